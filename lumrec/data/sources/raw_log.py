"""RawLog: what every source returns, and the expressions that sources share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from lumrec.run.errors import MissingFileError, UserError, did_you_mean

# Times outside 1970-01-02 … 2100-01-01 UTC are rejected: many logs write 0 for "none", and milliseconds read as seconds
# are far beyond 2100.
FIRST_POSSIBLE_S, LAST_POSSIBLE_S = 1, 4_102_444_800
NO_CLOCK_S = 946_684_800  # 2000-01-01 UTC: the time of every event of a log without a clock
SHOWN_WITH = "lumrec.shown_with"  # a column of events, see RawLog
MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}


class DataSetMissing(MissingFileError):
    """The data set is not on this machine and could not be fetched; the message says how to place it."""


@dataclass(frozen=True)
class LabelConfig:
    """What counts as positive. Without at_least and values, the column holds 0/1 or true/false.

    column: column of the events; "" = the source's default.
    at_least: a number that is at least this large is positive.
    values: the texts that are positive, such as the behaviour types [cart, buy], each spelt as in the log. In a column
        of truth values write true or false; in a column of numbers "1" equals 1.0. Each value must occur in the log.
    """

    column: str = ""
    at_least: float | None = None
    values: list[str] = field(default_factory=list)

    def check(self, at: str) -> None:
        """Raises UserError for two rules at once (`at`: the section, with a dot)."""
        if self.values and self.at_least is not None:
            raise UserError(f"{at}values and {at}at_least are both given; expected one of the two")


@dataclass(frozen=True)
class RawLog:
    """All rows of one data set, before any is left out. The frames are lazy, so they may be larger than memory.

    events: one row for each row read: user_id, item_id (each Int64 or String), time_us (i64, microseconds UTC, null
        where there is none), order (i64, original row number, unique), label (f32, 0 or 1), and the columns that
        features read; where the source can have bad rows: `reason` (why the row cannot be used, null where it can) and
        `raw` (the row as read). Simulated events have `probability` (f32, the true P(label = 1)). Where the
        source knows it, SHOWN_WITH: rows of a user with the same value were shown together (null: by itself).
    items, users: one row for each row of the catalogue or user file: item_id or user_id (of the events' type), feature
        columns, and title, order, raw, reason where the source has them. None: there is no such file; ids and features
        are then taken from the events, features from the first event (in `order`) of each id.
    known_after: columns of events that are known only after the item was shown, the label's among them.
    utc_offset_hours: local time of the users, for hour, weekday and time_of_day.
    absolute_time: False where times of different users cannot be compared.
    has_clock: False where only the order of events is known, and times mean nothing.
    request: name by which features would find the column that SHOWN_WITH is made of; "" where there is none.
    exact: columns whose values may differ only in form, such as 007 and 7 (lumrec/data/forms.py); None: all of them.
    unusable: "events", "items", "users" → column → (when a value of it cannot be used, why): the row is left out where
        a feature reads it.
    left_out: columns of the files that no feature can read, and why.
    files: what was read. note: one line for the user (where it came from). extra: facts for the manifest.
    """

    events: pl.LazyFrame
    items: pl.LazyFrame | None
    users: pl.LazyFrame | None
    files: list[Path]
    note: str
    known_after: tuple[str, ...] = ()
    utc_offset_hours: float = 0.0
    absolute_time: bool = True
    has_clock: bool = True
    request: str = ""
    exact: tuple[str, ...] | None = None
    unusable: dict[str, dict[str, tuple[pl.Expr, str]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)


def usable_rows(catalogue: pl.LazyFrame) -> pl.LazyFrame:
    """The rows of a catalogue of items without a `reason`, the first one of each id."""
    if "reason" in catalogue.collect_schema():
        catalogue = catalogue.filter(pl.col("reason").is_null())
    return catalogue.unique("item_id", keep="first", maintain_order=True)


def first_reason(*checks: tuple) -> pl.Expr:
    """The reason of the first (condition, reason) pair whose condition is true (null is not), else null."""
    reason = pl.lit(None, dtype=pl.String)
    for condition, text in reversed(checks):
        reason = pl.when(condition).then(pl.lit(text)).otherwise(reason)
    return reason


def microseconds(time: pl.Expr, unit: str) -> pl.Expr:
    """A whole number of seconds ("s"), milliseconds ("ms") or microseconds ("us") as i64 microseconds.

    Null where it lies outside 1970-01-02 … 2100-01-01 UTC, so that nothing overflows.
    """
    factor = MICROSECONDS[unit]
    per_second = 1_000_000 // factor
    sane = time.is_between(FIRST_POSSIBLE_S * per_second, LAST_POSSIBLE_S * per_second - 1)
    return pl.when(sane).then(time.cast(pl.Int64) * factor)


def positive(column: pl.Expr, kind: pl.DataType, config: LabelConfig) -> pl.Expr:
    """The label (f32, 0 or 1) that `config` makes of a column of this type; null where the value gives none.

    A number, a truth value, or the text of either is read as 0/1; for 0/1 columns every other number is null. Numbers
    are compared with label.values as numbers, everything else as text.
    """
    if config.values:
        if not kind.is_numeric():
            return column.cast(pl.String).is_in(config.values).cast(pl.Float32)
        return column.cast(pl.Float64).is_in(_numbers(config.values, kind).implode()).cast(pl.Float32)
    number = column
    if not kind.is_numeric():
        text = column.cast(pl.String).str.strip_chars().str.to_lowercase()
        number = (
            pl.when(text.is_in(["true", "yes"]))
            .then(1.0)
            .when(text.is_in(["false", "no"]))
            .then(0.0)
            .otherwise(text.cast(pl.Float64, strict=False))
        )
    number = pl.when(number.cast(pl.Float64).is_finite()).then(number)
    if config.at_least is not None:
        return (number >= config.at_least).cast(pl.Float32)
    return pl.when((number == 0) | (number == 1)).then(number).cast(pl.Float32)


def check_label_values(rows: pl.LazyFrame, name: str, kind: pl.DataType, config: LabelConfig) -> None:
    """Raises UserError for a value of data.label.values that no row has; most often it is spelt differently there."""
    if not config.values:
        return
    column, wanted = pl.col(name).cast(pl.String), pl.Series(config.values, dtype=pl.String)
    if kind.is_numeric():
        column, wanted = pl.col(name).cast(pl.Float64), _numbers(config.values, kind)
    counts = rows.group_by(column.alias("value")).len().collect(engine="streaming").drop_nulls()
    absent = [text for text, is_there in zip(config.values, wanted.is_in(counts["value"].implode())) if not is_there]
    if absent:
        there = counts.sort(["len", "value"], descending=[True, False])["value"].cast(pl.String).to_list()
        hint, holds = did_you_mean(absent[0], there), ", ".join(map(repr, there[:20])) + ", …" * (len(there) > 20)
        raise UserError(f"data.label.values: {absent[0]!r} is in no row of column {name!r}{hint}; it holds {holds}")


def _numbers(values: list[str], kind: pl.DataType) -> pl.Series:
    """Texts as numbers (f64). Raises UserError for one that is not a number."""
    numbers = pl.Series(values, dtype=pl.String).str.strip_chars().cast(pl.Float64, strict=False)
    for text, number in zip(values, numbers):
        if number is None:
            raise UserError(f"data.label.values: got {text!r}; the label's column holds numbers ({kind})")
    return numbers
