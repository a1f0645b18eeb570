"""Dense statistics of each event, from what was known before it: how often, how recently and what the user liked.

::

    labels of the user   1   0   1   1   0
    statistics of            ^ sees 1   ^ sees 1 0 1        (never its own label, never a later one)

Other users' labels enter in one place, an item's like-rate, and there only those of training events with an EARLIER
timestamp: no label of the validation or test part reaches a training row. (A mean over all training rows but the row
itself looks as honest and is not: beside the item's embedding, which knows the whole sum, it gives the label away.)

Shape suffixes: E events, F statistics, P pairs (event, value of a feature).
"""

from typing import NamedTuple

import numpy as np
import torch

from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import features_by_role
from lumrec.data.splits import TRAIN

KINDS = ("all", "user", "none")
WINDOWS = (5, 10, 50)
PRIOR_EVENTS = 5.0  # an unseen user, value or item counts as this many events at the expected rate


class Statistics(NamedTuple):
    """values_EF: float32, mean 0 and variance 1 over the training part; names: one for each of the F columns."""

    values_EF: np.ndarray
    names: list[str]


def dense_inputs(data: PreparedData, *, kind: str = "all") -> Statistics:
    """What a ranker reads as numbers of each event: `row_statistics`, and behind them the schema's dense features."""
    statistics = row_statistics(data, kind=kind)
    index = {"item": data.item, "user": data.user, "context": np.arange(data.num_events)}
    declared = {name: values[index[data.schema.features[name].role]] for name, values in data.dense.items()}
    if not declared:
        return statistics
    columns_EF = np.stack(list(declared.values()), axis=1)
    return Statistics(np.concatenate([statistics.values_EF, columns_EF], axis=1), [*statistics.names, *declared])


def row_statistics(data: PreparedData, *, kind: str = "all") -> Statistics:
    """Statistics of every event of the prepared data, by event row number, each column standardised.

    kind: "all" of them; "user" leaves out what needs other users (the item's, and every excess); "none" has no column.
    Raises ValueError for another kind, and where the training part is empty (there is nothing to standardise by).
    """
    columns = raw_statistics(data, kind=kind)
    values_EF = np.empty((data.num_events, len(columns)), dtype=np.float32)
    for f, column_E in enumerate(columns.values()):
        values_EF[:, f] = _standardised(column_E, data.split == TRAIN)
    return Statistics(values_EF, list(columns))


def raw_statistics(data: PreparedData, *, kind: str = "all") -> dict[str, np.ndarray]:
    """Name of each statistic and its values before they are standardised, float64 [E].

    Of the user, over all events before this one and over the last 5, 10 and 50: the smoothed like-rate, and its excess
    over the like-rate of the items shown (who likes good items is not easy to please for that). Of the user and each
    value of each item feature (genre, …) that the target has: like-rate, excess, log count. Of the item: like-rate and
    log count over earlier training events. And the log number of events so far, the log seconds since the last one.
    """
    if kind not in KINDS:
        raise ValueError(f"the kind of statistics is {kind!r}; expected one of {', '.join(KINDS)}")
    is_training_E = data.split == TRAIN
    if not is_training_E.any():
        raise ValueError(f"{data.path}: the training part has no events; expected some to take statistics from")
    columns: dict[str, np.ndarray] = {}
    if kind == "none":
        return columns
    if kind == "all" and not data.absolute_time:
        raise ValueError(
            "rank.statistics=all reads what other users did before, and this log has no clock that they share: "
            "set rank.statistics=user"
        )
    label_E = data.label.astype(np.float64)
    base_rate = label_E[is_training_E].mean()  # one constant for all rows
    columns |= _recency(data)
    columns |= _user_averages(data, label_E, "like_rate", prior=base_rate)
    if kind == "all":
        item_rate_E, item_count_E = _item_history(data, label_E, is_training_E, base_rate)
        columns |= {"item_like_rate": item_rate_E, "item_log_count": np.log1p(item_count_E)}
        columns |= _user_averages(data, label_E - item_rate_E, "excess", prior=0.0)
    return columns


def _standardised(column_E: np.ndarray, is_training_E: np.ndarray) -> np.ndarray:
    training = column_E[is_training_E]
    deviation = training.std()
    # A constant column (a count that is always 0, say) becomes 0, not rounding noise blown up.
    return (column_E - training.mean()) / (deviation if deviation > 1e-9 else np.inf)


def _recency(data: PreparedData) -> dict[str, np.ndarray]:
    """Log of the user's number of events so far, of those with a value of the target, of the seconds since the last."""
    event_E, first_E = np.arange(data.num_events), data.user_offsets[data.user]
    previous_E = np.maximum(event_E - 1, first_E)
    seconds_E = np.maximum(data.timestamp - data.timestamp[previous_E], 0)
    columns = {"log_count": np.log1p(event_E - first_E), "log_seconds_since_last": np.log1p(seconds_E)}
    for feature in features_by_role(data.schema, "item"):
        count_E, _ = _value_history(data, data.item_columns[feature], np.zeros(data.num_events))
        columns[f"{feature}_log_count"] = np.log1p(count_E)
    return columns


def _user_averages(data: PreparedData, x_E: np.ndarray, name: str, *, prior: float) -> dict[str, np.ndarray]:
    """Smoothed means of x over the user's events before each: all, the last few, those with a value of the target."""
    event_E, first_E = np.arange(data.num_events), data.user_offsets[data.user]
    columns = {}
    for window in (None, *WINDOWS):
        begin_E = first_E if window is None else np.maximum(first_E, event_E - window)
        sum_E = _range_sum(x_E, begin_E, event_E) + PRIOR_EVENTS * prior
        columns[name if window is None else f"{name}_last_{window}"] = sum_E / (event_E - begin_E + PRIOR_EVENTS)
    for feature in features_by_role(data.schema, "item"):
        count_E, sum_E = _value_history(data, data.item_columns[feature], x_E)
        columns[f"{feature}_{name}"] = (sum_E + PRIOR_EVENTS * columns[name]) / (count_E + PRIOR_EVENTS)
    return columns


def _range_sum(values_E: np.ndarray, begin_E: np.ndarray, end_E: np.ndarray) -> np.ndarray:
    """Sum of values over begin … end - 1, for each entry."""
    total = np.concatenate([[0.0], np.cumsum(values_E)])
    return total[end_E] - total[begin_E]


def _item_history(
    data: PreparedData, label_E: np.ndarray, is_training_E: np.ndarray, base_rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed like-rate and number of the item's training events with a strictly earlier timestamp."""
    order = np.lexsort((data.timestamp, data.item))
    begin, end = _runs(data.item[order], data.timestamp[order])  # events of the same second are not "before"
    count_E, rate_E = np.empty(len(order)), np.empty(len(order))
    count_E[order] = _range_sum(is_training_E[order].astype(np.float64), begin, end)
    rate_E[order] = _range_sum((label_E * is_training_E)[order], begin, end)
    return (rate_E + PRIOR_EVENTS * base_rate) / (count_E + PRIOR_EVENTS), count_E


def _value_history(data: PreparedData, column: Column, x_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number and sum of x of the user's events before this one on each value that the target has, over its values."""
    if column.offsets is None:
        event_P, value_P = np.arange(data.num_events), column.values.numpy()[data.item]
    else:
        values, lengths = column.take(torch.from_numpy(data.item))
        event_P, value_P = np.repeat(np.arange(data.num_events), lengths.numpy()), values.numpy()
    key_P = data.user[event_P] * (int(value_P.max(initial=0)) + 1) + value_P
    order = np.argsort(key_P, kind="stable")  # pairs of one user and value stay in the order of events
    event_P, key_P = event_P[order], key_P[order]
    begin_P, end_P = _runs(key_P, event_P)  # a value that an event lists twice does not come before itself
    count_E = np.bincount(event_P, weights=end_P - begin_P, minlength=data.num_events)
    sum_E = np.bincount(event_P, weights=_range_sum(x_E[event_P], begin_P, end_P), minlength=data.num_events)
    return count_E, sum_E


def _runs(key_P: np.ndarray, moment_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For sorted pairs (key, moment): where each one's key begins, and where its moment within the key begins."""
    is_new_key = np.append(True, key_P[1:] != key_P[:-1])[: len(key_P)]
    is_new_moment = is_new_key | np.append(True, moment_P[1:] != moment_P[:-1])[: len(key_P)]
    place_P = np.arange(len(key_P))
    begin_P, end_P = (np.maximum.accumulate(np.where(is_new, place_P, 0)) for is_new in (is_new_key, is_new_moment))
    return begin_P, end_P
