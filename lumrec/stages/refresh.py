"""Keeps a knowledge store fresh: the LUM answers again for users with new events in a user state."""

from __future__ import annotations

import logging
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lumrec.data.common import Common
from lumrec.data.prepare import open_or_prepare
from lumrec.knowledge.store import KnowledgeStore
from lumrec.models.lum import load_lum
from lumrec.models.lum_folds import AskedLum, find_lums, open_lums
from lumrec.query.group_query import GroupQuery
from lumrec.run.distributed import init_distributed, world_size
from lumrec.run.errors import UserError
from lumrec.run.key_value import is_redis
from lumrec.run.limits import count, setting
from lumrec.serving.follow import Answered, Follower
from lumrec.serving.live_lum import LiveLum
from lumrec.serving.state import UserState, read_identity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RefreshConfig:
    """Fresh knowledge: who is answered again, and where the answers go.

    follow: go on as new events come, until the process is stopped; else end when nobody is left to be answered.
    state: the user state, as the name of a run or a Redis (redis://host:6379/0#name); "" = "<name>-rank-user_state".
    store: the knowledge store in a Redis; "" = the run inputs.knowledge.
    users_at_once: users of one pass of the LUM; fewer are answered sooner, more take less time each.
    cache_mib: memory for the keys and values of histories that were read, for each LUM.
    idle_s: seconds between two looks for new events.
    """

    follow: bool = False
    state: str = ""
    store: str = ""
    users_at_once: int = count(32, least=1, most=2**16)
    cache_mib: int = count(256, most=2**20)
    idle_s: float = setting(0.2, least=0.001, most=3600)

    def check(self, at: str) -> None:
        """Raises UserError for a store that is no URL of a Redis (`at`: the section, with a dot)."""
        if self.store and not is_redis(self.store):
            raise UserError(
                f"{at}store: got {self.store!r}, expected a Redis, redis://host:6379/0#name; a run is named in "
                "inputs.knowledge"
            )


def places(common: Common, settings: RefreshConfig) -> tuple[str | Path, str | Path]:
    """Where the user state and the knowledge store are."""
    name = settings.state or f"{common.name}-rank-user_state"
    return (name if is_redis(name) else common.find_run(name)), settings.store or common.knowledge


def check_inputs(common: Common, *, refresh: RefreshConfig) -> None:
    """Raises MissingFileError where there is no LUM, knowledge or user state; reads no data."""
    open_lums(common)
    state, store = places(common, refresh)
    read_identity(state)
    KnowledgeStore.open(store, verify=False)


def run(common: Common, settings: RefreshConfig) -> dict[str, float | str]:
    """Answers users with new events, and returns users, p50_s, p95_s, most_s (seconds from an event's arrival to its
    answer) and wall_s.

    Ctrl-C and SIGTERM end it after the users at hand; the others are answered by the next call. Raises MissingFileError
    for a missing input, UserError for a state, a store and LUMs that do not belong together.
    """
    started = time.perf_counter()
    device = init_distributed(threads=common.threads)
    if world_size() > 1:
        raise UserError("the refresh stage runs in one process: use -j 1x1")
    check_inputs(common, refresh=settings)
    state_place, store_place = places(common, settings)
    state, manifest = UserState.open(state_place), KnowledgeStore.open(store_place).manifest
    if "imported" in manifest:
        raise UserError(f"the knowledge in {store_place} was imported: it does not say how its LUM was asked")
    data = open_or_prepare(common, make=False)
    if state.identity.get("data_fingerprint") != data.fingerprint:
        raise UserError(
            f"the user state in {state_place} was built from other data than {data.path}: name the data it was built "
            "from (inputs.prepared), or build it again (lumrec user_state overwrite=true)"
        )
    lums = find_lums(common, data)
    asked = {"conditions": manifest["conditions"], "max_conditions": len(manifest["conditions"]), **manifest["window"]}
    live = []
    for lum in lums:
        dmp, builder, _ = load_lum(lum.trained.folder, data, device=device)
        live.append(LiveLum(GroupQuery(dmp, builder, **asked), state.layout, cache_bytes=settings.cache_mib << 20))
    follower = Follower(state, store_place, live, [_named(lum) for lum in lums], users_at_once=settings.users_at_once)
    done = _follow(follower, settings.idle_s) if settings.follow else follower.drain()
    p50, p95, most = np.percentile(done.seconds, [50, 95, 100]) if done.seconds else [float("nan")] * 3
    wall_s = time.perf_counter() - started
    return {"users": done.users, "p50_s": p50, "p95_s": p95, "most_s": most, "wall_s": wall_s}


def _named(lum: AskedLum) -> dict[str, str]:
    """A LUM as the manifests of knowledge name it."""
    return {"run": lum.run, "fold": lum.fold, "fingerprint": lum.fingerprint}


def _follow(follower: Follower, idle_s: float) -> Answered:
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    logger.info("following; Ctrl-C or SIGTERM ends it")
    try:
        return follower.run(stop, idle_s=idle_s)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
