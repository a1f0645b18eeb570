"""Logs, prepared folders and configs made to do harm: read as data, or refused in one sentence; nothing is executed."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lumrec.config import load
from lumrec.data.manifest import _hash, sha256
from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData
from lumrec.errors import UserError
from lumrec.warm_start.rules import read_rules

LOG = {"user_id": ["a", "a", "b"], "item_id": ["x", "y", "x"], "timestamp": [1, 2, 3], "label": [1, 0, 1]}


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "ran"),)


def read_log(file: Path) -> None:
    words = ["data.source=log", f"data.log.events={file}", f"runs_dir={file.parent / 'runs'}", "name=x"]
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
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": _hash(manifest)}))


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
    file = next((prepared / "events").glob("*.parquet"))
    frame = pl.read_parquet(file)
    frame.with_columns(pl.lit(value).cast(pl.Int64).alias(column)).write_parquet(file)
    seal(prepared)
    with pytest.raises(UserError, match=f"{column} has|not sorted by user"):
        PreparedData.open(prepared)


def test_one_bit_of_the_manifest(prepared):
    file = prepared / "manifest.json"
    file.write_text(file.read_text().replace('"absolute_time": true', '"absolute_time": false'))
    with pytest.raises(UserError, match="its own hash does not fit"):
        PreparedData.open(prepared)
