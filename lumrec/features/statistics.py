"""Dense statistics of each event, from what was known before its moment: how often, how recently, what the user liked.

::

    times of the user    3   5   8   8   9
    labels               1   0   1   1   0
    statistics of            ^ sees 1   ^ sees 1 0          (never its own moment's labels, never later ones)

What a moment is: lumrec/data/moments.py. Other users' labels enter in one place, an item's like-rate, and there only
those of training events with an EARLIER timestamp: no label of the validation or test part reaches a training row. (A
mean over all training rows but the row itself looks as honest and is not: beside the item's embedding, which knows the
whole sum, it gives the label away.)

A drawn row (data.negatives) has the statistics that its item would have had in its event's place, and counts nowhere.

Shape suffixes: E events, R rows (events, and behind them drawn ones), F statistics, S seconds that occur, P sorted
entries that are counted, V pairs (row, value of a feature).
"""

from typing import NamedTuple

import numpy as np
import torch

from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData, Rows
from lumrec.data.schema import features_by_role
from lumrec.data.splits import TRAIN
from lumrec.run.errors import UserError

KINDS = ("all", "user", "none")
WINDOWS = (5, 10, 50)
PRIOR_EVENTS = 5.0  # an unseen user, value or item counts as this many events at the expected rate


class Statistics(NamedTuple):
    """values_RF: float32, mean 0 and variance 1 over the training events; names: one for each of the F columns."""

    values_RF: np.ndarray
    names: list[str]


def dense_inputs(data: PreparedData, *, kind: str = "all") -> Statistics:
    """What a ranker reads as numbers of each row: `row_statistics`, and behind them the schema's dense features."""
    statistics = row_statistics(data, kind=kind)
    rows = data.rows(np.arange(data.num_rows))
    index = {"item": rows.item, "user": data.user[rows.event], "context": rows.event}
    declared = {name: values[index[data.schema.features[name].role]] for name, values in data.dense.items()}
    if not declared:
        return statistics
    columns_RF = np.stack(list(declared.values()), axis=1)
    return Statistics(np.concatenate([statistics.values_RF, columns_RF], axis=1), [*statistics.names, *declared])


def row_statistics(data: PreparedData, *, kind: str = "all") -> Statistics:
    """Statistics of every row of the prepared data, by row number, each column standardised by the training events.

    kind: "all" of them; "user" leaves out what needs other users (the item's, and every excess); "none" has no column.
    Raises UserError for another kind, and where the training part is empty (there is nothing to standardise by).
    """
    columns = raw_statistics(data, kind=kind)
    values_RF = np.empty((data.num_rows, len(columns)), dtype=np.float32)
    for f, column_R in enumerate(columns.values()):
        values_RF[:, f] = _standardised(column_R, np.flatnonzero(data.split == TRAIN))
    return Statistics(values_RF, list(columns))


def raw_statistics(data: PreparedData, *, kind: str = "all") -> dict[str, np.ndarray]:
    """Name of each statistic and its values before they are standardised, float64 [R].

    Of the user, over all events before this row's moment and over the last 5, 10 and 50: the smoothed like-rate, and
    its excess over the like-rate of the items shown (who likes good items is not easy to please for that). Of the user
    and each value of each item feature (genre, …) that the target has: like-rate, excess, log count. Of the item:
    like-rate and log count over earlier training events. And the log number of events so far, the log seconds since
    the last one.
    """
    if kind not in KINDS:
        raise UserError(f"the kind of statistics is {kind!r}; expected one of {', '.join(KINDS)}")
    is_training_E = data.split == TRAIN
    if not is_training_E.any():
        raise UserError(f"{data.path}: the training part has no events; expected some to take statistics from")
    if kind == "none":
        return {}
    if kind == "all" and not data.absolute_time:
        raise UserError(
            "rank.statistics=all reads what other users did before, and this log has no clock that they share: "
            "set rank.statistics=user"
        )
    label_E = data.label.astype(np.float64)
    base_rate = label_E[is_training_E].mean()  # one constant for all rows
    rows = data.rows(np.arange(data.num_rows))
    averaged, of_item = {"like_rate": (label_E, base_rate)}, {}
    if kind == "all":
        item_rate_R, item_count_R = _item_history(data, rows, is_training_E, base_rate)
        of_item = {"item_like_rate": item_rate_R, "item_log_count": np.log1p(item_count_R)}
        averaged["excess"] = label_E - item_rate_R[: data.num_events], 0.0
    of_user = {name: _user_averages(data, rows, x_E, name, prior=prior) for name, (x_E, prior) in averaged.items()}
    of_values: dict[str, dict[str, np.ndarray]] = {name: {} for name in ("log_count", *averaged)}
    for feature in features_by_role(data.schema, "item"):
        earlier = _Earlier(data, rows, data.item_columns[feature])
        of_values["log_count"][f"{feature}_log_count"] = np.log1p(earlier.count_R)
        for name, (x_E, _) in averaged.items():
            sum_R = earlier.sum(x_E) + PRIOR_EVENTS * of_user[name][name]
            of_values[name][f"{feature}_{name}"] = sum_R / (earlier.count_R + PRIOR_EVENTS)
    columns = _recency(data, rows) | of_values["log_count"] | of_user["like_rate"] | of_values["like_rate"] | of_item
    return columns if kind == "user" else columns | of_user["excess"] | of_values["excess"]


def _standardised(column_R: np.ndarray, training_rows: np.ndarray) -> np.ndarray:
    training = column_R[training_rows]
    deviation = training.std()
    # A constant column (a count that is always 0, say) becomes 0, not rounding noise blown up.
    return (column_R - training.mean()) / (deviation if deviation > 1e-9 else np.inf)


def _recency(data: PreparedData, rows: Rows) -> dict[str, np.ndarray]:
    """Log of the number of the user's events so far, and of the seconds since the last of them."""
    first_R, before_R = data.user_offsets[data.user[rows.event]], data.before[rows.event]
    seconds_R = data.timestamp[before_R] - data.timestamp[np.maximum(before_R - 1, first_R)]
    return {"log_count": np.log1p(before_R - first_R), "log_seconds_since_last": np.log1p(seconds_R)}


def _user_averages(
    data: PreparedData, rows: Rows, x_E: np.ndarray, name: str, *, prior: float
) -> dict[str, np.ndarray]:
    """Smoothed means of x over the user's events before each row's moment: over all of them, and over the last few."""
    first_R, before_R = data.user_offsets[data.user[rows.event]], data.before[rows.event]
    columns = {}
    for window in (None, *WINDOWS):
        begin_R = first_R if window is None else np.maximum(first_R, before_R - window)
        sum_R = _range_sum(x_E, begin_R, before_R) + PRIOR_EVENTS * prior
        columns[name if window is None else f"{name}_last_{window}"] = sum_R / (before_R - begin_R + PRIOR_EVENTS)
    return columns


def _range_sum(values_E: np.ndarray, begin_E: np.ndarray, end_E: np.ndarray) -> np.ndarray:
    """Sum of values over begin … end - 1, for each entry."""
    total = np.concatenate([[0.0], np.cumsum(values_E)])
    return total[end_E] - total[begin_E]


def _item_history(
    data: PreparedData, rows: Rows, is_training_E: np.ndarray, base_rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed like-rate and number of the item's training events with a strictly earlier timestamp, [R].

    Earlier than the row's moment, that is: for a row of a request, than its first row.
    """
    second_S, second_E = np.unique(data.timestamp, return_inverse=True)  # numbered, so that a key cannot overflow
    training = np.flatnonzero(is_training_E)
    key_P = data.item[training] * len(second_S) + second_E[training]
    order = np.argsort(key_P, kind="stable")
    key_P, label_P = key_P[order], data.label[training[order]].astype(np.float64)
    key_R = rows.item * len(second_S)
    begin_R, end_R = _searched(key_P, key_R), _searched(key_P, key_R + second_E[data.before[rows.event]])
    count_R = (end_R - begin_R).astype(np.float64)
    return (_range_sum(label_P, begin_R, end_R) + PRIOR_EVENTS * base_rate) / (count_R + PRIOR_EVENTS), count_R


class _Earlier:
    """The events of each row's user before its moment, on the values of one item feature that the row's item has.

    count_R: their number (float64). An event that shares two values with the row counts twice, and one that lists a
    value twice too.
    """

    def __init__(self, data: PreparedData, rows: Rows, column: Column) -> None:
        self.num_rows = len(rows.event)
        event_P, value_P = _entries(column, data.item)
        key_P = value_P * data.num_events + event_P  # an event has one user, so this sorts by value, user and time
        order = np.argsort(key_P, kind="stable")
        key_P, self.event_P = key_P[order], event_P[order]
        self.row_V, value_V = _entries(column, rows.item)
        event_V, key_V = rows.event[self.row_V], value_V * data.num_events
        self.begin_V = _searched(key_P, key_V + data.user_offsets[data.user[event_V]])
        self.end_V = _searched(key_P, key_V + data.before[event_V])
        self.count_R = self._of_rows(self.end_V - self.begin_V)

    def sum(self, x_E: np.ndarray) -> np.ndarray:
        """Sum of x over them, float64 [R]."""
        return self._of_rows(_range_sum(x_E[self.event_P], self.begin_V, self.end_V))

    def _of_rows(self, values_V: np.ndarray) -> np.ndarray:
        return np.bincount(self.row_V, weights=values_V, minlength=self.num_rows)


def _entries(column: Column, item_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place and value (int64) of each value that these items have, in order."""
    values, lengths = column.take(torch.from_numpy(item_X))
    return np.repeat(np.arange(len(item_X)), lengths.numpy()), values.numpy()


def _searched(key_P: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of `wanted` would be in the sorted keys; looked up in order, which is several times as fast."""
    order = np.argsort(wanted, kind="stable")
    place = np.empty(len(wanted), np.int64)
    place[order] = np.searchsorted(key_P, wanted[order])
    return place
