"""Dense statistics of each event, from what was known before it: how often, how recently and what the user liked.

::

    labels of the user   1   0   1   1   0
    statistics of            ^ sees 1   ^ sees 1 0 1        (never its own label, never a later one)

Other users' labels enter in one place, an item's like-rate, and there only those of training events with an EARLIER
timestamp: no label of the validation or test part reaches a training row. (A mean over all training rows but the row
itself looks as honest and is not: beside the item's embedding, which knows the whole sum, it gives the label away.)

A drawn row (data.negatives) has the statistics that its item would have had in its event's place, and counts nowhere.

Shape suffixes: E events, R rows (events, and behind them drawn ones), F statistics, P pairs (row, value of a feature).
"""

from typing import NamedTuple

import numpy as np
import torch

from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData, Rows
from lumrec.data.schema import features_by_role
from lumrec.data.splits import TRAIN
from lumrec.errors import UserError

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

    Of the user, over all events before this row and over the last 5, 10 and 50: the smoothed like-rate, and its excess
    over the like-rate of the items shown (who likes good items is not easy to please for that). Of the user and each
    value of each item feature (genre, …) that the target has: like-rate, excess, log count. Of the item: like-rate and
    log count over earlier training events. And the log number of events so far, the log seconds since the last one.
    """
    if kind not in KINDS:
        raise UserError(f"the kind of statistics is {kind!r}; expected one of {', '.join(KINDS)}")
    is_training_E = data.split == TRAIN
    if not is_training_E.any():
        raise UserError(f"{data.path}: the training part has no events; expected some to take statistics from")
    columns: dict[str, np.ndarray] = {}
    if kind == "none":
        return columns
    if kind == "all" and not data.absolute_time:
        raise UserError(
            "rank.statistics=all reads what other users did before, and this log has no clock that they share: "
            "set rank.statistics=user"
        )
    label_E = data.label.astype(np.float64)
    base_rate = label_E[is_training_E].mean()  # one constant for all rows
    rows = data.rows(np.arange(data.num_rows))
    columns |= _recency(data, rows)
    columns |= _user_averages(data, rows, label_E, "like_rate", prior=base_rate)
    if kind == "all":
        item_rate_R, item_count_R = _item_history(data, rows, is_training_E, base_rate)
        columns |= {"item_like_rate": item_rate_R, "item_log_count": np.log1p(item_count_R)}
        columns |= _user_averages(data, rows, label_E - item_rate_R[: data.num_events], "excess", prior=0.0)
    return columns


def _standardised(column_R: np.ndarray, training_rows: np.ndarray) -> np.ndarray:
    training = column_R[training_rows]
    deviation = training.std()
    # A constant column (a count that is always 0, say) becomes 0, not rounding noise blown up.
    return (column_R - training.mean()) / (deviation if deviation > 1e-9 else np.inf)


def _recency(data: PreparedData, rows: Rows) -> dict[str, np.ndarray]:
    """Log of the user's number of events so far, of those with a value of the target, of the seconds since the last."""
    first_R = data.user_offsets[data.user[rows.event]]
    previous_R = np.maximum(rows.event - 1, first_R)
    seconds_R = np.maximum(data.timestamp[rows.event] - data.timestamp[previous_R], 0)
    columns = {"log_count": np.log1p(rows.event - first_R), "log_seconds_since_last": np.log1p(seconds_R)}
    for feature in features_by_role(data.schema, "item"):
        count_R, _ = _value_history(data, rows, data.item_columns[feature], np.zeros(data.num_events))
        columns[f"{feature}_log_count"] = np.log1p(count_R)
    return columns


def _user_averages(
    data: PreparedData, rows: Rows, x_E: np.ndarray, name: str, *, prior: float
) -> dict[str, np.ndarray]:
    """Smoothed means of x over the user's events before each: all, the last few, those with a value of the target."""
    first_R = data.user_offsets[data.user[rows.event]]
    columns = {}
    for window in (None, *WINDOWS):
        begin_R = first_R if window is None else np.maximum(first_R, rows.event - window)
        sum_R = _range_sum(x_E, begin_R, rows.event) + PRIOR_EVENTS * prior
        columns[name if window is None else f"{name}_last_{window}"] = sum_R / (rows.event - begin_R + PRIOR_EVENTS)
    for feature in features_by_role(data.schema, "item"):
        count_R, sum_R = _value_history(data, rows, data.item_columns[feature], x_E)
        columns[f"{feature}_{name}"] = (sum_R + PRIOR_EVENTS * columns[name]) / (count_R + PRIOR_EVENTS)
    return columns


def _range_sum(values_E: np.ndarray, begin_E: np.ndarray, end_E: np.ndarray) -> np.ndarray:
    """Sum of values over begin … end - 1, for each entry."""
    total = np.concatenate([[0.0], np.cumsum(values_E)])
    return total[end_E] - total[begin_E]


def _item_history(
    data: PreparedData, rows: Rows, is_training_E: np.ndarray, base_rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed like-rate and number of the item's training events with a strictly earlier timestamp, [R]."""
    timestamp_R, weight_R = data.timestamp[rows.event], _of_events(is_training_E, rows)
    order = np.lexsort((timestamp_R, rows.item))
    begin, end = _runs(rows.item[order], timestamp_R[order])  # events of the same second are not "before"
    count_R, rate_R = np.empty(len(order)), np.empty(len(order))
    count_R[order] = _range_sum(weight_R[order], begin, end)
    rate_R[order] = _range_sum((rows.label * weight_R)[order], begin, end)
    return (rate_R + PRIOR_EVENTS * base_rate) / (count_R + PRIOR_EVENTS), count_R


def _value_history(data: PreparedData, rows: Rows, column: Column, x_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number and sum of x of the user's events before each row on the values that its item has, over these, [R]."""
    row_P = np.argsort(rows.event, kind="stable")  # a drawn row beside its event
    if column.offsets is None:
        value_P = column.values.numpy()[rows.item[row_P]]
    else:
        values, lengths = column.take(torch.from_numpy(rows.item[row_P]))
        row_P, value_P = np.repeat(row_P, lengths.numpy()), values.numpy()
    key_P = data.user[rows.event[row_P]] * (int(value_P.max(initial=0)) + 1) + value_P
    order = np.argsort(key_P, kind="stable")  # pairs of one user and value stay in the order of events
    row_P, key_P = row_P[order], key_P[order]
    begin_P, end_P = _runs(key_P, rows.event[row_P])  # a value that an event lists twice does not come before itself
    sums = []
    for values_E in (np.ones(data.num_events), x_E):
        sum_P = _range_sum(_of_events(values_E, rows)[row_P], begin_P, end_P)
        sums.append(np.bincount(row_P, weights=sum_P, minlength=len(rows.event)))
    return sums[0], sums[1]


def _of_events(values_E: np.ndarray, rows: Rows) -> np.ndarray:
    """The values of events, and 0 for drawn rows, which count nowhere (float64 [R])."""
    return np.append(values_E.astype(np.float64), np.zeros(len(rows.event) - len(values_E)))


def _runs(key_P: np.ndarray, moment_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For sorted pairs (key, moment): where each one's key begins, and where its moment within the key begins."""
    is_new_key = np.append(True, key_P[1:] != key_P[:-1])[: len(key_P)]
    is_new_moment = is_new_key | np.append(True, moment_P[1:] != moment_P[:-1])[: len(key_P)]
    place_P = np.arange(len(key_P))
    begin_P, end_P = (np.maximum.accumulate(np.where(is_new, place_P, 0)) for is_new in (is_new_key, is_new_moment))
    return begin_P, end_P
