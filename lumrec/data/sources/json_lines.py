"""Files with one JSON object or Python dict on each line, as Parquet; lines that cannot be decoded are kept as text."""

from __future__ import annotations

import ast
import zlib
from collections.abc import Callable, Iterator, Mapping
from gzip import BadGzipFile
from pathlib import Path
from typing import Any

import polars as pl

from lumrec.data.sources.lines import open_bytes, scan_lines
from lumrec.run.errors import UserError

BLOCK_BYTES = 1 << 26  # text in memory at a time
DECODED_LINES = 2048  # lines of JSON decoded at a time; many more are slower, as their values no longer fit the cache
NUMBER = "#line"  # a key added to each line, which shows whether each was decoded by itself
Fields = Mapping[str, pl.DataType]
Decode = Callable[[pl.Series, Fields], pl.DataFrame]


def decode_file(
    path: Path, fields: Fields, into: Path, decode: Decode, *, block_bytes: int = BLOCK_BYTES
) -> pl.LazyFrame:
    """The `fields` of every line, null where they are missing; written as Parquet to the new folder `into`.

    Further columns: order (i64, line number), decoded (bool), and raw: the line, where it could not be decoded.
    path: of text or a .gz file. fields: name → String, or List(String). decode: decode_json or decode_python. Raises
    UserError where a .gz file is cut or broken.
    """
    into.mkdir()
    first = 0
    for part, lines in enumerate(line_blocks(path, block_bytes)):
        rows = decode(lines, fields)
        order = pl.int_range(first, first + len(lines), dtype=pl.Int64, eager=True).alias("order")
        raw = pl.when(~pl.col("decoded")).then("raw").alias("raw")
        frame = rows.with_columns(order, lines.alias("raw")).with_columns(raw)
        frame.write_parquet(into / f"{part:05d}.parquet", compression="lz4", statistics=False)
        first += len(lines)
    return pl.scan_parquet(into / "*.parquet")


def line_blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[pl.Series]:
    """The lines of a file in series of about `block_bytes` of text, at least one; what is not UTF-8 is replaced."""
    rest, blocks = b"", 0
    try:
        with open_bytes(path) as file:
            while block := file.read(block_bytes):
                whole, newline, tail = block.rpartition(b"\n")
                if newline:
                    yield scan_lines(rest + whole + newline).select("raw").collect().to_series()
                    rest, blocks = tail, blocks + 1
                else:
                    rest += block
    except (EOFError, BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is cut or broken: {error}; get it again") from error
    if rest or not blocks:
        yield scan_lines(rest).select("raw").collect().to_series()


def decode_json(lines: pl.Series, fields: Fields) -> pl.DataFrame:
    """The fields of each line, and `decoded`: whether it is one JSON object with values of these kinds.

    Numbers and truth values become text; a single value in place of a list becomes a list of one.
    """
    line = pl.col("line").str.strip_chars()
    # Polars decodes a series as if it were one array, where a broken line can swallow the next: hence the numbers.
    marked = pl.concat_str(
        pl.lit(f'{{"{NUMBER}":'), pl.int_range(pl.len()).cast(pl.String), pl.lit(","), line.str.slice(1)
    )
    is_object = line.str.starts_with("{") & line.str.ends_with("}")
    numbered = pl.DataFrame({"line": lines}).select(pl.when(is_object).then(marked)).to_series()
    dtype = pl.Struct({NUMBER: pl.String, **fields})
    starts = range(0, len(lines), DECODED_LINES) or [0]
    rows = pl.concat([_decode_or_halve(numbered.slice(at, DECODED_LINES), dtype, first=at) for at in starts])
    return rows.struct.unnest().with_columns(pl.col(NUMBER).is_not_null().alias("decoded")).drop(NUMBER)


def _decode_or_halve(numbered: pl.Series, dtype: pl.Struct, *, first: int) -> pl.Series:
    """Structs of the numbered lines; lines that cannot be decoded are null, and are found by halving."""
    if len(numbered) == 0:
        return pl.Series(dtype=dtype)
    try:
        rows = numbered.str.json_decode(dtype)
        expected = pl.int_range(first, first + len(numbered), eager=True).cast(pl.String)
        if len(rows) == len(numbered):
            found = (rows.struct.field(NUMBER) == expected).fill_null(False)
            if (found | numbered.is_null()).all():
                return rows
    except pl.exceptions.ComputeError:
        pass
    if len(numbered) == 1:
        return pl.Series([None], dtype=dtype)
    half = len(numbered) // 2
    parts = (numbered[:half], first), (numbered[half:], first + half)
    return pl.concat([_decode_or_halve(part, dtype, first=start) for part, start in parts])


def decode_python(lines: pl.Series, fields: Fields) -> pl.DataFrame:
    """`decode_json` for lines that are Python literals (a dict with single quotes); nested lists are flattened.

    Nothing is evaluated: ast.literal_eval reads only literals.
    """
    rows = [_literal_fields(line, fields) for line in lines]
    columns = {name: pl.Series([row and row[name] for row in rows], dtype=dtype) for name, dtype in fields.items()}
    return pl.DataFrame({**columns, "decoded": pl.Series([row is not None for row in rows], dtype=pl.Boolean)})


def _literal_fields(line: str, fields: Fields) -> dict[str, Any] | None:
    """The fields of one line; None where it is not a dict, or has a value of another kind."""
    try:
        row = ast.literal_eval(line)
        if not isinstance(row, dict):
            return None
        return {
            name: None if row.get(name) is None else list(_flat(row[name])) if dtype == pl.List else _text(row[name])
            for name, dtype in fields.items()
        }
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    elif value is not None:
        yield _text(value)


def _text(value: Any) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)
    raise TypeError(f"expected text or a number, got {type(value).__name__}")
