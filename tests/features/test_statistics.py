"""Dense statistics of rows: equal to a slow twin, blind to their own label and to whatever is not before the row."""

import copy

import numpy as np
import pytest
import torch

from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData
from lumrec.data.splits import TEST, TRAIN
from lumrec.experiments.config import load
from lumrec.features import statistics
from lumrec.features.items import PRIOR_EVENTS
from lumrec.features.statistics import Statistics, dense_inputs, raw_statistics
from lumrec.run.errors import UserError
from lumrec.stages.registry import STAGES


def changed(data: PreparedData, **values) -> PreparedData:
    other = copy.copy(data)
    for name, value in values.items():
        setattr(other, name, value)
    return other


def row_statistics(data: PreparedData, kind: str = "all") -> Statistics:
    """The statistics without the dense features that follow them."""
    return dense_inputs(changed(data, dense={}), kind=kind)


def slow_row(data: PreparedData, row: int) -> dict[str, float]:
    """The statistics of one row, word by word, in Python loops."""
    user, item, moment = data.user[row], data.item[row], data.timestamp[row]
    base = data.label[data.split == TRAIN].mean(dtype=np.float64)

    def item_history(target: int, before: int) -> list[float]:
        is_earlier = (data.item == target) & (data.split == TRAIN) & (data.timestamp < before)
        return [float(x) for x in data.label[is_earlier]]

    def rate(labels: list[float], prior: float) -> float:
        return (sum(labels) + PRIOR_EVENTS * prior) / (len(labels) + PRIOR_EVENTS)

    past = [e for e in range(data.user_offsets[user], row)]
    label = {e: float(data.label[e]) for e in past}
    excess = {e: label[e] - rate(item_history(data.item[e], data.timestamp[e]), base) for e in past}
    expected = {
        "item_like_rate": rate(item_history(item, moment), base),
        "item_log_count": np.log1p(len(item_history(item, moment))),
        "log_count": np.log1p(len(past)),
        "log_seconds_since_last": np.log1p(moment - data.timestamp[past[-1]]) if past else 0.0,
    }
    for suffix, events in [("", past), *((f"_last_{n}", past[-n:]) for n in (5, 10, 50))]:
        expected[f"like_rate{suffix}"] = rate([label[e] for e in events], base)
        expected[f"excess{suffix}"] = rate([excess[e] for e in events], 0.0)
    for feature, column in data.item_columns.items():

        def values(of: int, column: Column = column) -> list[int]:
            return column.take(torch.tensor([data.item[of]]))[0].tolist()

        events = [e for value in values(row) for e in past for other in values(e) if other == value]
        expected[f"{feature}_log_count"] = np.log1p(len(events))
        expected[f"{feature}_like_rate"] = rate([label[e] for e in events], expected["like_rate"])
        expected[f"{feature}_excess"] = rate([excess[e] for e in events], expected["excess"])
    return expected


def test_equal_to_a_slow_twin(tiny_prepared: PreparedData):
    columns = raw_statistics(tiny_prepared)
    rows = np.random.default_rng(0).choice(tiny_prepared.num_events, 60, replace=False)
    for row in [0, *rows.tolist()]:
        expected = slow_row(tiny_prepared, row)
        assert sorted(expected) == sorted(columns)
        got = {name: column[row] for name, column in columns.items()}
        assert got == pytest.approx(expected, abs=1e-9), row


def test_a_row_knows_nothing_that_is_not_before_it(tiny_prepared: PreparedData):
    """Labels of the row, of the user's later events and of all others' events from that second on, shuffled at will."""
    data, random = tiny_prepared, np.random.default_rng(1)
    before = raw_statistics(data)
    for row in random.choice(data.num_events, 12, replace=False):
        is_hidden = np.where(
            data.user == data.user[row], np.arange(data.num_events) >= row, data.timestamp >= data.timestamp[row]
        )
        # Within the training part and outside of it, so that the base rate, one constant for all rows, stays.
        label = data.label.copy()
        for part in (data.split == TRAIN, data.split != TRAIN):
            label[is_hidden & part] = random.permutation(label[is_hidden & part])
        after = raw_statistics(changed(data, label=label))
        for name, column in before.items():
            assert after[name][row] == pytest.approx(column[row], abs=1e-9), name


def test_labels_of_validation_and_test_reach_no_training_row(tiny_prepared: PreparedData):
    data = tiny_prepared
    is_training = data.split == TRAIN
    label = np.where(is_training, data.label, 1 - data.label)
    before, after = row_statistics(data), row_statistics(changed(data, label=label))
    assert np.array_equal(before.values_RF[is_training], after.values_RF[is_training])
    assert not np.array_equal(before.values_RF[data.split == TEST], after.values_RF[data.split == TEST])


def test_a_value_listed_twice_does_not_show_the_rows_own_label(tiny_prepared: PreparedData):
    data = tiny_prepared
    twice = Column(torch.arange(data.num_items).repeat_interleave(2) % 5, torch.arange(data.num_items + 1) * 2)
    name = next(iter(data.item_columns))
    data = changed(data, item_columns={**data.item_columns, name: twice})
    label = data.label.copy()
    row = int(data.user_offsets[1]) - 1  # a user's last row: nobody's past
    label[row] = 1 - label[row]
    before, after = raw_statistics(data, kind="user"), raw_statistics(changed(data, label=label), kind="user")
    base_shift = 1 / (data.split == TRAIN).sum()
    assert before[f"{name}_like_rate"][row] == pytest.approx(after[f"{name}_like_rate"][row], abs=base_shift)


def test_standardised_over_the_training_part_and_constant_columns_are_zero(tiny_prepared: PreparedData):
    data = changed(tiny_prepared, timestamp=np.zeros_like(tiny_prepared.timestamp))
    values_RF, names, _ = row_statistics(data)
    assert values_RF.dtype == np.float32 and values_RF.shape == (data.num_events, len(names))
    training = values_RF[data.split == TRAIN].astype(np.float64)
    deviation = training.std(axis=0)
    assert np.allclose(training.mean(axis=0), 0, atol=1e-4)
    # All at one second: nothing is earlier, so that the item's count is 0 everywhere, and so is the time since.
    constant = {"log_seconds_since_last", "item_log_count", "item_like_rate"}
    assert {name for name, x in zip(names, deviation) if x == 0} >= constant
    assert np.allclose(deviation[deviation > 0], 1, atol=1e-3)


def test_kinds(tiny_prepared: PreparedData):
    everything, user, none = (row_statistics(tiny_prepared, kind=kind) for kind in ("all", "user", "none"))
    assert none.values_RF.shape == (tiny_prepared.num_events, 0)
    assert set(user.names) < set(everything.names)
    assert not any("excess" in name or name.startswith("item_like") for name in user.names)
    is_training = tiny_prepared.split == TRAIN
    others = is_training & (tiny_prepared.user != 0)
    label = tiny_prepared.label.copy()
    label[others] = np.random.default_rng(0).permutation(label[others])
    columns = raw_statistics(changed(tiny_prepared, label=label), kind="user")
    rows = slice(0, tiny_prepared.user_offsets[1])
    for name, column in raw_statistics(tiny_prepared, kind="user").items():
        assert np.allclose(columns[name][rows], column[rows]), name


@pytest.mark.parametrize("part_events", [1, 100])
@pytest.mark.parametrize("kind", ["all", "user", "none"])
def test_logs_in_parts_have_the_same_statistics(tiny_prepared: PreparedData, monkeypatch, kind, part_events):
    whole = dense_inputs(tiny_prepared, kind=kind)
    monkeypatch.setattr(statistics, "PART_EVENTS", part_events)
    parts = statistics.user_parts(tiny_prepared)
    events = np.concatenate([np.arange(part.start, part.stop) for part in parts])
    assert len(parts) > 5 and np.array_equal(events, np.arange(tiny_prepared.num_events))
    for part in parts:  # of whole users, with no more events than asked for, unless one user has more
        users = np.unique(tiny_prepared.user[part])
        assert part.stop - part.start <= part_events or len(users) == 1
        assert np.isin(tiny_prepared.user, users).sum() == part.stop - part.start
    made = dense_inputs(tiny_prepared, kind=kind)
    np.testing.assert_allclose(made.values_RF, whole.values_RF, rtol=0, atol=2e-6)
    assert made.names == whole.names and made.model.dense == whole.model.dense


def test_errors(tiny_prepared: PreparedData):
    with pytest.raises(ValueError, match="'some'; expected one of all, user, none"):
        row_statistics(tiny_prepared, kind="some")
    with pytest.raises(ValueError, match="training part has no events"):
        row_statistics(changed(tiny_prepared, split=np.full_like(tiny_prepared.split, TEST)))


def test_dense_features_stand_behind_the_statistics(tiny_prepared: PreparedData):
    data = tiny_prepared
    plain, inputs = row_statistics(data), dense_inputs(data)
    assert inputs.names == [*plain.names, *data.dense]
    assert len(data.dense) > 1
    assert inputs.values_RF.dtype == np.float32
    assert np.array_equal(inputs.values_RF[:, : len(plain.names)], plain.values_RF)
    index = {"item": data.item, "user": data.user, "context": np.arange(data.num_events)}
    for name, values in data.dense.items():
        of_event = values[index[data.schema.features[name].role]]
        assert np.array_equal(inputs.values_RF[:, inputs.names.index(name)], of_event), name
    none = changed(data, dense={})
    assert dense_inputs(none, kind="user").names == row_statistics(data, kind="user").names


def test_a_log_without_a_common_clock_has_no_statistics_of_others(tiny_prepared: PreparedData):
    data = changed(tiny_prepared, absolute_time=False)
    with pytest.raises(ValueError, match="no clock that they share: set rank.statistics=user"):
        row_statistics(data)
    with pytest.raises(UserError, match="no clock that they share: set rank.statistics=user"):
        STAGES["rank"].check_data(load(None, []), data)  # before a pipeline trains a LUM
    assert row_statistics(data, kind="user").names
