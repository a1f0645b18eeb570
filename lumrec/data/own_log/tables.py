"""The files of a log of one's own as tables: what is there, whether it fits together, each row by its number."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from polars import selectors

from lumrec.data.own_log.calendar import of_calendar
from lumrec.data.own_log.config import LogConfig
from lumrec.data.own_log.csv_files import to_parquet
from lumrec.data.own_log.folders import find_files, partitions
from lumrec.data.own_log.parts import (
    RAW,
    REASON,
    ROW,
    UNDECODABLE,
    Part,
    check_unique,
    decode,
    is_number,
    undecodable,
)
from lumrec.run.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

_FILE = "lumrec.file"
FORMATS = {
    ".parquet": "Parquet",
    ".pq": "Parquet",
    ".csv": "CSV",
    ".csv.gz": "CSV",
    ".tsv": "TSV",
    ".tsv.gz": "TSV",
}
MAX_DIGITS = 38  # of a decimal, in polars
MAX_ROWS = 2**32 - 2  # polars counts rows in 32 bits


@dataclass(frozen=True)
class Table:
    """All files of one kind (events, items or users) as one frame.

    frame: the columns of the files, text as text and missing values as null, and ROW (i64, number of the row over all
    files in order of their names, from 0; header lines are no rows), REASON (why the row cannot be used, null where
    nothing is known against it), RAW (the row as read). schema: names and types of the files' own columns. origin: a
    file that has the column in that type. lacking: columns that are missing in some files, and the first of those.
    left_out: columns that cannot be read, and why.
    undecodable: columns whose values may hold UNDECODABLE, and why such a row cannot be used, where one reads them.
    separator: between the fields of the first CSV file. is_text: the files are CSV or TSV, so that every type is text.
    """

    name: str
    format: str
    files: list[Path]
    frame: pl.LazyFrame
    schema: pl.Schema
    origin: dict[str, Path]
    lacking: dict[str, Path]
    left_out: dict[str, str]
    undecodable: dict[str, str]
    num_rows: int
    separator: str = ""

    @property
    def is_text(self) -> bool:
        return self.format != "Parquet"

    def require(self, column: str, key: str) -> None:
        """Raises UserError, which names the nearest column, where a file lacks that column; `key` asked for it."""
        if column in self.left_out:
            raise UserError(f"{key}: {self.left_out[column]}")
        if column in self.lacking:
            raise UserError(
                f"{key}: {self.lacking[column]} has no column {column!r}, which {self.origin[column]} has; expected "
                "it in all files. Write that file again, or leave it out"
            )
        if column in self.schema:
            return
        message = (
            f"{key}: {self.files[0]} has no column {column!r}{did_you_mean(column, self.schema, cutoff=0.5)}; it has: "
            f"{', '.join(self.schema)}"
        )
        if self.is_text and any(map(is_number, self.schema)):
            message += ". That looks like data: the first line of each file must name the columns"
        elif self.is_text and len(self.schema) == 1:
            message += f". That is a single column: is data.log.separator right for {next(iter(self.schema))!r}?"
        raise UserError(message)

    def __str__(self) -> str:
        number = f"{len(self.files)} {self.format} files" if len(self.files) > 1 else str(self.files[0].name)
        return f"{self.name} {number} ({self.num_rows:,} rows)"


def open_table(name: str, patterns: Sequence[str], config: LogConfig, scratch: Path) -> Table:
    """The table of the files that `patterns` lead to; CSV is put into Parquet files in `scratch` first.

    Every header and every Parquet footer is read before anything else. Raises DataSetMissing and UserError, see
    `lumrec.data.own_log.read.read`.
    """
    files = find_files(patterns, f"data.log.{name}")
    format = _one_format(files, f"data.log.{name}")
    if format == "Parquet":
        parts = [_parquet_part(file) for file in files]
    else:
        parts = to_parquet(files, name, config, scratch)
    parts = [_with_partition(part) for part in parts]
    for part in parts:
        if part.num_rows == 0:
            raise UserError(f"{part.file} holds no row; leave it out of data.log.{name}, or write it again")
    num_rows = sum(part.num_rows for part in parts)
    if num_rows > MAX_ROWS:
        raise UserError(
            f"data.log.{name}: {num_rows:,} rows, and at most {MAX_ROWS:,} can be numbered; take fewer files"
        )
    schema, origin, left_out = _common_schema(parts)
    for why in left_out.values():
        log.warning("%s: %s; it is left out", name, why)
    names = readable(list(schema))
    lacking = {
        column: part.file
        for part in reversed(parts)
        for column in schema
        if column not in part.schema and column not in part.partition
    }
    for column, file in lacking.items():
        log.warning("%s: column %r is missing in some files (%s, …), and taken as empty there", name, column, file)
    frame = _scan(parts, schema, names)
    schema, origin, lacking = pl.Schema(_renamed(schema, names)), _renamed(origin, names), _renamed(lacking, names)
    for column, new in names.items():
        if new != column:
            log.warning("%s: column %r is read as %r", name, column, new)
    if format == "Parquet":
        as_bytes = {name: undecodable(name, "utf8") for name, kind in schema.items() if _is_bytes(kind)}
        frame, schema = _parquet_columns(frame, schema)
    else:
        is_bad = any(part.has_undecodable for part in parts)
        frame, schema = _text_columns(frame, schema, parts[0].separator, config.missing)
        as_bytes = {name: undecodable(name, config.encoding) for name in schema} if is_bad else {}
    return Table(name, format, files, frame, schema, origin, lacking, left_out, as_bytes, num_rows, parts[0].separator)


def _one_format(files: Sequence[Path], key: str) -> str:
    """The format of all files, by their names. Raises UserError for an unknown one, and for several."""
    first: dict[str, Path] = {}
    for file in files:
        suffix = "".join(file.suffixes[-2:]).lower() if file.suffix == ".gz" else file.suffix.lower()
        if suffix not in FORMATS:
            raise UserError(
                f"{key}: {file} is of no format that can be read; expected a name that ends in {', '.join(FORMATS)}. "
                "Where other files lie among those of the log, name these by a glob, such as log/*.parquet"
            )
        first.setdefault(FORMATS[suffix], file)
    if len(first) > 1:
        (one, file), (other, other_file) = list(first.items())[:2]
        raise UserError(
            f"{key}: files of several formats: {file} is {one}, {other_file} is {other}; expected one format"
        )
    return next(iter(first))


def _parquet_part(file: Path) -> Part:
    """Types and rows from the footer. Raises UserError for a file that is cut or damaged, or names a column twice."""
    try:
        metadata = pq.read_metadata(file)
        names = metadata.schema.to_arrow_schema().names
        check_unique(names, file)
        schema = pl.read_parquet_schema(file)
        groups = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        if groups != metadata.num_rows:
            raise pa.ArrowInvalid(f"it says that it has {metadata.num_rows:,} rows, and its parts have {groups:,}")
    except (pa.ArrowInvalid, OSError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"{file} cannot be read as Parquet: it is cut or damaged, or no Parquet file "
            f"({str(error).splitlines()[0]}). Copy or write it again"
        ) from None
    return Part(file, file, pl.Schema(schema), metadata.num_rows)


def _with_partition(part: Part) -> Part:
    """The part with the columns that its folders give. Raises UserError where the file has one of these itself."""
    partition = partitions(part.file)
    for name, value in partition.items():
        if name in part.schema:
            raise UserError(
                f"{part.file}: column {name!r} is in the file and in the name of its folder, {name}={value}; expected "
                "one of the two. Write the file without that column, or rename the folder"
            )
    return part._replace(partition=partition)


def _common_schema(parts: Sequence[Part]) -> tuple[pl.Schema, dict[str, Path], dict[str, str]]:
    """Every column of any file, with a type that holds what each file has, and a file that made it that type; and the
    columns that cannot be read, each with the reason: of different kinds in two files (text and numbers, say), or of
    decimals that are too long. A column that a file lacks is missing for all its rows.
    """
    common: dict[str, pl.DataType] = {}
    origin: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for part in parts:
        for name, kind in part.schema.items():
            if isinstance(kind, pl.Decimal) and (kind.precision or 0) > MAX_DIGITS:
                left_out[name] = f"column {name!r} of {part.file} has decimals of over {MAX_DIGITS} digits"
            if name == ROW or name in left_out:
                continue
            if name not in common or common[name] == pl.Null:
                common[name], origin[name] = kind, part.file
                continue
            wider = wider_type(common[name], kind)
            if wider is None:
                left_out[name] = (
                    f"column {name!r} is {common[name]} in {origin[name]}, and {kind} in {part.file}; expected one "
                    "kind of values in all files"
                )
            elif wider != common[name]:
                common[name], origin[name] = wider, part.file
    for name in left_out:
        common.pop(name, None)
        origin.pop(name, None)
    for part in parts:
        for name in part.partition:
            if common.setdefault(name, pl.String()) != pl.String():
                raise UserError(
                    f"column {name!r} is {common[name]} in {origin[name]}, and the name of a folder of {part.file}; "
                    "expected one of the two in all files"
                )
            origin.setdefault(name, part.file)
    return pl.Schema(common), origin, left_out


def wider_type(one: pl.DataType, other: pl.DataType) -> pl.DataType | None:
    """The type that holds the values of both without loss of meaning; None where they are of different kinds."""
    if one == other or other == pl.Null:
        return one
    if one == pl.Null:
        return other
    if one.is_integer() and other.is_integer():
        unsigned = pl.UInt64 in (one, other) and not (one.is_signed_integer() or other.is_signed_integer())
        return pl.UInt64() if unsigned else (None if pl.UInt64 in (one, other) else pl.Int64())
    if one.is_numeric() and other.is_numeric():
        return pl.Float64()
    if _is_text(one) and _is_text(other):
        return pl.Binary() if pl.Binary in (one, other) else pl.String()
    if one.is_temporal() and other.is_temporal() and {type(one), type(other)} <= {pl.Date, pl.Datetime}:
        zones = {getattr(kind, "time_zone", None) for kind in (one, other)}
        return pl.Datetime("us", "UTC" if zones != {None} else None)
    if isinstance(one, (pl.List, pl.Array)) and isinstance(other, (pl.List, pl.Array)):
        inner = wider_type(one.inner, other.inner)  # type: ignore[arg-type]
        return pl.List(inner) if inner is not None else None
    return None


def _is_text(kind: pl.DataType) -> bool:
    return kind in (pl.String, pl.Binary, pl.Categorical) or isinstance(kind, pl.Enum)


def _is_bytes(kind: pl.DataType) -> bool:
    return kind == pl.Binary or (isinstance(kind, (pl.List, pl.Array)) and kind.inner == pl.Binary)


def _is_json(kind: pl.DataType, *, nested: bool = False) -> bool:
    """Whether every value can be written as JSON: bytes cannot, nor times in lists, which may be in no calendar."""
    if isinstance(kind, (pl.List, pl.Array)):
        return _is_json(kind.inner, nested=True)  # type: ignore[arg-type]
    if isinstance(kind, pl.Struct):
        return all(_is_json(inner.dtype, nested=True) for inner in kind.fields)  # type: ignore[arg-type]
    return kind != pl.Binary and not (nested and kind.is_temporal())


def readable(names: Sequence[str]) -> dict[str, str]:
    """Each name of a column → the name that it is read by.

    polars takes "*" and "^…$" for patterns, and no name means the default in a config: these get a _ in front.
    """
    new: dict[str, str] = {}
    for name in names:
        new[name] = name
        while not new[name] or new[name] == "*" or (new[name][0] == "^" and new[name][-1] == "$"):
            new[name] = f"_{new[name]}"
        while new[name] != name and new[name] in names:
            new[name] = f"_{new[name]}"
    return new


def _renamed(columns: Mapping[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names[name]: value for name, value in columns.items()}


def _scan(parts: Sequence[Part], schema: pl.Schema, names: dict[str, str]) -> pl.LazyFrame:
    """All rows of all files with the common types, and their numbers; files in a row that agree are one scan.

    names: what each column is to be called.
    """
    frames, first = [], 0
    for kinds, group in itertools.groupby(parts, key=lambda part: tuple(part.schema.items())):
        same, own = list(group), dict(kinds)
        numbered = {} if ROW in own else {"row_index_name": ROW, "row_index_offset": first}
        files = [str(part.parquet) for part in same]
        in_folders = sorted({name for part in same for name in part.partition})
        paths = {"include_file_paths": _FILE} if in_folders else {}
        frame = pl.scan_parquet(files, glob=False, hive_partitioning=False, **numbered, **paths)  # type: ignore[arg-type]
        first += sum(part.num_rows for part in same)
        columns = [
            (_of_folder(name, same) if name in in_folders else _widened(name, own.get(name), kind)).alias(names[name])
            for name, kind in schema.items()
        ]
        frames.append(frame.select(pl.col(ROW).cast(pl.Int64), *columns))
    return pl.concat(frames) if len(frames) > 1 else frames[0]


def _of_folder(name: str, parts: Sequence[Part]) -> pl.Expr:
    """A column that the folders of these parts give, by the file of each row."""
    values = [part.partition.get(name) for part in parts]
    return pl.col(_FILE).replace_strict([str(part.parquet) for part in parts], values, return_dtype=pl.String)


def _widened(name: str, own: pl.DataType | None, common: pl.DataType) -> pl.Expr:
    """A column of one file in the common type; null where the file lacks it."""
    if own is None:
        return pl.lit(None, common)
    column = selectors.by_name(name).as_expr()  # pl.col would take some names for patterns
    if isinstance(own, pl.Datetime) and isinstance(common, pl.Datetime) and own.time_zone != common.time_zone:
        zone = common.time_zone
        column = column.dt.convert_time_zone(zone) if own.time_zone and zone else column.dt.replace_time_zone(zone)
    elif own == pl.Date and isinstance(common, pl.Datetime):
        return column.cast(pl.Datetime("us")).dt.replace_time_zone(common.time_zone)
    return column if own == common else column.cast(common)


def _text_columns(
    frame: pl.LazyFrame, schema: pl.Schema, separator: str, missing: Sequence[str]
) -> tuple[pl.LazyFrame, pl.Schema]:
    """CSV: the row as read, and null for the texts that stand for no value."""
    own = {name: kind for name, kind in schema.items() if name not in (REASON, RAW)}
    fields = pl.concat_str([pl.col(name) for name in own], separator=separator, ignore_nulls=True)
    as_read = pl.coalesce(RAW, fields).str.replace_all(UNDECODABLE, "\ufffd", literal=True)
    values = [pl.when(~pl.col(name).str.strip_chars().is_in(missing)).then(name).alias(name) for name in own]
    return frame.with_columns(as_read.alias(RAW), *values), pl.Schema(own)


def _parquet_columns(frame: pl.LazyFrame, schema: pl.Schema) -> tuple[pl.LazyFrame, pl.Schema]:
    """Parquet: bytes and categories as text, empty text as null, the row as JSON."""
    as_bytes = [name for name, kind in schema.items() if kind == pl.Binary]
    own = pl.Schema({name: pl.String() if _is_text(kind) else kind for name, kind in schema.items()})
    texts = [name for name, kind in own.items() if kind == pl.String]
    frame = frame.with_columns(
        decode(pl.col(name)) if name in as_bytes else pl.col(name).cast(pl.String) for name in texts
    )
    row = pl.struct([of_calendar(pl.col(name), kind) for name, kind in own.items() if _is_json(kind)])
    row = row.struct.json_encode()
    as_read = row.str.replace_all(UNDECODABLE, "\ufffd", literal=True)
    values = [pl.when(pl.col(name) != "").then(name).alias(name) for name in texts]
    return frame.with_columns(pl.lit(None, pl.String).alias(REASON), as_read.alias(RAW), *values), own
