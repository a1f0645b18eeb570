"""Lines of text as rows: each line with its number and its fields; malformed lines are kept."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

import polars as pl

from lumrec.run.errors import UserError

_NEVER = "\x01"  # a separator that no sound file holds, so that the CSV reader returns whole lines
NO_VALUE = ("", "null", "NULL", "NaN", "nan", "None", r"\N")


def scan_lines(source: Path | bytes, *, encoding: str = "utf8", skip_lines: int = 0, first: int = 0) -> pl.LazyFrame:
    """Each line of a file (a .gz file too) or of bytes as `raw`, and its number as `order` (i64), counted from `first`.

    encoding: utf8, read as a stream, what is not UTF-8 replaced; or latin-1, decoded in memory, for small files. A line
    with the control character \\x01 is read up to and including that character.
    """
    if encoding == "latin-1":
        source = (source if isinstance(source, bytes) else source.read_bytes()).decode("latin-1").encode()
    frame = pl.scan_csv(
        source,
        separator=_NEVER,
        has_header=False,
        skip_lines=skip_lines,
        quote_char=None,
        schema={"raw": pl.String, "rest": pl.String},
        encoding="utf8-lossy",
        truncate_ragged_lines=True,
        missing_columns="insert",
        raise_if_empty=False,
        row_index_name="order",
        row_index_offset=first,
    )
    raw = pl.col("raw").fill_null("").str.strip_chars_end("\r")
    raw = pl.when(pl.col("rest").is_null()).then(raw).otherwise(raw + _NEVER)
    return frame.select(raw.alias("raw"), pl.col("order").cast(pl.Int64))


def scan_fields(
    path: Path,
    fields: Sequence[str],
    *,
    separator: str = ",",
    encoding: str = "utf8",
    skip_lines: int = 0,
    first: int = 0,
) -> pl.LazyFrame:
    """`scan_lines` with the fields of each line by name as text; `whole` is true where their number is right.

    Quotes have no meaning: every separator ends a field.
    """
    names = [*fields, "_more"]
    parts = pl.col("raw").str.splitn(separator, len(names)).struct.rename_fields(names)
    return (
        scan_lines(path, encoding=encoding, skip_lines=skip_lines, first=first)
        .with_columns(parts.alias("_parts"))
        .unnest("_parts")
        .with_columns((pl.col(names[-2]).is_not_null() & pl.col("_more").is_null()).alias("whole"))
        .drop("_more")
    )


def open_bytes(path: Path) -> BinaryIO:
    """The file, decompressed while it is read if its name ends in .gz."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def check_header(path: Path, needed: Sequence[str]) -> list[str]:
    """Names in the first line of a CSV file (a .gz file too). Raises UserError where it lacks one of those `needed`."""
    with open_bytes(path) as file:
        line = file.readline().decode("utf-8", "replace").strip("\ufeff\r\n")
    names = [name.strip() for name in line.split(",")]
    if missing := [name for name in needed if name not in names]:
        raise UserError(
            f"{path}: the first line has no column {', '.join(missing)}; it reads {','.join(names)!r}, "
            f"and a published file has {', '.join(needed)}"
        )
    return names


def wrong_number_of_fields() -> tuple[pl.Expr, str]:
    """The check of `scan_fields` for `first_reason`."""
    return ~pl.col("whole"), "wrong number of fields"


def number_checks(*names: str) -> list[tuple[pl.Expr, str]]:
    """Checks for `first_reason`: each of the text columns `names` must hold a whole number."""
    checks = []
    for name in names:
        checks.append((is_missing(name), f"{name} is missing"))
        checks.append((whole_number(name).is_null(), f"{name} is not a whole number"))
    return checks


def is_missing(name: str) -> pl.Expr:
    """Whether a text column is null, empty or one of the words that mean "no value"."""
    return pl.col(name).is_null() | pl.col(name).str.strip_chars().is_in(NO_VALUE)


def whole_number(name: str) -> pl.Expr:
    """A text column as i64, null where it is not a whole number."""
    return pl.col(name).cast(pl.Int64, strict=False)


def raw_of_bad_rows() -> pl.Expr:
    """`raw` where there is a `reason`, else null: catalogues are held in memory, lines of good rows need not be."""
    return pl.when(pl.col("reason").is_not_null()).then("raw").alias("raw")
