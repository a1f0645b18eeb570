"""Logs, prepared folders and configs made to do harm: read as data, or refused in one sentence; nothing is executed."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import load
from lumrec.run.errors import UserError
from lumrec.run.files import sha256
from lumrec.run.listed_files import own_hash
from lumrec.warm_start.rules import read_rules

LOG = {"user_id": ["a", "a", "b"], "item_id": ["x", "y", "x"], "timestamp": [1, 2, 3], "label": [1, 0, 1]}


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "ran"),)


def read_log(file: Path, more: Sequence[str] = ()) -> None:
    words = ["data.source=log", f"data.log.events={file}", f"runs_dir={file.parent / 'runs'}", "name=x", *more]
    prepare(load(None, words), file.parent / "runs" / "x")


@pytest.mark.parametrize("name", ["arrow.py_extension_type", "POLARS_EXTENSION_TYPE", "lumrec.any"])
def test_types_that_a_reader_would_unpickle(tmp_path, name):
    metadata = pickle.dumps(Runs(tmp_path), protocol=0)
    schema = pa.table(LOG).schema
    evil = schema.field("item_id").with_metadata({"ARROW:extension:name": name, "ARROW:extension:metadata": metadata})
    pq.write_table(pa.table(LOG).cast(schema.set(1, evil)), tmp_path / "log.parquet")
    try:
        read_log(tmp_path / "log.parquet")
    except UserError as error:
        assert "\n" not in str(error)
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1\xff\xff\xff\xffPAR1", b"PAR1" + b"\x15" * 50 + b"\x10\0\0\0PAR1", b"PARE" * 4]
)
def test_a_footer_that_lies(tmp_path, content):
    (tmp_path / "log.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"log.parquet"):
        read_log(tmp_path / "log.parquet")


# Columns that no feature reads: whatever they hold, the log is read.
N = len(LOG["label"])
ODD: dict[str, Any] = {
    "bytes that are no text": pa.array([b"\xff"] * N),
    "checksums": pa.array([b"\xff\xfe"] * N, pa.binary(2)),
    "lists of bytes": pa.array([[b"\xff"]] * N),
    "bytes inside": pa.array([{"a": b"\xff"}] * N),
    "days in no calendar": pa.array([2**31 - 1] * N, pa.int32()).cast(pa.date32()),
    "moments in no calendar": pa.array([2**63 - 1] * N).cast(pa.timestamp("us")),
    "moments in no calendar, with a zone": pa.array([2**63 - 1] * N).cast(pa.timestamp("ms", "Europe/Berlin")),
    "lists of days in no calendar": pa.array([[2**31 - 1]] * N, pa.list_(pa.int32())).cast(pa.list_(pa.date32())),
    "no numbers": pa.array([float("nan"), float("inf"), -float("inf")]),
    "long decimals": pa.array([Decimal("1.5")] * N, pa.decimal256(76, 2)),
    "the largest integers": pa.array([2**64 - 1] * N, pa.uint64()),
    "maps": pa.array([[("a", 1)]] * N, pa.map_(pa.string(), pa.int64())),
    "nothing": pa.nulls(N),
    "\x1b[31mred\x1b]0;title\x07": pa.array(["\x1b[2J\n\0"] * N),
    "'; DROP TABLE log; --": pa.array(["${HOME}$(touch ran)"] * N),
}


def nested(depth: int) -> Any:
    value: Any = 1
    kind = pa.int64()
    for _ in range(depth):
        value, kind = [value], pa.list_(kind)
    return pa.array([value] * N, kind)


@pytest.mark.parametrize("column", [*ODD.values(), nested(100)], ids=[*map(ascii, ODD), "lists in lists, 100 deep"])
def test_a_column_that_no_feature_reads(tmp_path, column):
    names = {values: name for name, values in zip(ODD, map(id, ODD.values()))}
    times = [10**9 + time for time in LOG["timestamp"]]
    table = pa.table({**LOG, "timestamp": times, names.get(id(column), "nested"): column})
    pq.write_table(table, tmp_path / "log.parquet")
    read_log(tmp_path / "log.parquet")
    pq.write_table(table.set_column(3, "label", [[1, None, 0]]), tmp_path / "log.parquet")  # and a row to be left out
    (again := tmp_path / "again").mkdir()
    os.rename(tmp_path / "log.parquet", again / "log.parquet")
    read_log(again / "log.parquet")
    assert pl.read_parquet(again / "runs" / "x" / "quarantine.parquet")["reason"].to_list() == ["label is missing"]
    assert not list(tmp_path.rglob("ran"))


USED = {
    "bytes that are no text": "odd is not utf8 text",
    "lists of bytes": "odd is not utf8 text",
    "days in no calendar": "odd is no date of the years 1 to 9999",
    "moments in no calendar": "odd is no date of the years 1 to 9999",
    "long decimals": "schema.features.odd: column 'odd' of .*log.parquet has decimals of over 38 digits",
    "maps": "schema.features.odd: column 'odd' is of type .*; expected text, numbers, dates or lists of these",
    "bytes inside": "schema.features.odd: column 'odd' is of type Struct.*; expected text",
}


@pytest.mark.parametrize("name", USED)
def test_such_a_column_that_a_feature_reads(tmp_path, name):
    bad = ODD[name]
    good = pa.concat_arrays([bad[:1], pa.nulls(N - 1, bad.type)])
    log = pa.table({**LOG, "timestamp": [10**9 + time for time in LOG["timestamp"]], "odd": good})
    pq.write_table(log, tmp_path / "log.parquet")
    kind = "multi" if name.startswith("lists") else "id"
    words = [f"schema.features={{item_id: {{role: item}}, odd: {{role: context, kind: {kind}}}}}"]
    try:
        read_log(tmp_path / "log.parquet", words)
    except UserError as error:
        assert re.search(USED[name], str(error)) and "\n" not in str(error), str(error)
    else:
        assert pl.read_parquet(tmp_path / "runs" / "x" / "quarantine.parquet")["reason"].to_list() == [USED[name]]


def damaged(file: Path, flips: Sequence[tuple[int, int]]) -> None:
    log = {"user_id": [f"u{row % 50}" for row in range(2000)], "item_id": [f"i{row % 199}" for row in range(2000)]}
    log |= {"timestamp": [10**9 + row for row in range(2000)], "label": [row % 2 for row in range(2000)]}
    pq.write_table(pa.table(log), file, row_group_size=700, compression="none")
    content = bytearray(file.read_bytes())
    for place, value in flips:
        content[4 + place % (len(content) - 12)] = value
    file.write_bytes(content)


@pytest.mark.parametrize("seed", range(25))
def test_bytes_that_were_changed(tmp_path, seed):
    random = np.random.default_rng(seed)
    damaged(tmp_path / "log.parquet", random.integers(0, [[2**31, 256]], (random.choice([1, 3, 10]), 2)).tolist())
    try:
        read_log(tmp_path / "log.parquet")
    except UserError as error:
        assert "\n" not in str(error), str(error)
    assert not list((tmp_path / "runs").glob(".*.preparing"))


def test_the_error_of_a_damaged_page_names_the_file_and_a_bug_is_no_damaged_file(tmp_path, monkeypatch):
    damaged(tmp_path / "log.parquet", [(place, 255) for place in range(200)])
    with pytest.raises(UserError, match=r"log.parquet cannot be read"):
        read_log(tmp_path / "log.parquet")
    damaged(tmp_path / "log.parquet", [])

    def bug(*_: Any, **__: Any) -> None:
        raise pl.exceptions.ColumnNotFoundError("ours")

    monkeypatch.setattr("lumrec.data.prepare.convert", bug)
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        read_log(tmp_path / "log.parquet")


def test_a_claim_of_more_rows_than_there_are(tmp_path):
    log = pa.table({**LOG, "timestamp": [10**9 + time for time in LOG["timestamp"]]})
    pq.write_table(log, tmp_path / "log.parquet", compression="none", write_statistics=False)
    content = (tmp_path / "log.parquet").read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    lie = b"\x16\xfe\xff\xff\xff\x0f"  # num_rows: 2^31 - 1 in place of 3
    footer = content[start:-8].replace(b"\x16\x06\x19", lie + b"\x19", 1)
    assert footer != content[start:-8]
    (tmp_path / "log.parquet").write_bytes(content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(UserError, match=r"log.parquet"):
        read_log(tmp_path / "log.parquet")


@pytest.mark.parametrize("name", ["lumrec.row", "lumrec.reason", "lumrec.user"])
def test_a_column_with_the_name_of_one_of_ours(tmp_path, name):
    pq.write_table(pa.table({**LOG, name: pa.nulls(N)}), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=f"column '{name}' begins with lumrec., as lumrec's own"):
        read_log(tmp_path / "log.parquet")


def test_names_that_occur_twice(tmp_path):
    twice = pa.Table.from_arrays([*pa.table(LOG).columns, pa.array(["x"] * N)], [*LOG, "item_id"])
    pq.write_table(twice, tmp_path / "log.parquet")
    with pytest.raises(UserError, match="column 'item_id' occurs 2 times"):
        read_log(tmp_path / "log.parquet")


@pytest.mark.parametrize(
    "pandas", [b"{", b'{"columns": 1}', b"[" * 100_000, b"{\"index_columns\": [\"__import__('os').mkdir('ran')\"]}"]
)
def test_metadata_of_pandas_is_not_read(tmp_path, monkeypatch, pandas):
    monkeypatch.chdir(tmp_path)
    log = pa.table({**LOG, "timestamp": [10**9 + time for time in LOG["timestamp"]]})
    pq.write_table(log.replace_schema_metadata({b"pandas": pandas}), tmp_path / "log.parquet")
    read_log(tmp_path / "log.parquet")
    assert not list(tmp_path.rglob("ran"))


def test_a_column_of_two_kinds(tmp_path):
    (tmp_path / "log").mkdir()
    for number, odd in enumerate(([1] * N, ["a"] * N)):
        times = [10**9 + number * 100 + time for time in LOG["timestamp"]]
        log = pa.table({**LOG, "timestamp": times, "odd": odd})
        pq.write_table(log, tmp_path / "log" / f"{number}.parquet")
    read_log(tmp_path / "log")
    words = ["schema.features={item_id: {role: item}, odd: {role: context}}", "name=y", "overwrite=true"]
    with pytest.raises(UserError, match="schema.features.odd: column 'odd' is Int64 in .*, and String in "):
        read_log(tmp_path / "log", words)
    with pytest.raises(UserError, match="data.request: column 'odd' is Int64 in "):
        read_log(tmp_path / "log", ["data.request=odd", "overwrite=true"])


def test_a_table_of_a_prepared_folder_that_was_swapped_or_is_a_link(prepared, tmp_path):
    shutil.copy(prepared / "users.parquet", prepared / "items.parquet")
    with pytest.raises(UserError, match=r"items.parquet"):
        PreparedData.open(prepared)
    seal(prepared)
    with pytest.raises(UserError):
        PreparedData.open(prepared)
    shutil.copy(prepared / "users.parquet", tmp_path / "elsewhere.parquet")
    (prepared / "users.parquet").unlink()
    (prepared / "users.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(UserError, match="is a link that leads out of the folder"):
        PreparedData.open(prepared)


CONFIGS = [
    "seed: !!python/object/apply:os.mkdir [ran]",
    "run: !!python/name:os.system",
    "name: !include /etc/passwd",
    "name: ${oc.env:HOME}\nseed: ${oc.env:SEED}",
    "a: &a [x, x]\n"
    + "".join(f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *{'a' if not i else f'b{i - 1}'}]\n" for i in range(40)),
    "a: &a [*a]",
    "seed: 1\nseed: 2",
    "[" * 20_000,
    "seed: " + "9" * 10_000,
    "<<: [1]",
    "? [a]\n: b",
    "seed: \x00",
]


@pytest.mark.parametrize("text", CONFIGS)
def test_configs_and_rules(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(text)
    for read in (load, read_rules):
        with pytest.raises(UserError) as caught:
            read(tmp_path / "x.yaml")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def prepared(tiny_prepared: PreparedData, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_prepared.path, tmp_path / "prepared"))


def seal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        facts |= {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": own_hash(manifest)}))


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a file above": lambda m: m["files"].update({"events/../../x": {"bytes": 0, "sha256": ""}}),
    "an absolute file": lambda m: m["files"].update({"/etc/passwd": {"bytes": 0, "sha256": ""}}),
    "files as a list": lambda m: m.update(files=[]),
    "facts as a list": lambda m: m["files"].update({"items.parquet": [1]}),
    "a schema of text": lambda m: m.update(schema="x"),
    "a schema without features": lambda m: m.update(schema={}),
    "a table name above": lambda m: m["schema"]["features"]["item_id"].update(table="../x"),
    "rows of text": lambda m: m["table_rows"].update(item_id="9"),
    "fewer rows than values": lambda m: m["table_rows"].update(item_id=2),
    "no fingerprint": lambda m: m.pop("fingerprint"),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_prepared_folders(prepared, change):
    seal(prepared, change)
    with pytest.raises(UserError):
        PreparedData.open(prepared)


@pytest.mark.parametrize(("column", "value"), [("item", 10**9), ("item", -1), ("user", -5), ("split", 9)])
def test_an_index_that_leads_nowhere(prepared, column, value):
    file = prepared / "mapped" / f"{column}.npy"
    array = np.load(file)
    array[len(array) // 2] = value
    np.save(file, array)
    seal(prepared)
    with pytest.raises(UserError, match=f"{column} has|not sorted by user"):
        PreparedData.open(prepared)


def _header(file, shape, dtype="<i8"):
    with open(file, "wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})


@pytest.mark.parametrize(
    "evil",
    [
        lambda file, folder: np.save(file, np.array([Runs(folder)] * 9, object), allow_pickle=True),
        lambda file, folder: file.write_bytes(pickle.dumps(Runs(folder))),
        lambda file, folder: _header(file, (2**60,)),
        lambda file, folder: _header(file, (-1,)),
        lambda file, folder: np.save(file, np.load(file)[:-1]),
        lambda file, folder: np.save(file, np.load(file)[:, None]),
        lambda file, folder: np.save(file, np.load(file).astype(np.int32)),
        lambda file, folder: np.save(file, np.load(file).astype(">i8")),
        lambda file, folder: shutil.move(shutil.make_archive(str(file), "zip", folder / "prepared" / "events"), file),
        lambda file, folder: file.write_bytes(b""),
    ],
    ids=["objects", "pickle", "huge", "negative", "short", "2-D", "narrow", "big-endian", "zip", "empty"],
)
def test_mapped_files(prepared, tmp_path, evil):
    evil(prepared / "mapped" / "item.npy", tmp_path)
    seal(prepared)
    with pytest.raises(UserError, match="item"):
        PreparedData.open(prepared)
    assert not (tmp_path / "ran").exists()


def test_lists_that_overlap(prepared):
    file = next((prepared / "mapped").glob("*.offsets.npy"))
    array = np.load(file)
    array[1] = array[-1] + 5
    np.save(file, array)
    seal(prepared)
    with pytest.raises(UserError, match="lists overlap"):
        PreparedData.open(prepared)


def test_one_bit_of_the_manifest(prepared):
    file = prepared / "manifest.json"
    file.write_text(file.read_text().replace('"absolute_time": true', '"absolute_time": false'))
    with pytest.raises(UserError, match="its own hash does not fit"):
        PreparedData.open(prepared)
