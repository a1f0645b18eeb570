"""Logs of one's own: each row is there, read alike from CSV and Parquet; what is wrong is a reason or a clear error."""

from __future__ import annotations

import datetime
import gzip
import logging
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.data.config import DataConfig
from lumrec.data.open_log import read_source
from lumrec.data.own_log import csv_files as log_csv
from lumrec.data.own_log.config import LogConfig
from lumrec.data.own_log.read import read
from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import FeatureConfig, SchemaConfig
from lumrec.data.sources.raw_log import DataSetMissing, LabelConfig, RawLog
from lumrec.experiments.config import load
from lumrec.run.errors import UserError
from lumrec.run.failures import sentence

SHOP = Path(__file__).parents[3] / "examples" / "shop"
HEADER = "user_id,item_id,timestamp,label,scene\n"
GOOD = "u,7,1714521600,1,home\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file (text, or bytes as they are) and gives its path."""

    def writer(text: str | bytes, name: str = "log.csv") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return writer


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def read_log(events: object, scratch: Path, *, label: LabelConfig | None = None, **fields) -> RawLog:
    names = [str(event) for event in events] if isinstance(events, list) else str(events)
    log = LogConfig(events=names, **fields)
    return read(DataConfig(source="log", log=log, label=label or LabelConfig()), seed=0, scratch=scratch)


def reasons(raw: RawLog) -> list[str | None]:
    frame = raw.events.sort("order").collect()
    assert frame["order"].to_list() == list(range(len(frame)))
    return frame["reason"].to_list()


IDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=5)
ROWS = st.lists(
    st.tuples(
        IDS, IDS, st.integers(200_000_000, 4_000_000_000), st.booleans(), st.sampled_from(["a,b", '"', "x y", "ü"])
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(ROWS)
def test_csv_and_parquet_are_read_alike(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]):
    """Ids with quotes, separators and letters of any script; order is the number of the row."""
    folder = tmp_path_factory.mktemp("alike")
    columns = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "label": pl.Int64, "scene": pl.String}
    frame = pl.DataFrame([(u, i, t, int(y), s) for u, i, t, y, s in rows], schema=columns, orient="row")
    frame.write_csv(folder / "log.csv", quote_style="non_numeric")
    frame.write_parquet(folder / "log.parquet")
    read_frames = []
    for name in ("log.csv", "log.parquet"):
        (scratch := folder / f"{name}.d").mkdir()
        raw = read_log(folder / name, scratch, missing=[""])
        read_frames.append(raw.events.sort("order").collect())
    csv, parquet = (f.with_columns(pl.col("user_id", "item_id").cast(pl.String)) for f in read_frames)
    keys = ["user_id", "item_id", "time_us", "order", "label", "scene"]
    assert csv.select(keys).equals(parquet.select(keys))
    assert csv["reason"].null_count() == len(rows)
    assert csv["user_id"].to_list() == [row[0] for row in rows]
    assert csv["time_us"].to_list() == [row[2] * 1_000_000 for row in rows]
    assert csv["label"].to_list() == [float(row[3]) for row in rows]


def test_every_bad_row_is_there_with_its_reason_and_its_number(write: Callable, scratch: Path):
    text = (
        HEADER
        + GOOD
        + ",7,1714521600,1,home\n"
        + "u,,1714521600,1,home\n"
        + "u,7,,1,home\n"
        + "u,7,soon,1,home\n"
        + "u,7,0,1,home\n"
        + "u,7,1714521600,maybe,home\n"
        + "u,7,1714521600,,home\n"
        + "u,7,1714521600\n"
        + "u,7,1714521600,1,home,more\n"
        + "\n"
        + HEADER
        + GOOD
    )
    raw = read_log(write(text), scratch)
    assert reasons(raw) == [
        None,
        "user_id is missing",
        "item_id is missing",
        "timestamp is missing",
        "timestamp is not a number",
        "timestamp is not within 1970-01-02 and 2100-01-01, read as seconds",
        "label is neither 0 nor 1, true nor false",
        "label is missing",
        "3 fields, expected 5",
        "6 fields, expected 5",
        "empty line",
        "the header again",
        None,
    ]
    as_read = raw.events.sort("order").collect()["raw"]
    assert as_read[9] == "u,7,1714521600,1,home,more"
    assert as_read[1].endswith("7,1714521600,1,home")


def test_bytes_that_are_no_text_are_a_reason_or_another_encoding(write: Callable, scratch: Path, tmp_path: Path):
    path = write((HEADER + GOOD).encode() + "caf\xe9,7,1714521600,1,caf\xe9\n".encode("latin-1"))
    assert reasons(read_log(path, scratch)) == [None, "user_id is not utf8 text"]
    (again := tmp_path / "again").mkdir()
    raw = read_log(path, again, encoding="latin-1")
    assert reasons(raw) == [None, None]
    assert raw.events.sort("order").collect()["scene"].to_list() == ["home", "café"]


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        (["1714521600", "1714521601.25"], "auto", [1_714_521_600_000_000, 1_714_521_601_250_000]),
        (["1714521600123"], "auto", [1_714_521_600_123_000]),
        (["1714521600123456"], "auto", [1_714_521_600_123_456]),
        (["1714521600123456789"], "auto", [1_714_521_600_123_456]),
        (["2024-05-01", "2024-05-01 00:00Z"], "auto", [1_714_521_600_000_000, 1_714_521_600_000_000]),
        (["2024-05-01T02:00:00.5+02:00"], "auto", [1_714_521_600_500_000]),
        (["5000"], "s", [5_000_000_000]),
    ],
)  # fmt: skip
def test_times_of_every_kind(write: Callable, scratch: Path, values: list[str], unit: str, expected: list[int]):
    text = HEADER + "".join(f"u,7,{value},1,home\n" for value in values)
    assert (
        read_log(write(text), scratch, time_unit=unit).events.sort("order").collect()["time_us"].to_list() == expected
    )


def test_mixed_and_unclear_units_are_refused(write: Callable, scratch: Path):
    with pytest.raises(ValueError, match="mixes units: 1 values read as seconds, 1 as milliseconds|mixes units"):
        read_log(write(HEADER + GOOD + "u,7,1714521600000,1,home\n"), scratch)
    with pytest.raises(ValueError, match="holds no time whose unit is clear .*'12'"):
        read_log(write(HEADER + "u,7,12,1,home\n", "small.csv"), scratch)


def test_ids_are_integers_where_all_are(write: Callable, scratch: Path):
    raw = read_log(write(HEADER + GOOD), scratch)
    schema = raw.events.collect_schema()
    assert (schema["user_id"], schema["item_id"]) == (pl.String, pl.Int64)
    raw = read_log(write(HEADER + GOOD + "u,007,1714521600,1,home\n", "zeros.csv"), scratch)
    assert raw.events.sort("order").collect()["item_id"].to_list() == ["7", "007"]
    with pytest.raises(ValueError, match="the ids in column 'item_id' are numbers such as '12.0'.*not the id 12"):
        read_log(write(HEADER + "u,12.0,1714521600,1,home\n", "float.csv"), scratch)
    frame = pl.DataFrame({"user_id": ["u"], "item_id": [12.0], "timestamp": [1_714_521_600], "label": [1]})
    frame.write_parquet(path := scratch / "float.parquet")
    with pytest.raises(ValueError, match="'item_id' are of type Float64; expected integers or text"):
        read_log(path, scratch)


def test_labels_of_behaviour_types_and_ratings(write: Callable, scratch: Path, tmp_path: Path):
    path = write("user_id,item_id,timestamp,action,stars\nu,1,1714521600,buy,5\nu,2,1714521601,view,3\n")
    raw = read_log(path, scratch, label=LabelConfig("action", values=["buy"]))
    assert raw.events.sort("order").collect()["label"].to_list() == [1.0, 0.0]
    assert raw.known_after == ("action", "label")
    (again := tmp_path / "again").mkdir()
    raw = read_log(path, again, label=LabelConfig("stars", at_least=3), known_after="action")
    assert raw.events.sort("order").collect()["label"].to_list() == [1.0, 1.0]
    assert raw.known_after == ("action", "label", "stars")
    (third := tmp_path / "third").mkdir()
    with pytest.raises(ValueError, match="data.label.column is not given.*data.log.all_positive=true"):
        read_log(path, third)


def test_files_are_read_in_order_of_their_names_and_types_are_widened(scratch: Path):
    folder = scratch / "log"
    folder.mkdir()
    columns = {"user_id": ["u"], "item_id": [1], "timestamp": [1_714_521_600], "label": [1]}
    pl.DataFrame({**columns, "n": [1]}, schema_overrides={"item_id": pl.Int32}).write_parquet(folder / "b.parquet")
    pl.DataFrame({**columns, "item_id": [2], "n": [0.5]}).write_parquet(folder / "a.parquet")
    (folder / "_SUCCESS").write_text("")
    raw = read_log(folder, scratch)
    frame = raw.events.sort("order").collect()
    assert frame["item_id"].to_list() == [2, 1]
    assert frame["n"].to_list() == [0.5, 1.0]
    pl.DataFrame({**columns, "n": ["one"]}).write_parquet(folder / "c.parquet")
    raw = read_log(folder, scratch)  # a column that nothing reads keeps nobody from the others
    assert "n" not in raw.events.collect_schema()
    assert re.match(r"column 'n' is Float64 in .*a.parquet, and String in .*c.parquet", raw.left_out["n"])


def parquet_bytes(folder: Path) -> bytes:
    frame = pl.DataFrame(
        {"user_id": ["u"] * 99, "item_id": [1] * 99, "timestamp": [1_714_521_600] * 99, "label": [1] * 99}
    )
    frame.write_parquet(folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", b"", "log.csv is empty; expected a first line with the names"),
        ("log.csv", HEADER.encode(), "log.csv holds no row"),
        ("log.csv", b"user_id,item_id,item_id\n", "column 'item_id' occurs 2 times"),
        ("log.csv", GOOD.encode() + GOOD.encode(), "no column 'user_id'.*the first line of each file must name"),
        ("log.csv", b"user_id,item_id,timestmp,label\nu,1,1714521600,1\n", r"'timestamp' \(did you mean 'timestmp'"),
        ("log.csv", (HEADER + 'u,7,1714521600,1,"a\n' + GOOD * 300).encode(), "a quote that opens in or near line 2"),
        ("log.csv", b"PAR1....", "log.csv is a Parquet file, not CSV; end its name in .parquet"),
        ("log.csv.gz", gzip.compress((HEADER + GOOD * 5000).encode(), mtime=0)[:80], "cut or damaged"),
        ("log.parquet", b"PAR1 cut", "log.parquet cannot be read as Parquet: it is cut or damaged"),
        ("log.txt", GOOD.encode(), "is of no format that can be read; expected a name that ends in"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_refused(write: Callable, scratch: Path, name: str, content: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        read_log(write(content, name), scratch).events.collect()


def test_a_type_that_cannot_be_read_is_named(scratch: Path, tmp_path: Path):
    pl.DataFrame({"user_id": ["u"], "big": pl.Series([1]).cast(pl.Int128)}).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(UserError, match="log.parquet cannot be read as Parquet: .* more than 64 bits not implemented"):
        read_log(tmp_path / "log.parquet", scratch)


def test_a_cut_parquet_file_and_mixed_formats_and_no_file(write: Callable, scratch: Path, tmp_path: Path):
    whole = parquet_bytes(scratch)
    with pytest.raises(ValueError, match="half.parquet cannot be read as Parquet"):
        read_log(write(whole[: len(whole) // 2], "half.parquet"), scratch)
    write(whole, "mixed/a.parquet")
    write(HEADER + GOOD, "mixed/b.csv")
    with pytest.raises(ValueError, match="files of several formats: .*a.parquet is Parquet, .*b.csv is CSV"):
        read_log(tmp_path / "mixed", scratch)
    with pytest.raises(DataSetMissing, match="data.log.events: '.*nothing.*csv' leads to no file"):
        read_log(tmp_path / "nothing*.csv", scratch)
    with pytest.raises(ValueError, match="data.log.events is not given"):
        read(DataConfig(source="log"), seed=0, scratch=scratch)


def test_columns_that_lumrec_names_itself_are_handed_on_under_another_name(write: Callable, scratch: Path):
    raw = read_log(write("user_id,item_id,timestamp,label,order\nu,1,1714521600,1,A-77\n"), scratch)
    assert raw.events.collect()["order_raw"].to_list() == ["A-77"]


def events_of(raw: RawLog) -> pl.DataFrame:
    return raw.events.sort("order").collect()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["good", "short", "long", "empty", "undecodable", "header"]), min_size=1, max_size=60))
def test_every_line_keeps_its_number_whatever_stands_before_it(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str]
):
    """Blocks of two or three lines, so that most rows follow bad ones of this block and of earlier ones."""
    lines = {
        "good": b"u,7,1714521600,1,home",
        "short": b"u,7",
        "long": b"u,7,1714521600,1,home,more",
        "empty": b"",
        "undecodable": b"\xff,7,1714521600,1,home",
        "header": HEADER.strip().encode(),
    }
    folder = tmp_path_factory.mktemp("numbers")
    first = b"\n".join([HEADER.strip().encode(), *(lines[kind] for kind in kinds), b"first,7,1714521600,1,home\n"])
    (folder / "a.csv").write_bytes(first)
    (folder / "b.csv").write_text(HEADER + "last,7,1714521600,1,home\n")
    expected = {"good": None, "short": "2 fields, expected 5", "long": "6 fields, expected 5", "empty": "empty line"}
    expected |= {"undecodable": "user_id is not utf8 text", "header": "the header again"}
    before = log_csv.BLOCK_BYTES
    try:
        log_csv.BLOCK_BYTES = 64
        (scratch := folder / "scratch").mkdir()
        frame = events_of(read_log([folder / "a.csv", folder / "b.csv"], scratch))
    finally:
        log_csv.BLOCK_BYTES = before
    assert frame["order"].to_list() == list(range(len(kinds) + 2))
    assert frame["reason"].to_list() == [*(expected[kind] for kind in kinds), None, None]
    assert frame["user_id"].to_list()[-2:] == ["first", "last"]
    for kind, raw in zip(kinds, frame["raw"]):
        assert raw == lines[kind].decode(errors="replace") or kind == "empty"


def test_a_line_break_in_a_field_is_quarantined_or_allowed(write: Callable, scratch: Path, tmp_path: Path):
    path = write(HEADER + GOOD + 'u,7,1714521600,1,"home\npage"\n' + GOOD)
    raw = read_log(path, scratch)
    assert reasons(raw) == [None, "line break within a field (a quote that is not closed?)", None]
    (again := tmp_path / "again").mkdir()
    frame = events_of(read_log(path, again, line_breaks=True))
    assert frame["scene"].to_list() == ["home", "home\npage", "home"]
    (third := tmp_path / "third").mkdir()
    path = write(HEADER + 'u,7,1714521600,1,"27 inch\n' + GOOD, "inch.csv")
    assert events_of(read_log(path, third, quote=""))["scene"].to_list() == ['"27 inch', "home"]


@pytest.mark.parametrize("name", ["log.tsv", "log.csv.gz", "log.tsv.gz"])
def test_tabs_and_gzip(write: Callable, scratch: Path, name: str):
    text = HEADER + 'u,7,1714521600,1,"a b"\n' + GOOD
    text = text.replace(",", "\t") if ".tsv" in name else text
    content = gzip.compress(text.encode()) if name.endswith(".gz") else text
    frame = events_of(read_log(write(content, name), scratch))
    assert frame["scene"].to_list() == ["a b", "home"]
    assert frame["item_id"].to_list() == [7, 7]


def parquet_log(folder: Path, name: str = "log.parquet", /, **columns: object) -> Path:
    """Two events; keywords replace or add columns (None takes one away)."""
    usual = {"user_id": ["u", "v"], "item_id": [1, 2], "timestamp": [1_714_521_600, 1_714_521_601], "label": [1, 0]}
    pl.DataFrame({key: value for key, value in {**usual, **columns}.items() if value is not None}).write_parquet(
        folder / name
    )
    return folder / name


def test_times_of_parquet(scratch: Path, tmp_path: Path):
    """Dates, times with and without a zone, in files of one log: all become microseconds UTC."""
    utc = datetime.datetime(2024, 5, 1, 0, 0, 1)
    dates = pl.Series([datetime.date(2024, 5, 1), None])
    zoned = (
        pl.Series([utc, utc]).dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Shanghai").dt.cast_time_unit("ns")
    )
    files = [
        parquet_log(tmp_path, "a.parquet", timestamp=dates),
        parquet_log(
            tmp_path, "b.parquet", timestamp=pl.Series([utc, datetime.datetime(1970, 1, 1)]).dt.cast_time_unit("ms")
        ),
        parquet_log(tmp_path, "c.parquet", timestamp=zoned),
    ]
    raw = read_log(files, scratch)
    midnight = 1_714_521_600_000_000
    assert events_of(raw)["time_us"].to_list() == [
        midnight,
        None,
        midnight + 10**6,
        None,
        midnight + 10**6,
        midnight + 10**6,
    ]
    assert reasons(raw)[:4] == [
        None, "timestamp is missing", None, "timestamp is not within 1970-01-02 and 2100-01-01"
    ]  # fmt: skip
    assert raw.extra["time_unit"] == "datetime"
    with pytest.raises(ValueError, match="time_unit is 's'.*holds times already"):
        read_log(files[0], scratch, time_unit="s")


def test_numbers_that_are_not_finite(scratch: Path, tmp_path: Path):
    path = parquet_log(tmp_path, timestamp=[1714521600.5, float("inf")], label=[1.0, 0.0])
    assert reasons(read_log(path, scratch)) == [None, "timestamp is not finite"]
    assert events_of(read_log(path, scratch))["time_us"][0] == 1_714_521_600_500_000
    path = parquet_log(tmp_path, label=[float("nan"), 1.0])
    assert reasons(read_log(path, scratch)) == ["label is not finite", None]
    path = parquet_log(tmp_path, label=[float("-inf"), 3.0])
    assert reasons(read_log(path, scratch, label=LabelConfig("label", at_least=2))) == ["label is not finite", None]


def test_bytes_categories_lists_and_wide_integers_of_parquet(scratch: Path, tmp_path: Path):
    columns = {
        "user_id": [b"u", b"\xff"],
        "item_id": pl.Series([2**64 - 1, 3], dtype=pl.UInt64),
        "brand": pl.Series(["", "b"], dtype=pl.Categorical),
        "tags": [[1, 2], None],
        "blobs": [[b"x"], []],
    }
    raw = read_log(parquet_log(tmp_path, **columns), scratch)
    frame = events_of(raw)
    assert frame["reason"].to_list() == [None, "user_id is not utf8 text"]
    assert frame["item_id"].to_list() == [str(2**64 - 1), "3"]
    assert frame["brand"].to_list() == [None, "b"]
    assert frame["tags"].to_list() == [["1", "2"], None]
    assert frame["raw"][1].startswith('{"user_id":"\ufffd","item_id":3')


def test_a_column_that_one_file_lacks(scratch: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A feature's is empty there, and that is told; a key's or the label's is refused."""
    whole = parquet_log(tmp_path, "b.parquet", scene=["home", "home"])
    caplog.set_level(logging.WARNING)
    frame = events_of(read_log([parquet_log(tmp_path, "a.parquet"), whole], scratch))
    assert frame["scene"].to_list() == [None, None, "home", "home"]
    assert "column 'scene' is missing in some files" in caplog.text
    for column in ("user_id", "timestamp", "label"):
        cut = parquet_log(tmp_path, "c.parquet", **{column: None})
        with pytest.raises(ValueError, match=f"c.parquet has no column '{column}', which .*b.parquet has"):
            read_log([whole, cut], scratch)


def test_ids_of_events_and_items_are_of_one_type(write: Callable, scratch: Path, tmp_path: Path):
    events = write(HEADER + GOOD)
    items = parquet_log(
        tmp_path, "items.parquet", user_id=None, timestamp=None, label=None, item_id=[7, 8], name=["a", "b"]
    )
    raw = read_log(events, scratch, items=str(items), title="name")
    assert raw.items is not None
    assert raw.items.collect()["item_id"].to_list() == [7, 8]
    assert raw.items.collect()["title"].to_list() == ["a", "b"]
    (again := tmp_path / "again").mkdir()
    raw = read_log(events, again, items=str(write("id,x\n007,1\n7,2\n,3\n9\n", "items.csv")), item_in_items="id")
    assert raw.items is not None
    found = raw.items.sort("order").collect()
    assert found["item_id"].to_list() == ["007", "7", None, None]
    assert found["reason"].to_list() == [None, None, "id is missing", "1 fields, expected 2"]
    assert found["raw"].to_list() == [None, None, ",3", "9"]
    assert events_of(raw)["item_id"].to_list() == ["7"]


def test_lists_are_split_and_missing_texts_are_missing(write: Callable, scratch: Path):
    text = "user_id,item_id,timestamp,label,tags,city\nu,1,1714521600,1,a;;b,NULL\nu,1,1714521600,1,,Nan\n"
    raw = read_log(write(text), scratch, lists="tags", list_separator=";")
    assert events_of(raw)["tags"].to_list() == [["a", "b"], None]
    assert events_of(raw)["city"].to_list() == [None, "Nan"]


def test_folders_globs_and_single_names(write: Callable, scratch: Path, tmp_path: Path):
    """Also of a config: one name stands for a list of one, on the command line and in YAML."""
    for day in ("02", "01"):
        write(HEADER + f"u,{int(day)},1714521600,1,home\n", f"log/day={day}/part-0.csv")
    write("", "log/_SUCCESS")
    write("", "log/.part-0.csv.crc")
    (again := tmp_path / "again").mkdir()
    for names, place in ((tmp_path / "log", scratch), (tmp_path / "log" / "*" / "*.csv", again)):
        assert events_of(read_log(names, place))["item_id"].to_list() == [1, 2]
    (config := tmp_path / "c.yaml").write_text("data: {source: log, log: {events: clicks.csv, known_after: dwell}}\n")
    assert load(config).data.log.events == "clicks.csv"
    assert load(config, ["data.log.events=[a.csv, b.csv]"]).data.log.events == ["a.csv", "b.csv"]
    assert load(None, ["data.log.events=x.csv"]).data.log.events == "x.csv"
    with pytest.raises(ValueError, match="data.log.events: got"):
        load(None, ["data.log.events={a: b}"])


def test_reading_twice_gives_the_same(write: Callable, scratch: Path, tmp_path: Path):
    (again := tmp_path / "again").mkdir()
    path = write(HEADER + GOOD + "u,7\n" + GOOD)
    assert events_of(read_log(path, scratch)).equals(events_of(read_log(path, again)))


@pytest.mark.parametrize(
    ("fields", "label", "message"),
    [
        ({"time_unit": "h"}, LabelConfig(), "data.log.time_unit: got 'h', expected one of auto, s, ms"),
        ({"encoding": "utf9"}, LabelConfig(), "data.log.encoding: got 'utf9'"),
        ({"separator": "::"}, LabelConfig(), "data.log.separator: got '::', expected one ASCII character"),
        ({"lists": "scnee"}, LabelConfig(), r"data.log.lists: no table has a column 'scnee' \(did you mean 'scene'"),
        ({"known_after": "dwell"}, LabelConfig(), "data.log.known_after: .* has no column 'dwell'"),
        ({"title": "name"}, LabelConfig(), "data.log.title is 'name', and there are no items"),
        ({"all_positive": True}, LabelConfig("label"), "data.log.all_positive means that there is no label"),
        ({}, LabelConfig("label", at_least=1, values=["1"]), "values and data.label.at_least are both given"),
        ({}, LabelConfig("lable"), r"data.label.column: .* no column 'lable' \(did you mean 'label'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    write: Callable, scratch: Path, fields: dict, label: LabelConfig, message: str
):
    with pytest.raises(ValueError, match=message):
        read_log(write(HEADER + GOOD), scratch, label=label, **fields)


def test_more_bad_rows_than_a_log_can_have(write: Callable, scratch: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(log_csv, "MAX_BAD_ROWS", 100)
    with pytest.raises(
        ValueError, match="over 100 consecutive rows have another number of fields than the header .4, exp"
    ):
        read_log(write("user_id,item_id,timestamp\n" + "u,7,1714521600,1\n" * 200), scratch, all_positive=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"items": "nowhere.csv"}, "data.log.items: 'nowhere.csv' leads to no file"),
        ({"items": "items.csv"}, r"data.log.item: .*items.csv has no column 'item_id'; it has: id, price"),
        (
            {"items": "items.csv", "item_in_items": "idd"},
            "data.log.item_in_items: .* no column 'idd'.*'id'",
        ),
        ({"items": "items.csv", "item_in_items": "id"}, "schema.features.prize: the items .* have no column 'prize'"),
        ({"users": ["users.csv", "items.parquet"]}, "data.log.users: files of several formats"),
        ({"users": "empty.csv"}, "empty.csv holds no row"),
        ({"users": "users.csv", "known_after": "dwell"}, "data.log.known_after: .* no column 'dwell'"),
        ({"separator": "::"}, "data.log.separator: got '::', expected one ASCII character"),
    ],
)
def test_all_files_are_looked_at_before_any_is_converted(
    write: Callable, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict, message: str
):
    monkeypatch.chdir(tmp_path)
    write("id,price\n7,1.5\n", "items.csv")
    write("user_id,city\nu,Rome\n", "users.csv")
    write("user_id,city\n", "empty.csv")
    parquet_log(tmp_path, "items.parquet")
    schema = SchemaConfig(features={"item_id": FeatureConfig("item"), "prize": FeatureConfig("item", kind="dense")})
    data = DataConfig(source="log", log=LogConfig(events=str(write(HEADER + GOOD)), **fields))
    with pytest.raises(UserError, match=message):
        read_source(data, schema, seed=0, scratch=scratch)
    assert list(scratch.iterdir()) == []


def test_the_template_is_a_config_that_prepares(monkeypatch: pytest.MonkeyPatch, write: Callable, tmp_path: Path):
    rows = "".join(f"u{n % 5},{n % 7},{1_714_521_600 + n},{n % 2}\n" for n in range(60))
    write("user_id,item_id,timestamp,click\n" + rows, "log/events/part-0.csv")
    monkeypatch.chdir(tmp_path)
    result = prepare(load(SHOP.parents[1] / "configs" / "own-log.yaml"), tmp_path / "prepared")
    assert (result["events"], result["users"], result["items"]) == (60, 5, 7)


def test_the_example_shop_is_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The log of docs/how-to/own-data.md: its five bad rows are where they were put, and nothing else is lost."""
    monkeypatch.chdir(SHOP.parents[1])
    folder = tmp_path / "shop-prepare"
    result = prepare(load(SHOP / "shop.yaml", [f"runs_dir={tmp_path}"]), folder)
    assert (result["events_read"], result["events"], result["events_quarantined"]) == (300, 295, 5)
    left_out = pl.read_parquet(folder / "quarantine.parquet")
    assert dict(left_out.sort("order").select("order", "reason").iter_rows()) == {
        41: "user is missing",
        97: "time is not a number",
        150: "duplicate row",
        203: "8 fields, expected 7",
        255: "unknown item",
    }
    data = PreparedData.open(folder)
    assert data.item_titles()[0].startswith("Shoes")
    assert set(data.dense) == {"price"}
    assert set(data.vocabulary("query")) >= {"shoes", "sale"}
    assert set(data.vocabulary("feedback")) == {"like", "dislike"}
    bad = load(SHOP / "shop.yaml", [f"runs_dir={tmp_path}", "schema.features.dwell_s.role=context"])
    with pytest.raises(ValueError, match="schema.features.dwell_s: column 'dwell_s' is known only after"):
        prepare(bad, tmp_path / "other")


def test_a_parquet_file_with_a_damaged_page_is_refused_in_a_sentence(tmp_path: Path):
    count = 5000
    frame = pl.DataFrame({"user_id": range(count), "item_id": range(count), "timestamp": [1_714_521_600] * count})
    frame.with_columns(label=pl.lit(1)).write_parquet(path := tmp_path / "log.parquet", compression="zstd")
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = b"\xff" * (len(content) // 2 - 4)  # the footer stays sound
    path.write_bytes(content)
    config = load(None, ["data.source=log", f"data.log.events={path}", f"runs_dir={tmp_path}"])
    with pytest.raises(ValueError, match="log.parquet cannot be read to its end: .*copy or write it again"):
        prepare(config, tmp_path / "prepared")
    assert sorted(os.listdir(tmp_path)) == ["log.parquet"]


@pytest.mark.parametrize("name", ["log.csv", "log.parquet"])
def test_a_limit_of_the_machine_is_not_taken_for_a_damaged_log(tmp_path: Path, name: str):
    (tmp_path / "log.csv").write_text(HEADER + GOOD * 500 + GOOD.replace("1,home", "0,home") * 500)
    pl.read_csv(tmp_path / "log.csv").write_parquet(tmp_path / "log.parquet")
    config = load(
        None, ["data.source=log", f"data.log.events={tmp_path / name}", f"runs_dir={tmp_path}", "data.duplicates=keep"]
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(Exception) as error:
            prepare(config, tmp_path / "p")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"p.preparing.*: file too large; ", sentence(error.value))
