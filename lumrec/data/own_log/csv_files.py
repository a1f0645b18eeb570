"""CSV files as Parquet, converted as a stream; every row keeps its index, also rows that cannot be used.

user_id,item_id,click
u1,i1,1                    row 0: REASON null
u1,i2                      row 1: too few fields: REASON, and RAW with the line
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from lumrec.data.own_log.config import TAB, LogConfig
from lumrec.data.own_log.table_file import MARK_ERRORS, RAW, REASON, ROW, UNDECODABLE, TableFile, check_unique
from lumrec.run.errors import UserError
from lumrec.run.failures import machine_errno

log = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20  # read and parsed at a time: limits the memory, and the length of a row
MAX_BREAKS = 100  # in one field: with more, a quote was left open and the field runs to the end of the file
MAX_BAD_ROWS = 200_000  # consecutive ones: then the separator or the header is wrong
SEPARATORS = (",", ";", "\t", "|")  # tried where the config's does not separate the fields
FIRST_LINES = 5
EMPTY_LINE, HEADER_AGAIN = "empty line", "the header again"
LINE_BREAK = "line break within a field (a quote that is not closed?)"


class Utf8Stream(io.RawIOBase):
    """Bytes of a file in any encoding as UTF-8, with UNDECODABLE in place of what cannot be decoded.

    seen: those of the texts `watch` that were read so far.
    """

    def __init__(self, source: BinaryIO, encoding: str, watch: Sequence[str] = ()):
        self._source, self._left, self._watch = source, b"", watch
        self._decoder = codecs.getincrementaldecoder(encoding)(MARK_ERRORS)
        self.seen: set[str] = set()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """`size` bytes; fewer only at the end."""
        assert size >= 0
        while len(self._left) < size:
            chunk = self._source.read(size)
            text = self._decoder.decode(chunk, not chunk)
            self.seen.update(each for each in self._watch if each not in self.seen and each in text)
            self._left += text.encode()
            if not chunk:
                break
        out, self._left = self._left[:size], self._left[size:]
        return out

    def readinto(self, buffer: Any) -> int:
        """Reads into a buffer; returns the number of bytes, 0 at the end."""
        out = self.read(len(buffer))
        buffer[: len(out)] = out
        return len(out)

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()


def csv_file(file: Path, config: LogConfig) -> TableFile:
    """A CSV file of which only the header was read.

    Raises UserError, which names the file, for one that is empty, cut or not CSV, and for a header that names a column
    twice.
    """
    separator = _separator(file, config)
    names = _names(_header(file, config, separator))
    kinds = {**dict.fromkeys(names, pl.String()), ROW: pl.Int64(), REASON: pl.String(), RAW: pl.String()}
    return TableFile(file, file, pl.Schema(kinds), 0, separator)


def to_parquet(files: Sequence[TableFile], name: str, config: LogConfig, scratch: Path) -> list[TableFile]:
    """The files of `csv_file` as Parquet in `scratch`: their columns as text, ROW, and REASON and RAW of bad rows.

    Raises UserError, which names the file, for one that is cut, and for a quote that is never closed.
    """
    converted: list[TableFile] = []
    for index, file in enumerate(files):
        first = sum(each.num_rows for each in converted)
        converted.append(_convert(file, scratch / f"{name}-{index:05d}.parquet", config, first))
    return converted


def _separator(file: Path, config: LogConfig) -> str:
    """The separator of this file: a tab in a .tsv, else the config's; where that does not separate the first lines and
    another one does, the other one, with a warning in the log.
    """
    given = "\t" if ".tsv" in file.suffixes else TAB.get(config.separator, config.separator)
    counts = {one: _counts(file, config, one) for one in dict.fromkeys((given, *SEPARATORS))}
    if counts[given] and counts[given][0] > 1 and len(set(counts[given])) == 1:
        return given
    better = [one for one, of in counts.items() if of and of[0] > max(1, counts[given][0]) and len(set(of)) == 1]
    if not better:
        return given
    found = max(better, key=lambda one: counts[one][0])
    log.warning(
        "%s is read with separator %r, as %r (data.log.separator) does not fit its first lines", file, found, given
    )
    return found


def _counts(file: Path, config: LogConfig, separator: str) -> list[int]:
    """Number of fields of each of the first lines."""
    try:
        with _text(file, config) as text:
            rows = csv.reader(text, delimiter=separator, **_quoting(config))
            return [len(row) for row in itertools.islice(rows, FIRST_LINES) if row]
    except csv.Error:
        return []
    except (OSError, EOFError) as error:
        raise _damaged(file, error) from None


def _text(file: Path, config: LogConfig) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedReader(_open(file, config)), encoding="utf-8", newline="")


def _quoting(config: LogConfig) -> Any:
    return {"quotechar": config.quote} if config.quote else {"quoting": csv.QUOTE_NONE}


def _open(file: Path, config: LogConfig) -> Utf8Stream:
    """The file as UTF-8. Raises UserError where its first bytes are those of another format or encoding."""
    packed = file.suffix == ".gz"
    with open(file, "rb") as start:
        magic = start.read(4)
    for first, what, advice in (
        (b"PAR1", "a Parquet file", "end its name in .parquet"),
        (b"\x1f\x8b", "a gzip file", "end its name in .gz"),
        (b"PK\x03\x04", "a zip file (or a spreadsheet)", "unpack it, or save it as CSV"),
    ):
        if magic.startswith(first) and not (packed and what == "a gzip file"):
            raise UserError(f"{file} is {what}, not CSV; {advice}")
    watch = [UNDECODABLE, *([config.quote] if config.quote else [])]
    return Utf8Stream(_bytes(file, packed), _encoding(file, packed, config), watch)


def _bytes(file: Path, packed: bool) -> BinaryIO:
    source = pa.OSFile(str(file))
    return cast(BinaryIO, pa.CompressedInputStream(source, "gzip") if packed else source)


def _encoding(file: Path, packed: bool, config: LogConfig) -> str:
    """The encoding: the config's, unless the file begins with a byte order mark."""
    try:
        with _bytes(file, packed) as source:
            first = source.read(4)
    except OSError as error:
        raise _damaged(file, error) from None
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),  # the mark is not part of the first name
        (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, as it begins with that mark
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if first.startswith(mark):
            return encoding
    if (name := codecs.lookup(config.encoding).name) in ("utf-16", "utf-32"):
        raise UserError(
            f"{file} does not begin with the byte order mark of {name}; say data.log.encoding={name}-le or {name}-be"
        )
    if b"\0" in first and name == "utf-8":
        likely = "utf-16-le" if first[1:2] == b"\0" else "utf-16-be"
        raise UserError(f"{file} is not {config.encoding} text (it has zero bytes); try data.log.encoding={likely}")
    return config.encoding


def _header(file: Path, config: LogConfig, separator: str) -> list[str]:
    """The fields of the first line, unchanged. Raises UserError where there are none, or two with one name."""
    try:
        with _text(file, config) as text:
            fields = next(csv.reader(text, delimiter=separator, **_quoting(config)), None)
            has_rows = text.read(1) != ""
    except (OSError, csv.Error) as error:
        raise _damaged(file, error) from None
    if not fields:
        raise UserError(f"{file} is empty; expected a first line with the names of the columns")
    if any(UNDECODABLE in field for field in fields):
        raise UserError(
            f"{file}: the names of the columns are not {config.encoding} text; give its encoding, such as "
            "data.log.encoding=latin-1 (or cp1252, gbk, …)"
        )
    check_unique(_names(fields), file)
    if not has_rows:
        raise UserError(f"{file} holds no row; leave it out, or write it again")
    return fields


def _names(header: Sequence[str]) -> list[str]:
    """Names of the columns, without blanks around them; a column without a name is named by its index, from 1."""
    return [field.strip() or f"column_{index}" for index, field in enumerate(header, 1)]


def _damaged(file: Path, error: Exception) -> Exception:
    """A UserError; the error itself where it is one of the machine, such as a full disk."""
    return (
        error
        if machine_errno(error)
        else UserError(f"{file} cannot be read to its end: it is cut or damaged ({error}). Copy or write it again")
    )


class _BadRows:
    """Collects the rows whose number of fields is not the header's, while pyarrow parses a block."""

    def __init__(self) -> None:
        self.rows: list[pacsv.InvalidRow] = []
        self.good_before = np.zeros(0, np.int64)  # good rows of the file before each bad row taken so far
        self.too_many = False

    def add(self, row: pacsv.InvalidRow) -> str:
        """Called by pyarrow, which would swallow an exception; so `take` raises."""
        self.rows.append(row)
        self.too_many = self.too_many or len(self.rows) > MAX_BAD_ROWS
        return "error" if self.too_many else "skip"

    def take(self, file: Path) -> dict[str, list]:
        """ROW (in the file), REASON, RAW of the rows since the last call. Raises UserError for an open quote."""
        rows, self.rows = self.rows, []
        for row in rows:
            if row.text.count("\n") > MAX_BREAKS:
                raise _open_quote(file, row.number)
        numbers = np.array([row.number for row in rows], np.int64) - 2  # pyarrow counts from 1, the header too
        before = len(self.good_before) + np.arange(len(rows))
        self.good_before = np.concatenate([self.good_before, numbers - before])
        return {
            ROW: list(numbers),
            REASON: [f"{row.actual_columns} fields, expected {row.expected_columns}" for row in rows],
            RAW: [row.text for row in rows],
        }

    def numbers_of_good(self, first: int, num_rows: int) -> np.ndarray:
        """Row in the file of each of the good rows first … first + num_rows - 1 (int64)."""
        good = np.arange(first, first + num_rows)
        return good + np.searchsorted(self.good_before, good, side="right")


def _open_quote(file: Path, line: int) -> UserError:
    return UserError(
        f"{file}: a quote that opens in or near line {line} is not closed within {MAX_BREAKS} lines. Where quotes are "
        "plain characters in this file, set data.log.quote=''; where fields hold that many lines, set "
        "data.log.line_breaks=true"
    )


def _convert(given: TableFile, target: Path, config: LogConfig, first_row: int) -> TableFile:
    """Writes `target` with every row of the CSV file; ROW counts from `first_row`."""
    file, header, separator = given.file, _header(given.file, config, given.separator), given.separator
    names, bad_rows, num_good, num_bad = _names(header), _BadRows(), 0, 0
    schema = pa.schema(
        [*((name, pa.string()) for name in names), (ROW, pa.int64()), (REASON, pa.string()), (RAW, pa.string())]
    )
    stream = _open(file, config)
    try:
        with pq.ParquetWriter(
            target, schema, compression="lz4", use_dictionary=False, write_statistics=False
        ) as writer:

            def write_bad() -> int:
                taken = bad_rows.take(file)
                taken[ROW] = [row + first_row for row in taken[ROW]]
                nothing = {name: pa.nulls(len(taken[ROW]), pa.string()) for name in names}
                writer.write_table(pa.table({**nothing, **taken}, schema=schema))
                return len(taken[ROW])

            for batch in _batches(stream, separator, header, config, bad_rows):
                num_bad += write_bad() if bad_rows.rows else 0
                rows = bad_rows.numbers_of_good(num_good, batch.num_rows)
                reason = _reasons(batch, header, file, config, stream.seen, rows)
                added = [pa.array(first_row + rows), reason, pa.nulls(batch.num_rows, pa.string())]
                writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, *added], schema=schema))
                num_good += batch.num_rows
            num_bad += write_bad() if bad_rows.rows else 0
    except pa.ArrowInvalid as error:
        if bad_rows.too_many:
            row = bad_rows.rows[0]
            raise UserError(
                f"{file}: over {MAX_BAD_ROWS:,} consecutive rows have another number of fields than the header "
                f"({row.actual_columns}, expected {row.expected_columns}), the first of them: {row.text[:200]!r}. Is "
                "data.log.separator right, and does the first line name every column?"
            ) from None
        if "straddling" in str(error) or "out of sync" in str(error):
            raise _open_quote(file, num_good + num_bad + 2) from None
        raise _damaged(file, error) from None
    except OSError as error:
        raise _damaged(file, error) from None
    return given._replace(parquet=target, num_rows=num_good + num_bad, has_undecodable=UNDECODABLE in stream.seen)


def _batches(
    stream: Utf8Stream, separator: str, header: Sequence[str], config: LogConfig, bad_rows: _BadRows
) -> Iterator[pa.RecordBatch]:
    """The good rows of a file, every field as text, in order."""
    yield from pacsv.open_csv(
        pa.PythonFile(stream, mode="r"),
        read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        parse_options=pacsv.ParseOptions(
            delimiter=separator,
            quote_char=config.quote or False,
            newlines_in_values=True,
            ignore_empty_lines=False,  # they count as rows, so that indices are right
            invalid_row_handler=bad_rows.add,
        ),
        convert_options=pacsv.ConvertOptions(check_utf8=False, column_types=dict.fromkeys(header, pa.string())),
    )


def _reasons(
    batch: pa.RecordBatch, header: Sequence[str], file: Path, config: LogConfig, seen: set[str], rows: np.ndarray
) -> pa.Array:
    """Why each row cannot be used (text, null where it can). Raises UserError for an open quote.

    rows: indices of the rows in the file, for that message.
    """
    empty = _all_equal(batch, [""] * len(header)) if len(header) > 1 else None
    found: list[tuple[Any, str]] = [(empty, EMPTY_LINE), (_all_equal(batch, header), HEADER_AGAIN)]
    for column in batch.columns:
        if config.quote in seen and not config.line_breaks:
            breaks = pc.match_substring_regex(column, "[\r\n]")
            found.append((breaks, LINE_BREAK))
            if pc.any(breaks).as_py() and pc.max(pc.count_substring(column, "\n")).as_py() > MAX_BREAKS:
                raise _open_quote(file, int(rows[pc.index(breaks, True).as_py()]) + 2)
    reason = pa.nulls(batch.num_rows, pa.string())
    for mask, text in reversed(found):
        if mask is not None and pc.any(mask).as_py():
            reason = pc.if_else(mask, text, reason)
    return reason


def _all_equal(batch: pa.RecordBatch, fields: Sequence[str]) -> Any:
    """Mask of the rows that hold exactly these fields; None where there are none."""
    mask = pc.equal(batch.column(0), fields[0])
    for column, field in zip(batch.columns[1:], fields[1:]):
        if not pc.any(mask).as_py():
            return None
        mask = pc.and_(mask, pc.equal(column, field))
    return mask
