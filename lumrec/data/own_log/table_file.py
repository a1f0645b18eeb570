"""One file of a table, and its text that cannot be decoded."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from lumrec.run.errors import UserError

# Columns that are added to a table; no column of a file may have this prefix.
OURS = "lumrec."
ROW, REASON, RAW = "lumrec.row", "lumrec.reason", "lumrec.raw"
UNDECODABLE = "\ufdd0"  # replaces bytes that cannot be decoded; Unicode reserves it for internal use
MARK_ERRORS = "lumrec.undecodable"  # name of the error handler that inserts it
codecs.register_error(MARK_ERRORS, lambda error: (UNDECODABLE, error.end))  # type: ignore[attr-defined]


class TableFile(NamedTuple):
    """One file of a table.

    file: as the user named it. parquet: the file that is scanned; a CSV file itself until it is converted. schema:
    types of its columns. num_rows: 0 until a CSV file is converted. separator: of a CSV file. has_undecodable: whether
    a converted CSV file holds bytes that cannot be decoded. partition: columns given by the names of its folders.
    """

    file: Path
    parquet: Path
    schema: pl.Schema
    num_rows: int
    separator: str = ""
    has_undecodable: bool = False
    partition: dict[str, str | None] = {}


def is_number(text: str) -> bool:
    """Whether a name is a number in digits, as in a file without a header."""
    return text.lstrip("-").replace(".", "", 1).isdecimal()


def check_unique(names: Sequence[str], file: Path) -> None:
    """Raises UserError where a column name occurs twice, or begins as the names of lumrec's own columns do."""
    if taken := [name for name in names if name.startswith(OURS)]:
        raise UserError(f"{file}: column {taken[0]!r} begins with {OURS}, as lumrec's own columns do; rename it")
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        hint = ". The first line of a CSV file must name the columns" if is_number(twice[0]) else ""
        count = Counter(names)[twice[0]]
        raise UserError(f"{file}: column {twice[0]!r} occurs {count} times; names must be unique{hint}")


def undecodable(name: str, encoding: str) -> str:
    """The reason for a row whose bytes cannot be decoded."""
    return f"{name} is not {encoding} text"


def decode(column: pl.Expr) -> pl.Expr:
    """Bytes as text, with UNDECODABLE in place of those that are not UTF-8."""
    return column.map_batches(_decode, return_dtype=pl.String, is_elementwise=True)


def _decode(column: pl.Series) -> pl.Series:
    try:
        return column.cast(pl.String)
    except pl.exceptions.ComputeError:  # some are not UTF-8: the slow way, only for this batch
        texts = [None if value is None else value.decode("utf-8", MARK_ERRORS) for value in column]
        return pl.Series(column.name, texts, pl.String)
