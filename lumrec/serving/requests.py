"""Requests for scores as the batches that a ranker was trained on: the same features, from the states of the users.

What a row of the log reads of the past is defined once (lumrec/features/statistics.py, lumrec/batches/rows.py). A
request at time t reads what a row of that moment would: the user's events before t, the training events of the items
before t, and the context that it gives.

Unknown users, items and values are served: row 0 of their tables, as for what was not seen in training. A context
feature that a request leaves out is unknown too, except those made of the time (hour, weekday, time_of_day), which are
made of the request's. A name that is no feature is an error.

Shape suffixes: Q requests, B candidates of all requests, T history events of all requests, E events, F statistics.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from threading import local
from typing import Any, NamedTuple, Protocol

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lumrec.data.columns import Column
from lumrec.data.log_columns import DERIVED_AFTER, TIMES_OF_DAY
from lumrec.data.prepared import PreparedData
from lumrec.data.scaling import MAX_SCALED
from lumrec.data.schema import EVENT_ROLES, FeatureConfig, SchemaConfig, features_by_role, schema_from_dict
from lumrec.data.sources.raw_log import FIRST_POSSIBLE_S, LAST_POSSIBLE_S
from lumrec.features.history import SECOND, EventRows, Known, Layout, UserHistory, content_ids
from lumrec.features.items import Catalogue, ItemHistory, LiveCounts, categories
from lumrec.features.request_past import RequestPast
from lumrec.features.statistics import WINDOWS, Scale, StatisticsModel, raw_columns
from lumrec.modules.rankers.base import RankBatch
from lumrec.run.errors import UserError

LONGEST_WINDOW = max(WINDOWS)
FOREVER = int(np.iinfo(np.int64).max)
AT_ONCE = 32  # requests whose statistics are made together


class Event(NamedTuple):
    """What a user did with an item that was shown.

    user, item: raw ids. time: seconds since 1970, UTC, with fractions; None = now. In a log without times it is not
    read: events come in the order of arrival. label: 0 or 1. features: raw values (a list for kind multi) by the name
    of a feature, or of the column that it reads. event_id: tells a repeated event from another one. request: equal for
    events that were shown together.
    """

    user: str
    item: str
    time: float | None = None
    label: float = 0.0
    features: Mapping[str, Any] = {}
    event_id: str = ""
    request: str = ""


class ScoreRequest(NamedTuple):
    """Candidates (raw item ids) to be scored for a user (raw id).

    context: raw values by feature or column: of the context, of conditions that are known before an item is shown, and
    of the user, where they differ from what the state holds. per_item: values of the context that differ by candidate,
    one for each. time: seconds since 1970, UTC; None = now. In a log without times: the number of the user's events
    that are seen, None = all.
    """

    user: str
    items: Sequence[str]
    context: Mapping[str, Any] = {}
    time: float | None = None
    per_item: Mapping[str, Sequence[Any]] = {}


class KeyIndex(Protocol):
    """What looks up raw keys; lumrec/serving/keys.py has one."""

    def rows(self, table: str, keys: Sequence[str]) -> np.ndarray:
        """Rows of the table, int64 [N], 0 where a key is unknown."""

    def items(self, keys: Sequence[str]) -> np.ndarray:
        """Indices of the items, int64 [N], -1 where a key is unknown."""


@dataclass(frozen=True)
class RequestSpec:
    """How requests become batches: plain values, also as JSON.

    schema: without features that the ranker leaves out. features, row_features, reads: of the ranker. max_history,
    category: as of RowBuilder. has_clock, absolute_time: of the log. utc_offset_hours: local time of its users.
    derived: columns that lumrec made of time and label. table_rows: as of PreparedData.
    """

    schema: SchemaConfig
    features: list[str]
    row_features: list[str]
    reads: list[str]
    max_history: int
    category: str
    statistics: StatisticsModel
    has_clock: bool
    absolute_time: bool
    utc_offset_hours: float
    derived: list[str]
    table_rows: dict[str, int]

    @classmethod
    def of(
        cls,
        data: PreparedData,
        statistics: StatisticsModel,
        *,
        features: Sequence[str],
        row_features: Sequence[str],
        max_history: int,
        reads: Sequence[str] = (),
        category: str = "",
    ) -> RequestSpec:
        """That of a ranker which reads these features of a log. Raises UserError for data of an older lumrec."""
        manifest = data.manifest
        made = [*TIME_TEXTS, *DERIVED_AFTER]
        if "derived" not in manifest and any(feature.column in made for feature in data.schema.features.values()):
            raise UserError(
                f"{data.path} was prepared by an older lumrec, which did not say whether {', '.join(made)} are columns "
                "of the log or made by lumrec: prepare it again (apps/prepare.py with overwrite=true)"
            )
        return cls(
            schema=data.schema,
            features=list(features),
            row_features=list(row_features),
            reads=sorted(reads),
            max_history=max_history,
            category=category,
            statistics=statistics,
            has_clock=manifest["has_clock"],
            absolute_time=data.absolute_time,
            utc_offset_hours=manifest.get("utc_offset_hours", 0.0),
            derived=list(manifest.get("derived", [])),
            table_rows=data.table_rows,
        )

    @property
    def least_kept(self) -> int:
        """How many of a user's last events a batch reads one by one."""
        return max(1, self.max_history, 0 if self.statistics.kind == "none" else LONGEST_WINDOW)

    def layout(self, *, keep: int) -> Layout:
        """What the states of users hold. Raises UserError where that is not enough for the ranker."""
        if keep < self.least_kept:
            raise UserError(
                f"{keep} events of a user are to be kept, and this ranker reads {self.least_kept}: keep at least those"
            )
        return Layout.of(self.schema, keep=keep, has_clock=self.has_clock, category=self.category)

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RequestSpec:
        """What `to_json` gave back."""
        schema, statistics = schema_from_dict(values["schema"]), StatisticsModel.from_json(values["statistics"])
        return cls(**(dict(values) | {"schema": schema, "statistics": statistics}))


class RequestBatch(NamedTuple):
    """What a ranker reads of Q requests: rank, with one row for each candidate and one history for each request.

    offsets_Q1: int64, the rows of each request. item_B: int64, index of each candidate; number of items where unknown.
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


class RequestBuilder:
    """Makes batches of requests, and rows of events for the states of users.

    catalogue: of the items. items: what statistics of kind "all" read of other users, else None. A thread at a time may
    build a batch with one builder; others run beside it.
    """

    def __init__(self, spec: RequestSpec, keys: KeyIndex, catalogue: Catalogue, items: ItemHistory | None) -> None:
        self.spec, self.keys, self.catalogue, self.items = spec, keys, catalogue, items
        schema = spec.schema
        self.item_features, self.feedback_features = (features_by_role(schema, role) for role in ("item", "feedback"))
        self.event_features = [name for role in EVENT_ROLES for name in features_by_role(schema, role)]
        self.layout = spec.layout(keep=max(spec.max_history, LONGEST_WINDOW))
        self._nobody = UserHistory.empty(self.layout)
        self._category_I = categories(catalogue.columns, spec.category) if "category_U" in spec.reads else None
        dense = {name: schema.features[name] for name in spec.statistics.dense}
        self._dense_context = [name for name, feature in dense.items() if feature.role == "context"]
        self._context = {name: schema.features[name] for name in (*spec.row_features, *self._dense_context)}
        self._given = _names(self._context)
        self._local = local()

    def known(self, layout: Layout, live: LiveCounts | None = None) -> Known:
        """What events are counted by in states of a layout. live: of items, for what is appended after the log."""
        return Known.of(self.catalogue, layout, self._rate(live))

    def _rate(self, live: LiveCounts | None) -> Any:
        if self.items is None:
            return None
        items, base_rate = self.items, self.spec.statistics.base_rate
        return lambda item_N, second_N: items.rates(item_N, second_N, base_rate, live)[0]

    def encode(self, events: Sequence[Event]) -> EventRows:
        """The rows of events, for `UserHistory.append`. Raises UserError for a name that no feature of events has, for
        a label that is neither 0 nor 1, and for a time that is no number.
        """
        features = {name: self.spec.schema.features[name] for name in self.event_features}
        names = _names(features)
        now = time.time()
        for event in events:
            _check_names(event.features, names, "features of events")
            if event.label not in (0, 1):
                raise UserError(f"the label of an event is {event.label!r}; expected 0 or 1")
        times = [now if event.time is None else event.time for event in events]
        time_E = np.array([_microseconds(each) for each in times], np.int64)
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
                rows.features[name] = Column(values, _offsets(lengths) if is_list else None)
                continue
            raw = [_given(event.features, name, feature) for event in events]
            if feature.column in self.spec.derived:
                derived = self._derived(feature.column, time_E, rows.label)
                raw = [made if value is MISSING else value for value, made in zip(raw, derived, strict=True)]
            rows.features[name] = self._column(feature, raw)[0]
        missing = np.flatnonzero(rows.id == 0)
        rows.id[missing] = content_ids(rows.take(missing), has_clock=self.spec.has_clock)
        return rows

    def _of_items(self, feature: FeatureConfig) -> Column | None:
        """Where a wish reads a column of the items ("an item of this category"): that column."""
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

        live: number and likes of items in events that came after the log; None counts the training part's only, as in
        every row of the log. Raises UserError for a name in a context that is no feature of requests, for a time that
        is no number, and ValueError without any candidate.
        """
        if not any(request.items for request in requests):
            raise ValueError("the requests have no candidates; expected at least one")
        spec = self.spec
        states = [self._nobody if history is None else history for history in histories]
        time_Q = self._times(requests)
        seen = [state.as_of(at) for state, at in zip(states, time_Q.tolist(), strict=True)]
        num_Q = np.array([len(request.items) for request in requests])
        offsets_Q1 = np.concatenate([[0], np.cumsum(num_Q)])
        request_B = np.repeat(np.arange(len(requests)), num_Q)
        item_B = self._items([item for request in requests for item in request.items])
        second_Q = time_Q // SECOND if spec.has_clock else np.zeros_like(time_Q)
        for request in requests:
            self._check(request)
        context, unknown_Q = self._context_columns(requests, states, time_Q, request_B)
        dense_BF = self._dense(requests, states, seen, second_Q, item_B, request_B, offsets_Q1, unknown_Q, live)
        unknown_items = np.concatenate([[0], np.cumsum(item_B == self.catalogue.num_items)])
        return RequestBatch(
            rank=self._rank_batch(states, seen, second_Q, context, item_B, request_B, dense_BF),
            offsets_Q1=offsets_Q1,
            item_B=item_B,
            unknown_user_Q=np.array([history is None for history in histories]),
            unknown_items_Q=np.diff(unknown_items[offsets_Q1]),
            unknown_values_Q=unknown_Q,
            cut_Q=np.array([at <= state.folded_until for at, state in zip(time_Q.tolist(), states)]),
        )

    def _times(self, requests: Sequence[ScoreRequest]) -> np.ndarray:
        """Microseconds, or in a log without times how many events are seen."""
        if not self.spec.has_clock:
            return np.array([FOREVER if each.time is None else int(each.time) for each in requests], np.int64)
        now = time.time()
        if not self.spec.absolute_time and any(each.time is None for each in requests):
            raise UserError("the log has a clock for each user, so that a request needs a time on that of its user")
        return np.array([_microseconds(now if each.time is None else each.time) for each in requests], np.int64)

    def _items(self, keys: Sequence[str]) -> np.ndarray:
        item_N = self.keys.items(keys)
        return np.where(item_N < 0, self.catalogue.num_items, item_N).astype(np.int64)

    def _check(self, request: ScoreRequest) -> None:
        """Raises UserError for names that are no features, and for values that are not one for each candidate."""
        for given in (request.context, request.per_item):
            _check_names(given, self._given, "features of a request")
        for name, values in request.per_item.items():
            if len(values) != len(request.items) or isinstance(values, str):
                raise UserError(
                    f"{name!r} has {len(values)} values per item; expected {len(request.items)}, one for each"
                )

    def _context_columns(
        self,
        requests: Sequence[ScoreRequest],
        states: Sequence[UserHistory],
        time_Q: np.ndarray,
        request_B: np.ndarray,
    ) -> tuple[dict[str, tuple[Column, np.ndarray]], np.ndarray]:
        """Of each feature a column, and the entry of each row in it, int64 [B]; unknown values by request."""
        columns, unknown_Q = {}, np.zeros(len(requests), np.int64)
        for name in self.spec.row_features:
            feature = self._context[name]
            raw, of_Q, index_B = _raw(requests, name, feature, request_B)
            if feature.role == "user":
                columns[name] = self._user_column(name, feature, raw, [states[q] for q in of_Q.tolist()]), index_B
                continue
            if feature.column in self.spec.derived:
                derived = self._derived(feature.column, time_Q[of_Q])
                raw = [made if value is MISSING else value for value, made in zip(raw, derived, strict=True)]
            column, unknown_N = self._column(feature, raw)
            columns[name] = column, index_B
            np.add.at(unknown_Q, of_Q[unknown_N], 1)
        return columns, unknown_Q

    def _user_column(
        self, name: str, feature: FeatureConfig, raw: Sequence[Any], states: Sequence[UserHistory]
    ) -> Column:
        of_users = [state.users[name] for state in states]
        for q, value in enumerate(raw):
            if value is not MISSING:
                of_users[q] = self._column(feature, [value])[0]
        values = torch.cat([column.values for column in of_users])
        if feature.kind != "multi":
            return Column(values)
        return Column(values, _offsets(torch.tensor([len(column.values) for column in of_users])))

    def _column(self, feature: FeatureConfig, raw: Sequence[Any]) -> tuple[Column, np.ndarray]:
        """The rows of raw values, and the index of each entry with a value that has none (repeated for several)."""
        if feature.kind != "multi":
            row_N = self.keys.rows(feature.table, [text(value) for value in raw]).astype(np.int64)
            return Column(torch.from_numpy(row_N)), np.flatnonzero(row_N == 0)
        lists = [_texts(feature, value) for value in raw]
        length_N = np.array([len(each) for each in lists], np.int64)
        row_V = self.keys.rows(feature.table, [value for each in lists for value in each]).astype(np.int64)
        of_entry = np.repeat(np.arange(len(raw)), length_N)
        return Column(torch.from_numpy(row_V), _offsets(torch.from_numpy(length_N))), of_entry[row_V == 0]

    def _derived(self, column: str, time_N: np.ndarray, label_N: np.ndarray | None = None) -> list[str]:
        """What lumrec makes of times or labels."""
        if column in TIME_TEXTS:
            return TIME_TEXTS[column](time_N + int(self.spec.utc_offset_hours * 3600 * SECOND))
        assert column in DERIVED_AFTER and label_N is not None
        return ["like" if label > 0 else "dislike" for label in label_N.tolist()]

    def _dense(
        self,
        requests: Sequence[ScoreRequest],
        states: Sequence[UserHistory],
        seen: Sequence[int],
        second_Q: np.ndarray,
        item_B: np.ndarray,
        request_B: np.ndarray,
        offsets_Q1: np.ndarray,
        unknown_Q: np.ndarray,
        live: LiveCounts | None,
    ) -> Tensor:
        """Statistics and dense features of each candidate, float32 [B, F]; adds numbers that are missing to unknown."""
        model = self.spec.statistics
        dense_BF = np.zeros((len(item_B), len(model.names)), np.float32)
        if model.columns:
            item_rates = None
            if self.items is not None:
                item_rates = self.items.rates(item_B, second_Q[request_B], model.base_rate, live)
            last_Q = np.array([int(of.events.time[n - 1]) if n else 0 for of, n in zip(states, seen)], np.int64)
            last_Q = np.where(np.array(seen) > 0, last_Q // SECOND, second_Q) if self.spec.has_clock else second_Q
            for start in range(0, len(requests), AT_ONCE):
                stop = min(start + AT_ONCE, len(requests))
                rows = slice(int(offsets_Q1[start]), int(offsets_Q1[stop]))
                past = RequestPast(
                    states[start:stop],
                    seen[start:stop],
                    (second_Q - last_Q)[start:stop],
                    item_B[rows],
                    request_B[rows] - start,
                    self.catalogue.columns,
                    self._slots(),
                )
                rates = item_rates and (item_rates[0][rows], item_rates[1][rows])
                raw = raw_columns(past, model.kind, model.base_rate, model.features, rates)
                dense_BF[rows, : len(model.columns)] = model.standardised(raw, rows.stop - rows.start)
        for f, (name, scale) in enumerate(model.dense.items(), len(model.columns)):
            feature = self.spec.schema.features[name]
            if feature.role == "item":
                dense_BF[:, f] = self.catalogue.dense[name][item_B]
            elif feature.role == "user":
                dense_BF[:, f] = np.array([state.dense[name] for state in states], np.float32)[request_B]
            else:
                values, of_Q, index_B = _raw(requests, name, feature, request_B)
                number_N = np.array([scaled_number(value, scale) for value in values])
                is_missing_N = np.isnan(number_N)
                np.add.at(unknown_Q, of_Q[is_missing_N], 1)
                dense_BF[:, f] = np.where(is_missing_N, 0.0, number_N)[index_B]
        return torch.from_numpy(dense_BF)

    def _slots(self) -> np.ndarray:
        """For RequestPast; one per thread."""
        slots = getattr(self._local, "slots", None)
        if slots is None:
            tables = [self.spec.schema.features[name].table for name in self.item_features]
            slots = self._local.slots = np.zeros(max(self.spec.table_rows[table] for table in tables), np.int32)
        return slots

    def _rank_batch(
        self,
        states: Sequence[UserHistory],
        seen: Sequence[int],
        second_Q: np.ndarray,
        context: Mapping[str, tuple[Column, np.ndarray]],
        item_B: np.ndarray,
        request_B: np.ndarray,
        dense_BF: Tensor,
    ) -> RankBatch:
        """Each history event and each candidate is a token; see RankBatch."""
        spec, num_rows = self.spec, len(item_B)
        first = [max(0, n - spec.max_history) for n in seen]
        spans = [slice(begin, end) for begin, end in zip(first, seen, strict=True)]
        length_Q = np.array(seen) - np.array(first)
        item_T = np.concatenate([state.events.item[span] for state, span in zip(states, spans)])
        num_events, num_tokens = len(item_T), len(item_T) + num_rows
        item_U = torch.from_numpy(np.concatenate([item_T, item_B]))
        values: dict[str, Tensor] = {}
        lengths_FS = torch.zeros(len(spec.features), num_tokens + num_rows, dtype=torch.int32)
        lengths = dict(zip(spec.features, lengths_FS, strict=True))

        def put(name: str, first: int, column: Column, index_N: Tensor) -> None:
            """Fills the bags of a feature from `first` on; all others are empty."""
            values[name], length_N = (column.values[index_N], 1) if column.offsets is None else column.take(index_N)
            lengths[name][first : first + len(index_N)] = length_N

        for name in self.item_features:
            put(name, 0, self.catalogue.columns[name], item_U)
        for name in self.feedback_features:
            parts = [_span(state.events.features[name], span) for state, span in zip(states, spans)]
            values[name] = torch.cat([part.values for part in parts])
            of_list = [part.offsets.diff() for part in parts if part.offsets is not None]
            lengths[name][:num_events] = torch.cat(of_list) if of_list else 1
        for name in spec.row_features:
            column, index_B = context[name]
            put(name, num_tokens, column, torch.from_numpy(index_B))
        extras: dict[str, Any] = {}
        if "item_U" in spec.reads:
            extras["item_U"] = item_U
        if self._category_I is not None:
            extras["category_U"] = torch.from_numpy(self._category_I[item_U.numpy()])
        if "age_T" in spec.reads:
            time_T = np.concatenate([state.events.time[span] for state, span in zip(states, spans)])
            age_T = np.repeat(second_Q, length_Q) - (time_T // SECOND if spec.has_clock else 0)
            extras["age_T"] = torch.from_numpy(age_T.astype(np.float32))
        if "category_count_T" in spec.reads:
            count_T = np.concatenate([state.earlier[span] for state, span in zip(states, spans)])
            extras["category_count_T"] = torch.from_numpy(count_T)
        return RankBatch(
            tokens=KeyedJaggedTensor(
                keys=spec.features,
                values=torch.cat([values[name] for name in spec.features]),
                lengths=lengths_FS.view(-1),
                stride=num_tokens + num_rows,
            ),
            num_tokens=num_tokens,
            target_B=torch.arange(num_events, num_tokens),
            history_T=torch.arange(num_events),
            offsets_B1=torch.from_numpy(np.concatenate([[0], np.cumsum(length_Q)])),
            history_of_B=torch.from_numpy(request_B),
            dense_BF=dense_BF,
            label_B=torch.zeros(num_rows),
            row_B=torch.arange(num_rows),
            **extras,
        )


class _Missing:
    """A feature that a request or an event does not have."""


MISSING = _Missing()


def _names(features: Mapping[str, FeatureConfig]) -> frozenset[str]:
    """The names by which values are given: those of features and of the columns that they read."""
    return frozenset(features) | {feature.column for feature in features.values()}


def _check_names(given: Mapping[str, Any], names: frozenset[str], what: str) -> None:
    """Raises UserError for a name that is none of `names`."""
    if not names.issuperset(given):
        unknown = sorted(set(given) - names)
        raise UserError(f"there is no feature {unknown[0]!r}; the {what} are: {', '.join(sorted(names)) or 'none'}")


def _given(values: Mapping[str, Any], name: str, feature: FeatureConfig) -> Any:
    return values.get(name, values.get(feature.column, MISSING))


def _raw(
    requests: Sequence[ScoreRequest], name: str, feature: FeatureConfig, request_B: np.ndarray
) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """The raw values of a feature, the request of each (int64), and for each row the place of its value (int64 [B]).

    One value for each request or, where a request gives them, one for each candidate.
    """
    raw = [_given(request.context, name, feature) for request in requests]
    each = [_given(request.per_item, name, feature) for request in requests]
    if all(values is MISSING for values in each):
        return raw, np.arange(len(requests)), request_B
    of_rows = (
        [one] * len(request.items) if values is MISSING else values
        for request, one, values in zip(requests, raw, each, strict=True)
    )
    return [value for values in of_rows for value in values], request_B, np.arange(len(request_B))


def _texts(feature: FeatureConfig, value: Any) -> list[str]:
    """The texts of a list; missing values within it are left out, as in a log."""
    if value is MISSING or value is None:
        return []
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"column {feature.column!r} is of kind multi: got {value!r:.80}, expected a list")
    return [text(each) for each in value if each is not None]


def text(value: Any) -> str:
    """The text of a raw value as vocabularies have it (lumrec/data/forms.py); "" where it is missing.

    >>> [text(value) for value in (54, 54.0, 0.5, True, "a", None, float("nan"))]
    ['54', '54', '0.5', 'true', 'a', '', '']
    """
    if isinstance(value, str):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if value is MISSING or value is None or value != value:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2.0**53 else pl.Series([value]).cast(pl.String)[0]
    raise UserError(f"a value of a feature is {value!r:.80}; expected text, a number, true or false")


def scaled_number(value: Any, scale: Scale) -> float:
    """A dense feature as a ranker reads it (lumrec/data/scaling.py); NaN where it is missing, no number, or too far
    from those of the training part for a model to read.
    """
    try:
        number = float("nan" if value is MISSING or value is None else value)
    except (TypeError, ValueError):
        return np.nan
    if scale.scale == "log":
        number = float(np.sign(number) * np.log1p(abs(number)))
    if scale.scale != "none":
        number = (number - scale.mean) / (scale.deviation if scale.deviation > 1e-9 else np.inf)
    return number if abs(number) <= MAX_SCALED[scale.scale] else np.nan


def _microseconds(seconds: float) -> int:
    """Raises UserError for a time that no log has (milliseconds, say)."""
    try:
        if FIRST_POSSIBLE_S <= float(seconds) < LAST_POSSIBLE_S:
            return round(float(seconds) * SECOND)
    except (TypeError, ValueError):
        pass
    raise UserError(f"a time is {seconds!r:.80}; expected seconds since 1970, UTC, before the year 2100")


def hashed(key: str) -> int:
    """64 bits of a text that differ for another one; 0 for ""."""
    if not key:
        return 0
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _hours(time_N: np.ndarray) -> list[int]:
    return (time_N // (3600 * SECOND) % 24).tolist()


def _weekdays(time_N: np.ndarray) -> list[str]:
    return [str(day) for day in ((time_N // (86_400 * SECOND) + 3) % 7 + 1).tolist()]


# The columns made of the time (`of_time` in lumrec/data/log_columns.py): microseconds of local time to texts.
TIME_TEXTS = {
    "hour": lambda time_N: [str(hour) for hour in _hours(time_N)],
    "weekday": _weekdays,
    "time_of_day": lambda time_N: [TIMES_OF_DAY[hour // 6] for hour in _hours(time_N)],
}


def _offsets(lengths_N: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths_N.cumsum(0), (1, 0))


def _span(column: Column, span: slice) -> Column:
    """Consecutive entries; offsets do not begin at 0."""
    if column.offsets is None:
        return Column(column.values[span])
    offsets = column.offsets[span.start : span.stop + 1]
    return Column(column.values[offsets[0] : offsets[-1]], offsets)
