"""Which row of the source each row of a table gets: by place, by raw id, or by a hash of the raw id.

Shape suffixes: R rows of the target table, S rows of the source's, N raw ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from lumrec.errors import MissingFileError, UserError
from lumrec.warm_start.rules import Rule

NEW = -1
_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


@dataclass(frozen=True)
class RowMap:
    """source_row_R: row of the source (int64), NEW for none. category_R: number of a row's category, -1 for none."""

    source_row_R: Tensor
    num_source_rows: int
    category_R: "Tensor | None" = None
    num_categories: int = 0

    @property
    def taken_S(self) -> Tensor:
        """Whether each row of the source is taken (bool)."""
        taken_S = torch.zeros(self.num_source_rows, dtype=torch.bool)
        taken_S[self.source_row_R[self.source_row_R >= 0]] = True
        return taken_S

    @property
    def num_new(self) -> int:
        return int((self.source_row_R == NEW).sum())


def map_rows(rule: Rule, *, source_rows: int, target_rows: int, folder: Path, what: str) -> RowMap:
    """The RowMap that a rule asks for. `what`: the parameter, for errors.

    Raises UserError for tables of other sizes than the rule allows, a vocabulary with an id or a row twice or a row
    that its table has not, ids that share a row of the source without leave, and new rows about which nothing is said.
    """
    if rule.rows in ("error", "grow"):
        if source_rows != target_rows and (rule.rows == "error" or source_rows > target_rows):
            hint = "rows=grow or remap" if source_rows < target_rows else "rows=remap, by raw id"
            raise UserError(
                f"{what} has {target_rows:,} rows, {rule.source!r} {source_rows:,}: say what row is which by {hint}"
            )
        row_R = torch.arange(target_rows)
        return _stated(rule, RowMap(row_R.where(row_R < source_rows, NEW), source_rows), what)
    target = read_vocabulary(folder / rule.target_vocabulary, rule.target_columns, target_rows, what)
    if rule.rows == "remap":
        source = read_vocabulary(folder / rule.source_vocabulary, rule.source_columns, source_rows, repr(rule.source))
        pairs = _join(target, source.rename({"row": "source_row"}))
    else:
        hash_N = torch.from_numpy(hash_rows(target["key"], rule.hash, source_rows, what))
        pairs = target.with_columns(pl.Series("source_row", hash_N.numpy()))
        _check_collisions(rule, pairs, source_rows, what)
    source_row_R = torch.full((target_rows,), NEW)
    source_row_R[_tensor(pairs["row"])] = _tensor(pairs["source_row"])
    for row in rule.keep_rows:
        if not (0 <= row < source_rows and row < target_rows):
            raise UserError(f"{what}: keep_rows has {row}; there are {source_rows} and {target_rows} rows")
        if (target["row"] == row).any():
            raise UserError(f"{what}: keep_rows has {row}, but {rule.target_vocabulary} gives that row to a raw id")
        source_row_R[row] = row
    row_map = RowMap(source_row_R, source_rows)
    if rule.new_rows == "category_mean":
        category_R, number = _categories(folder / rule.categories, target, target_rows, what)
        row_map = RowMap(source_row_R, source_rows, category_R, number)
    return _stated(rule, row_map, what)


def _join(target: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
    """Both by key; as text where one side has numbers and the other text."""
    if target["key"].dtype != other["key"].dtype:
        target, other = (frame.with_columns(pl.col("key").cast(pl.String)) for frame in (target, other))
    return target.join(other, on="key", how="inner")


def _stated(rule: Rule, row_map: RowMap, what: str) -> RowMap:
    if rule.new_rows == "unknown" and row_map.source_row_R[0] == NEW:
        raise UserError(f"{what}: new_rows=unknown copies row 0, which has no source itself: say keep_rows: [0]")
    if row_map.num_new and not rule.new_rows:
        raise UserError(
            f"{what}: {row_map.num_new:,} of {len(row_map.source_row_R):,} rows have no source: say new_rows=mean, "
            "category_mean, unknown, zero or random"
        )
    if rule.new_rows in ("mean", "category_mean") and row_map.num_new == len(row_map.source_row_R):
        raise UserError(f"{what}: not one raw id is in both vocabularies, so there is no mean: are they of one table?")
    return row_map


def read_vocabulary(path: Path, columns: Sequence[str], rows: int, what: str) -> pl.DataFrame:
    """key (str, or i64 where Parquet has whole numbers), row (i64) of a Parquet or CSV file, in its order.

    Raises MissingFileError, or UserError for missing columns and values, an id or a row that stands twice, and a row
    that a table of `rows` rows has not.
    """
    key, row = columns
    frame = _read(path, [key, row]).select(pl.col(key).alias("key"), pl.col(row).alias("row"))
    frame = frame.with_columns(pl.col("key").cast(pl.Int64 if frame["key"].dtype.is_integer() else pl.String))
    try:
        frame = frame.with_columns(pl.col("row").cast(pl.Int64))
    except pl.exceptions.InvalidOperationError:
        raise UserError(f"{path}: column {row!r} holds {frame['row'].dtype}; expected row numbers") from None
    if missing := int(frame.select(pl.any_horizontal(pl.all().is_null())).sum().item()):
        raise UserError(f"{path}: {missing:,} entries lack their raw id or their row")
    for column, name in (("key", key), ("row", row)):
        twice = frame.filter(pl.col(column).is_duplicated())
        if len(twice):
            raise UserError(
                f"{path}: {name} {twice[column][0]!r} stands {int((frame[column] == twice[column][0]).sum())} times "
                f"({len(twice):,} such entries): a raw id has one row, and a row one raw id. Mend the vocabulary"
            )
    beyond = frame.filter((pl.col("row") < 0) | (pl.col("row") >= rows))
    if len(beyond):
        raise UserError(
            f"{path}: {beyond['key'][0]!r} has row {beyond['row'][0]:,} ({len(beyond):,} such entries), but the table "
            f"of {what} has {rows:,} rows: it is shorter than the vocabulary says, or the vocabulary is another table's"
        )
    return frame


def _read(path: Path, columns: list[str]) -> pl.DataFrame:
    if not path.is_file():
        raise MissingFileError(
            f"there is no file {path}; expected Parquet or CSV with the columns {', '.join(columns)}"
        )
    try:
        # Raw ids are text: "007" is not 7.
        frame = (
            pl.read_parquet(path)
            if path.suffix == ".parquet"
            else pl.read_csv(path, schema_overrides={columns[0]: pl.String})
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} cannot be read as {path.suffix or 'CSV'}: {str(error).splitlines()[0]}") from None
    absent = [name for name in columns if name not in frame.columns]
    if absent:
        raise UserError(f"{path} has no column {absent[0]!r}; it has {', '.join(frame.columns)}")
    return frame


def _categories(path: Path, target: pl.DataFrame, target_rows: int, what: str) -> tuple[Tensor, int]:
    frame = _read(path, ["key", "category"]).select(pl.col("key").cast(pl.String), pl.col("category").cast(pl.String))
    twice = frame.filter(pl.col("key").is_duplicated())
    if len(twice):
        raise UserError(f"{path}: key {twice['key'][0]!r} has several categories; expected one for each")
    known = _join(target, frame.drop_nulls())
    if not len(known):
        raise UserError(f"{path} has no raw id of {what}: are its keys of another table?")
    codes = known["category"].rank("dense").cast(pl.Int64) - 1
    category_R = torch.full((target_rows,), -1)
    category_R[_tensor(known["row"])] = _tensor(codes)
    return category_R, int(codes.max()) + 1  # type: ignore[arg-type]


def hash_rows(keys: pl.Series, function: str, rows: int, what: str = "a table") -> np.ndarray:
    """Row (int64 [N]) of each raw id under a hash rule: hash(id) modulo `rows`.

    "modulo": the id, a whole number (a negative one counts from the end, as in Python). "splitmix64": the finalizer of
    SplitMix64 (Steele et al., OOPSLA 2014) of the id as an unsigned 64-bit number. "fnv1a64": FNV-1a of its UTF-8
    bytes.
    """
    if function == "fnv1a64":
        return (_fnv1a64(keys) % np.uint64(rows)).astype(np.int64)
    try:
        id_N = keys.cast(pl.Int64).to_numpy()
    except pl.exceptions.InvalidOperationError:
        raise UserError(
            f"{what}: hash={function} is of whole numbers, and the ids are text ({keys[0]!r}); use hash=fnv1a64"
        ) from None
    if function == "modulo":
        return np.mod(id_N, rows)
    x_N = id_N.astype(np.uint64)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x_N ^ (x_N >> np.uint64(31))) % np.uint64(rows)).astype(np.int64)


def _fnv1a64(keys: pl.Series) -> np.ndarray:
    text = keys.cast(pl.String).to_arrow().cast(pa.large_string()).cast(pa.large_binary())
    _, offset_buffer, byte_buffer = text.buffers()
    offset = np.frombuffer(offset_buffer, np.int64)[text.offset : text.offset + len(text) + 1]
    byte = np.frombuffer(byte_buffer, np.uint8) if byte_buffer is not None else np.zeros(0, np.uint8)
    hash_N, length_N = np.full(len(text), _FNV_OFFSET), np.diff(offset)
    for place in range(int(length_N.max(initial=0))):  # over the places in a text, not over texts
        has = length_N > place
        hash_N[has] = (hash_N[has] ^ byte[offset[:-1][has] + place].astype(np.uint64)) * _FNV_PRIME
    return hash_N


def _check_collisions(rule: Rule, pairs: pl.DataFrame, source_rows: int, what: str) -> None:
    shared = pairs.filter(pl.col("source_row").is_duplicated()).sort("source_row")
    if len(shared) and rule.collisions == "error":
        (one, two), row = shared["key"][:2], shared["source_row"][0]
        raise UserError(
            f"{what}: {len(shared):,} of {len(pairs):,} raw ids share a row of the source under hash={rule.hash} "
            f"modulo {source_rows:,}, such as {one!r} and {two!r} (row {row:,}): "
            "say collisions=share to begin each with that row, as production answered them"
        )


def _tensor(series: pl.Series) -> Tensor:
    return torch.from_numpy(series.cast(pl.Int64).to_numpy(writable=True))
