"""Dense statistics of each event, from what was known before its moment: how often, how recently, what the user liked.

::

    times of the user    3   5   8   8   9
    labels               1   0   1   1   0
    statistics of            ^ sees 1   ^ sees 1 0          (never its own moment's labels, never later ones)

What a moment is: lumrec/data/moments.py. Other users' labels enter in one place, an item's like-rate, and there only
those of training events with an EARLIER timestamp: no label of the validation or test part reaches a training row. (A
mean over all training rows except the row itself looks just as safe but leaks: the item's embedding has learned the sum
over all rows, and the difference gives the row's label away.)

A drawn row (data.negatives) has the statistics that its item would have had in its event's place, and is not counted in
those of any other row.

`raw_columns` defines the statistics for training and for requests. It reads the past from a `Past`: `LogPast` for rows
of a log, and lumrec/features/request_past.py for requests, from the states of their users.

Shape suffixes: E events, R rows of a log (events, and behind them drawn ones), N rows, F statistics, P sorted entries
that are counted, V pairs (row, value of a feature).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lumrec.data.prepared import PreparedData, Rows
from lumrec.data.schema import features_by_role
from lumrec.data.splits import TRAIN
from lumrec.features.items import ItemHistory, at, by_value, entries, running, searched, smoothed, sum_of_rows
from lumrec.run.errors import UserError
from lumrec.run.kept import NewArray, in_memory

KINDS = ("all", "user", "none")
WINDOWS = (5, 10, 50)
BLOCK = 1 << 16  # rows that are standardised at a time
PART_EVENTS = 1 << 20  # events whose statistics are computed at a time


class Statistics(NamedTuple):
    """values_RF: float32, mean 0 and variance 1 over the training events. names: one for each of the F columns. model:
    how they were made; None where that is not known.
    """

    values_RF: np.ndarray
    names: list[str]
    model: StatisticsModel | None = None


class Past(ABC):
    """Sums over the events that each row's user had before the row's moment.

    values: name → one number for each event, float64. Row n has the events first_N[n] to before_N[n] - 1, and
    count_N[n] - (before_N[n] - first_N[n]) older ones of which only sums are known. seconds_N: time from the last event
    to the row; 0 without an event.
    """

    def __init__(
        self, values: Mapping[str, np.ndarray], first_N: np.ndarray, before_N: np.ndarray, seconds_N: np.ndarray
    ) -> None:
        self.values, self.first_N, self.before_N, self.seconds_N = values, first_N, before_N, seconds_N
        self._running = {name: running(values_E) for name, values_E in values.items()}
        self.count_N = before_N - first_N

    def total(self, name: str) -> np.ndarray:
        """Sum of the numbers `name` over all events of each row, float64 [N]."""
        return self._range_sum(name, self.first_N)

    def last(self, name: str, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Sum of the numbers `name` over the last `window` events, float64 [N], and how many events there were."""
        begin_N = np.maximum(self.first_N, self.before_N - window)
        return self._range_sum(name, begin_N), self.before_N - begin_N

    def _range_sum(self, name: str, begin_N: np.ndarray) -> np.ndarray:
        total = self._running[name]
        return total[self.before_N] - total[begin_N]

    @abstractmethod
    def shared(self, feature: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Number of events whose item shares a value of `feature` with the row's item, and the sums of their numbers,
        float64 [N].

        An event that shares two values with the row counts twice, as does one that lists a shared value twice.
        """


def raw_columns(
    past: Past,
    kind: str,
    base_rate: float,
    features: Sequence[str],
    item_rates: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Name of each statistic and its values before they are standardised, float64 [N].

    Of the user, over all events before the row's moment and over the last 5, 10 and 50: the smoothed like-rate, and
    its excess over the like-rate of the items shown (a user who was shown good items is not therefore easy to please).
    Of the user and the values of each item feature (genre, …) that the target has: like-rate, excess, log count. Of the
    item: like-rate and log count over earlier training events. And the log number of events so far, and the log seconds
    since the last one.

    base_rate: the mean label of the training part. features: of items. item_rates: like-rate and count of the rows'
    items, for the kind "all".
    """
    if kind == "none":
        return {}
    averaged = {"like_rate": ("label", base_rate)}
    of_item = {}
    if item_rates is not None:
        averaged["excess"] = "excess", 0.0
        of_item = {"item_like_rate": item_rates[0], "item_log_count": np.log1p(item_rates[1])}
    of_user: dict[str, dict[str, np.ndarray]] = {}
    for name, (of, prior) in averaged.items():
        of_user[name] = {name: smoothed(past.total(of), past.count_N, prior)}
        of_user[name] |= {f"{name}_last_{window}": smoothed(*past.last(of, window), prior) for window in WINDOWS}
    of_values: dict[str, dict[str, np.ndarray]] = {name: {} for name in ("log_count", *averaged)}
    for feature in features:
        count_N, sums = past.shared(feature)
        of_values["log_count"][f"{feature}_log_count"] = np.log1p(count_N)
        for name, (of, _) in averaged.items():
            of_values[name][f"{feature}_{name}"] = smoothed(sums[of], count_N, of_user[name][name])
    columns = {"log_count": np.log1p(past.count_N), "log_seconds_since_last": np.log1p(past.seconds_N)}
    columns |= of_values["log_count"] | of_user["like_rate"] | of_values["like_rate"] | of_item
    return columns if kind == "user" else columns | of_user["excess"] | of_values["excess"]


class Scale(NamedTuple):
    """Mean and deviation, over the training part, of a column or of a dense feature (scale "log": of its logarithm)."""

    mean: float
    deviation: float
    scale: str = "standard"


@dataclass(frozen=True)
class StatisticsModel:
    """How the numbers that a ranker reads of a row are computed, as fitted on a training part; serving uses the same.

    kind: one of KINDS. base_rate: mean label of the training part. features: item features whose values are counted.
    columns: scale of each statistic, in order. dense: scale of each dense feature, behind them, in order.
    """

    kind: str
    base_rate: float
    features: list[str]
    columns: dict[str, Scale]
    dense: dict[str, Scale]

    @property
    def names(self) -> list[str]:
        """The name of each number that a ranker reads."""
        return [*self.columns, *self.dense]

    @cached_property
    def _scales(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of each statistic, float64 [F, 1]."""
        mean_F1 = np.array([[scale.mean] for scale in self.columns.values()])
        deviation_F1 = np.array([[scale.deviation] for scale in self.columns.values()])
        # A constant column (a count that is always 0, say) becomes 0, not rounding noise blown up.
        deviation_F1[deviation_F1 <= 1e-9] = np.inf
        return mean_F1, deviation_F1

    def standardised(self, raw: Mapping[str, np.ndarray], num_rows: int) -> np.ndarray:
        """The statistics of `raw_columns`, in this order, as a ranker reads them, float32 [N, F]."""
        values_NF = np.empty((num_rows, len(raw)), dtype=np.float32)
        mean_F1, deviation_F1 = self._scales
        for start in range(0, num_rows if raw else 0, BLOCK):
            block_FN = np.array([column_N[start : start + BLOCK] for column_N in raw.values()])
            values_NF[start : start + BLOCK] = ((block_FN - mean_F1) / deviation_F1).T
        return values_NF

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StatisticsModel:
        """The inverse of `to_json`, also for values that went through JSON, where tuples become lists."""
        scales = {part: {name: Scale(*scale) for name, scale in values[part].items()} for part in ("columns", "dense")}
        return cls(values["kind"], values["base_rate"], list(values["features"]), **scales)


def dense_inputs(data: PreparedData, *, kind: str = "all", new: NewArray = in_memory) -> Statistics:
    """The numbers that a ranker reads of each row, and their model, which is fitted on the training part.

    The numbers are the statistics, each column standardised by the training events, followed by the schema's dense
    features. kind: "all" statistics; "user" leaves out those that need other users (the item's, and every excess);
    "none" has none. new: makes the array of the numbers; the rest is in memory for some users at a time. Raises
    UserError for another kind, and if the training part is empty (there is nothing to standardise by).
    """
    check_kind(data, kind)
    base, items = base_rate(data), ItemHistory.of(data) if kind == "all" else None

    @lru_cache(maxsize=1)  # a log of one part is read once, not twice
    def raw(number: int) -> dict[str, np.ndarray]:
        return raw_statistics(data, kind=kind, part=parts[number], items=items)

    parts = user_parts(data)
    columns = _scales(raw, [data.split[part] == TRAIN for part in parts])
    scales = data.manifest["scales"]
    dense = {name: Scale(**scales[name], scale=data.schema.features[name].scale) for name in data.dense}
    model = StatisticsModel(kind, base, features_by_role(data.schema, "item"), columns, dense)
    values_RF = new("statistics", (data.num_rows, len(model.names)), np.float32)
    for number, part in enumerate(parts):
        row_N = _rows_of(data, part)
        values_RF[row_N, : len(columns)] = model.standardised(raw(number), len(row_N))
        rows = data.rows(row_N)
        index = {"item": rows.item, "user": data.user[rows.event], "context": rows.event}
        for place, (name, values) in enumerate(data.dense.items(), len(columns)):
            values_RF[row_N, place] = values[index[data.schema.features[name].role]]
    return Statistics(values_RF, model.names, model)


def _scales(raw: Callable[[int], dict[str, np.ndarray]], is_training: Sequence[np.ndarray]) -> dict[str, Scale]:
    """Mean and deviation of each column over the training events. raw: the columns of a part. is_training: by part."""
    found: list[tuple[float, dict[str, tuple[float, float]]]] = []
    total = sum(int(of_part.sum()) for of_part in is_training)
    for number, of_part in enumerate(is_training):
        training = np.flatnonzero(of_part)  # events come before drawn rows
        if len(training):
            of_columns = {
                name: (float((x := x_N[training]).mean()), float(x.std())) for name, x_N in raw(number).items()
            }
            found.append((len(training) / total, of_columns))
    scales = {}
    for name in found[0][1]:
        mean = sum(share * of_columns[name][0] for share, of_columns in found)
        variance = sum(
            share * (of_columns[name][1] ** 2 + (of_columns[name][0] - mean) ** 2) for share, of_columns in found
        )
        scales[name] = Scale(mean, math.sqrt(variance))
    return scales


def user_parts(data: PreparedData) -> list[slice]:
    """Events of whole users, some PART_EVENTS in each part (at least one user)."""
    bounds, offsets_U1 = [0], data.user_offsets
    while bounds[-1] < data.num_events:
        first = int(np.searchsorted(offsets_U1, bounds[-1], side="right"))  # the next user that begins later
        fitting = int(np.searchsorted(offsets_U1, bounds[-1] + PART_EVENTS, side="right")) - 1
        bounds.append(int(offsets_U1[max(first, fitting)]))
    return [slice(first, end) for first, end in pairwise(bounds)]


def _rows_of(data: PreparedData, part: slice) -> np.ndarray:
    """The events of a part, and behind them the rows drawn beside them, int64 [N]."""
    drawn = np.flatnonzero((data.negative_event >= part.start) & (data.negative_event < part.stop))
    return np.concatenate([np.arange(part.start, part.stop), data.num_events + drawn])


def raw_statistics(
    data: PreparedData, *, kind: str = "all", part: slice | None = None, items: ItemHistory | None = None
) -> dict[str, np.ndarray]:
    """`raw_columns` of the rows of whole users, float64 [N]: events, and behind them drawn rows.

    part: the events of these users; None = all. items: of the data, where it is known. Raises UserError like
    `dense_inputs`.
    """
    check_kind(data, kind)
    base, part = base_rate(data), slice(0, data.num_events) if part is None else part
    if kind == "none":
        return {}
    rows, values, item_rates = data.rows(_rows_of(data, part)), {"label": data.label[part].astype(np.float64)}, None
    if kind == "all":
        items = ItemHistory.of(data) if items is None else items
        item_rates = items.rates(rows.item, data.timestamp[data.before[rows.event]], base)
        values["excess"] = values["label"] - item_rates[0][: part.stop - part.start]
    past = LogPast(data, rows, values, part)
    return raw_columns(past, kind, base, features_by_role(data.schema, "item"), item_rates)


def check_kind(data: PreparedData, kind: str) -> None:
    """Raises UserError for an unknown kind of statistics, and for one that this log cannot have."""
    if kind not in KINDS:
        raise UserError(f"the kind of statistics is {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "all" and not data.absolute_time:
        raise UserError(
            "rank.statistics=all reads what other users did before, and this log has no clock that they share: "
            "set rank.statistics=user"
        )


def base_rate(data: PreparedData) -> float:
    """Mean label of the training part, one constant for all rows. Raises UserError where that part is empty."""
    is_training_E = data.split == TRAIN
    if not is_training_E.any():
        raise UserError(f"{data.path}: the training part has no events; expected some to take statistics from")
    return float(data.label[is_training_E].mean(dtype=np.float64))


class LogPast(Past):
    """The past of rows of a log: those of whole users, who have the events of `part`, of which `values` are."""

    def __init__(self, data: PreparedData, rows: Rows, values: Mapping[str, np.ndarray], part: slice) -> None:
        first_N, before_N = data.user_offsets[data.user[rows.event]], data.before[rows.event]
        seconds_N = data.timestamp[before_N] - data.timestamp[np.maximum(before_N - 1, first_N)]
        super().__init__(values, first_N - part.start, before_N - part.start, seconds_N)
        self.data, self.rows, self.item_E = data, rows, data.item[part]

    def shared(self, feature: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        column, num_events = self.data.item_columns[feature], len(self.item_E)
        place_P, value_P = entries(column, self.item_E)
        order = by_value(value_P)  # by value, user and time: events are in the order of their users
        event_P = at(np.arange(num_events), place_P)[order]
        key_P = value_P[order] * num_events + event_P
        row_V, value_V = entries(column, self.rows.item)
        order = by_value(value_V)  # nearly that of the keys
        begin_V, end_V = (
            searched(key_P, value_V * num_events + at(bound_N, row_V), order)
            for bound_N in (self.first_N, self.before_N)
        )

        def of_rows(values_V: np.ndarray) -> np.ndarray:
            return sum_of_rows(values_V, row_V, len(self.first_N))

        totals = {name: running(values_E[event_P]) for name, values_E in self.values.items()}
        return of_rows(end_V - begin_V), {
            name: of_rows(total[end_V] - total[begin_V]) for name, total in totals.items()
        }
