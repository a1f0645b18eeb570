"""Serves a bundle over HTTP: scores, rankings, health and counters (lumrec/serving/server.py)."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from lumrec.data.common import Common
from lumrec.models.ranker import open_ranker_run
from lumrec.run.errors import UserError
from lumrec.run.key_value import is_redis
from lumrec.serving.settings import Places, ServeConfig

logger = logging.getLogger(__name__)
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def check_inputs(common: Common, *, serve: ServeConfig) -> None:
    """Raises UserError for an installation without a server, and for a token that is missing or too short."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"lumrec serve needs packages that are not installed ({', '.join(missing)}): "
            "pip install 'lumrec[serve]' (Python 3.11 or later)"
        )
    serve.token()


def run(common: Common, settings: ServeConfig) -> dict[str, Any]:
    """Serves until SIGTERM or Ctrl-C. What cannot be opened is reported before any request is taken.

    Raises MissingFileError for a bundle or state that is not there, UserError for one that is damaged.
    """
    check_inputs(common, serve=settings)
    from lumrec.serving.opening import serve  # with FastAPI, which not every installation has

    serve(places_of(common, settings), settings, threads=common.threads)
    return {}


def places_of(common: Common, settings: ServeConfig) -> Places:
    """Where the bundle, the store and the state are; those of the ranker's run where the settings name none."""
    run = common.run_name("rank")
    state = settings.state or f"{run}-user_state"
    if not settings.state and not (common.runs / state).exists():
        logger.warning("serve.state is not given, and there is no %s: every user is unknown", common.runs / state)
        state = ""
    store = settings.store or common.inputs.knowledge
    if not store:  # where the ranker had it from, if its run is here
        ranker = common.folder("rank")
        is_here = (ranker / "result.json").exists()
        store = str(open_ranker_run(ranker).common.knowledge if is_here else common.knowledge)
    bundle = common.find_run(settings.bundle or f"{run}-bundle")
    if not (settings.bundle or bundle.exists()):
        bundle = common.runs / f"{run}-bundle"  # which is what the message names
    store, state = (each if is_redis(each) or not each else str(common.find_run(each)) for each in (store, state))
    log = common.runs / settings.log if settings.log else None
    lums = replace(common, inputs=replace(common.inputs, lums=settings.lums)) if settings.lums else None
    return Places(bundle, store, state, log, lums, settings.trust_compiled)
