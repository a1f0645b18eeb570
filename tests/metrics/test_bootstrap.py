"""Bootstrap over users: weighted metrics equal those of rows that are repeated, and intervals cover the truth."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from lumrec.metrics.bootstrap import METRICS, _Rows, compare, intervals
from lumrec.metrics.ranking import ranking_metrics

ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(0, 4)),  # label, logit with many ties, user
    min_size=0,
    max_size=40,
)


def columns(rows: list) -> list[np.ndarray]:
    return [np.array([row[i] for row in rows], dtype=np.float64) for i in range(3)]


@settings(deadline=None, max_examples=150)
@given(ROWS, st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_weighted_metrics_are_those_of_repeated_rows(rows, weights):
    label_N, logit_N, user_N = columns(rows)
    weight_U = np.array(weights, dtype=np.float64)[np.unique(user_N).astype(int)]
    got = _Rows(label_N, [logit_N], user_N).metrics(weight_U)[0]
    # The plain twin: user u's rows as often as u was drawn, each copy a user of its own.
    repeated = [(*row[:2], 10 * row[2] + copy) for row in rows for copy in range(weights[row[2]])]
    expected = ranking_metrics(*columns(repeated))
    for name, value in zip(METRICS, got):
        assert value == pytest.approx(expected[name], nan_ok=True, abs=1e-12), name
    label, weight = label_N, np.array(weights, dtype=np.float64)[user_N.astype(int)]
    if (weight * label).any() and (weight * (1 - label)).any():
        assert got[0] == pytest.approx(sk.roc_auc_score(label, logit_N, sample_weight=weight), abs=1e-12)


def test_intervals_of_two_users_by_hand():
    # User 1 is in order (AUC 1), user 2 is not (AUC 0). Drawn twice: 1 1, 1 2, 2 1 or 2 2, a quarter each.
    found = intervals([1, 0, 1, 0], [2.0, 1.0, 0.0, 3.0], [1, 1, 2, 2], num_resamples=2000, level=0.4)
    # pairs of 1 2: (2 > 1) right, (2 > 3), (0 > 1) and (0 > 3) wrong: 1/4. At level 0.4 the middle 40 % are all 1 2.
    assert found["auc"] == (1 / 4, 1 / 4, 1 / 4)
    assert found["gauc"] == (1 / 2, 1 / 2, 1 / 2)
    wide = intervals([1, 0, 1, 0], [2.0, 1.0, 0.0, 3.0], [1, 1, 2, 2], num_resamples=2000)
    assert wide["auc"] == (1 / 4, 0, 1) and wide["gauc"] == (1 / 2, 0, 1)


def simulated(seed: int, *, users: int = 60, noise: float = 1.0) -> list[np.ndarray]:
    """label, logits of two models (the second sees more), user: users differ in taste and number of rows."""
    generator = np.random.default_rng(seed)
    user_N = np.repeat(np.arange(users), generator.integers(2, 30, users))
    taste_N = generator.normal(0, 1.5, users)[user_N]
    shown_N = generator.normal(0, 1, len(user_N))
    label_N = generator.random(len(user_N)) < 1 / (1 + np.exp(-taste_N - shown_N))
    return [label_N, shown_N + noise * generator.normal(0, 1, len(user_N)), shown_N, user_N]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    truth = {
        name: value.value for name, value in intervals(*pick(simulated(99, users=20_000)), num_resamples=1).items()
    }
    # Seeds of their own: the same stream would tie what is resampled to what was drawn.
    found = [intervals(*pick(simulated(s)), num_resamples=100, seed=10_000 + s, level=0.9) for s in range(200)]
    for name in METRICS:
        covered = np.mean([one[name].low <= truth[name] <= one[name].high for one in found])
        assert 0.82 < covered < 0.96, f"{name}: {covered}"
        # And a 90 % interval is 3.29 times as wide as the metric really scatters from one log to the next.
        width, scatter = (
            np.mean([one[name].high - one[name].low for one in found]),
            np.std([x[name].value for x in found]),
        )
        assert width / 3.29 == pytest.approx(scatter, rel=0.15), name


def pick(columns: list[np.ndarray]) -> list[np.ndarray]:
    return [columns[0], columns[1], columns[3]]


def test_rows_of_one_user_belong_together():
    # Each row ten times, under its user: no more is known than before, and the interval is as wide as it was.
    label_N, logit_N, _, user_N = simulated(0)
    once = intervals(label_N, logit_N, user_N)
    often = intervals(*(np.repeat(x, 10) for x in (label_N, logit_N, user_N)))
    for name in METRICS:
        assert often[name] == pytest.approx(once[name], abs=1e-12), name


def test_a_paired_difference_tells_apart_what_two_intervals_do_not():
    label_N, weaker_N, stronger_N, user_N = simulated(1, users=200, noise=0.5)
    found = compare(label_N, weaker_N, stronger_N, user_N)["auc"]
    assert found.a.high > found.b.low and found.difference.low > 0
    assert found.difference.value == found.b.value - found.a.value
    assert (found.a, found.b) == tuple(intervals(label_N, x, user_N)["auc"] for x in (weaker_N, stronger_N))
    swapped = compare(label_N, stronger_N, weaker_N, user_N)["auc"].difference
    assert swapped == pytest.approx([-x for x in (found.difference[0], found.difference[2], found.difference[1])])


def test_a_model_and_itself_differ_by_nothing():
    label_N, logit_N, _, user_N = simulated(2)
    found = compare(label_N, logit_N, logit_N * 1.0, user_N)
    assert all(found[name].difference == (0, 0, 0) for name in METRICS)


def test_noise_alone_is_seldom_told_apart():
    told = 0
    for seed in range(60):
        label_N, _, logit_N, user_N = simulated(seed + 1000)
        noise = np.random.default_rng(seed + 500).normal(0, 0.5, (2, len(label_N)))
        difference = compare(label_N, *(logit_N + noise), user_N, num_resamples=200)["auc"].difference
        told += not difference.low <= 0 <= difference.high
    assert told <= 9  # 5 % of 60 is 3


def test_seeds():
    label_N, logit_N, _, user_N = simulated(3)
    first, again, other = (intervals(label_N, logit_N, user_N, seed=seed) for seed in (0, 0, 1))
    assert first == again and first["auc"].low != other["auc"].low
    assert intervals(label_N, logit_N, [f"u{u}" for u in user_N]).keys() == set(METRICS)


@pytest.mark.parametrize(
    ("label", "user", "has_value", "has_bounds"),
    [
        ([], [], "", ""),
        ([1], [7], "log_loss", ""),
        ([1, 0, 1], [7, 7, 7], "auc gauc log_loss", ""),  # one user: nothing to resample
        ([1, 1, 1], [7, 8, 9], "log_loss", "log_loss"),  # one class
        ([1, 0, 1], [7, 7, 9], "auc gauc log_loss", "auc log_loss"),  # one user with both classes
        ([1, 0, 1], [7, 8, 9], "auc log_loss", "auc log_loss"),  # no user with both
    ],
)
def test_what_cannot_be_said_is_nan(label, user, has_value, has_bounds):
    found = intervals(label, np.arange(len(label)), user)
    assert [name for name in METRICS if math.isfinite(found[name].value)] == has_value.split()
    for bound in ("low", "high"):
        assert [name for name in METRICS if math.isfinite(getattr(found[name], bound))] == has_bounds.split()
    difference = compare(label, np.arange(len(label)), np.arange(len(label)), user)
    assert [name for name in METRICS if math.isfinite(difference[name].difference.low)] == has_bounds.split()


def test_extreme_and_infinite_logits():
    label_N, logit_N, user_N = [1, 0, 1, 0], [math.inf, -math.inf, math.inf, math.inf], [1, 1, 2, 2]
    found = intervals(label_N, logit_N, user_N)
    assert found["auc"].value == 3 / 4 and found["gauc"].value == 3 / 4
    assert all(math.isfinite(bound) for name in METRICS for bound in found[name])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intervals([0, 2], [0.1, 0.2], [1, 2]), "got label 2"),
        (lambda: intervals([0, 1], [0.1, 0.2], [1]), "one user for each row"),
        (lambda: compare([0, 1], [0.1, 0.2], [0.1], [1, 2]), "one length"),
        (lambda: intervals([0, 1], [0.1, 0.2], [1, 2], num_resamples=0), "got 0 resamples"),
        (lambda: intervals([0, 1], [0.1, 0.2], [1, 2], level=95), "level=95"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_hundreds_of_resamples_of_300_000_rows_take_seconds():
    generator = np.random.default_rng(0)
    user_N = generator.integers(6000, size=300_000)
    label_N, logit_N = generator.integers(2, size=300_000), generator.normal(size=300_000)
    started = time.process_time()
    intervals(label_N, logit_N, user_N, num_resamples=200)
    assert time.process_time() - started < 120  # 0.7 s on a quiet core
