"""Raw values to rows of embedding tables, counted over the training part alone; row 0 is "unknown"."""

from __future__ import annotations

from typing import Tuple

import polars as pl
import pyarrow as pa


def count_values(values: pl.Series, weight: pl.Series | None = None) -> pl.DataFrame:
    """key (str), count (i64) of a column of single values or lists.

    Each entry weighs `weight` (1 where None); an entry of weight 0, a missing and an empty value are not counted.
    """
    frame = pl.DataFrame(
        {"key": values, "count": pl.repeat(1, len(values), dtype=pl.Int64, eager=True) if weight is None else weight}
    ).filter(pl.col("count") > 0)
    if isinstance(values.dtype, pl.List):
        frame = frame.filter(pl.col("key").list.len() > 0).explode("key")
    return (
        frame.with_columns(pl.col("key").cast(pl.String), pl.col("count").cast(pl.Int64))
        .filter(_present("key"))
        .group_by("key")
        .agg(pl.col("count").sum())
    )


def build_vocabulary(counts: pl.DataFrame, min_count: int) -> pl.DataFrame:
    """key (str), row (i32, from 1), count (i64) of one table, the most frequent first, ties by key.

    counts: key, count, summed over every feature that reads the table; a key seen less than `min_count` times stays
    unknown.
    """
    return (
        counts.filter(pl.col("count") >= min_count)
        .sort(["count", "key"], descending=[True, False])
        .with_row_index("row", offset=1)
        .select("key", pl.col("row").cast(pl.Int32), "count")
    )


def encode(values: pl.Series, vocabulary: pl.DataFrame, kind: str) -> Tuple[pl.Series, int]:
    """Rows (i32, or list of i32 for kind multi) of a column, and how many values were unknown (row 0).

    A missing single value is unknown; a missing list is empty. Missing values within a list are left out.
    """
    if kind == "multi":
        lists = values.cast(pl.List(pl.String))
        lengths = lists.list.drop_nulls().list.len().fill_null(0)
        flat = lists.filter(lengths > 0).list.drop_nulls().explode()
        rows = _lookup(flat, vocabulary)
        return _regroup(rows, lengths).alias(values.name), int((rows == 0).sum())
    rows = _lookup(values.cast(pl.String), vocabulary)
    return rows.alias(values.name), int((rows == 0).sum())


def _present(name: str) -> pl.Expr:
    return pl.col(name).is_not_null() & (pl.col(name) != "")


def _lookup(keys: pl.Series, vocabulary: pl.DataFrame) -> pl.Series:
    if len(vocabulary) == 0 or len(keys) == 0:
        return pl.zeros(len(keys), dtype=pl.Int32, eager=True)
    return keys.replace_strict(vocabulary["key"], vocabulary["row"], default=0, return_dtype=pl.Int32).fill_null(0)


def _regroup(flat: pl.Series, lengths: pl.Series) -> pl.Series:
    """Lists of the given lengths, cut from `flat` in order."""
    offsets = pa.concat_arrays(
        [pa.array([0], pa.int64()), lengths.cast(pl.Int64).cum_sum().to_arrow().cast(pa.int64())]
    )
    return pl.Series(pa.LargeListArray.from_arrays(offsets, flat.to_arrow()))
