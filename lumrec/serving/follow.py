"""Keeps the knowledge of a store fresh: users with new events are answered again, beside the requests.

    events ──▶ user state ──▶ note of the user ──▶ follower: LUM ──▶ fresh answers over the published ones ──▶ readers

A user's answer is that of `lumrec query` for a log with these events: the LUM of the user's fold, the history to the
last event, stored in the same format. What was published is not touched, and rows that rankers train on are not either.
A store that gets its next version (the nightly `lumrec query`) starts without fresh answers; the follower then goes
through the state once, when it has nothing else to do, and answers those users whose events are newer than that
version's. Users who were forgotten are not answered.

Shape suffixes: B users, N conditions, D width.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lumrec.data.splits import user_fold
from lumrec.features.history import SECOND, UserHistory
from lumrec.knowledge.answers import version_in_force
from lumrec.knowledge.log_normalizer import log_normalizer
from lumrec.knowledge.records import (
    bytes_to_records,
    decode,
    encode,
    identity_user_dtype,
    make_records,
    records_to_bytes,
    user_key_bytes,
)
from lumrec.knowledge.store import KnowledgeStore
from lumrec.run.errors import UserError
from lumrec.run.key_value import Unavailable, without_password
from lumrec.serving.live_lum import LiveLum
from lumrec.serving.state import UserState

logger = logging.getLogger(__name__)
WAIT_S = 5.0  # after a store did not answer
LOG_EVERY_S = 30.0


class Answered(NamedTuple):
    """Result of a step. users: number of users answered. seconds: for each user with a new event, the time from its
    arrival until readers find the new answer; nothing for users who were behind the published version.
    """

    users: int
    seconds: list[float]


class Follower:
    """Asks the LUM again about users with new events.

    state: where events are appended. place: the knowledge store, a run folder or a Redis. lums: one, or one for each
    fold, as in the store. lum_identity: their entry "lums" in the store's manifest. users_at_once: users who are
    answered in one pass; with a smaller number the first of them are answered sooner.

    Raises as `KnowledgeStore.open`, UserError for a store of other LUMs.
    """

    def __init__(
        self,
        state: UserState,
        place: str | Path,
        lums: Sequence[LiveLum],
        lum_identity: Sequence[Mapping[str, Any]],
        *,
        users_at_once: int = 32,
    ) -> None:
        self.place, self.lums, self.lum_identity = place, lums, list(lum_identity)
        self.users_at_once = users_at_once
        self._take(state)
        self._open()

    def _take(self, state: UserState) -> None:
        if any(lum.layout != state.layout for lum in self.lums):
            raise UserError("the user state was built again with other settings: start the follower again")
        self.state = state
        self._behind = self._users_behind()

    def _open(self) -> None:
        self.store = KnowledgeStore.open(self.place, timeout_s=WAIT_S)
        assert self.store.answers is not None
        self._answers, manifest = self.store.answers, self.store.manifest
        if manifest["lums"] != self.lum_identity:
            raise UserError(
                f"the knowledge in {without_password(str(self.place))} was made by the LUMs "
                f"{[lum.get('run') for lum in manifest['lums']]}, and these are others, or their weights have changed: "
                "name the LUMs that made it (inputs.lums), or run the query stage again"
            )
        conditions = self.lums[0].query.conditions
        if manifest["conditions"] != conditions:
            raise UserError(f"the knowledge answers {manifest['conditions']}, and {conditions} would be asked")
        self._e_KID = self.store.items()[1]
        self._record = identity_user_dtype(manifest)
        self._behind = self._users_behind()

    def step(self) -> Answered:
        """Answers a few users: those with new events or, if there are none, some who are behind the published version.

        Raises Unavailable if a store does not answer; nothing is lost then.
        """
        if (state := self.state.current()) is not self.state:
            logger.info("the user state was built again")
            self._take(state)
        if version_in_force(self.place) != self.store.manifest["folder"]:
            logger.info("a new version of the knowledge was published")
            self._open()
        marked = self.state.unanswered(self.users_at_once)
        if not marked.keys:
            behind = next(self._behind, [])
            return Answered(self._answer(behind), [])
        users = self._answer(marked.keys)
        self.state.answered(marked)
        now = time.time()
        return Answered(users, [now - at for at in marked.came_at])

    def drain(self) -> Answered:
        """Steps until every user is answered."""
        users = 0
        seconds: list[float] = []
        while True:
            step = self.step()
            users, seconds = users + step.users, seconds + step.seconds
            if not step.users and not step.seconds and self._behind_is_done:
                return Answered(users, seconds)

    def run(self, stop: threading.Event, *, idle_s: float = 0.2) -> Answered:
        """Follows until `stop` is set. A store that does not answer is logged, and tried again."""
        users, logged = 0, time.monotonic()
        seconds: list[float] = []
        while not stop.is_set():
            try:
                step = self.step()
            except (Unavailable, FileNotFoundError) as error:
                logger.warning("trying again in %g s: %s", WAIT_S, error)
                stop.wait(WAIT_S)
                continue
            users, seconds = users + step.users, [*seconds, *step.seconds][-10_000:]
            if time.monotonic() - logged > LOG_EVERY_S and seconds:
                logged = time.monotonic()
                logger.info("%d users answered; seconds from event to answer: %s", users, spread(seconds))
            if not step.users:
                stop.wait(idle_s)
        return Answered(users, seconds)

    def _answer(self, user_keys: Sequence[str]) -> int:
        """Answers users after their last events; returns the number of those who have events."""
        states = zip(user_keys, self.state.get(user_keys), strict=True)
        known = {key: history for key, history in states if history is not None and len(history.events)}
        keys = list(known)
        fold_B = user_fold(keys, len(self.lums))
        pairs: list[tuple[bytes, bytes]] = []
        for fold in np.unique(fold_B).tolist():
            mine = [key for key, of in zip(keys, fold_B.tolist()) if of == fold]
            pairs += zip(map(user_key_bytes, mine), self._records(fold, mine, [known[key] for key in mine]))
        self._answers.put_fresh(pairs)
        # A user may have been forgotten since the state was read; `forget` removes what was written before that.
        gone = [key for key, history in zip(keys, self.state.get(keys), strict=True) if history is None]
        self._answers.remove_fresh([user_key_bytes(key) for key in gone])
        return len(keys)

    def _records(self, fold: int, user_keys: Sequence[str], histories: Sequence[UserHistory]) -> list[bytes]:
        """Records of users, answered by the LUM of their fold."""
        manifest = self.store.manifest
        o_BND, num_seen_B = self.lums[fold].answer(user_keys, histories)
        log_z_BN = None
        if manifest["log_normalizer"]:
            # Computed from the answers as they are stored, so that log_z is the sum over exactly what readers see.
            stored = torch.from_numpy(decode(*encode(o_BND, manifest["dtype"])))
            log_z_BN = log_normalizer(stored.flatten(0, 1), self._e_KID[fold]).view(o_BND.shape[:2])
        record_B = make_records(
            self._record,
            manifest["dtype"],
            o_BND,
            log_z_BN,
            asked_at=int(time.time()),
            last_event_at=[_last_second(history) for history in histories],
            num_events=[int(history.count) + len(history.events) for history in histories],
            num_seen=num_seen_B,
            fold=fold,
        )
        return records_to_bytes(record_B)

    def _users_behind(self) -> Iterator[list[str]]:
        """Raw keys of users with events newer than the store's answers, in blocks.

        Users whose keys are too long for LMDB are left out: they are answered with their next events.
        """
        self._behind_is_done = False
        for block in self.state.store.scan():
            entries = {key: value for key, value in block if key[:1] == b"u"}
            records = dict(zip(entries, self._answers.get(list(entries)), strict=True))
            behind = []
            for key, value in entries.items():
                history = UserHistory.from_bytes(value, self.state.layout)
                if len(history.events) and self._is_behind(history, records[key]):
                    behind.append(key[1:].decode(errors="surrogatepass"))
            for first in range(0, len(behind), self.users_at_once):
                yield behind[first : first + self.users_at_once]
        self._behind_is_done = True

    def _is_behind(self, history: UserHistory, record: bytes | None) -> bool:
        if record is None:
            return True
        [of] = bytes_to_records([record], self._record)
        last, number = _last_second(history), int(history.count) + len(history.events)
        return (last, number) > (int(of["last_event_at"]), int(of["num_events"]))


def _last_second(history: UserHistory) -> int:
    last = int(history.events.time[-1])
    return last // SECOND if history.layout.has_clock else last


def spread(seconds: Sequence[float]) -> str:
    """Median, 95th percentile and maximum, as text."""
    p50, p95, most = np.percentile(seconds, [50, 95, 100])
    return f"p50 {p50:.3f}, p95 {p95:.3f}, at most {most:.3f}"
