"""Turns requests into batches like those that the ranker was trained on, from the states of the users.

A request at time t reads the same as a row of the log at that moment: the user's events before t, the training events
of the items before t, and the context that it gives. The definitions are shared with training
(lumrec/features/statistics.py, lumrec/batches/rows.py).

Unknown users, items and values are served: row 0 of their tables, as for what was not seen in training. A context
feature that a request leaves out is unknown too, except those derived from the time (hour, weekday, time_of_day), which
are derived from the request's time. A name that is no feature is an error.

Shape suffixes: Q requests, B candidates of all requests, T history events of all requests, E events, F statistics.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import local
from typing import Any, NamedTuple

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lumrec.data.columns import Column
from lumrec.data.schema import EVENT_ROLES, FeatureConfig, features_by_role
from lumrec.features.history import SECOND, EventRows, Known, Layout, UserHistory, content_ids
from lumrec.features.items import Catalogue, ItemHistory, LiveCounts, categories, entries
from lumrec.features.request_past import RequestPast
from lumrec.features.statistics import raw_columns
from lumrec.modules.rankers.base import RankBatch
from lumrec.run.errors import UserError
from lumrec.serving.raw_values import (
    MISSING,
    KeyIndex,
    RawReader,
    check_names,
    given,
    hashed,
    microseconds,
    names_of,
    offsets_of,
    scaled_number,
)
from lumrec.serving.request_spec import LONGEST_WINDOW, Event, RequestSpec, ScoreRequest

__all__ = ["Event", "RequestBatch", "RequestBuilder", "RequestSpec", "ScoreRequest"]
FOREVER = int(np.iinfo(np.int64).max)
AT_ONCE = 32  # requests whose statistics are made together


class RequestBatch(NamedTuple):
    """The batch of Q requests.

    rank: what the ranker reads, with one row for each candidate and one history for each request. offsets_Q1: int64,
    the rows of each request. item_B: int64, index of each candidate; the number of items if it is unknown.
    unknown_user_Q: bool. unknown_items_Q, unknown_values_Q: int64, candidates and context values without a row.
    cut_Q: bool, the request is for a time so early that the user's state no longer holds all that it would have seen.
    """

    rank: RankBatch
    offsets_Q1: np.ndarray
    item_B: np.ndarray
    unknown_user_Q: np.ndarray
    unknown_items_Q: np.ndarray
    unknown_values_Q: np.ndarray
    cut_Q: np.ndarray


class _Asked(NamedTuple):
    """Requests with the states of their users. seen: how many events of each. second_Q: 0 in a log without times.
    item_B, request_B: int64, of each candidate. unknown_Q: int64, values that have no row; to be added to.
    """

    requests: Sequence[ScoreRequest]
    states: Sequence[UserHistory]
    seen: Sequence[int]
    time_Q: np.ndarray
    second_Q: np.ndarray
    item_B: np.ndarray
    request_B: np.ndarray
    offsets_Q1: np.ndarray
    unknown_Q: np.ndarray

    def raw(self, name: str, feature: FeatureConfig) -> tuple[list[Any], np.ndarray, np.ndarray]:
        """The raw values of a feature, the request of each (int64), and the place of each row's value (int64 [B]).

        One value for each request or, where a request gives them, one for each candidate.
        """
        raw = [given(request.context, name, feature) for request in self.requests]
        if not any(request.per_item for request in self.requests):
            return raw, np.arange(len(raw)), self.request_B
        of_rows = []
        for request, one in zip(self.requests, raw, strict=True):
            values = given(request.per_item, name, feature)
            of_rows.append([one] * len(request.items) if values is MISSING else values)
        return [value for values in of_rows for value in values], self.request_B, np.arange(len(self.item_B))


class RequestBuilder:
    """Makes batches from requests, and rows from events for the states of users. Safe for any number of threads.

    items: the history of the items, which statistics of kind "all" read; otherwise None. layout: that of a state which
    keeps only the events that the ranker reads one by one.
    """

    def __init__(self, spec: RequestSpec, keys: KeyIndex, catalogue: Catalogue, items: ItemHistory | None) -> None:
        self.spec, self.keys, self.catalogue, self.items = spec, keys, catalogue, items
        schema = spec.schema
        self.item_features, self.feedback_features = (features_by_role(schema, role) for role in ("item", "feedback"))
        self.event_features = [name for role in EVENT_ROLES for name in features_by_role(schema, role)]
        self._reader = RawReader(keys, derived=spec.derived, utc_offset_hours=spec.utc_offset_hours)
        self.layout = spec.layout(keep=max(spec.max_history, LONGEST_WINDOW))
        self._nobody = UserHistory.empty(self.layout)
        self._category_I = categories(catalogue.columns, spec.category) if "category_U" in spec.reads else None
        dense = {name: schema.features[name] for name in spec.statistics.dense}
        of_request = [*spec.row_features, *(name for name, feature in dense.items() if feature.role != "item")]
        self._names = names_of({name: schema.features[name] for name in of_request})
        self._local = local()

    def known(self, layout: Layout, live: LiveCounts | None = None) -> Known:
        """The `Known` of states with this layout. live: counts of items in events that were appended after the log."""
        if self.items is None:
            return Known.of(self.catalogue, layout, None)
        items, base_rate = self.items, self.spec.statistics.base_rate
        return Known.of(
            self.catalogue, layout, lambda item_N, second_N: items.rates(item_N, second_N, base_rate, live)[0]
        )

    def encode(self, events: Sequence[Event]) -> EventRows:
        """The rows of events, for `UserHistory.append`.

        Raises UserError for a name that is no feature of events, a label that is neither 0 nor 1, and an invalid time.
        """
        features = {name: self.spec.schema.features[name] for name in self.event_features}
        names = names_of(features)
        now = time.time()
        for event in events:
            check_names(event.features, names, "features of events")
            if event.label not in (0, 1):
                raise UserError(f"the label of an event is {event.label!r}; expected 0 or 1")
        times = [now if event.time is None else event.time for event in events]
        time_E = np.array([microseconds(each) for each in times], np.int64)
        rows = EventRows(
            item=self._items([event.item for event in events]),
            time=time_E if self.spec.has_clock else np.full(len(events), FOREVER),
            moment=time_E if self.spec.has_clock else np.full(len(events), FOREVER),
            label=np.array([float(event.label) for event in events]),
            excess=np.zeros(len(events)),
            id=np.array([hashed(event.event_id) for event in events], np.uint64),
            request=np.array([hashed(event.request) for event in events], np.uint64),
            features={},
        )
        for name, feature in features.items():
            if (of_item := self._of_items(feature)) is not None:
                values, lengths = of_item.take(torch.from_numpy(rows.item))
                is_list = of_item.offsets is not None
                rows.features[name] = Column(values, offsets_of(lengths) if is_list else None)
                continue
            raw = [given(event.features, name, feature) for event in events]
            rows.features[name] = self._reader.column(feature, raw, time_E, rows.label)[0]
        missing = np.flatnonzero(rows.id == 0)
        rows.id[missing] = content_ids(rows.take(missing), has_clock=self.spec.has_clock)
        return rows

    def _of_items(self, feature: FeatureConfig) -> Column | None:
        """The items' column that a wish reads ("an item of this category"); None for other features."""
        for name in self.item_features if feature.wish else ():
            of = self.spec.schema.features[name]
            if (of.column, of.table, of.kind) == (feature.column, feature.table, feature.kind):
                return self.catalogue.columns[name]
        return None

    def batch(
        self,
        requests: Sequence[ScoreRequest],
        histories: Sequence[UserHistory | None],
        live: LiveCounts | None = None,
    ) -> RequestBatch:
        """The batch of requests; histories: the states of their users, None for a user who has none.

        live: number and likes of items in events after the log; None counts only the training part, as in rows of the
        log. Raises UserError for a name in a context that is no feature of requests, for a value or a
        time that cannot be read, and ValueError without any candidate.
        """
        if not any(request.items for request in requests):
            raise ValueError("the requests have no candidates; expected at least one")
        for request in requests:
            self._check(request)
        states = [self._nobody if history is None else history for history in histories]
        time_Q = self._times(requests)
        num_Q = np.array([len(request.items) for request in requests])
        asked = _Asked(
            requests=requests,
            states=states,
            seen=[state.as_of(at) for state, at in zip(states, time_Q.tolist(), strict=True)],
            time_Q=time_Q,
            second_Q=time_Q // SECOND if self.spec.has_clock else np.zeros_like(time_Q),
            item_B=self._items([item for request in requests for item in request.items]),
            request_B=np.repeat(np.arange(len(requests)), num_Q),
            offsets_Q1=np.concatenate([[0], np.cumsum(num_Q)]),
            unknown_Q=np.zeros(len(requests), np.int64),
        )
        unknown_items = np.concatenate([[0], np.cumsum(asked.item_B == self.catalogue.num_items)])
        return RequestBatch(
            rank=self._rank_batch(asked, self._dense(asked, live)),
            offsets_Q1=asked.offsets_Q1,
            item_B=asked.item_B,
            unknown_user_Q=np.array([history is None for history in histories]),
            unknown_items_Q=np.diff(unknown_items[asked.offsets_Q1]),
            unknown_values_Q=asked.unknown_Q,
            cut_Q=np.array([at <= state.folded_until for at, state in zip(time_Q.tolist(), states)]),
        )

    def _check(self, request: ScoreRequest) -> None:
        """Raises UserError for names that are no features, and for values that are not one for each candidate."""
        check_names([*request.context, *request.per_item], self._names, "features of a request")
        for name, values in request.per_item.items():
            if len(values) != len(request.items) or isinstance(values, str):
                num = len(request.items)
                raise UserError(f"{name!r} has {len(values)} values per item; expected {num}, one for each")

    def _times(self, requests: Sequence[ScoreRequest]) -> np.ndarray:
        """The time of each request in microseconds; in a log without times, the number of events that it sees."""
        if not self.spec.has_clock:
            return np.array([FOREVER if each.time is None else int(each.time) for each in requests], np.int64)
        now = time.time()
        if not self.spec.absolute_time and any(each.time is None for each in requests):
            raise UserError("the log has a clock for each user, so that a request needs a time on that of its user")
        return np.array([microseconds(now if each.time is None else each.time) for each in requests], np.int64)

    def _items(self, keys: Sequence[str]) -> np.ndarray:
        item_N = self.keys.items(keys)
        return np.where(item_N < 0, self.catalogue.num_items, item_N).astype(np.int64)

    def _dense(self, asked: _Asked, live: LiveCounts | None) -> np.ndarray:
        """Statistics and dense features of each candidate, float32 [B, F]."""
        model = self.spec.statistics
        first, num_rows = len(model.columns), len(asked.item_B)
        dense_BF = np.zeros((num_rows, len(model.names)), np.float32)
        if model.columns:
            self._put_statistics(asked, live, dense_BF[:, :first])
        for f, (name, scale) in enumerate(model.dense.items(), first):
            feature = self.spec.schema.features[name]
            if feature.role == "item":
                dense_BF[:, f] = self.catalogue.dense[name][asked.item_B]
            else:
                values, of_Q, index_B = asked.raw(name, feature)
                numbers = [
                    asked.states[q].dense[name]
                    if value is MISSING and feature.role == "user"
                    else scaled_number(value, scale)
                    for q, value in zip(of_Q.tolist(), values, strict=True)
                ]
                for q in [q for q, number in zip(of_Q.tolist(), numbers) if number is None]:
                    asked.unknown_Q[q] += 1
                dense_BF[:, f] = np.array([number or 0.0 for number in numbers])[index_B]
        return dense_BF

    def _put_statistics(self, asked: _Asked, live: LiveCounts | None, dense_BF: np.ndarray) -> None:
        model, seen_Q, item_rates = self.spec.statistics, np.array(asked.seen), None
        if self.items is not None:
            second_B = asked.second_Q[asked.request_B]
            item_rates = self.items.rates(asked.item_B, second_B, model.base_rate, live)
        seconds_Q = np.zeros_like(asked.second_Q)
        if self.spec.has_clock:
            last = [of.events.time[n - 1] if n else 0 for of, n in zip(asked.states, asked.seen)]
            seconds_Q = np.where(seen_Q > 0, asked.second_Q - np.array(last) // SECOND, 0)
        for start in range(0, len(asked.states), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            rows = slice(asked.offsets_Q1[start], asked.offsets_Q1[: start + AT_ONCE + 1][-1])
            past = RequestPast(
                asked.states[some],
                asked.seen[some],
                seconds_Q[some],
                asked.item_B[rows],
                asked.request_B[rows] - start,
                self.catalogue.columns,
                self._slots(),
            )
            rates = item_rates and (item_rates[0][rows], item_rates[1][rows])
            raw = raw_columns(past, model.kind, model.base_rate, model.features, rates)
            dense_BF[rows] = model.standardised(raw, rows.stop - rows.start)

    def _slots(self) -> np.ndarray:
        """Scratch memory for RequestPast, one for each thread."""
        slots = getattr(self._local, "slots", None)
        if slots is None:
            tables = [self.spec.schema.features[name].table for name in self.item_features]
            slots = self._local.slots = np.zeros(max(self.spec.table_rows[table] for table in tables), np.int32)
        return slots

    def _rank_batch(self, asked: _Asked, dense_BF: np.ndarray) -> RankBatch:
        """Each history event and each candidate is a token; see RankBatch."""
        spec, states = self.spec, asked.states
        spans = [slice(max(0, num - spec.max_history), num) for num in asked.seen]
        length_Q = np.array([span.stop - span.start for span in spans])
        item_T = np.concatenate([state.events.item[span] for state, span in zip(states, spans)])
        item_U = np.concatenate([item_T, asked.item_B])
        num_events, num_tokens, num_rows = len(item_T), len(item_U), len(asked.item_B)
        bags = _Bags(spec.features, num_tokens + num_rows)
        for name in self.item_features:
            bags.put(name, 0, *_picked(self.catalogue.columns[name], item_U))
        for name in self.feedback_features:
            bags.put(name, 0, *_spans([state.events.features[name] for state in states], spans))
        for name in spec.row_features:
            column, index_B = self._context(asked, name)
            bags.put(name, num_tokens, *_picked(column, index_B))
        extras: dict[str, Any] = {}
        if "item_U" in spec.reads:
            extras["item_U"] = torch.from_numpy(item_U)
        if self._category_I is not None:
            extras["category_U"] = torch.from_numpy(self._category_I[item_U])
        if "age_T" in spec.reads:
            time_T = np.concatenate([state.events.time[span] for state, span in zip(states, spans)])
            age_T = np.repeat(asked.second_Q, length_Q) - (time_T // SECOND if spec.has_clock else 0)
            extras["age_T"] = torch.from_numpy(age_T.astype(np.float32))
        if "category_count_T" in spec.reads:
            count_T = np.concatenate([state.earlier[span] for state, span in zip(states, spans)])
            extras["category_count_T"] = torch.from_numpy(count_T)
        return RankBatch(
            tokens=bags.kjt(),
            num_tokens=num_tokens,
            target_B=torch.arange(num_events, num_tokens),
            history_T=torch.arange(num_events),
            offsets_B1=torch.from_numpy(np.concatenate([[0], np.cumsum(length_Q)])),
            history_of_B=torch.from_numpy(asked.request_B),
            dense_BF=torch.from_numpy(dense_BF),
            label_B=torch.zeros(num_rows),
            row_B=torch.arange(num_rows),
            **extras,
        )

    def _context(self, asked: _Asked, name: str) -> tuple[Column, np.ndarray]:
        """A feature of the requests, as a column, and the place of each row's entry in it, int64 [B]."""
        feature = self.spec.schema.features[name]
        raw, of_Q, index_B = asked.raw(name, feature)
        if feature.role != "user":
            column, unknown_N = self._reader.column(feature, raw, asked.time_Q[of_Q])
            for q in of_Q[unknown_N].tolist():
                asked.unknown_Q[q] += 1
            return column, index_B
        columns = [asked.states[q].users[name] for q in of_Q.tolist()]
        for n, value in enumerate(raw):
            if value is not MISSING:
                columns[n] = self._reader.column(feature, [value], asked.time_Q[:1])[0]
        values = torch.cat([column.values for column in columns])
        if feature.kind != "multi":
            return Column(values), index_B
        return Column(values, offsets_of(torch.tensor([len(column.values) for column in columns]))), index_B


class _Bags:
    """A KeyedJaggedTensor that is filled feature by feature; bags that are not filled are empty."""

    def __init__(self, features: Sequence[str], num_bags: int) -> None:
        self.features = list(features)
        self._lengths_FS = np.zeros((len(features), num_bags), np.int32)
        self._place = {name: f for f, name in enumerate(features)}
        self._values = [np.zeros(0, np.int64) for _ in features]

    def put(self, name: str, first: int, values: np.ndarray, length_N: np.ndarray) -> None:
        """Fills the bags from `first` on."""
        place = self._place[name]
        self._values[place] = values
        self._lengths_FS[place, first : first + len(length_N)] = length_N

    def kjt(self) -> KeyedJaggedTensor:
        """With what was filled."""
        return KeyedJaggedTensor(
            keys=self.features,
            values=torch.from_numpy(np.concatenate(self._values)),
            lengths=torch.from_numpy(self._lengths_FS.reshape(-1)),
            stride=self._lengths_FS.shape[1],
        )


def _picked(column: Column, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and lengths of these entries."""
    _, values = entries(column, index_N)
    if column.offsets is None:
        return values, np.ones(len(index_N), np.int32)
    offsets = column.offsets.numpy()
    return values, offsets[index_N + 1] - offsets[index_N]


def _spans(columns: Sequence[Column], spans: Sequence[slice]) -> tuple[np.ndarray, np.ndarray]:
    """Values and lengths of consecutive entries of each column, one column after the other."""
    if columns[0].offsets is None:
        values = np.concatenate([column.values.numpy()[span] for column, span in zip(columns, spans)])
        return values, np.ones(len(values), np.int32)
    parts, lengths = [], []
    for column, span in zip(columns, spans):
        assert column.offsets is not None
        offsets = column.offsets.numpy()[span.start : span.stop + 1]
        parts.append(column.values.numpy()[offsets[0] : offsets[-1]])
        lengths.append(np.diff(offsets))
    return np.concatenate(parts), np.concatenate(lengths)
