"""The one form in which every source hands over its data, and the checks that all sources share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List

import polars as pl

LAST_POSSIBLE_TIME = 4_102_444_800  # 2100-01-01 UTC in seconds; milliseconds taken for seconds lie far beyond


class DataSetMissing(FileNotFoundError):
    """The data set is not on this machine and could not be fetched; the message says how to place it."""


@dataclass(frozen=True)
class RawLog:
    """One data set, every row of it, before anything is left out.

    events: one row for each line read: user_id, item_id (str), timestamp (i64, seconds), order (i64, original row
        number, unique), label (f32), the columns that features read; and where the source can have bad rows: `raw` (the
        line as read), `reason` (why the row cannot be used, null where it can). Simulated events have `probability`
        (f32, the true P(label = 1)).
    items, users: one row for each line of the catalogue or user file: item_id or user_id, feature columns; `title`,
        order, raw, reason where there are such.
    files: what was read. note: one line for the user (where it came from). extra: facts for the manifest.
    """

    events: pl.LazyFrame
    items: pl.LazyFrame
    users: pl.LazyFrame
    files: List[Path]
    note: str
    extra: Dict[str, object] = field(default_factory=dict)


def first_reason(*checks: tuple) -> pl.Expr:
    """The reason of the first (condition, reason) pair whose condition holds, else null; a null condition does not."""
    reason = pl.lit(None, dtype=pl.String)
    for condition, text in reversed(checks):
        reason = pl.when(condition).then(pl.lit(text)).otherwise(reason)
    return reason


def impossible_time(column: str = "timestamp") -> pl.Expr:
    """Whether a time in seconds lies outside 1970-01-01 … 2100-01-01 (0 stands for "no time" in many logs)."""
    return ~pl.col(column).is_between(1, LAST_POSSIBLE_TIME - 1)
