"""Confidence intervals of metrics, and of the difference of two models, by a bootstrap over users.

A user's rows belong together, so users are resampled (with replacement), not rows, which would give intervals that are
too narrow. A resample gives each user a weight, the number of times they were drawn; its metric is the weighted metric.
So rows are sorted once and never copied. Two models that scored the same rows are compared on the same resamples: what
makes a resample hard for both cancels out.

Shape suffixes: N rows, U users, R resamples, S score vectors, M metrics,
P positive and Q negative rows in the order of their scores.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lumrec.metrics.ranking import auc_by_group, checked_rows, row_losses, sigmoid
from lumrec.run.errors import UserError

METRICS = ("auc", "gauc", "log_loss")


class Interval(NamedTuple):
    """value: without resampling. low, high: ends of the percentile interval; nan where there is none."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """One metric of two models over the same rows. difference: b - a."""

    a: Interval
    b: Interval
    difference: Interval


def intervals(
    label_N: ArrayLike,
    logit_N: ArrayLike,
    user_N: ArrayLike,
    *,
    num_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """AUC, gAUC and log loss of logits, each with the interval of `level` of the resamples (Efron's percentiles).

    Resamples in which a metric is not defined (AUC where only one class was drawn) are left out of its interval. With
    only one user (for gAUC: only one with both classes) the bounds are nan.
    Raises UserError for labels other than 0 and 1, lengths that differ, nan, a level outside 0 … 1, no resamples.

    User 7's rows are in the right order, those of users 8 and 9 are not. Of the 27 possible resamples, 7 have user 7
    twice or more, and 1 three times.

    >>> intervals([1, 0, 1, 0, 1, 0], [2, 1, 1, 2, 1, 2], [7, 7, 8, 8, 9, 9], level=0.9)["gauc"]
    Interval(value=0.3333333333333333, low=0.0, high=0.6666666666666666)
    """
    rows = _Rows(label_N, [logit_N], user_N)
    value_SM, drawn_RSM = rows.metrics(np.ones(rows.num_users)), _resamples(rows, num_resamples, level, seed)
    return {
        name: _interval(value_SM[0, m], drawn_RSM[:, 0, m], rows.num_usable[m], level) for m, name in enumerate(METRICS)
    }


def compare(
    label_N: ArrayLike,
    logit_a_N: ArrayLike,
    logit_b_N: ArrayLike,
    user_N: ArrayLike,
    *,
    num_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Comparison]:
    """AUC, gAUC and log loss of two models' logits of the same rows, and their difference (see `intervals`).

    The models differ if the interval of the difference excludes 0; the intervals of a and b may still overlap.
    """
    return compare_means(
        label_N, [logit_a_N], [logit_b_N], user_N, num_resamples=num_resamples, level=level, seed=seed
    )[0]


def compare_means(
    label_N: ArrayLike,
    logits_a: Sequence[ArrayLike],
    logits_b: Sequence[ArrayLike],
    user_N: ArrayLike,
    *,
    num_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[dict[str, Comparison], dict[str, list[float]]]:
    """Like `compare`, for the mean of each metric over several seeds of a and as many of b; and b - a of each seed."""
    rows = _Rows(label_N, [*logits_a, *logits_b], user_N)
    return _compare(rows, METRICS, num_resamples=num_resamples, level=level, seed=seed)


def compare_user_means(
    a: Sequence[Mapping[str, np.ndarray]],
    b: Sequence[Mapping[str, np.ndarray]],
) -> tuple[dict[str, Comparison], dict[str, list[float]]]:
    """Like `compare_means`, for metrics that are means of one value per user: for each seed, name → value_U.

    >>> hit = [{"hr@10": np.array([0.0, 1.0, 1.0, 0.0])}, {"hr@10": np.array([1.0, 1.0, 1.0, 0.0])}]
    >>> compare_user_means(hit[:1], hit[1:])[0]["hr@10"].difference
    Interval(value=0.25, low=0.0, high=0.75)
    """
    users = _Users(np.array([list(values.values()) for values in (*a, *b)], dtype=np.float64))
    return _compare(users, list(a[0]))


def _compare(
    rows: "_Rows | _Users", names: Sequence[str], *, num_resamples: int = 500, level: float = 0.95, seed: int = 0
) -> tuple[dict[str, Comparison], dict[str, list[float]]]:
    """`compare_means` of score vectors; the first half belongs to a, the second to b."""
    num = len(rows.scores) // 2
    each_SM, drawn_RSM = rows.metrics(np.ones(rows.num_users)), _resamples(rows, num_resamples, level, seed)

    def means(metrics: np.ndarray) -> np.ndarray:
        """a, b and, as a third score vector, b - a within each resample."""
        a, b = metrics[..., :num, :].mean(-2), metrics[..., num:, :].mean(-2)
        return np.stack([a, b, b - a], axis=-2)

    value_SM, drawn_RSM = means(each_SM), means(drawn_RSM)
    return {
        name: Comparison(*(_interval(value_SM[s, m], drawn_RSM[:, s, m], rows.num_usable[m], level) for s in range(3)))
        for m, name in enumerate(names)
    }, {name: (each_SM[num:, m] - each_SM[:num, m]).tolist() for m, name in enumerate(names)}


class _Users:
    """Metrics that are means over users, value_SMU, for any weights of the users."""

    def __init__(self, value_SMU: np.ndarray) -> None:
        self.scores, (_, num_metrics, self.num_users) = value_SMU, value_SMU.shape
        self.num_usable = (self.num_users,) * num_metrics

    def metrics(self, weight_U: np.ndarray) -> np.ndarray:
        """[S, M]."""
        return self.scores @ weight_U / weight_U.sum()


class _Rows:
    """Scored rows, sorted once for each score vector, and the weighted metrics of any weights of their users."""

    def __init__(self, label_N: ArrayLike, logits: list[ArrayLike], user_N: ArrayLike) -> None:
        user_N = np.asarray(user_N)
        if user_N.shape != np.shape(label_N):
            raise UserError(f"got {user_N.size} users for {np.size(label_N)} labels; expected one user for each row")
        _, user_N = np.unique(user_N, return_inverse=True)
        self.rows_U = np.bincount(user_N)
        self.num_users = len(self.rows_U)
        self.scores = [_Scores(*checked_rows(label_N, logit_N), user_N, self.rows_U) for logit_N in logits]
        num_both = int(np.isfinite(self.scores[0].auc_U).sum()) if self.num_users else 0
        self.num_usable = (self.num_users, num_both, self.num_users)

    def metrics(self, weight_U: np.ndarray) -> np.ndarray:
        """[S, M]: METRICS of each score vector, where user u counts weight_U[u] times; nan where undefined."""
        return np.array([scores.metrics(weight_U) for scores in self.scores])


class _Scores:
    def __init__(self, label_N: np.ndarray, logit_N: np.ndarray, user_N: np.ndarray, rows_U: np.ndarray) -> None:
        is_positive_N, order_N = label_N == 1, np.argsort(logit_N, kind="stable")
        order_P, order_Q = order_N[is_positive_N[order_N]], order_N[~is_positive_N[order_N]]
        self.user_P, self.user_Q = user_N[order_P], user_N[order_Q]
        # For each positive: how many negatives score lower, and how many do not score higher. The difference is the
        # ties.
        self.lower_P, self.not_higher_P = (
            np.searchsorted(logit_N[order_Q], logit_N[order_P], side=side) for side in ("left", "right")
        )
        self.rows_U = rows_U
        self.auc_U = auc_by_group(label_N, logit_N, user_N)
        self.loss_U = np.bincount(user_N, weights=row_losses(label_N, sigmoid(logit_N)))
        self.has_auc_U = np.isfinite(self.auc_U)
        self.auc_rows_U = np.where(self.has_auc_U, self.auc_U * rows_U, 0.0)

    def metrics(self, weight_U: np.ndarray) -> tuple[float, float, float]:
        with np.errstate(invalid="ignore"):  # 0 / 0 is nan, which is what it means
            gauc = (weight_U @ self.auc_rows_U) / np.float64(weight_U @ (self.rows_U * self.has_auc_U))
            log_loss = (weight_U @ self.loss_U) / np.float64(weight_U @ self.rows_U)
            return self._auc(weight_U), gauc, log_loss

    def _auc(self, weight_U: np.ndarray) -> float:
        """Weight of the (positive, negative) pairs in the right order, ties half, over that of all pairs."""
        weight_P, negatives_Q = weight_U[self.user_P], np.append(0.0, np.cumsum(weight_U[self.user_Q]))
        wins = weight_P @ (negatives_Q[self.lower_P] + negatives_Q[self.not_higher_P]) / 2
        return wins / np.float64(weight_P.sum() * negatives_Q[-1])


def _resamples(rows: _Rows | _Users, num_resamples: int, level: float, seed: int) -> np.ndarray:
    """[R, S, M]: the metrics of each resample."""
    if num_resamples < 1 or not 0 < level < 1:
        raise UserError(f"got {num_resamples} resamples and level={level}; expected at least 1, and between 0 and 1")
    generator, num = np.random.default_rng(seed), rows.num_users
    # Draws as many users as there are and counts them: a multinomial, but faster than NumPy's.
    draws = (np.bincount(generator.integers(num, size=num), minlength=num) for _ in range(num_resamples if num else 0))
    return np.array([rows.metrics(weight_U.astype(np.float64)) for weight_U in draws]).reshape(
        -1, len(rows.scores), len(rows.num_usable)
    )


def _interval(value: float, drawn_R: np.ndarray, num_usable: int, level: float) -> Interval:
    drawn_R = drawn_R[np.isfinite(drawn_R)]
    if num_usable < 2 or not len(drawn_R):
        return Interval(float(value), float("nan"), float("nan"))
    low, high = np.quantile(drawn_R, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))
