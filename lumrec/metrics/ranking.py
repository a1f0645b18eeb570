"""Ranking metrics, exact and in NumPy: AUC, grouped AUC, log loss, normalized entropy, calibration.

Every function takes arrays with one entry per scored row (an impression) and works in float64. A metric that is not
defined (such as AUC where all labels are equal) is `nan`; `ranking_metrics` adds a sentence with the reason.

Shape suffixes: N rows, G groups (users) that have rows.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lumrec.run.errors import UserError


def auc(label_N: ArrayLike, score_N: ArrayLike) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, a tie counting one half.

    `nan` where there is no such pair (no rows, or only one class). Only the order of the scores matters, so logits and
    probabilities give the same. Raises UserError for labels other than 0 and 1, lengths that differ, or scores that are
    not numbers.

    Of the four pairs below one is tied and three are in order: (3 + 1/2) / 4.

    >>> auc([0, 1, 0, 1], [0.1, 0.4, 0.4, 0.8])
    0.875
    >>> auc([1, 1], [0.2, 0.3])
    nan
    """
    label_N, score_N = checked_rows(label_N, score_N)
    return grouped_auc(label_N, score_N, np.zeros(len(label_N), dtype=np.int64)).value


class GroupedAuc(NamedTuple):
    """value: row-weighted mean of the groups' AUC. num_groups: groups with rows. num_skipped: those of one class."""

    value: float
    num_groups: int
    num_skipped: int


def grouped_auc(label_N: ArrayLike, score_N: ArrayLike, group_N: ArrayLike) -> GroupedAuc:
    """Mean of the AUC within each group (user), weighted by its rows (impressions): the AUC of DIN (1706.06978).

    A group whose rows are all of one class has no AUC: it is left out, with its weight, and counted. `value` is `nan`
    if no group is left. One sort handles all groups, without a loop over users.

    User 7 is in the right order (AUC 1, three rows), user 8 in the wrong one (AUC 0, two rows), user 9 has only one
    class: the mean is 3/5.

    >>> grouped_auc([0, 0, 1, 0, 1, 1], [0.1, 0.2, 0.3, 0.9, 0.2, 0.5], [7, 7, 7, 8, 8, 9])
    GroupedAuc(value=0.6, num_groups=3, num_skipped=1)
    """
    label_N, score_N = checked_rows(label_N, score_N)
    group_N = np.asarray(group_N)
    if group_N.shape != label_N.shape:
        raise UserError(f"got {group_N.size} groups for {label_N.size} labels; expected one group for each row")
    _, group_N = np.unique(group_N, return_inverse=True)
    auc_G, rows_G = auc_by_group(label_N, score_N, group_N), np.bincount(group_N)
    usable_G = np.isfinite(auc_G)
    num_groups, num_skipped = len(auc_G), int((~usable_G).sum())
    if num_skipped == num_groups:
        return GroupedAuc(float("nan"), num_groups, num_skipped)
    return GroupedAuc(float(np.average(auc_G[usable_G], weights=rows_G[usable_G])), num_groups, num_skipped)


def auc_by_group(label_N: np.ndarray, score_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """AUC within each group, [G], `nan` where a group has only one class. group_N: int64, 0 … G-1, each used."""
    order_N = np.lexsort((score_N, group_N))
    label_N, score_N, group_N = label_N[order_N], score_N[order_N], group_N[order_N]
    rows_G = np.bincount(group_N)
    starts_G = np.cumsum(rows_G) - rows_G
    rank_N = _tie_averaged_rank(score_N, group_N) - starts_G[group_N]  # 1 … rows of the group
    positives_G = np.bincount(group_N, weights=label_N)
    negatives_G = rows_G - positives_G
    pairs_G = positives_G * negatives_G
    # Mann-Whitney: the sum of the positives' ranks, minus the sum that they would have if all positives came first.
    wins_G = np.bincount(group_N, weights=rank_N * label_N) - positives_G * (positives_G + 1) / 2
    return np.divide(wins_G, pairs_G, out=np.full(len(rows_G), np.nan), where=pairs_G > 0)


def log_loss(label_N: ArrayLike, probability_N: ArrayLike) -> float:
    """Mean negative log likelihood in nats; `nan` for no rows.

    Probabilities are clipped to 2.2e-16 (float64's rounding unit, as in scikit-learn) from 0 and 1, so that a row that
    is certain and wrong costs 36, not infinity.

    >>> log_loss([1, 0], [0.5, 0.5])  # log 2
    0.6931471805599453
    """
    label_N, probability_N = checked_rows(label_N, probability_N)
    _check_probabilities(probability_N)
    return float(row_losses(label_N, probability_N).mean()) if len(label_N) else float("nan")


def row_losses(label_N: np.ndarray, probability_N: np.ndarray) -> np.ndarray:
    """The log loss of each row, [N]."""
    eps = np.finfo(np.float64).eps
    right_N = np.where(label_N == 1.0, probability_N, 1.0 - probability_N)
    return -np.log(np.clip(right_N, eps, 1 - eps))


def sigmoid(logit_N: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), written so that it does not overflow for large negative x."""
    return np.exp(-np.logaddexp(0.0, -logit_N))


def normalized_entropy(label_N: ArrayLike, probability_N: ArrayLike) -> float:
    """Log loss divided by the entropy of the rows' positive rate (He et al., 2014, ADKDD); 1 = no better than that
    rate.

    `nan` for no rows or only one class (its entropy is 0).

    >>> round(normalized_entropy([1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]), 12)
    1.0
    """
    label_N, probability_N = checked_rows(label_N, probability_N)
    rate = label_N.mean() if len(label_N) else 0.0
    if rate in (0.0, 1.0):
        return float("nan")
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return float(log_loss(label_N, probability_N) / entropy)


def calibration_ratio(label_N: ArrayLike, probability_N: ArrayLike) -> float:
    """Predicted positives divided by actual positives: above 1 predicts too many; `nan` without a positive.

    >>> calibration_ratio([1, 0, 0, 1], [0.5, 0.5, 0.5, 1.0])
    1.25
    """
    label_N, probability_N = checked_rows(label_N, probability_N)
    _check_probabilities(probability_N)
    return float(probability_N.sum() / label_N.sum()) if label_N.any() else float("nan")


def expected_calibration_error(label_N: ArrayLike, probability_N: ArrayLike, *, num_bins: int = 20) -> float:
    """Mean distance of predicted and actual rate over bins of equal width, weighted by rows; `nan` for no rows.

    Bin b holds the probabilities in [b / num_bins, (b + 1) / num_bins), the last bin also 1.0; empty bins do not count.

    Two bins: |0.2 - 0| weighs two of four rows, |0.8 - 1/2| the others: 0.1 + 0.15.

    >>> round(expected_calibration_error([0, 0, 1, 0], [0.2, 0.2, 0.8, 0.8], num_bins=2), 12)
    0.25
    """
    label_N, probability_N = checked_rows(label_N, probability_N)
    _check_probabilities(probability_N)
    if num_bins < 1:
        raise UserError(f"got num_bins={num_bins}; expected at least 1")
    if not len(label_N):
        return float("nan")
    bin_N = np.minimum((probability_N * num_bins).astype(np.int64), num_bins - 1)
    gap_per_bin = np.bincount(bin_N, weights=probability_N - label_N, minlength=num_bins)
    return float(np.abs(gap_per_bin).sum() / len(label_N))


def ranking_metrics(label_N: ArrayLike, logit_N: ArrayLike, user_N: ArrayLike) -> dict[str, float | str]:
    """All metrics of one scored part by name, as in `result.json`.

    Keys: auc, gauc, log_loss, ne, calibration, ece, num_rows, num_users, num_users_skipped; and, only if some of them
    are `nan`, `undefined`, a sentence with the reason. logit_N: scores before the sigmoid.
    """
    label_N, logit_N = checked_rows(label_N, logit_N)
    probability_N = sigmoid(logit_N)
    by_user = grouped_auc(label_N, logit_N, user_N)
    result: dict[str, float | str] = {
        "auc": auc(label_N, logit_N),
        "gauc": by_user.value,
        "log_loss": log_loss(label_N, probability_N),
        "ne": normalized_entropy(label_N, probability_N),
        "calibration": calibration_ratio(label_N, probability_N),
        "ece": expected_calibration_error(label_N, probability_N),
        "num_rows": len(label_N),
        "num_users": by_user.num_groups,
        "num_users_skipped": by_user.num_skipped,
    }
    if not len(label_N):
        result["undefined"] = "the part has no rows: every metric is nan"
    elif label_N.min() == label_N.max():
        result["undefined"] = f"all {len(label_N)} labels are {label_N[0]:g}: auc, gauc and ne need both classes"
    elif by_user.num_groups == by_user.num_skipped:
        result["undefined"] = f"each of the {by_user.num_groups} users has one class only: gauc is nan"
    return result


def _tie_averaged_rank(score_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """Ranks 1 … N of rows sorted by (group, score); tied rows of a group share their mean rank."""
    is_new_N = np.ones(len(score_N), dtype=bool)
    is_new_N[1:] = (score_N[1:] != score_N[:-1]) | (group_N[1:] != group_N[:-1])
    first_of_run = np.flatnonzero(is_new_N)
    length_of_run = np.diff(np.append(first_of_run, len(score_N)))
    return np.repeat(first_of_run + (length_of_run + 1) / 2, length_of_run)


def checked_rows(label_N: ArrayLike, score_N: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 vectors. Raises UserError for labels other than 0 and 1, lengths that differ, and nan."""
    label_N, score_N = np.asarray(label_N, dtype=np.float64), np.asarray(score_N, dtype=np.float64)
    if label_N.ndim != 1 or label_N.shape != score_N.shape:
        raise UserError(
            f"got labels of shape {label_N.shape} and scores of shape {score_N.shape}; expected vectors of one length"
        )
    if not np.isin(label_N, (0.0, 1.0)).all():
        raise UserError(f"got label {label_N[~np.isin(label_N, (0.0, 1.0))][0]}; expected 0 and 1 only")
    if np.isnan(score_N).any():
        raise UserError(f"got {int(np.isnan(score_N).sum())} scores that are nan; expected numbers")
    return label_N, score_N


def _check_probabilities(probability_N: np.ndarray) -> None:
    if len(probability_N) and not (probability_N.min() >= 0 and probability_N.max() <= 1):
        raise UserError(
            f"got probabilities from {probability_N.min():g} to {probability_N.max():g}; expected 0 … 1, of a sigmoid"
        )
