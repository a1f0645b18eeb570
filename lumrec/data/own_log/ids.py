"""The ids of your own log: whether they are integers or text, and which of them are missing."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from lumrec.data.own_log.tables import REASON, UNDECODABLE, Table
from lumrec.run.errors import UserError

WHOLE = r"^(?:0|-?[1-9][0-9]{0,18})$"  # the one way to write an integer: not "007", "+7", "-0"
WHOLE_AS_FLOAT = r"^-?[0-9]+(?:\.0*|(?:\.[0-9]+)?[eE]\+?[0-9]+)$"
_WHOLE_TYPES = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32)


def id_type(columns: Sequence[tuple[Table, str]]) -> pl.DataType:
    """Int64 where every id in these columns is an integer, else String.

    Text of a CSV file counts as an integer where it is written as one ("007" is not). Raises UserError for ids that are
    numbers with a fraction, or neither text nor numbers.
    """
    whole = [_is_whole(table, name) for table, name in columns]
    return pl.Int64() if all(whole) else pl.String()


def _is_whole(table: Table, name: str) -> bool:
    kind = table.schema[name]
    where = f"{table.origin[name]}: the ids in column {name!r} are"
    floats = "A column of integers becomes one of floats where some are missing (pandas does so), and"
    if kind in _WHOLE_TYPES or kind == pl.Null:
        return True
    if kind.is_float() or (isinstance(kind, pl.Decimal) and kind.scale):
        raise UserError(
            f"{where} of type {kind}; expected integers or text. {floats} 12.0 is then not the id 12: write it as "
            f"integers (df[{name!r}].astype('Int64')) or as text"
        )
    if not (kind in (pl.String, pl.UInt64) or isinstance(kind, pl.Decimal)):
        raise UserError(f"{where} of type {kind}; expected integers or text")
    if not table.is_text or kind != pl.String:
        return False  # text by its type; UInt64 and Decimal may exceed 64 bits, their text does not
    text = pl.col(name).filter(pl.col(REASON).is_null()).drop_nulls()
    text = text.filter(~text.str.contains(UNDECODABLE, literal=True))
    is_whole = text.str.contains(WHOLE) & text.cast(pl.Int64, strict=False).is_not_null()
    as_float = text.str.contains(WHOLE_AS_FLOAT)
    facts = table.frame.select(num=text.len(), whole=is_whole.sum(), float=as_float.sum())
    num, num_whole, num_float = facts.collect(engine="streaming").row(0)
    if num_float and num_whole + num_float == num:
        found = table.frame.select(text.filter(as_float).first()).collect(engine="streaming").item()
        raise UserError(
            f"{where} numbers such as {found!r}; expected integers or text. {floats} {found} is then not the id "
            f"{float(found):.0f}: write them as integers"
        )
    return num_whole == num


def id_check(table: Table, name: str) -> tuple[pl.Expr, str]:
    """The check of an id column for `first_reason`."""
    missing = pl.col(name).is_null()
    if table.schema[name] == pl.String:
        missing = missing | (pl.col(name).str.strip_chars() == "")
    return missing, f"{name} is missing"
