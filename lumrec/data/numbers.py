"""The values of dense features: numbers, missing values, text that is not a number, numbers that are too large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from lumrec.data.schema import FeatureConfig, SchemaConfig
from lumrec.run.errors import UserError

MAX_NUMBER = 1e30  # squares of larger numbers overflow in moments (64 bits) and models (32 bits)
UNREADABLE = 0.5  # share of values that are not numbers from which the column is refused
MAX_SPREADS = 1e6  # a deviation so many times the distance of two numbers makes them equal when they are scaled
LOW = 0.05  # quantile of the distances from the median that are compared with the deviation
NOISE = 1e-7  # numbers that differ by less than this share of themselves are one in 32 bits
SAMPLED_ROWS = 1_000_000  # for these quantiles
DECIMAL_COMMA = r"^[+-]?[0-9.]*[0-9],[0-9]+$"


@dataclass(frozen=True)
class NumberFacts:
    """Counts for one dense feature. rows: events, items or users. missing: without a value. unreadable: text that is
    not a number. example: such a text, one with a decimal comma if there is any.
    """

    rows: int
    missing: int
    unreadable: int
    example: str | None = None


def number(value: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """Numbers, or texts of numbers, as f64; null where the value is neither."""
    found = (value.str.strip_chars() if kind == pl.String else value).cast(pl.Float64, strict=False)
    return pl.when(found.is_not_nan()).then(found)


def number_checks(column: str, kind: pl.DataType) -> list[tuple[pl.Expr, str]]:
    """Checks for `first_reason` of the column of a dense feature."""
    value = number(pl.col(column), kind)
    return [
        (value.is_infinite(), f"{column} is not finite"),
        (value.abs() > MAX_NUMBER, f"{column} is beyond ±{MAX_NUMBER:g}"),
    ]


def number_facts(
    schema: SchemaConfig, blocks: Sequence[Path], catalogues: dict[str, pl.DataFrame]
) -> dict[str, NumberFacts]:
    """The facts of each dense feature. blocks: Parquet files of events, features by name. catalogues: by role.

    Raises UserError for a column of which most values are not numbers, for numbers with a decimal comma, and for a
    number so far from most others that scaling would make these equal.
    """
    facts = {}
    for name, feature in schema.features.items():
        if feature.kind != "dense":
            continue
        is_event = feature.role not in catalogues
        frame = pl.scan_parquet(list(blocks)) if is_event else catalogues[feature.role].lazy()
        column = name if is_event else feature.column
        facts[name] = _facts(frame, column)
        _check(name, feature, facts[name])
        if feature.scale == "standard":
            _check_outliers(name, frame, column, "order" if is_event else f"{feature.role}_id")
    return facts


def _facts(frame: pl.LazyFrame, column: str) -> NumberFacts:
    value, kind = pl.col(column), frame.collect_schema()[column]
    is_number = number(value, kind).is_not_null()
    is_missing = value.is_null()
    if kind == pl.String:
        is_missing = is_missing | value.str.strip_chars().str.to_lowercase().is_in(["", "nan"])
    elif kind.is_float():
        is_missing = is_missing | value.is_nan()
    bad = value.filter(~is_missing & ~is_number).cast(pl.String)
    with_comma = bad.filter(bad.str.contains(DECIMAL_COMMA)).first()
    found = frame.select(
        rows=pl.len(), missing=is_missing.sum(), unreadable=bad.len(), example=pl.coalesce(with_comma, bad.first())
    )
    return NumberFacts(**found.collect(engine="streaming").row(0, named=True))


def _check(name: str, feature: FeatureConfig, facts: NumberFacts) -> None:
    if not facts.unreadable:
        return
    example = facts.example or ""
    where = f"schema.features.{name}: {facts.unreadable:,} values of column {feature.column!r} are no numbers"
    if pl.Series([example]).str.contains(DECIMAL_COMMA).item():
        raise UserError(
            f"{where}, such as {example!r}; where the comma is a decimal point, say "
            f"data.log.decimal_comma=[{feature.column}]"
        )
    if facts.unreadable > UNREADABLE * (facts.rows - facts.missing):
        raise UserError(f"{where}, such as {example!r}; kind: dense is for numbers, use kind: id for text")


def _check_outliers(name: str, frame: pl.LazyFrame, column: str, row: str) -> None:
    """Raises UserError where the numbers spread so widely that scaling by their deviation makes most of them equal.

    row: column that identifies a row in the message.
    """
    value = number(pl.col(column), frame.collect_schema()[column])
    middle = frame.head(SAMPLED_ROWS).select(value.quantile(0.5)).collect().item()
    if middle is None:
        return
    distance = (value - middle).abs()  # of 0 or by rounding, where most numbers are equal: they do not count
    different = distance.filter(distance > NOISE * abs(middle))
    low = frame.head(SAMPLED_ROWS).select(different.quantile(LOW)).collect().item()
    farthest = distance == distance.max()
    found = frame.select(value.std(), far=value.filter(farthest).first(), row=pl.col(row).filter(farthest).first())
    deviation, far, at = found.collect(engine="streaming").row(0)
    if low is not None and deviation is not None and deviation > MAX_SPREADS * low:
        raise UserError(
            f"schema.features.{name}: {far:g} in row {at} is too far from the other numbers, such as {middle:g} and "
            f"{middle + low:g}: scaling would make these all equal; correct it, leave it empty, or use scale: log, or "
            "buckets as kind: id"
        )


def number_lines(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each dense feature without a number in each row; facts as in the manifest."""
    return [
        f"{name}: {one['missing']:,} of {one['rows']:,} values are missing"
        + (f", {one['unreadable']:,} are no numbers (such as {one['example']!r}) and read as missing")
        * bool(one["unreadable"])
        for name, one in facts.items()
        if one["missing"] or one["unreadable"]
    ]
