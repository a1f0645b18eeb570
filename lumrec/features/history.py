"""The state of one user: the last events, and sums over all older ones.

::

    events     e1 … e900            e901 … e1000
               folded: sums only    kept (`keep` of them), with item, time, label and features

`append` sorts events in by time and folds the oldest ones. What a ranker reads of a request's past is computed from
this state (lumrec/features/request_past.py) and equals what it reads for a row of the log, with two exceptions: for a
request before the first kept event, the sums still include later folded events; and an event whose moment began before
the first kept event has TWIN counts over all folded events.

Times are in microseconds since 1970, UTC; in a log without times, an event's time is its number.

Shape suffixes: E events, K values that were counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import EVENT_ROLES, SchemaConfig, features_by_role
from lumrec.data.splits import mix
from lumrec.features.items import Catalogue, at, categories, entries
from lumrec.run.errors import UserError

SECOND = 1_000_000  # microseconds
NEVER = int(np.iinfo(np.int64).min)
MAGIC = b"LUMH0001"
CATEGORY = ""  # counted like an item feature: the first value of Layout.category


@dataclass(frozen=True)
class Layout:
    """The contents of every user's state.

    keep: the most events that are kept. events, users: features of events and of users that read tables; True for a
    feature whose values are lists. user_dense: dense features of users. items: item features whose values are counted.
    category: the item feature whose first value TWIN counts; "" = none. has_clock: False for a log without times.
    """

    keep: int
    events: dict[str, bool]
    users: dict[str, bool]
    user_dense: list[str]
    items: list[str]
    category: str
    has_clock: bool

    @classmethod
    def of(cls, schema: SchemaConfig, *, keep: int, has_clock: bool, category: str = "") -> Layout:
        """The layout for a schema's features. category: "" = the first multi-valued item feature, if there is one."""
        if keep < 1:
            raise UserError(f"{keep} events of a user are to be kept; expected at least 1")
        is_list = {name: feature.kind == "multi" for name, feature in schema.features.items()}
        events = [name for role in EVENT_ROLES for name in features_by_role(schema, role)]
        users, items = features_by_role(schema, "user"), features_by_role(schema, "item")
        return cls(
            keep=keep,
            events={name: is_list[name] for name in events},
            users={name: is_list[name] for name in users},
            user_dense=features_by_role(schema, "user", dense=True),
            items=items,
            category=category or next((name for name in items if is_list[name]), ""),
            has_clock=has_clock,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for Layout(**values)."""
        return asdict(self)

    @cached_property
    def digest(self) -> bytes:
        """8 bytes that differ for another layout."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).digest()[:8]

    @cached_property
    def dtypes(self) -> list[np.dtype]:
        """The dtype of each array of a state, in the order in which they are written."""
        columns = [("<i4", "<i8")[: 1 + is_list] for is_list in (*self.events.values(), *self.users.values())]
        of_columns = [dtype for column in columns for dtype in column]
        of_counts = ["<i8", "<f8", "<f8", "<f8"] * len(_no_counts(self))
        return [np.dtype(x) for x in ("<f8", "<i8", "<f8", *_STORED, "<i4", *of_columns, *of_counts)]


class Known(NamedTuple):
    """What a state needs to know of the items in order to count events.

    columns: of a Catalogue. category_I: category of each item, int64 [I + 1]; None if no category is counted. rate:
    gives the smoothed like-rates (float64 [N]) of items at given seconds (int64 [N]); None if no statistic reads them.
    """

    columns: Mapping[str, Column]
    category_I: np.ndarray | None
    rate: Callable[[np.ndarray, np.ndarray], np.ndarray] | None

    @classmethod
    def of(
        cls, catalogue: Catalogue, layout: Layout, rate: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
    ) -> Known:
        """The part of a catalogue that a layout needs; rate: see above."""
        category_I = categories(catalogue.columns, layout.category) if layout.category else None
        return cls({name: catalogue.columns[name] for name in layout.items}, category_I, rate)


@dataclass
class EventRows:
    """Events of one or several users, as columns.

    item: int64, index in the catalogue. time: int64. moment: int64, time at which the event was shown (see
    lumrec/data/moments.py). label, excess (over the item's like-rate at that moment): float64. id: uint64, 0 = none.
    request: uint64, equal for events that were shown together, 0 = by itself. features: by name.
    """

    item: np.ndarray
    time: np.ndarray
    moment: np.ndarray
    label: np.ndarray
    excess: np.ndarray
    id: np.ndarray
    request: np.ndarray
    features: dict[str, Column]

    def __len__(self) -> int:
        return len(self.item)

    @classmethod
    def none(cls, is_list: Mapping[str, bool]) -> EventRows:
        """No events. is_list: whether the values of each feature are lists."""
        nothing = torch.zeros(0, dtype=torch.int64)
        columns = {
            name: Column(nothing, torch.zeros(1, dtype=torch.int64) if of else None) for name, of in is_list.items()
        }
        return cls(**{name: np.zeros(0, dtype) for name, dtype in _ARRAYS.items()}, features=columns)

    def take(self, index: np.ndarray | slice) -> EventRows:
        """The events at these indices, in that order."""
        arrays = {name: getattr(self, name)[index] for name in _ARRAYS}
        return EventRows(**arrays, features={name: _taken(column, index) for name, column in self.features.items()})

    def followed_by(self, other: EventRows) -> EventRows:
        """These events, then the others."""
        arrays = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _ARRAYS}
        return EventRows(
            **arrays, features={name: _joined(c, other.features[name]) for name, c in self.features.items()}
        )


_ARRAYS = {
    "item": np.int64,
    "time": np.int64,
    "moment": np.int64,
    "label": np.float64,
    "excess": np.float64,
    "id": np.uint64,
    "request": np.uint64,
}
_STORED = ("<i4", "<i8", "<i8", "<u1", "<f8", "<u8", "<u8")  # of _ARRAYS, in bytes


def _taken(column: Column, index: np.ndarray | slice) -> Column:
    if column.offsets is None:
        return Column(torch.from_numpy(column.values.numpy()[index]))
    if isinstance(index, slice):
        offsets = column.offsets[index.start : index.stop + 1]
        return Column(column.values[offsets[0] : offsets[-1]], offsets - offsets[0])
    values, lengths = column.take(torch.from_numpy(index))
    return Column(values, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))


def _joined(first: Column, second: Column) -> Column:
    values = torch.cat([first.values, second.values])
    if first.offsets is None or second.offsets is None:
        return Column(values)
    return Column(values, torch.cat([first.offsets, second.offsets[1:] + first.offsets[-1]]))


class Counts(NamedTuple):
    """Counts of folded events by value of an item feature.

    value_K: int64, sorted. count_K, label_K, excess_K: number of events, sum of their labels and of their excesses,
    float64.
    """

    value_K: np.ndarray
    count_K: np.ndarray
    label_K: np.ndarray
    excess_K: np.ndarray

    def plus(self, value_N: np.ndarray, label_N: np.ndarray, excess_N: np.ndarray) -> Counts:
        """These counts with further values added."""
        value_K, place = np.unique(np.concatenate([self.value_K, value_N]), return_inverse=True)
        added = (np.ones(len(value_N)), label_N, excess_N)
        sums = (np.bincount(place, np.concatenate(both), len(value_K)) for both in zip(self[1:], added, strict=True))
        return Counts(value_K, *sums)

    def of(self, value_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count and sums of each of these values, float64 [N]; 0 where it was not counted."""
        place = np.searchsorted(self.value_K, value_N)
        is_there = np.append(self.value_K, -1)[place] == value_N
        return tuple(np.where(is_there, np.append(x, 0.0)[place], 0.0) for x in self[1:])  # type: ignore[return-value]


NO_COUNTS = Counts(np.zeros(0, np.int64), np.zeros(0), np.zeros(0), np.zeros(0))


@dataclass
class UserHistory:
    """The state of one user.

    events: the last ones, sorted by time. earlier: int64 [E], how many events of its category the user had before each
    event's moment. count, label, excess: number and sums of the folded events; folded_until: time of the newest one.
    counts: of the folded events, by item feature. users, dense: features of the user.
    """

    layout: Layout
    events: EventRows
    earlier: np.ndarray
    users: dict[str, Column]
    dense: dict[str, float]
    counts: dict[str, Counts]
    count: float = 0.0
    label: float = 0.0
    excess: float = 0.0
    folded_until: int = NEVER

    @classmethod
    def empty(cls, layout: Layout) -> UserHistory:
        """A user of whom nothing is known."""
        return cls(
            layout=layout,
            events=EventRows.none(layout.events),
            earlier=np.zeros(0, np.int64),
            users={name: _unknown(is_list) for name, is_list in layout.users.items()},
            dense=dict.fromkeys(layout.user_dense, 0.0),
            counts=_no_counts(layout),
        )

    def as_of(self, time: int) -> int:
        """Number of kept events strictly before `time`; in a log without times, `time` is the number of an event."""
        return int(np.searchsorted(self.events.time, time))

    def append(self, rows: EventRows, known: Known) -> None:
        """Adds events of this user, in any order; in a log without times, in the order of arrival.

        Equal times keep the order of arrival. The caller has removed events that the state already has, by their ids.
        """
        if not len(rows):
            return
        if not self.layout.has_clock:
            number = int(self.count) + len(self.events) + np.arange(len(rows))
            rows = replace(rows, time=number, moment=number, request=np.zeros(len(rows), np.uint64))
        events = self.events.followed_by(rows)
        is_new = np.arange(len(events)) >= len(self.events)
        if (events.time[1:] < events.time[:-1]).any():
            order = np.argsort(events.time, kind="stable")
            events, is_new = events.take(order), is_new[order]
        moment = _moments(events)
        is_new |= moment != events.moment
        events.moment = moment
        first = int(np.argmax(is_new))
        changed = np.flatnonzero(is_new)
        if known.rate is not None:
            rate = known.rate(events.item[changed], _seconds(moment[changed], has_clock=self.layout.has_clock))
            events.excess[changed] = events.label[changed] - rate
        if known.category_I is not None:
            category_E = known.category_I[events.item]
            before_E = np.searchsorted(events.time, moment)
            earlier = earlier_of_category(np.zeros(len(events), np.int64), category_E, before_E)
            earlier = earlier + self.counts[CATEGORY].of(category_E)[0].astype(np.int64)
            earlier[:first] = self.earlier[:first]  # these also counted events that have been folded since
            self.earlier = earlier
        else:
            self.earlier = np.zeros(len(events), np.int64)
        self.events = events
        self.fold(known)

    def fold(self, known: Known) -> None:
        """Keeps the last `keep` events and adds the older ones to the counts."""
        num = len(self.events) - self.layout.keep
        if num <= 0:
            return
        old = self.events.take(slice(0, num))
        self.count += num
        self.label += old.label.sum()
        self.excess += old.excess.sum()
        self.folded_until = int(old.time[-1])
        for name, column in known.columns.items():
            place, value = entries(column, old.item)
            self.counts[name] = self.counts[name].plus(value, at(old.label, place), at(old.excess, place))
        if known.category_I is not None:
            self.counts[CATEGORY] = self.counts[CATEGORY].plus(known.category_I[old.item], old.label, old.excess)
        self.events = self.events.take(slice(num, len(self.events)))
        self.earlier = self.earlier[num:]

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads: a header with the length of each array, and the arrays, each at a multiple of 8."""
        both = zip(self.arrays(), self.layout.dtypes, strict=True)
        arrays = [array.astype(dtype, copy=False) for array, dtype in both]
        lengths = np.array([len(array) for array in arrays], "<i8").tobytes()
        parts = [array.tobytes() for array in arrays]
        padded = [part + bytes(-len(part) % 8) for part in parts]
        return b"".join([MAGIC, self.layout.digest, lengths, *padded])

    @classmethod
    def from_bytes(cls, content: bytes, layout: Layout) -> UserHistory:
        """The state that `to_bytes` wrote. Raises UserError for bytes of another layout, cut or damaged ones."""
        dtypes = layout.dtypes
        header = len(MAGIC) + 8 + 8 * len(dtypes)
        if len(content) < header or bytes(content[: len(MAGIC)]) != MAGIC:
            raise UserError("the state of a user is damaged: build it again")
        if bytes(content[len(MAGIC) : len(MAGIC) + 8]) != layout.digest:
            raise UserError("the state of a user was made with other features or settings: build it again")
        lengths = np.frombuffer(content, "<i8", len(dtypes), len(MAGIC) + 8).tolist()
        arrays, at = [], header
        for length, dtype in zip(lengths, dtypes, strict=True):
            end = at + length * dtype.itemsize
            if length < 0 or end > len(content):
                raise UserError("the state of a user is damaged: build it again")
            arrays.append(np.frombuffer(content, dtype, length, at))
            at = end + -end % 8
        if at != len(content):
            raise UserError("the state of a user is damaged: build it again")
        return cls._of_arrays(layout, iter(arrays))

    def arrays(self) -> Iterator[np.ndarray]:
        """The arrays of the state, in the order in which they are written."""
        yield np.array([self.count, self.label, self.excess])
        yield np.array([self.folded_until])
        yield np.array(list(self.dense.values()))
        for name in _ARRAYS:
            yield getattr(self.events, name)
        yield self.earlier
        for column in (*self.events.features.values(), *self.users.values()):
            yield from (part.numpy() for part in column if part is not None)
        for counts in self.counts.values():
            yield from counts

    @classmethod
    def _of_arrays(cls, layout: Layout, arrays: Iterator[np.ndarray]) -> UserHistory:
        count, label, excess = next(arrays).tolist()
        folded_until = int(next(arrays)[0])
        dense = dict(zip(layout.user_dense, next(arrays).tolist(), strict=True))
        events = {name: next(arrays).astype(dtype) for name, dtype in _ARRAYS.items()}
        earlier = next(arrays).astype(np.int64)

        def columns(features: Mapping[str, bool]) -> dict[str, Column]:
            parts = {name: [next(arrays) for _ in range(1 + is_list)] for name, is_list in features.items()}
            return {name: Column(*(torch.from_numpy(x.astype(np.int64)) for x in of)) for name, of in parts.items()}

        features, users = columns(layout.events), columns(layout.users)
        counts = {name: Counts(*(next(arrays) for _ in Counts._fields)) for name in _no_counts(layout)}
        rows = EventRows(**events, features=features)
        return cls(layout, rows, earlier, users, dense, counts, count, label, excess, folded_until)


def _unknown(is_list: bool) -> Column:
    zero = torch.zeros(1, dtype=torch.int64)
    return Column(zero[:0], torch.zeros(2, dtype=torch.int64)) if is_list else Column(zero)


def _no_counts(layout: Layout) -> dict[str, Counts]:
    return dict.fromkeys([*layout.items, CATEGORY], NO_COUNTS)


def _moments(events: EventRows) -> np.ndarray:
    """The earliest moment of each event's request, int64 [E]."""
    moment = events.moment.copy()
    shown = np.flatnonzero(events.request)
    if len(shown):
        _, request = np.unique(events.request[shown], return_inverse=True)
        first = np.full(request.max() + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, request, moment[shown])
        moment[shown] = first[request]
    return moment


def _seconds(time: np.ndarray, *, has_clock: bool) -> np.ndarray:
    return time // SECOND if has_clock else np.zeros_like(time)


def earlier_of_category(user_E: np.ndarray, category_E: np.ndarray, before_E: np.ndarray) -> np.ndarray:
    """How many events of its category each event's user had before its moment, int64 [E]; see lumrec/data/moments.py.

    >>> earlier_of_category(np.array([0, 0, 0, 1]), np.array([7, 7, 7, 7]), np.array([0, 1, 1, 3])).tolist()
    [0, 1, 1, 0]
    """
    order_E = np.lexsort([category_E, user_E])  # stable: by time within a user's category
    is_first_E = np.ones(len(order_E), bool)
    is_first_E[1:] = (np.diff(user_E[order_E]) != 0) | (np.diff(category_E[order_E]) != 0)
    run_E = np.cumsum(is_first_E) - 1  # number of the user's category, in that order
    # Within a run the rows ascend; the run's number keeps the keys of different runs apart.
    key_E = run_E * len(order_E) + order_E
    count_E = np.empty(len(order_E), np.int64)
    end_E = np.searchsorted(key_E, run_E * len(order_E) + before_E[order_E])
    count_E[order_E] = end_E - np.flatnonzero(is_first_E)[run_E]
    return count_E


def histories_of(data: PreparedData, layout: Layout, known: Known) -> Iterator[UserHistory]:
    """The state of each user after all events of a log, in the order of the users.

    Prepared data have no requests and whole seconds: events of one second get times that differ as their moments do.
    """
    rows = log_events(data, layout, known)
    earlier_E = np.zeros(len(rows), np.int64)
    if known.category_I is not None:
        earlier_E = earlier_of_category(data.user, known.category_I[data.item], data.before)
    users = {name: data.user_columns[name] for name in layout.users}
    dense = {name: data.dense[name] for name in layout.user_dense}
    # Folds the events of all users at once, which is several times as fast as `UserHistory.fold`.
    length_U = np.diff(data.user_offsets)
    folded_U = np.maximum(0, length_U - layout.keep)
    begin_U = data.user_offsets[:-1] + folded_U
    old = np.flatnonzero(np.arange(len(rows)) < np.repeat(begin_U, length_U))
    user_O, label_O, excess_O = data.user[old], rows.label[old], rows.excess[old]
    label_U, excess_U = (np.bincount(user_O, x_O, data.num_users).tolist() for x_O in (label_O, excess_O))
    until_U = np.where(folded_U > 0, at(rows.time, begin_U - 1), NEVER).tolist()
    entries_of = {name: entries(column, rows.item[old]) for name, column in known.columns.items()}
    if known.category_I is not None:
        entries_of[CATEGORY] = np.arange(len(old)), known.category_I[rows.item[old]]
    counts_U = {
        name: _counts_by_user(at(user_O, place), value, at(label_O, place), at(excess_O, place), data.num_users)
        for name, (place, value) in entries_of.items()
    }
    nothing = _no_counts(layout)
    for user, (begin, last) in enumerate(zip(begin_U.tolist(), data.user_offsets[1:].tolist())):
        yield UserHistory(
            layout=layout,
            events=rows.take(slice(begin, last)),
            earlier=earlier_E[begin:last],
            users={name: _taken(column, slice(user, user + 1)) for name, column in users.items()},
            dense={name: float(values[user]) for name, values in dense.items()},
            counts=nothing | {name: counts[user] for name, counts in counts_U.items()},
            count=float(folded_U[user]),
            label=label_U[user],
            excess=excess_U[user],
            folded_until=until_U[user],
        )


def _counts_by_user(
    user_P: np.ndarray, value_P: np.ndarray, label_P: np.ndarray, excess_P: np.ndarray, num_users: int
) -> list[Counts]:
    """The counts of each user. user_P: int64, ascending."""
    width = int(value_P.max(initial=0)) + 1
    key_K, place = np.unique(user_P * width + value_P, return_inverse=True)
    sums = [np.bincount(place, x_P, len(key_K)) for x_P in (np.ones(len(place)), label_P, excess_P)]
    columns = [key_K % width, *sums]
    bounds = np.searchsorted(key_K, np.arange(num_users + 1) * width).tolist()
    return [
        Counts(*(column[begin:end] for column in columns)) if begin < end else NO_COUNTS
        for begin, end in zip(bounds, bounds[1:])
    ]


def log_events(data: PreparedData, layout: Layout, known: Known) -> EventRows:
    """The events of a log with everything that a state stores of an event."""
    index_E = np.arange(data.num_events)
    first_E = data.user_offsets[data.user]
    if layout.has_clock:
        # Within a second, each moment of the user gets another microsecond.
        is_first_E = np.zeros(len(index_E), bool)
        is_first_E[data.before] = True
        begins_E = np.cumsum(is_first_E)
        of_second = (data.user[1:] != data.user[:-1]) | (data.timestamp[1:] != data.timestamp[:-1])
        start_E = np.maximum.accumulate(np.where(np.append(True, of_second)[: len(index_E)], index_E, 0))
        time = data.timestamp * SECOND + begins_E - begins_E[start_E]
        moment, second_E = time[data.before], data.timestamp[data.before]
    else:
        time = moment = index_E - first_E
        second_E = np.zeros_like(time)
    label = data.label.astype(np.float64)
    rows = EventRows(
        item=data.item,
        time=time,
        moment=moment,
        label=label,
        excess=np.zeros_like(label) if known.rate is None else label - known.rate(data.item, second_E),
        id=np.zeros(len(time), np.uint64),
        request=np.zeros(len(time), np.uint64),
        features={name: data.event_columns[name] for name in layout.events},
    )
    rows.id = content_ids(rows, has_clock=layout.has_clock)
    return rows


def content_ids(rows: EventRows, *, has_clock: bool) -> np.ndarray:
    """Ids for events that were given none: a hash of item, second, label and features, uint64 [E].

    In a log without times all are 0 (no id), because equal events are different events there.
    """
    if not has_clock:
        return np.zeros(len(rows), np.uint64)
    shown_E = rows.time // SECOND * 2 + rows.label.astype(np.int64)
    id_E = mix(rows.item.astype(np.uint64)) ^ mix(shown_E.astype(np.uint64))
    for number, column in enumerate(rows.features.values()):
        place, value = entries(column, np.arange(len(rows)))
        total = mix(value.astype(np.uint64) + np.uint64(number << 40))
        if place is not None:
            hashed, total = total, np.zeros(len(rows), np.uint64)
            np.add.at(total, place, hashed)
        id_E = mix(id_E + total)
    return np.maximum(id_E, np.uint64(1))
