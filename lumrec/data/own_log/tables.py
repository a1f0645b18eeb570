"""The files of your log as tables: one frame of all files of a kind, with the number of each row."""

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
from lumrec.data.own_log.csv_files import csv_file, to_parquet
from lumrec.data.own_log.folders import find_files, partitions
from lumrec.data.own_log.table_file import (
    RAW,
    REASON,
    ROW,
    UNDECODABLE,
    TableFile,
    check_unique,
    decode,
    is_number,
    undecodable,
)
from lumrec.run.errors import UserError, did_you_mean
from lumrec.run.failures import machine_errno

log = logging.getLogger(__name__)

_FILE = "lumrec.file"
FORMATS = {".parquet": "Parquet", ".pq": "Parquet", ".csv": "CSV", ".csv.gz": "CSV", ".tsv": "TSV", ".tsv.gz": "TSV"}
MAX_DIGITS = 38  # of a decimal, in polars
MAX_ROWS = 2**32 - 2  # polars counts rows in 32 bits


@dataclass(frozen=True)
class Columns:
    """The columns of all files of one kind (events, items or users), of which only headers and footers were read.

    schema: names and types, under the names by which lumrec reads them. origin: a file that has the column in that
        type. lacking: columns that are missing in some files, and the first of those files. left_out: columns that
        cannot be read, and why.
    in_files: names and types in the files. is_text: the files are CSV or TSV, so that every type is text.
    """

    name: str
    format: str
    files: list[TableFile]
    in_files: pl.Schema
    schema: pl.Schema
    origin: dict[str, Path]
    lacking: dict[str, Path]
    left_out: dict[str, str]

    @property
    def is_text(self) -> bool:
        return self.format != "Parquet"

    @property
    def separator(self) -> str:
        """Between the fields of the first CSV file."""
        return self.files[0].separator

    def require(self, column: str, key: str) -> None:
        """Raises UserError, with the nearest column, where a file lacks this one. key: the setting that names it."""
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
            f"{key}: {self.files[0].file} has no column {column!r}{did_you_mean(column, self.schema, cutoff=0.5)}; it "
            f"has: {', '.join(self.schema)}"
        )
        if self.is_text and any(map(is_number, self.schema)):
            message += ". That looks like data: the first line of each file must name the columns"
        elif self.is_text and len(self.schema) == 1:
            message += f". That is a single column: is data.log.separator right for {next(iter(self.schema))!r}?"
        raise UserError(message)


@dataclass(frozen=True)
class Table(Columns):
    """All files of one kind as one frame.

    frame: the columns of the files (missing values are null), and ROW (i64, index of the row over all files in order of
        their names; header lines do not count), REASON (why the row cannot be used, null where it can), RAW (the row as
        read).
    undecodable: columns whose values may hold UNDECODABLE, and the reason for leaving such a row out if they are read.
    """

    frame: pl.LazyFrame
    undecodable: dict[str, str]
    num_rows: int

    def __str__(self) -> str:
        files = f"{len(self.files)} {self.format} files" if len(self.files) > 1 else self.files[0].file.name
        return f"{self.name} {files} ({self.num_rows:,} rows)"


def find_columns(name: str, patterns: Sequence[str], config: LogConfig) -> Columns:
    """The columns of the files that `patterns` lead to; only headers of CSV and footers of Parquet files are read.

    Raises DataSetMissing and UserError, see `lumrec.data.own_log.read.read`.
    """
    paths = find_files(patterns, f"data.log.{name}")
    format = _one_format(paths, f"data.log.{name}")
    files = [_parquet_file(path) if format == "Parquet" else csv_file(path, config) for path in paths]
    files = [_with_partition(file) for file in files]
    schema, origin, left_out = _common_schema(files)
    for why in left_out.values():
        log.warning("%s: %s; it is left out", name, why)
    names = readable(list(schema))
    lacking = {
        column: file.file
        for file in reversed(files)
        for column in schema
        if column not in file.schema and column not in file.partition
    }
    for column, path in lacking.items():
        log.warning("%s: column %r is missing in some files (%s, …), and taken as empty there", name, column, path)
    for column, new in names.items():
        if new != column:
            log.warning("%s: column %r is read as %r", name, column, new)
    own = {
        names[column]: pl.String() if _is_text(kind) else kind
        for column, kind in schema.items()
        if column not in (REASON, RAW)
    }
    origin, lacking = _renamed(origin, names), _renamed(lacking, names)
    return Columns(name, format, files, schema, pl.Schema(own), origin, lacking, left_out)


def open_table(columns: Columns, config: LogConfig, scratch: Path) -> Table:
    """The table with these columns; CSV is written as Parquet to `scratch` first.

    Raises UserError, see `lumrec.data.own_log.read.read`.
    """
    files = to_parquet(columns.files, columns.name, config, scratch) if columns.is_text else columns.files
    num_rows = sum(file.num_rows for file in files)
    if num_rows > MAX_ROWS:
        raise UserError(
            f"data.log.{columns.name}: {num_rows:,} rows, and at most {MAX_ROWS:,} can be numbered; take fewer files"
        )
    names = readable(list(columns.in_files))
    frame, schema = _scan(files, columns.in_files, names), _renamed(columns.in_files, names)
    if columns.is_text:
        is_bad = any(file.has_undecodable for file in files)
        frame = _text_columns(frame, list(columns.schema), columns.separator, config.missing)
        as_bytes = {name: undecodable(name, config.encoding) for name in columns.schema} if is_bad else {}
    else:
        as_bytes = {name: undecodable(name, "utf8") for name, kind in schema.items() if _is_bytes(kind)}
        frame = _parquet_columns(frame, schema, columns.schema)
    return Table(**{**vars(columns), "files": files}, frame=frame, undecodable=as_bytes, num_rows=num_rows)


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


def _parquet_file(file: Path) -> TableFile:
    """Types and rows from the footer.

    Raises UserError for a file that is cut or damaged, names a column twice, or holds no row.
    """
    try:
        metadata = pq.read_metadata(file)
        names = metadata.schema.to_arrow_schema().names
        check_unique(names, file)
        schema = pl.read_parquet_schema(file)
        groups = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        if groups != metadata.num_rows:
            raise pa.ArrowInvalid(f"its footer counts {metadata.num_rows:,} rows, and its row groups have {groups:,}")
    except (pa.ArrowException, OSError, pl.exceptions.PolarsError) as error:
        if machine_errno(error):
            raise
        raise UserError(
            f"{file} cannot be read as Parquet: it is cut or damaged, no Parquet file, or has an unknown type "
            f"({str(error).splitlines()[0]}). Copy or write it again"
        ) from None
    if metadata.num_rows == 0:
        raise UserError(f"{file} holds no row; leave it out, or write it again")
    return TableFile(file, file, pl.Schema(schema), metadata.num_rows)


def _with_partition(file: TableFile) -> TableFile:
    """The file with the columns that its folders give. Raises UserError where it has one of these itself."""
    partition = partitions(file.file)
    for name, value in partition.items():
        if name in file.schema:
            raise UserError(
                f"{file.file}: column {name!r} is in the file and in the name of its folder, {name}={value}; expected "
                "one of the two. Write the file without that column, or rename the folder"
            )
    return file._replace(partition=partition)


def _common_schema(files: Sequence[TableFile]) -> tuple[pl.Schema, dict[str, Path], dict[str, str]]:
    """(types, origin, left out) of all columns of the files: a type that holds the values of every file, a file that
    has the column in that type, and why a column cannot be read: two files hold different kinds of values (text and
    numbers, say), or decimals that are too long. A column that a file lacks is missing for all its rows.
    """
    common: dict[str, pl.DataType] = {}
    origin: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for file in files:
        for name, kind in file.schema.items():
            if isinstance(kind, pl.Decimal) and (kind.precision or 0) > MAX_DIGITS:
                left_out[name] = f"column {name!r} of {file.file} has decimals of over {MAX_DIGITS} digits"
            if name == ROW or name in left_out:
                continue
            if name not in common or common[name] == pl.Null:
                common[name], origin[name] = kind, file.file
                continue
            wider = wider_type(common[name], kind)
            if wider is None:
                left_out[name] = (
                    f"column {name!r} is {common[name]} in {origin[name]}, and {kind} in {file.file}; expected one "
                    "kind of values in all files"
                )
            elif wider != common[name]:
                common[name], origin[name] = wider, file.file
    for name in left_out:
        common.pop(name, None)
        origin.pop(name, None)
    for file in files:
        for name in file.partition:
            if common.setdefault(name, pl.String()) != pl.String():
                raise UserError(
                    f"column {name!r} is {common[name]} in {origin[name]}, and the name of a folder of {file.file}; "
                    "expected one of the two in all files"
                )
            origin.setdefault(name, file.file)
    return pl.Schema(common), origin, left_out


def wider_type(one: pl.DataType, other: pl.DataType) -> pl.DataType | None:
    """The type that holds the values of both without changing them; None where they are of different kinds."""
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
    """Whether every value can be written as JSON: bytes cannot, nor times in lists, whose year may be out of range."""
    if isinstance(kind, (pl.List, pl.Array)):
        return _is_json(kind.inner, nested=True)  # type: ignore[arg-type]
    if isinstance(kind, pl.Struct):
        return all(_is_json(inner.dtype, nested=True) for inner in kind.fields)  # type: ignore[arg-type]
    return kind != pl.Binary and not (nested and kind.is_temporal())


def readable(names: Sequence[str]) -> dict[str, str]:
    """Each column name → the name by which it is read.

    Polars reads "*" and "^…$" as patterns, and an empty name means the default in a config: these get a _ in front.
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


def _scan(files: Sequence[TableFile], schema: pl.Schema, names: dict[str, str]) -> pl.LazyFrame:
    """All rows of all files with the common types and ROW; consecutive files with the same types are one scan.

    names: new name of each column.
    """
    frames, first = [], 0
    for kinds, group in itertools.groupby(files, key=lambda file: tuple(file.schema.items())):
        same, own = list(group), dict(kinds)
        numbered = {} if ROW in own else {"row_index_name": ROW, "row_index_offset": first}
        paths = [str(file.parquet) for file in same]
        in_folders = sorted({name for file in same for name in file.partition})
        with_path = {"include_file_paths": _FILE} if in_folders else {}
        frame = pl.scan_parquet(paths, glob=False, hive_partitioning=False, **numbered, **with_path)  # type: ignore[arg-type]
        first += sum(file.num_rows for file in same)
        columns = [
            (_of_folder(name, same) if name in in_folders else _widened(name, own.get(name), kind)).alias(names[name])
            for name, kind in schema.items()
        ]
        frames.append(frame.select(pl.col(ROW).cast(pl.Int64), *columns))
    return pl.concat(frames) if len(frames) > 1 else frames[0]


def _of_folder(name: str, files: Sequence[TableFile]) -> pl.Expr:
    """A column that the folders of these files give, by the file of each row."""
    values = [file.partition.get(name) for file in files]
    return pl.col(_FILE).replace_strict([str(file.parquet) for file in files], values, return_dtype=pl.String)


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


def _text_columns(frame: pl.LazyFrame, names: Sequence[str], separator: str, missing: Sequence[str]) -> pl.LazyFrame:
    """CSV: the row as read, and null for the texts that mean "no value"."""
    fields = pl.concat_str([pl.col(name) for name in names], separator=separator, ignore_nulls=True)
    as_read = pl.coalesce(RAW, fields).str.replace_all(UNDECODABLE, "\ufffd", literal=True)
    values = [pl.when(~pl.col(name).str.strip_chars().is_in(missing)).then(name).alias(name) for name in names]
    return frame.with_columns(as_read.alias(RAW), *values)


def _parquet_columns(frame: pl.LazyFrame, schema: Mapping[str, pl.DataType], own: pl.Schema) -> pl.LazyFrame:
    """Parquet: bytes and categories as text (`schema` → `own`), empty text as null, the row as JSON."""
    as_bytes = [name for name, kind in schema.items() if kind == pl.Binary]
    texts = [name for name, kind in own.items() if kind == pl.String]
    frame = frame.with_columns(
        decode(pl.col(name)) if name in as_bytes else pl.col(name).cast(pl.String) for name in texts
    )
    row = pl.struct([of_calendar(pl.col(name), kind) for name, kind in own.items() if _is_json(kind)])
    row = row.struct.json_encode()
    as_read = row.str.replace_all(UNDECODABLE, "\ufffd", literal=True)
    values = [pl.when(pl.col(name) != "").then(name).alias(name) for name in texts]
    return frame.with_columns(pl.lit(None, pl.String).alias(REASON), as_read.alias(RAW), *values)
