"""One file of a table, and the text in it that cannot be decoded."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from lumrec.run.errors import UserError

# Columns that are added to a table; the prefix keeps them apart from any that a file has.
OURS = "lumrec."


ROW, REASON, RAW = "lumrec.row", "lumrec.reason", "lumrec.raw"


UNDECODABLE = "\ufdd0"  # stands for bytes that are no text in the encoding given; Unicode keeps it free for such a use


MARK_ERRORS = "lumrec.undecodable"  # name of the error handler that puts it there


codecs.register_error(MARK_ERRORS, lambda error: (UNDECODABLE, error.end))  # type: ignore[attr-defined]


class Part(NamedTuple):
    """One file of a table, ready to be scanned.

    file: as the user named it. parquet: what is read for it. schema: types of the columns in that. separator: of a CSV
    file. has_undecodable: whether a CSV file holds bytes that are no text. partition: columns that the names of its
    folders give.
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
    """Raises UserError where a column name occurs twice, or is one that lumrec gives to columns of its own."""
    if taken := [name for name in names if name.startswith(OURS)]:
        raise UserError(f"{file}: column {taken[0]!r} begins with {OURS}, as lumrec's own columns do; rename it")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        number = list(names).count(twice[0])
        hint = ". The first line of a CSV file must name the columns" if is_number(twice[0]) else ""
        raise UserError(f"{file}: column {twice[0]!r} occurs {number} times; names must be unique{hint}")


def undecodable(name: str, encoding: str) -> str:
    """The reason for a row with bytes that are no text."""
    return f"{name} is not {encoding} text"


def decode(column: pl.Expr) -> pl.Expr:
    """Bytes as text, UNDECODABLE in place of those that are not UTF-8."""
    return column.map_batches(_decode, return_dtype=pl.String, is_elementwise=True)


def _decode(column: pl.Series) -> pl.Series:
    try:
        return column.cast(pl.String)
    except pl.exceptions.ComputeError:  # some are no text: the slow way, for this batch alone
        texts = [None if value is None else value.decode("utf-8", MARK_ERRORS) for value in column]
        return pl.Series(column.name, texts, pl.String)
