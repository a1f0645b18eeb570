"""Raw values to rows of embedding tables, counted over the training split only; row 0 is "unknown".

A vocabulary may build on an older one, for a LUM that continues training: tables then only grow.

    older    row 1 … n      unchanged, whether the value still occurs or not
    new      row n + 1 …    values that the older one lacks, the most frequent first
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa

from lumrec.data.forms import as_text, text_of
from lumrec.data.manifest import PreparedDataError, read_manifest
from lumrec.run.files import sha256

_NOTHING = pl.DataFrame(schema={"key": pl.String, "row": pl.Int32, "count": pl.Int64})


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
        frame.with_columns(text_of(pl.col("key"), frame["key"].dtype), pl.col("count").cast(pl.Int64))
        .filter(pl.col("key").is_not_null(), pl.col("key") != "")
        .group_by("key")
        .agg(pl.col("count").sum())
    )


def build_vocabulary(counts: pl.DataFrame, min_count: int, older: pl.DataFrame | None = None) -> pl.DataFrame:
    """key (str), row (i32, from 1), count (i64) of one table, the most frequent first, ties by key.

    counts: key, count, summed over every feature that reads the table; a key seen less than `min_count` times stays
    unknown. older: a vocabulary whose keys keep their rows, whatever their counts; all others come after them.
    """
    kept = _NOTHING if older is None else older.select("key", "row").join(counts, on="key", how="left")
    kept = kept.with_columns(pl.col("count").fill_null(0)).sort("row")
    new = (
        counts.join(kept, on="key", how="anti")
        .filter(pl.col("count") >= min_count)
        .sort(["count", "key"], descending=[True, False])
        .with_row_index("row", offset=len(kept) + 1)
        .select("key", pl.col("row").cast(pl.Int32), "count")
    )
    return pl.concat([kept, new])


def read_vocabularies(folder: Path) -> tuple[str, dict[str, pl.DataFrame]]:
    """Fingerprint of a prepared folder, and the vocabulary of each of its tables.

    Raises MissingFileError and PreparedDataError as read_manifest does, also for a vocabulary's wrong checksum.
    """
    manifest = read_manifest(folder, verify=False)
    vocabularies = {}
    for table in manifest["table_rows"]:
        name = f"vocabulary/{table}.parquet"
        if sha256(folder / name) != manifest["files"][name]["sha256"]:
            raise PreparedDataError(f"{folder / name} was changed or damaged: its checksum is not the manifest's")
        vocabularies[table] = pl.read_parquet(folder / name)
    return manifest["fingerprint"], vocabularies


def moved_values(older: pl.DataFrame, vocabulary: pl.DataFrame) -> pl.DataFrame:
    """key, row, row_now (null where it is gone) of the older values that are not in their row of `vocabulary`."""
    now = vocabulary.select("key", row_now="row")
    return (
        older.select("key", "row")
        .join(now, on="key", how="left")
        .filter(pl.col("row").ne_missing(pl.col("row_now")))
        .sort("row")
    )


def encode(values: pl.Series, vocabulary: pl.DataFrame, kind: str) -> tuple[pl.Series, int]:
    """Rows (i32, or list of i32 for kind multi) of a column, and how many values were unknown (row 0).

    A missing single value is unknown; a missing list is empty. Missing values within a list are left out.
    """
    if kind == "multi":
        lists = values.cast(pl.List(pl.String))
        lengths = lists.list.drop_nulls().list.len().fill_null(0)
        flat = lists.filter(lengths > 0).list.drop_nulls().explode()
        rows = _lookup(flat, vocabulary)
        return _regroup(rows, lengths).alias(values.name), int((rows == 0).sum())
    rows = _lookup(as_text(values), vocabulary)
    return rows.alias(values.name), int((rows == 0).sum())


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
