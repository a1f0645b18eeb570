"""What LUM knowledge gives a ranker over its base: the paired interval over users, and a verdict in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lumrec.evaluation.bootstrap import Comparison, compare_means
from lumrec.evaluation.compare import LOWER_IS_BETTER, SCORES, Scores, read_scores

LEAST_USERS = LEAST_OF_A_CLASS = 30  # in the test part: with fewer, an interval over users says little
NO_STEPS = "trained in too few steps to say"
NO_ROWS = "too few test rows to say"
CHANCE = "the base is no better than chance"
BETTER, WORSE, NOISE = "better", "worse", "within noise"


def gains(base: Sequence[Path], other: Sequence[Path], notes: Sequence[str]) -> dict[str, float | str]:
    """The gain of the runs `other` over `base`, one of each for a seed, that scored the same test rows.

    For each metric: "auc_gain" (mean over the seeds), "auc_gain_low", "auc_gain_high" (95 % over users, paired),
    "auc_gain_sd" (over several seeds), "auc_verdict"; and "test_rows", "test_users". {} for runs that keep no scores.
    notes: what the runs noted about themselves.
    """
    if not all((folder / SCORES).exists() for folder in (*base, *other)):
        return {}
    of_base, of_other = ([read_scores(folder) for folder in folders] for folders in (base, other))
    label_N, user_N = of_base[0].label_N, of_base[0].user_N
    assert all(np.array_equal(one.row_N, of_base[0].row_N) for one in (*of_base, *of_other)), (base, other)
    logits_a, logits_b = ([one.logit_N for one in runs] for runs in (of_base, of_other))
    found, by_seed = compare_means(label_N, logits_a, logits_b, user_N)
    result: dict[str, float | str] = {"test_rows": len(label_N), "test_users": len(np.unique(user_N))}
    for metric, comparison in found.items():
        values = {"gain": comparison.difference.value, "gain_low": comparison.difference.low}
        values["gain_high"] = comparison.difference.high
        if len(base) > 1:
            values["gain_sd"] = statistics.stdev(by_seed[metric])
        result |= {f"{metric}_{name}": float(value) for name, value in values.items() if math.isfinite(value)}
        result[f"{metric}_verdict"] = verdict(
            metric, comparison, by_seed[metric], of_base[0], base_auc=found["auc"], notes=notes
        )
    return result


def verdict(
    metric: str,
    comparison: Comparison,
    by_seed: Sequence[float],
    scores: Scores,
    *,
    base_auc: Comparison,
    notes: Sequence[str] = (),
) -> str:
    """ "better" or "worse" where the interval leaves 0 out and every seed agrees, "within noise" where not; or why it
    cannot be said."""
    positives = int((scores.label_N == 1).sum())
    low, high = comparison.difference.low, comparison.difference.high
    if len(np.unique(scores.user_N)) < LEAST_USERS or not math.isfinite(low):
        return NO_ROWS
    if min(positives, len(scores.label_N) - positives) < LEAST_OF_A_CLASS:
        return NO_ROWS
    if any("too few to learn in" in note for note in notes):
        return NO_STEPS
    if base_auc.a.low <= 0.5:
        return CHANCE
    sign = -1 if metric in LOWER_IS_BETTER else 1
    for word, direction in ((BETTER, sign), (WORSE, -sign)):
        if min(low * direction, high * direction, *(gain * direction for gain in by_seed)) > 0:
            return word
    return NOISE


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """What stages noted about themselves ("note/<stage>" of a pipeline's result), each once with the stages' names."""
    stages: dict[str, list[str]] = {}
    for key, value in result.items():
        if key.startswith("note/"):
            stages.setdefault(str(value), []).append(key.removeprefix("note/"))
    return [f"{', '.join(names)}: {note}" for note, names in stages.items()]
