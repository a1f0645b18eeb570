"""The state of all users after a log, for a server: what a ranker reads of a user, kept up to date from then on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from lumrec.data.common import Common
from lumrec.data.forgotten import read_forgotten
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import features_by_role
from lumrec.features.history import Known, UserHistory, histories_of
from lumrec.features.items import Catalogue, ItemHistory
from lumrec.features.statistics import StatisticsModel, base_rate
from lumrec.knowledge.live_users import STATE, STATE_KIND
from lumrec.knowledge.manifest import read_manifest
from lumrec.knowledge.records import user_digest
from lumrec.models.lum import open_lum_run
from lumrec.models.ranker import TrainedRanker, open_ranker_run
from lumrec.run.distributed import init_distributed, world_size
from lumrec.run.errors import UserError
from lumrec.run.files import full_disk_told, read_json
from lumrec.run.folder import RunFolder
from lumrec.run.key_value import is_redis, redis_place, without_password
from lumrec.run.limits import count
from lumrec.serving.requests import RequestSpec
from lumrec.serving.state import build, read_identity

logger = logging.getLogger(__name__)
SERVED = (STATE, f"{STATE_KIND}-*")  # what readers open until the next version is published, after overwrite=true too


@dataclass(frozen=True)
class UserStateConfig:
    """The state of users that a ranker needs. The ranker is the run `run` ("" = "<name>-rank"), and the state is beside
    it, in "<run>-user_state".

    keep: events of a user that are kept one by one; older ones are kept as sums. 0 = as many as the ranker reads, and
        as the LUM does where the ranker has knowledge.
    place: a Redis, redis://host:6379/0#name; "" = the run's folder (LMDB).
    """

    keep: int = count(0, most=2**20)
    place: str = ""

    def check(self, at: str) -> None:
        """Raises UserError for a place that is no URL of a Redis (`at`: the section, with a dot)."""
        if self.place and not is_redis(self.place):
            raise UserError(
                f"{at}place: got {self.place!r}, expected a Redis, redis://host:6379/0#name, or nothing for the run's "
                "folder"
            )
        if self.place:
            redis_place(self.place, timeout_s=1.0)


def check_inputs(common: Common, *, user_state: UserStateConfig) -> None:
    """Raises MissingFileError where there is no finished ranker; reads no data."""
    open_ranker_run(common.folder("rank"))


def run(common: Common, settings: UserStateConfig) -> dict[str, float | str]:
    """Publishes the state of the users of the ranker `run` after all events of its log; returns what its result.json
    holds.

    Keys: users, keep, events_kept, last_event_at (seconds: events from there on are to be appended; those that the log
    has too do not count twice), users_per_s, wall_s, and as text place, version. A state that is finished is kept, as
    it may hold events since then; overwrite=true builds it again from the log. Raises MissingFileError for a missing
    input, UserError for a ranker that reads more events than are to be kept.
    """
    started = time.perf_counter()
    init_distributed("cpu", threads=common.threads)
    if world_size() > 1:
        raise UserError("the user_state stage runs in one process: use -j 1x1")
    trained = open_ranker_run(common.folder("rank"))
    path = trained.folder.with_name(f"{trained.folder.name}-user_state")
    place = settings.place or path
    inputs = {"ranker": str(read_json(trained.folder / "versions.json").get("id", ""))}
    run_folder = RunFolder.create(path, "user_state", common.settings(user_state=settings), inputs=inputs, keep=SERVED)
    if run_folder.finished:
        read_identity(place)
        return run_folder.result()
    data = PreparedData.open(trained.common.prepared).without(trained.config.leave_out)
    spec = _spec(trained, data)
    layout = spec.layout(keep=settings.keep or max(spec.least_kept, _read_by_lum(trained)))
    catalogue = Catalogue.of(data)
    items = ItemHistory.of(data) if spec.statistics.kind == "all" else None
    rate = items and (lambda item_N, second_N: items.rates(item_N, second_N, spec.statistics.base_rate)[0])
    forgotten = read_forgotten(trained.common.runs)
    kept = 0

    def entries() -> Iterator[tuple[str, UserHistory]]:
        nonlocal kept
        for key, history in zip(data.user_keys(), histories_of(data, layout, Known.of(catalogue, layout, rate))):
            if user_digest(key) not in forgotten:
                kept += len(history.events)
                yield key, history

    identity = {
        "data_fingerprint": data.fingerprint,
        "vocabulary_fingerprint": data.vocabulary_fingerprint,
        "ranker": trained.folder.name,
    }
    with full_disk_told(path, "the user state", then="make room and run the same command again"):
        users = build(place, identity, layout, entries(), forgotten=forgotten)
    wall_s = time.perf_counter() - started
    result: dict[str, float | str] = {
        "place": without_password(str(place)),
        "version": read_identity(place)["version"],
        "users": users,
        "keep": layout.keep,
        "events_kept": kept,
        "last_event_at": int(data.timestamp.max(initial=0)),
        "users_per_s": users / wall_s,
        "wall_s": wall_s,
    }
    run_folder.finish(result)
    return result


def _spec(trained: TrainedRanker, data: PreparedData) -> RequestSpec:
    """What the ranker reads of users, without the scales of its numbers."""
    kind, items = trained.config.statistics, features_by_role(data.schema, "item")
    return RequestSpec.of(
        data,
        StatisticsModel(kind, base_rate(data), items, {}, {}),
        features=[],
        row_features=[],
        max_history=trained.config.max_history,
        category=trained.config.category,
    )


def _read_by_lum(trained: TrainedRanker) -> int:
    """Events that the LUMs behind the ranker's knowledge see before a query, at most."""
    if trained.config.knowledge == "none":
        return 0
    lums = read_manifest(trained.common.knowledge)["lums"]
    return max(open_lum_run(trained.common.runs / lum["run"]).model.max_events for lum in lums) - 1
