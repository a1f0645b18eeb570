"""Logs of ratings, such as MovieLens and Amazon, as events; a rating of 4 or more is positive by default."""

from __future__ import annotations

import polars as pl

from lumrec.data.sources.lines import is_missing, number_checks, whole_number
from lumrec.data.sources.raw_log import LabelConfig, first_reason, microseconds, positive

POSITIVE = LabelConfig(column="rating", at_least=4.0)
FIELDS = ["user_id", "item_id", "rating", "timestamp"]


def rating_events(
    rows: pl.LazyFrame,
    label: LabelConfig,
    malformed: tuple[pl.Expr, str],
    *,
    unit: str = "s",
    ids: pl.DataType = pl.String(),  # noqa: B008  (a constant)
    half_stars: bool = False,
) -> pl.LazyFrame:
    """The events of rows with FIELDS as text, `order` and `raw`.

    malformed: check for `first_reason` of a row that is not as published. unit: of the timestamps. ids: their type.
    half_stars: ratings are 0.5, 1, … 5; otherwise 1, 2, … 5.
    """
    keys = ("user_id", "item_id")
    stars = pl.col("rating").cast(pl.Float64, strict=False)
    possible = [half / 2 for half in range(1, 11)] if half_stars else [1.0, 2.0, 3.0, 4.0, 5.0]
    checks = [
        malformed,
        *(number_checks(*keys) if ids == pl.Int64 else ((is_missing(key), f"{key} is missing") for key in keys)),
        (is_missing("rating"), "rating is missing"),
        (stars.is_null(), "rating is not a number"),
        (~stars.is_in(possible), f"rating outside {'0.5' if half_stars else '1'}..5"),
        *number_checks("timestamp"),
    ]
    text = stars if half_stars else stars.cast(pl.Int8, strict=False)
    return rows.select(
        *(pl.col(key).cast(ids, strict=False) for key in keys),
        "order",
        microseconds(whole_number("timestamp"), unit).alias("time_us"),
        positive(stars, pl.Float64(), label).alias("label"),
        text.cast(pl.String).alias("rating"),
        first_reason(*checks).alias("reason"),
        "raw",
    )
