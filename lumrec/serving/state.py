"""The state of all users: their last events and counters, by raw key, kept up to date while events arrive.

    runs/shop-rank-user_state/state.json         what the state holds, and the folder of its version
    runs/shop-rank-user_state/state-3fa9…/       an LMDB
    redis://cache.internal:6379/0#shop           the same in a Redis: the key shop:state, and shop:state-3fa9…:*

One entry is one user: the bytes of a UserHistory (lumrec/features/history.py), with the ids of the events that it
keeps. `append` reads the entries of some users, adds their new events, and writes the entries, the items' counters and
a note for the LUM (lumrec/serving/follow.py) in one transaction. So a process that is killed at any point has appended
all of a user's events or none, and appending them again changes nothing.

An event is known by its id as long as it is among the `keep` events that its user's entry holds. One that is at or
before the newest event that was folded into the counters cannot be told from a repeated one, and is left out as late:
so the ids take a bounded space, and no event ever counts twice. Events without an id are known by their content, and so
are those that the state was built from: a stream that begins before the end of the log may be appended whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lumrec.features.history import EventRows, Known, Layout, UserHistory, content_ids
from lumrec.knowledge.live_users import STATE, STATE_KIND, new_version, remove_versions, tombstone
from lumrec.knowledge.records import raw_bytes, user_digest, user_key_bytes
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import read_json, sync_tree, write_atomically
from lumrec.run.key_value import Change, Changes, KeyValue, LmdbKeyValue, Moved, is_redis, without_password
from lumrec.run.redis_versions import RedisVersions
from lumrec.serving.requests import Event, RequestBuilder

FORMAT = 1
USERS_AT_ONCE = 256
AGAIN = "build it with: lumrec user_state --config <yours> run=<ranker's run> overwrite=true"
_MARK = struct.Struct("<d8s")  # when the user's newest events came, and what makes each mark another one


class Appended(NamedTuple):
    """What became of events. known: repeated ones. late: see the top of the file. forgotten: of forgotten users."""

    new: int = 0
    known: int = 0
    late: int = 0
    forgotten: int = 0

    def plus(self, other: Appended) -> Appended:
        """Both together."""
        return Appended(*(a + b for a, b in zip(self, other)))


class Marked(NamedTuple):
    """Users with events that the LUM has not answered yet. keys: raw. came_at: when the newest came, seconds since
    1970."""

    keys: list[str]
    came_at: list[float]
    marks: dict[bytes, bytes]


class UserState:
    """See the top of the file. layout: what each entry holds. identity: of the build, for a bundle to compare.

    builder: makes rows of events; only `append` needs it. Every method raises key_value.Unavailable where the store
    does not answer, UserError where an entry is damaged.
    """

    def __init__(self, store: KeyValue, identity: dict[str, Any], builder: RequestBuilder | None = None) -> None:
        self.store, self.identity, self.builder = store, identity, builder
        self._place: tuple[str | Path, float] = "", 0.0
        try:
            self.layout = Layout(**identity["layout"])
        except TypeError as error:
            raise UserError(f"the user state was made by another version of lumrec ({error}); {AGAIN}") from None

    @classmethod
    def open(cls, place: str | Path, builder: RequestBuilder | None = None, *, timeout_s: float = 1.0) -> UserState:
        """The state that was built at a place: a run folder, or redis://host:6379/0#name.

        Raises MissingFileError where there is none, UserError where it is of another format, Unavailable for a Redis
        that does not answer.
        """
        identity = read_identity(place)
        state = cls(_store(place, identity["version"], timeout_s=timeout_s), identity, builder)
        state._place = place, timeout_s
        return state

    def current(self) -> UserState:
        """This state, or the one that was built in its stead since it was opened."""
        place, timeout_s = self._place
        if read_identity(place)["version"] == self.identity["version"]:
            return self
        return UserState.open(place, self.builder, timeout_s=timeout_s)

    def get(self, user_keys: Sequence[str]) -> list[UserHistory | None]:
        """The state of each user, None for one of whom nothing is known."""
        values = self.store.get([user_key_bytes(key) for key in user_keys])
        return [None if value is None else UserHistory.from_bytes(value, self.layout) for value in values]

    def append(self, events: Sequence[Event]) -> Appended:
        """Adds the events that are not known, in any order; events of one time in the order given.

        Raises UserError as `RequestBuilder.encode`, before anything is written.
        """
        if self.builder is None:
            raise UserError("this user state was opened without the builder of a bundle; only its reader can be used")
        of_user: dict[str, list[int]] = {}
        for place, event in enumerate(events):
            of_user.setdefault(event.user, []).append(place)
        rows = self.builder.encode(events).take(np.array([place for of in of_user.values() for place in of], np.int64))
        content = content_ids(rows, has_clock=self.layout.has_clock)
        known = self.builder.known(self.layout)
        ends = np.cumsum([len(of) for of in of_user.values()]).tolist()
        spans = {user: slice(end - len(of), end) for (user, of), end in zip(of_user.items(), ends)}
        total, users = Appended(), list(of_user)
        for first in range(0, len(users), USERS_AT_ONCE):
            part = users[first : first + USERS_AT_ONCE]
            update = _Update(self.layout, known, rows, content, {user: spans[user] for user in part})
            self._update([*map(user_key_bytes, part), *(tombstone(user_digest(user)) for user in part)], update)
            total = total.plus(update.appended)
        return total

    def item_counts(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the events appended since the build, and the sum of their labels, of items (int64 [N]): float64."""
        number, total = self.store.counters(list(map(_item_key, items.tolist())))
        return number.astype(np.float64), total

    def forget(self, user_keys: Sequence[str]) -> None:
        """Removes users; their events are not taken in again."""
        put = {tombstone(user_digest(key)): b"" for key in user_keys}
        self._update([], lambda _: Changes(put=put, delete=[user_key_bytes(key) for key in user_keys]))

    def _update(self, keys: Sequence[bytes], change: Change) -> None:
        """Updates the store, also if it was rewritten to another folder meanwhile (lumrec/knowledge/live_users.py)."""
        try:
            self.store.update(keys, change)
        except Moved:
            if (moved := self.current()) is self:
                raise
            self.store, self.identity = moved.store, moved.identity
            self.store.update(keys, change)

    def unanswered(self, most: int) -> Marked:
        """At most `most` users who have had events since `answered` was last called for them."""
        marks = self.store.marked(most)
        keys = [mark[_MARK.size :].decode(errors="surrogatepass") for mark in marks.values()]
        return Marked(keys, [_MARK.unpack_from(mark)[0] for mark in marks.values()], marks)

    def answered(self, marked: Marked) -> None:
        """Marks these users as answered, except those who have had another event since `unanswered`."""
        self.store.unmark(marked.marks)

    def __len__(self) -> int:
        """Number of entries: users, and forgotten users."""
        return len(self.store)


class _Update:
    """A change for `KeyValue.update`: appends the events of some users; it may be called again with newer values.

    of_user: raw key → slice of the user's events in `rows`. appended: result of the last call.
    """

    def __init__(
        self, layout: Layout, known: Known, rows: EventRows, content: np.ndarray, of_user: Mapping[str, slice]
    ) -> None:
        self.layout, self.known, self.rows, self.content, self.of_user = layout, known, rows, content, of_user
        self.appended = Appended()

    def __call__(self, values: list[bytes | None]) -> Changes:
        entries, tombstones = values[: len(self.of_user)], values[len(self.of_user) :]
        put, mark = {}, {}
        taken, counted, came_at = [np.zeros(0, np.int64)], Appended(), time.time()
        for (user, span), value, gone in zip(self.of_user.items(), entries, tombstones):
            number = span.stop - span.start
            if gone is not None:
                counted = counted.plus(Appended(forgotten=number))
                continue
            history = UserHistory.empty(self.layout) if value is None else UserHistory.from_bytes(value, self.layout)
            new, late = self._sorted_out(history, span)
            counted = counted.plus(Appended(len(new), number - len(new) - late, late))
            if len(new):
                history.append(self.rows.take(span if len(new) == number else new), self.known)
                key = user_key_bytes(user)
                put[key], mark[key] = history.to_bytes(), _MARK.pack(came_at, os.urandom(8)) + raw_bytes(user)
                taken.append(new)
        self.appended = counted
        return Changes(put=put, add=self._item_counts(np.concatenate(taken)), mark=mark)

    def _sorted_out(self, history: UserHistory, span: slice) -> tuple[np.ndarray, int]:
        """Indices of a user's events that are new, int64, and the number of late ones."""
        ids, content, kept = self.rows.id[span], self.content[span], history.events.id
        # Compared one by one: np.isin takes ten times as long over so few.
        is_known = (ids != 0) & (ids[:, None] == kept).any(1) | (content != 0) & (content[:, None] == kept).any(1)
        is_late = ~is_known & (self.rows.time[span] <= history.folded_until)
        is_new = ~is_known & ~is_late
        if len(ids) > 1:
            first = np.zeros(len(ids), bool)
            first[np.unique(ids, return_index=True)[1]] = True
            is_new &= first | (ids == 0)
        return span.start + np.flatnonzero(is_new), int(is_late.sum())

    def _item_counts(self, index_N: np.ndarray) -> dict[bytes, tuple[int, float]]:
        item, place = np.unique(self.rows.item[index_N], return_inverse=True)
        number = np.bincount(place, minlength=len(item)).tolist()
        label = np.bincount(place, self.rows.label[index_N], minlength=len(item)).tolist()
        return {_item_key(i): (n, x) for i, n, x in zip(item.tolist(), number, label)}


def read_identity(place: str | Path) -> dict[str, Any]:
    """The identity of the state in force at a place; its "version" changes with each build.

    Raises as `UserState.open`.
    """
    if is_redis(place):
        found = RedisVersions(str(place), STATE_KIND).in_force()
        identity = None if found is None else json.loads(found[1])
    else:
        file = Path(place) / STATE
        identity = read_json(file, again=AGAIN) if file.exists() else None
    shown = without_password(str(place))
    if identity is None:
        raise MissingFileError(f"there is no user state in {shown}; {AGAIN}")
    if identity.get("format") != FORMAT or not {"layout", "version"} <= identity.keys():
        raise UserError(f"the user state in {shown} was made by another version of lumrec; {AGAIN}")
    return identity


def build(
    place: str | Path,
    identity: Mapping[str, Any],
    layout: Layout,
    entries: Iterable[tuple[str, UserHistory]],
    *,
    forgotten: Collection[str] = (),
) -> int:
    """Publishes a state of these users (raw key, history) at a place, replacing the one there; returns their number.

    identity: values that a bundle compares with its own. forgotten: SHA-256 of users whose events are never taken in.
    Until the state is published, readers open the previous one. A build that was killed leaves the previous one in
    force, and the next build removes what it left.
    """
    version, number = new_version(), 0
    described = {"format": FORMAT, "version": version, **identity, "layout": layout.to_json()}
    with _writing(place, version, lambda: json.dumps(described, indent=2) + "\n") as put:
        put([(tombstone(digest), b"") for digest in forgotten])
        rest = iter(entries)
        while block := [(user_key_bytes(key), history.to_bytes()) for key, history in islice(rest, USERS_AT_ONCE)]:
            put(block)
            number += len(block)
    return number


@contextlib.contextmanager
def _writing(
    place: str | Path, version: str, text: Callable[[], str]
) -> Iterator[Callable[[list[tuple[bytes, bytes]]], None]]:
    """Like `RedisVersions.writing`, also for a folder, which only one process may write at a time."""
    if is_redis(place):
        with RedisVersions(str(place), STATE_KIND).writing(version, text) as put:
            yield put
        return
    path = Path(place)
    in_force = read_json(path / STATE).get("version") if (path / STATE).exists() else None
    remove_versions(path, but=in_force)
    yield LmdbKeyValue(path / version).put
    sync_tree(path / version)
    write_atomically(path / STATE, text())
    remove_versions(path, but=version)


def _store(place: str | Path, version: str, *, timeout_s: float) -> KeyValue:
    if is_redis(place):
        return RedisVersions(str(place), STATE_KIND).store(version, timeout_s=timeout_s)
    return LmdbKeyValue(Path(place) / version, create=False)


def _item_key(item: int) -> bytes:
    return item.to_bytes(8, "big")
