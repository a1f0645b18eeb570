"""Vocabularies of a warm start: files of raw id → row, how two of them are joined, and hashes in place of one.

Shape suffixes: N raw ids.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from lumrec.run.errors import UserError
from lumrec.run.files import check_file

_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
# What surrounds an id in some files: blanks, quotes, what is not printed; and whole numbers: `7`, `007`, `+7`, `7.00`.
_AROUND, _NUMBER = r"""^b?['"\s\pC]+|['"\s\pC]+$""", r"^\+?(-?)0*(\d+?)(?:\.0*)?$"
_POWER = r"^\d(?:\.\d+)?e\+?\d{1,2}$"  # 1.25e7, as Java and pandas write 12500000.0


def read_vocabulary(
    path: Path, columns: Sequence[str], rows: int, what: str, *, is_shared: bool = False
) -> pl.DataFrame:
    """key (str, or whole numbers where Parquet has such), row (i64) of a Parquet or CSV file, in its order.

    is_shared: several raw ids may have one row. Raises MissingFileError, or UserError for missing columns and values,
    rows that are no whole numbers, an id (or, without is_shared, a row) that occurs twice, and a row beyond `rows`.
    """
    key, row = columns
    frame = read_columns(path, [key, row], numbers=[row]).select(pl.col(key).alias("key"), pl.col(row).alias("row"))
    frame = frame.with_columns(_keys(frame["key"], path, key), row_numbers(frame["row"], path, row))
    if missing := int(frame.select(pl.any_horizontal(pl.all().is_null())).sum().item()):
        raise UserError(f"{path}: {missing:,} entries lack their raw id or their row")
    for column, name in (("key", key), ("row", row)):
        twice = frame.filter(pl.col(column).is_duplicated())
        if len(twice) and not (is_shared and column == "row"):
            number = int((frame[column] == twice[column][0]).sum())
            shared = " (or say collisions=share, where a hash gave several raw ids one row)" if column == "row" else ""
            raise UserError(
                f"{path}: {name} {short(twice[column][0])} occurs {number} times ({len(twice):,} such entries): a raw "
                f"id has one row, and a row one raw id. Mend the vocabulary{shared}"
            )
    beyond = frame.filter((pl.col("row") < 0) | (pl.col("row") >= rows))
    if len(beyond):
        raise UserError(
            f"{path}: {short(beyond['key'][0])} has row {beyond['row'][0]:,} ({len(beyond):,} such entries), but the "
            f"table of {what} has {rows:,} rows: it is shorter than the vocabulary says, or the vocabulary is another "
            "table's"
        )
    return frame


def read_columns(
    path: Path, columns: list[str], *, numbers: Sequence[str] = (), key: str = "", expected: str = ""
) -> pl.DataFrame:
    """A Parquet or CSV file that has these columns; in CSV all but `numbers` are text. key, expected: for errors."""
    check_file(path, key, expected or f"Parquet or CSV with the columns {', '.join(columns)}")
    try:
        # Raw ids and categories are text: "007" is not 7.
        texts = {name: pl.String for name in columns if name not in numbers}
        frame = (
            pl.read_parquet(path)
            if path.suffix == ".parquet"
            else pl.read_csv(path, schema_overrides=texts, infer_schema_length=None)
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} cannot be read as {path.suffix or 'CSV'}: {str(error).splitlines()[0]}") from None
    if twice := [name for name in frame.columns if f"{name}_duplicated_0" in frame.columns]:  # as polars renames them
        raise UserError(f"{path} has the column {twice[0]!r} twice; expected each once")
    absent = [name for name in columns if name not in frame.columns]
    if absent:
        raise UserError(f"{path} has no column {absent[0]!r}; it has {', '.join(frame.columns)}")
    return frame


def _keys(keys: pl.Series, path: Path, name: str) -> pl.Series:
    """Raw ids as text, or as i64 (u64 where one is 2^63 or more)."""
    if keys.dtype.is_integer() and keys.dtype not in (pl.Int128, pl.UInt128):
        return keys if keys.dtype == pl.UInt64 and (keys >= 2**63).any() else keys.cast(pl.Int64)
    if keys.dtype not in (pl.String, pl.Categorical, pl.Enum):
        raise UserError(
            f"{path}: column {name!r} holds {keys.dtype}; expected raw ids as text or whole numbers, in the log's form"
        )
    return keys.cast(pl.String)


def row_numbers(rows: pl.Series, path: Path, name: str) -> pl.Series:
    """Row numbers as i64. Raises UserError for what are none; nothing is rounded."""
    known = rows.drop_nulls()
    is_number = rows.dtype.is_integer() or rows.dtype.is_float() and bool((known.floor() == known).all())
    try:
        if not (is_number or rows.dtype in (pl.String, pl.Null)):
            raise ValueError
        return rows.cast(pl.Int64)
    except (ValueError, pl.exceptions.InvalidOperationError):
        some = f" such as {short(known[0])}" if rows.dtype.is_numeric() or rows.dtype == pl.String else ""
        raise UserError(f"{path}: column {name!r} holds {rows.dtype}{some}; expected row numbers: 0, 1, 2, …") from None


def join(target: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
    """Both by key; as text where they have it in different types."""
    if target["key"].dtype != other["key"].dtype:
        target, other = (frame.with_columns(pl.col("key").cast(pl.String)) for frame in (target, other))
    return target.join(other, on="key", how="inner")


def lookalikes(target: pl.DataFrame, source: pl.DataFrame) -> tuple[int, str, str]:
    """How many ids of the target have none in the source but for another form of it, and two such: ours, theirs."""

    def plain(frame: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
        key = pl.col("key").cast(pl.String)
        apart = frame.select(key).join(other.select(key), on="key", how="anti")
        return apart.with_columns(form=_form(pl.col("key")))

    alike = plain(target, source).join(plain(source, target), on="form", how="inner", suffix="_theirs")
    alike = alike.unique("key", maintain_order=True)
    return (len(alike), alike["key"][0], alike["key_theirs"][0]) if len(alike) else (0, "", "")


def _form(key: pl.Expr) -> pl.Expr:
    """One form for all ids that mean the same to a reader: of letters and digits alike (also é of one code or two), and
    of whole numbers, those of 64 bits with and without a sign among them.
    """
    text = key.str.normalize("NFKC").str.replace_all(_AROUND, "").str.to_lowercase()
    power = pl.when(text.str.contains(_POWER)).then(text).cast(pl.Float64, strict=False)
    text = pl.when(power < 2**63).then(power.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(text)
    text = text.str.replace(_NUMBER, "${1}${2}")
    negative = pl.when(text.str.starts_with("-")).then(text).cast(pl.Int64, strict=False)
    return pl.when(negative <= 0).then(negative.reinterpret(signed=False).cast(pl.String)).otherwise(text)


def short(value: object, show: Callable[[object], str] = repr) -> str:
    """A raw id for a message, cut where it is long."""
    text = show(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"


def hash_rows(keys: pl.Series, function: str, rows: int, what: str = "a table") -> np.ndarray:
    """Row (int64 [N]) of each raw id under a hash rule: hash(id) modulo `rows`.

    "modulo": the id, a whole number (a negative one counts from the end, as in Python). "splitmix64": the finalizer of
    SplitMix64 (Steele et al., OOPSLA 2014) of the id as an unsigned 64-bit number. "fnv1a64": FNV-1a of its UTF-8
    bytes.
    """
    if function == "fnv1a64":
        return (_fnv1a64(keys) % np.uint64(rows)).astype(np.int64)
    id_N = _whole_numbers(keys, function, what)
    if function == "modulo":
        return np.mod(id_N, id_N.dtype.type(rows)).astype(np.int64)
    x_N = id_N.astype(np.uint64)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x_N ^ (x_N >> np.uint64(31))) % np.uint64(rows)).astype(np.int64)


def _whole_numbers(keys: pl.Series, function: str, what: str) -> np.ndarray:
    """The ids as int64, or as uint64 where some are 2^63 or more."""
    for dtype in (pl.Int64, pl.UInt64):
        try:
            return keys.cast(dtype).to_numpy()
        except pl.exceptions.InvalidOperationError:
            continue
    raise UserError(
        f"{what}: hash={function} is of whole numbers of 64 bits, and not all ids are such (the first is "
        f"{short(keys[0])}); use hash=fnv1a64"
    )


def _fnv1a64(keys: pl.Series) -> np.ndarray:
    text = keys.cast(pl.String).to_arrow().cast(pa.large_string()).cast(pa.large_binary())
    _, offset_buffer, byte_buffer = text.buffers()
    offset = np.frombuffer(offset_buffer, np.int64)[text.offset : text.offset + len(text) + 1]
    byte = np.frombuffer(byte_buffer, np.uint8) if byte_buffer is not None else np.zeros(0, np.uint8)
    length_N = np.diff(offset)
    # Longest first, so that the texts which have a byte at some place are the first ones.
    order_N = np.argsort(-length_N, kind="stable")
    start_N, hash_N = offset[:-1][order_N], np.full(len(text), _FNV_OFFSET)
    number_at = len(text) - np.searchsorted(np.sort(length_N), np.arange(length_N.max(initial=0)), side="right")
    for place, number in enumerate(number_at):
        hash_N[:number] = (hash_N[:number] ^ byte[start_N[:number] + place].astype(np.uint64)) * _FNV_PRIME
    result_N = np.empty_like(hash_N)
    result_N[order_N] = hash_N
    return result_N
