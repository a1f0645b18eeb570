"""How many events and users are in train, validation and test, and whether there are enough test events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from lumrec.data.splits import DEFAULT_FRACTIONS, PARTS, SplitConfig, SplitKind, assign_block, check_split, cut_times

FEW_USERS = 30  # with test events: an interval over fewer users means little
LEAST = {"test": 0.05, "valid": 0.01}  # least shares of the events, for a suggested split


def count_splits(
    split: SplitConfig, blocks: Sequence[Path], user_ids: pl.Series, *, absolute_time: bool = True
) -> dict[str, int]:
    """ "train_events", "train_users", … under `split`; the blocks of `ingest` are not changed."""
    cuts = cut_times(split, blocks, absolute_time=absolute_time)
    counts = {f"{part}_{what}": 0 for what in ("events", "users") for part in PARTS}
    for path in blocks:
        block = pl.read_parquet(path, columns=["user", "timestamp", "rows_back"])
        user_E, split_E = block["user"].to_numpy(), assign_block(split, block, user_ids, cuts)
        for code, part in enumerate(PARTS):
            counts[f"{part}_events"] += int((split_E == code).sum())
            counts[f"{part}_users"] += len(np.unique(user_E[split_E == code]))
    return counts


def split_line(counts: Mapping[str, int]) -> str:
    """One line: 8,200 train, 1,036 valid (10.1%), 1,025 test (10.0%) events; 400 users with test events."""
    total = max(sum(counts[f"{part}_events"] for part in PARTS), 1)
    held_out = ", ".join(
        f"{counts[f'{part}_events']:,} {part} ({counts[f'{part}_events'] / total:.1%})" for part in ("valid", "test")
    )
    return f"{counts['train_events']:,} train, {held_out} events; {counts['test_users']:,} users with test events"


def split_warnings(split: SplitConfig, counts: Mapping[str, int], *, absolute_time: bool) -> list[str]:
    """Why figures with this split would mislead, one sentence each; [] where they would not."""
    fractions, total = check_split(split), max(sum(counts[f"{part}_events"] for part in PARTS), 1)
    others = (
        "data.split.kind=user (whole users) or time (one moment for all)" if absolute_time else "data.split.kind=user"
    )
    warnings = [
        f"the {part} split has no events (kind {split.kind}): {what}"
        for part, what in (
            ("train", "nothing can be trained"),
            ("valid", "no weights can be chosen by it, so the last ones are used"),
            ("test", "nothing is measured"),
        )
        if not counts[f"{part}_events"]
    ]
    if split.kind == "temporal" and counts["test_events"] < 0.5 * fractions[2] * total:
        least = next((n for n in range(1, 1000) if n > np.ceil(n * (fractions[0] + fractions[1]) - 1e-9)), 1000)
        warnings.append(
            f"the temporal split leaves {counts['test_events']:,} of {total:,} events "
            f"({counts['test_events'] / total:.1%}) to test: a user needs {least} events to have one there; "
            f"{others} tests on more"
        )
    if 0 < counts["test_users"] < FEW_USERS:
        warnings.append(
            f"{counts['test_users']} users have test events ({split.kind} split): too few to say whether one model is "
            "better than another"
        )
    return warnings


def fitting_split(counts: Mapping[SplitKind, Mapping[str, int]]) -> SplitKind:
    """The first kind with enough events in each split; else one with events in all of them and most test users."""
    for kind, of_kind in counts.items():
        total = max(sum(of_kind[f"{part}_events"] for part in PARTS), 1)
        is_large = all(of_kind[f"{part}_events"] >= share * total for part, share in LEAST.items())
        if is_large and of_kind["test_users"] >= FEW_USERS and of_kind["train_events"] >= 0.5 * total:
            return kind
    smallest = {kind: min(of_kind[f"{part}_events"] for part in PARTS) for kind, of_kind in counts.items()}
    return max(counts, key=lambda kind: (smallest[kind] > 0, counts[kind]["test_users"]))


def candidate_kinds(*, all_positive: bool, absolute_time: bool) -> list[SplitKind]:
    """Kinds of split that suit a log, the preferred one first."""
    leave_one_out = {"leave_one_out"} if all_positive else set()
    wanted: list[SplitKind] = ["temporal", "leave_one_out", "user", "time"]
    known = {"temporal", "user", *leave_one_out, *({"time"} if absolute_time else set())}
    assert set(wanted) == set(DEFAULT_FRACTIONS)
    return [kind for kind in wanted if kind in known]
