"""Logs of one's own: each row is there, read alike from CSV and Parquet; what is wrong is a reason or a clear error."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.config import load
from lumrec.data.prepare import DataConfig, prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.sources.log import LogConfig, read
from lumrec.data.sources.raw_log import DataSetMissing, LabelConfig, RawLog

SHOP = Path(__file__).parent / "own_log"
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
    path = write((HEADER + GOOD).encode() + "u,7,1714521600,1,caf\xe9\n".encode("latin-1"))
    assert reasons(read_log(path, scratch)) == [None, "scene is not utf8 text"]
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
    with pytest.raises(ValueError, match="holds no time that tells its unit .*'12'"):
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
    raw = read_log(path, scratch, label=LabelConfig("action", values=["buy", "cart"]))
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
    with pytest.raises(ValueError, match="column 'n' is Float64 in .*a.parquet, and String in .*c.parquet"):
        read_log(folder, scratch)


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
        ("log.csv.gz", gzip.compress((HEADER + GOOD * 5000).encode())[:80], "cut or damaged"),
        ("log.parquet", b"PAR1 cut", "log.parquet cannot be read as Parquet: it is cut or damaged"),
        ("log.txt", GOOD.encode(), "is of no format that can be read; expected a name that ends in"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_refused(write: Callable, scratch: Path, name: str, content: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        read_log(write(content, name), scratch).events.collect()


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


def test_the_example_shop_is_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The log of docs/how-to/own-data.md: its five bad rows are where they were put, and nothing else is lost."""
    monkeypatch.chdir(SHOP.parents[2])
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
