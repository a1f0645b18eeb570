"""Ranking metrics: fractions worked out by hand, ties, empty parts, one class, and agreement with scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from lumrec.metrics.ranking import (
    auc,
    calibration_ratio,
    expected_calibration_error,
    grouped_auc,
    log_loss,
    normalized_entropy,
    ranking_metrics,
)

ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 4)),  # label, score with many ties, user
    min_size=0,
    max_size=60,
)


def test_auc_by_hand():
    assert auc([1, 0, 1, 0], [0.9, 0.8, 0.4, 0.1]) == 3 / 4
    assert auc([1, 0, 1], [5.0, 5.0, 5.0]) == 1 / 2
    assert auc([0, 0, 1, 1, 1], [1, 2, 2, 0, 3]) == (0.5 + 1 + 0 + 0 + 1 + 1) / 6


def test_grouped_auc_by_hand():
    # user 1: pairs (3 > 1), (3 > 2) right -> 1; user 2: (2 vs 2) tie, (2 > 1) right -> 3/4; user 3: one class.
    label = [1, 0, 0, 1, 0, 0, 1, 1, 1, 1]
    score = [3, 1, 2, 2, 2, 1, 5, 6, 7, 8]
    user = [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert grouped_auc(label, score, user) == ((3 * 1 + 3 * 0.75) / 6, 2 + 1, 1)


def test_grouped_auc_weighs_users_by_their_rows():
    label = [1, 0] + [0, 0, 0, 1]
    score = [1, 0] + [9, 8, 7, 6]
    assert grouped_auc(label, score, [0, 0, 1, 1, 1, 1]).value == 2 / 6


def test_log_loss_and_normalized_entropy_by_hand():
    label, probability = [1, 0, 0, 1], [0.8, 0.4, 0.1, 0.5]
    expected = -(math.log(0.8) + math.log(0.6) + math.log(0.9) + math.log(0.5)) / 4
    assert log_loss(label, probability) == pytest.approx(expected, abs=1e-15)
    assert normalized_entropy(label, probability) == pytest.approx(expected / math.log(2), abs=1e-15)
    assert math.isfinite(log_loss([1], [0.0]))


def test_calibration_by_hand():
    assert calibration_ratio([1, 0, 1, 0], [0.5, 0.25, 0.25, 0.5]) == 1.5 / 2
    # bins of width 1/2: {.1, .3} with rate 1/2 against .2; {.5, 1.0} with rate 1 against .75.
    ece = expected_calibration_error([0, 1, 1, 1], [0.1, 0.3, 0.5, 1.0], num_bins=2)
    assert ece == pytest.approx(0.5 * 0.3 + 0.5 * 0.25, abs=1e-15)


@settings(deadline=None, max_examples=150)
@given(ROWS)
def test_agrees_with_scikit_learn_and_a_loop_over_users(rows):
    label, score, user = (np.array(column, dtype=np.int64) for column in zip(*rows)) if rows else ([], [], [])
    label, score, user = np.asarray(label), np.asarray(score), np.asarray(user)

    def reference(mask):
        both = len(set(label[mask])) == 2
        return sk.roc_auc_score(label[mask], score[mask]) if both else math.nan

    everything = np.ones(len(label), dtype=bool)
    assert auc(label, score) == pytest.approx(reference(everything), nan_ok=True, abs=1e-12)
    per_user = {int(u): reference(user == u) for u in np.unique(user)}
    weights = {u: int((user == u).sum()) for u, value in per_user.items() if not math.isnan(value)}
    expected = sum(per_user[u] * n for u, n in weights.items()) / sum(weights.values()) if weights else math.nan
    got = grouped_auc(label, score, user)
    assert got.value == pytest.approx(expected, nan_ok=True, abs=1e-12)
    assert (got.num_groups, got.num_skipped) == (len(per_user), len(per_user) - len(weights))
    if len(label):
        probability = score / 6
        assert log_loss(label, probability) == pytest.approx(sk.log_loss(label, probability, labels=[0, 1]), abs=1e-9)


@pytest.mark.parametrize("rows", [2, 7, 1000])
def test_normalized_entropy_and_calibration_error_agree_with_scikit_learn(rows):
    generator = np.random.default_rng(rows)
    probability, label = generator.random(rows), generator.integers(2, size=rows)
    label[:2] = 0, 1
    constant = np.full(rows, label.mean())
    expected = sk.log_loss(label, probability) / sk.log_loss(label, constant)
    assert normalized_entropy(label, probability) == pytest.approx(expected, abs=1e-12)
    for num_bins in (1, 5, 20):
        actual, predicted = calibration_curve(label, probability, n_bins=num_bins)
        in_bin = np.histogram(probability, num_bins, (0, 1))[0]
        expected = np.average(np.abs(actual - predicted), weights=in_bin[in_bin > 0])
        got = expected_calibration_error(label, probability, num_bins=num_bins)
        assert got == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(ROWS, st.randoms(use_true_random=False))
def test_order_of_rows_and_monotone_maps_of_scores_change_nothing(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    first, second = (list(zip(*r)) or [[], [], []] for r in (rows, shuffled))
    assert auc(first[0], first[1]) == pytest.approx(auc(second[0], np.exp(second[1])), nan_ok=True, abs=1e-12)
    got, again = grouped_auc(*first), grouped_auc(*second)
    assert got.value == pytest.approx(again.value, nan_ok=True, abs=1e-12)


def test_one_class_and_no_rows_are_stated():
    one_class = ranking_metrics([1, 1, 1], [0.1, -0.2, 0.3], [0, 0, 1])
    assert math.isnan(one_class["auc"]) and math.isnan(one_class["gauc"]) and math.isnan(one_class["ne"])
    assert math.isfinite(one_class["log_loss"]) and one_class["num_users_skipped"] == 2
    assert "all 3 labels are 1" in one_class["undefined"]
    empty = ranking_metrics([], [], [])
    assert empty["num_rows"] == 0 and math.isnan(empty["log_loss"]) and "no rows" in empty["undefined"]
    per_user = ranking_metrics([1, 0], [0.1, -0.2], [0, 1])
    assert per_user["auc"] == 1 and "each of the 2 users" in per_user["undefined"]
    assert "undefined" not in ranking_metrics([1, 0], [0.1, -0.2], [0, 0])


def test_extreme_logits_stay_finite():
    result = ranking_metrics([1, 0, 0, 1], [800.0, -800.0, 800.0, -800.0], [0, 0, 0, 0])
    assert all(math.isfinite(value) for value in result.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([0, 2], [0.1, 0.2]), "got label 2"),
        (lambda: auc([0, 1], [0.1]), "one length"),
        (lambda: auc([0, 1], [0.1, math.nan]), "nan"),
        (lambda: log_loss([0, 1], [0.1, 1.2]), "of a sigmoid"),
        (lambda: grouped_auc([0, 1], [0.1, 1.2], [1]), "one group for each row"),
        (lambda: expected_calibration_error([0, 1], [0.1, 0.2], num_bins=0), "num_bins"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
