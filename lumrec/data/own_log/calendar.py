"""Dates and times outside the years 1 to 9999, which Python and JSON cannot write."""

from __future__ import annotations

import polars as pl

PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_DAY_S = 86_400
_FIRST_S, _END_S = -62_135_596_800 + _DAY_S, 253_402_300_800 - _DAY_S  # years 1 and 9999, less a day for zones


def out_of_calendar(column: pl.Expr, kind: pl.DataType) -> pl.Expr | None:
    """Whether dates and times of a column are outside the years 1 to 9999; None for types that never are."""
    if kind == pl.Date:
        low, high = _FIRST_S // _DAY_S, _END_S // _DAY_S
    elif isinstance(kind, pl.Datetime) and kind.time_unit != "ns":
        low, high = (end * PER_SECOND[kind.time_unit] for end in (_FIRST_S, _END_S))
    elif kind == pl.Time:
        low, high = 0, _DAY_S * PER_SECOND["ns"]
    else:
        return None
    return ~column.to_physical().is_between(low, high, closed="left")


def of_calendar(column: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """The column, null where its values are `out_of_calendar`."""
    beyond = out_of_calendar(column, kind)
    return column if beyond is None else pl.when(~beyond).then(column)
