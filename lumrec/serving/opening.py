"""Opens what a server reads, and starts it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from lumrec.data.common import Common
from lumrec.data.prepare import open_or_prepare
from lumrec.knowledge.answers import KIND as KNOWLEDGE
from lumrec.knowledge.live_users import STATE, STATE_KIND
from lumrec.knowledge.manifest import MANIFEST
from lumrec.knowledge.store import KnowledgeStore
from lumrec.models.lum import condition_features, load_lum
from lumrec.models.lum_folds import find_lums
from lumrec.query.conditions import default_conditions
from lumrec.query.group_query import GroupQuery
from lumrec.run.distributed import init_distributed
from lumrec.run.errors import UserError
from lumrec.run.key_value import is_redis
from lumrec.run.redis_versions import RedisVersions
from lumrec.serving.api import MOST_CONDITIONS
from lumrec.serving.live import Live, stamp_of
from lumrec.serving.live_lum import LiveLum
from lumrec.serving.metrics import Metrics
from lumrec.serving.processes import run
from lumrec.serving.retrieval import Asker
from lumrec.serving.scorer import Scorer
from lumrec.serving.served_log import ServedLog
from lumrec.serving.server import make_app
from lumrec.serving.settings import Places, ServeConfig
from lumrec.serving.state import UserState

STATE_TIMEOUT_S = 0.25  # of a command; a Redis that does not answer is not asked again for a second


def serve(places: Places, settings: ServeConfig, *, threads: int) -> None:
    """Serves until SIGTERM or Ctrl-C. threads: of torch in each process; 0 = the cores, shared among the workers.

    Raises UserError where the address cannot be listened on, and as `open_live`, before any request is taken.
    """
    make = partial(open_app, places, settings, settings.token())
    if settings.workers == 1:
        app = make()
        run(lambda: app, settings, threads=threads)
    else:
        open_live(places, Metrics())  # what is wrong is reported once, by this process
        run(make, settings, threads=threads)


def open_app(places: Places, settings: ServeConfig, token: str) -> FastAPI:
    """The application over what lies in these places. Raises as `open_live`."""
    metrics = Metrics()
    live, log = open_live(places, metrics), None
    if places.log is not None:
        log = ServedLog(places.log, metrics, max_rows=settings.log_rows, max_age_s=settings.log_every_s)
    asker = None if places.lums is None else open_asker(places.lums, live.scorer.state)
    return make_app(live, settings, token=token, metrics=metrics, log=log, asker=asker)


def open_asker(common: Common, state: UserState | None) -> Asker:
    """The LUMs of the inputs, to be asked about the users of a state. Raises as `load_lum`, and UserError where they do
    not belong together.
    """
    if state is None:
        raise UserError("serve.lums needs the state of users: build it with lumrec user_state, and give serve.state")
    device = init_distributed("cpu")
    data = open_or_prepare(common, make=False)
    if state.identity.get("data_fingerprint") != data.fingerprint:
        raise UserError(f"the user state was built from other data than {data.path}: name its data by inputs.prepared")
    live = []
    for lum in find_lums(common, data):
        model = lum.trained.model
        dmp, builder, _ = load_lum(lum.trained.folder, data, device=device)
        conditions = default_conditions(data, condition_features(model, data.schema))
        query = GroupQuery(dmp, builder, conditions, max_events=model.max_events, max_conditions=MOST_CONDITIONS)
        live.append(LiveLum(query, state.layout))
    return Asker(live)


def open_live(places: Places, metrics: Metrics) -> Live:
    """The newest bundle, with the state and, if it reads knowledge, the store.

    Raises as `Scorer.open`; a store that cannot be read is absent knowledge.
    """
    openers: dict[str, Any] = {"bundle": lambda: Scorer.open(places.bundle, trust_compiled=places.trust_compiled)}
    versions = {"bundle": lambda: stamp_of(places.bundle / MANIFEST)}
    if places.store:
        openers["store"] = lambda _: KnowledgeStore.open(places.store)
        versions["store"] = partial(_version, places.store, KNOWLEDGE, MANIFEST)
    if places.state:
        openers["state"] = lambda scorer: UserState.open(places.state, scorer.bundle.builder, timeout_s=STATE_TIMEOUT_S)
        versions["state"] = partial(_version, places.state, STATE_KIND, STATE)
    return Live(openers, versions, metrics=metrics)


def _version(place: str, kind: str, file: str) -> Any:
    """Changes with each version that is published at a place. Without one: None for a folder, and for a Redis "", as it
    holds nothing else either. Raises Unavailable where the Redis does not answer.
    """
    if not is_redis(place):
        return stamp_of(Path(place) / file)
    found = RedisVersions(place, kind).in_force()
    return found[0] if found else ""
