"""The gain of a model with LUM knowledge over its base: the paired interval over users, and a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lumrec.metrics.bootstrap import METRICS, Comparison, Interval, compare_means, compare_user_means
from lumrec.metrics.compare import RANKS, SCORES, Ranks, Scores, better, read_ranks, read_scores
from lumrec.run.files import read_json

LEAST_USERS = LEAST_OF_A_CLASS = 30  # in the test part: an interval over fewer users means little
NO_SCORES = "no interval: not every run has its scores; train it again with overwrite=true"
OTHER_ROWS = "no interval: the runs were tested on different rows"
NO_STEPS = "trained in too few steps to say"
NO_ROWS = "too few test rows to say"
NO_HITS = "too few hits to say"
CHANCE = "the base is no better than chance"
BETTER, WORSE, NOISE = "better", "worse", "within noise"


def gains(
    base: Sequence[Path], other: Sequence[Path], metrics: Sequence[str] = METRICS, *, num_seeds: int = 0
) -> dict[str, float | str]:
    """The gain of the runs `other` over the runs `base`, paired by seed, on the same test rows.

    For each metric: "auc_gain" (mean over the pairs), "auc_gain_low", "auc_gain_high" (95 % over users, paired),
    "auc_gain_sd" (over several seeds) and "auc_verdict"; and "test_rows" and "test_users". If no interval can be
    computed, only the verdicts, which give the reason. metrics: those of rankers, or "hr@10", … for two towers.
    num_seeds: number of seeds of each model, if the pairs are from several models, one after another.
    """
    runs, num = [*base, *other], len(base)
    kept, read = (RANKS, read_ranks) if "@" in metrics[0] else (SCORES, read_scores)
    if not all((folder / kept).exists() for folder in runs):
        return {f"{metric}_verdict": NO_SCORES for metric in metrics}
    scores: list[Scores | Ranks] = [read(folder) for folder in runs]
    if not all(_same_rows(one, scores[0]) for one in scores):
        return {f"{metric}_verdict": OTHER_ROWS for metric in metrics}
    found, by_pair, too_few = _compared(scores, num, metrics)
    again = "make the run again with overwrite=true"
    notes = [str(read_json(folder / "result.json", again=again).get("note", "")) for folder in runs]
    user_N = scores[0].user_N
    result: dict[str, float | str] = {"test_rows": len(user_N), "test_users": len(np.unique(user_N))}
    for metric in metrics:
        difference = found[metric].difference
        by_seed = np.reshape(by_pair[metric], (-1, num_seeds or num)).mean(0).tolist()
        values = {"gain": difference.value, "gain_low": difference.low, "gain_high": difference.high}
        if len(by_seed) > 1:
            values["gain_sd"] = statistics.stdev(by_seed)
        result |= {f"{metric}_{name}": float(value) for name, value in values.items() if math.isfinite(value)}
        why_not = too_few[metric] if len(np.unique(user_N)) >= LEAST_USERS else NO_ROWS
        if not why_not and any("too few to learn from" in note for note in notes):
            why_not = NO_STEPS
        if not why_not and "auc" in found and found["auc"].a.low <= 0.5:
            why_not = CHANCE
        result[f"{metric}_verdict"] = why_not or verdict(metric, difference, by_seed)
    return result


def _same_rows(one: Scores | Ranks, other: Scores | Ranks) -> bool:
    names = [name for name in one._fields if name not in ("logit_N", "rank_N")]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def _compared(
    scores: Sequence[Any], num: int, metrics: Sequence[str]
) -> tuple[dict[str, Comparison], dict[str, list[float]], dict[str, str]]:
    """By metric: the comparison, the gain of each pair, and why an interval would mean little ("" = it does not)."""
    if isinstance(scores[0], Scores):
        label_N, user_N = scores[0].label_N, scores[0].user_N
        logits = [one.logit_N for one in scores]
        positives = int((label_N == 1).sum())
        few = NO_ROWS if min(positives, len(label_N) - positives) < LEAST_OF_A_CLASS else ""
        return *compare_means(label_N, logits[:num], logits[num:], user_N), dict.fromkeys(metrics, few)
    import torch

    from lumrec.evaluation.retrieval import user_metrics

    ks = sorted({int(metric.partition("@")[2]) for metric in metrics})
    values = [
        {name: value_B.numpy() for name, value_B in user_metrics(torch.tensor(one.rank_N), ks).items()}
        for one in scores
    ]
    hits = {metric: int(np.any([value[metric] > 0 for value in values], axis=0).sum()) for metric in metrics}
    too_few = {metric: NO_HITS if count < LEAST_OF_A_CLASS else "" for metric, count in hits.items()}
    return *compare_user_means(values[:num], values[num:]), too_few


def verdict(metric: str, difference: Interval, by_seed: Sequence[float]) -> str:
    """ "better" or "worse" if the interval excludes 0 and every seed agrees, otherwise "within noise"."""
    if not math.isfinite(difference.low):
        return NO_ROWS
    agrees = all(gain * difference.low > 0 for gain in by_seed)
    return {1: BETTER, -1: WORSE, 0: NOISE}[better(metric, difference) if agrees else 0]


def gain_text(result: Mapping[str, float | str], key: str) -> str:
    """The gain of a metric (`key`_gain, …) as text: +0.0064 [+0.0050, +0.0075] ± 0.0004, better."""
    gain, low, high, sd = (result.get(f"{key}_{name}") for name in ("gain", "gain_low", "gain_high", "gain_sd"))
    text = f"{gain:+.4f}" if isinstance(gain, float) else "–"
    if isinstance(low, float) and isinstance(high, float):
        text += f" [{low:+.4f}, {high:+.4f}]"
    if isinstance(sd, float):
        text += f" ± {sd:.4f}"
    return f"{text}, {result.get(f'{key}_verdict', NO_SCORES)}"


def measured(result: Mapping[str, float | str]) -> str:
    """Sentences to add to a table's protocol: the test rows, and how to read its gains; "" where that is not known."""
    rows, users = result.get("test_rows"), result.get("test_users")
    if not (isinstance(rows, (int, float)) and isinstance(users, (int, float))):
        return ""
    return (
        f" {rows:,.0f} test rows of {users:,.0f} users. Imp.: the gain, its 95 % interval over users (the same users "
        "for both), ± one standard deviation over the seeds if there are several; better or worse if the interval "
        "excludes 0 and every seed agrees."
    )


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """The notes of a pipeline's stages ("note/<stage>" of its result), each once, with the names of the stages."""
    stages: dict[str, list[str]] = {}
    for key, value in result.items():
        if key.startswith("note/"):
            stages.setdefault(str(value), []).append(key.removeprefix("note/"))
    return [f"{', '.join(names)}: {note}" for note, names in stages.items()]
