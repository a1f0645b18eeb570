"""Stores and exported Parquet made to do harm, with checksums that are right: refused in one sentence, nothing run."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_store import publish

from lumrec.knowledge.manifest import identity_of, read_manifest, version_name
from lumrec.knowledge.parquet import export_parquet, import_parquet
from lumrec.knowledge.refresh import Earlier
from lumrec.knowledge.store import KnowledgeStore
from lumrec.run.errors import UserError
from lumrec.run.files import sha256
from lumrec.run.listed_files import own_hash


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "ran"),)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return publish(tmp_path / "runs" / "store")


def version(store: Path) -> Path:
    return store / json.loads((store / "manifest.json").read_text())["folder"]


def seal(store: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Writes the manifest with a change, all checksums and its own hash right, its version under the right name."""
    manifest = json.loads((store / "manifest.json").read_text())
    folder = store / manifest["folder"]
    for name, facts in manifest["files"].items():
        facts |= {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    change(manifest)
    if manifest["folder"] == folder.name:
        manifest["folder"] = f"{version_name(identity_of(manifest))}-{folder.name.rpartition('-')[2]}"
        folder.rename(store / manifest["folder"])
    (store / "manifest.json").write_text(json.dumps(manifest | {"sha256": own_hash(manifest)}))


def refused(store: Path, said: str) -> None:
    def read() -> None:
        opened = KnowledgeStore.open(store)
        opened.get(["1", "2", "nobody"])
        opened.items()

    with pytest.raises(UserError, match=said) as caught:
        read()
    assert "\n" not in str(caught.value)
    absent = KnowledgeStore.open_or_absent(store, num_conditions=2, dim=8)  # what a server does
    assert absent.absent_because or "user's answers" in said or "bytes; expected" in said
    assert not list(store.parents[1].rglob("ran"))


def test_what_is_honest_is_read(store):
    before = KnowledgeStore.open(store).get(["1"])
    seal(store)
    assert KnowledgeStore.open(store).get(["1"]).o_BND.equal(before.o_BND)


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a folder above": lambda m: m.update(folder="../other"),
    "an absolute folder": lambda m: m.update(folder="/etc"),
    "a folder as a list": lambda m: m.update(folder=["x"]),
    "a file above": lambda m: m["files"].update({"../../x": {"bytes": 0, "sha256": ""}}),
    "an absolute file": lambda m: m["files"].update({"/etc/passwd": {"bytes": 0, "sha256": ""}}),
    "a file that is no text": lambda m: m["files"].update({"a\n.npy": {"bytes": 0, "sha256": ""}}),
    "facts as a list": lambda m: m["files"].update({"items_e.npy": [1, 2]}),
    "a size as a text": lambda m: m["files"]["items_e.npy"].update(bytes="8"),
    "a checksum as a number": lambda m: m["files"]["items_e.npy"].update(sha256=8),
    "files as a list": lambda m: m.update(files=[*m["files"]]),
    "no files": lambda m: m.pop("files"),
    "dim of text": lambda m: m.update(dim="8"),
    "dim below zero": lambda m: m.update(dim=-8),
    "dim without end": lambda m: m.update(dim=10**15),
    "dim NaN": lambda m: m.update(dim=float("nan")),
    "an object dtype": lambda m: m.update(dtype="O"),
    "a dtype as a list": lambda m: m.update(dtype=[["a", "O"]]),
    "conditions as text": lambda m: m.update(conditions="like"),
    "a condition of numbers": lambda m: m.update(conditions=[{"feedback": 5}]),
    "no conditions": lambda m: m.update(conditions=[]),
    "no LUMs": lambda m: m.update(lums=[]),
    "log_normalizer as a text": lambda m: m.update(log_normalizer="yes"),
    "forgotten of keys": lambda m: m.update(forgotten=["me"]),
    "another dim than its arrays": lambda m: m.update(dim=9),
    "more LUMs than its arrays": lambda m: m.update(lums=[{"run": "a"}] * 3),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests(store, change):
    seal(store, change)
    refused(store, "manifest.json|items_e.npy holds")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": NaN}'])
def test_a_manifest_that_is_no_manifest(store, content):
    (store / "manifest.json").write_bytes(content)
    refused(store, "manifest.json")


def objects(file: Path) -> None:
    np.save(file, np.array([Runs(file.parent)], dtype=object), allow_pickle=True)


def header(text: str) -> bytes:
    padded = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode()


ARRAYS: dict[str, Callable[[Path], Any]] = {
    "objects": objects,
    "a pickle": lambda file: file.write_bytes(pickle.dumps(Runs(file.parent))),
    "an archive": lambda file: np.savez(open(file, "wb"), np.zeros(3)),
    "code in the header": lambda file: file.write_bytes(header("__import__('os').mkdir('ran')")),
    "a call in the header": lambda file: file.write_bytes(
        header("{'descr': '<f2', 'fortran_order': False, 'shape': (exit(),)}")
    ),
    "an endless shape": lambda file: file.write_bytes(
        header(f"{{'descr': '<f2', 'fortran_order': False, 'shape': (2, {2**62}, 8)}}")
    ),
    "a negative shape": lambda file: file.write_bytes(
        header("{'descr': '<f2', 'fortran_order': False, 'shape': (2, -3, 8)}") + b"\0" * 96
    ),
    "a deep header": lambda file: file.write_bytes(header("(" * 5000)),
    "a long header": lambda file: file.write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{}"),
    "an unfinished header": lambda file: file.write_bytes(header("{'descr': '<f2', 'a")),
    "nothing": lambda file: file.write_bytes(b""),
    "a dtype of text": lambda file: np.save(file, np.full((2, 3, 8), "x")),
    "a dtype of records": lambda file: np.save(file, np.zeros((2, 3, 8), [("a", "<f2")])),
    "fewer dimensions": lambda file: np.save(file, np.zeros((3, 8), "<f2")),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
}


@pytest.mark.parametrize("write", ARRAYS.values(), ids=ARRAYS)
def test_arrays(store, write):
    write(version(store) / "items_e.npy")
    seal(store)
    refused(store, "items_e.npy is not an array of numbers|items_e.npy holds")


def test_links_that_lead_out_of_the_store(store, tmp_path):
    for name in ("items_e.npy", "store/data.mdb", "items.parquet"):
        file, outside = version(store) / name, tmp_path / Path(name).name
        file.rename(outside)
        file.symlink_to(outside)
        refused(store, "is a link that leads out of the folder")
        file.unlink()
        outside.rename(file)
    assert len(KnowledgeStore.open(store)) > 0


def put(folder: Path, key: bytes, value: bytes) -> None:
    with lmdb.open(str(folder / "store"), lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(key, value)


def test_records_of_another_size(store):
    put(version(store), b"u1", b"short")
    seal(store)
    refused(store, "has a value of 5 bytes; expected")


def test_a_record_of_no_lum(store):
    opened = KnowledgeStore.open(store)
    record = np.zeros(1, opened._record)
    record["fold"] = 77
    del opened
    put(version(store), b"u1", record.tobytes())
    seal(store)
    refused(store, "a user's answers belong to no LUM")


@pytest.mark.parametrize("content", [b"", b"x" * 4096, b"\0" * 65536, b"\xff" * 8192])
def test_a_database_that_is_none(store, content):
    (version(store) / "store" / "data.mdb").write_bytes(content)
    seal(store)
    refused(store, "is damaged")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1\xff\xff\xff\xffPAR1", b"x" * 100])
def test_item_keys_that_are_no_parquet(store, content):
    (version(store) / "items.parquet").write_bytes(content)
    seal(store)
    refused(store, "is damaged")


def test_item_keys_of_another_kind(store):
    for table in ({"item_key": [1, 2, 3]}, {"other": ["a"]}, {"item_key": [["a"]]}):
        pq.write_table(pa.table(table), version(store) / "items.parquet")
        seal(store)
        refused(store, "expected item_key of type text")


def test_an_index_that_leads_out_of_the_rows(store):
    from lumrec.knowledge.digests import USER_INDEX

    for first_row, num_events in ((-1, 1), (0, -1)):
        index = np.zeros(1, USER_INDEX)
        index["first_row"], index["num_events"] = first_row, num_events
        np.save(version(store) / "users.npy", index)
        np.save(version(store) / "user_fold.npy", np.zeros(1, np.int8))
        manifest = read_manifest(store)
        manifest["files"] |= {"users.npy": {}, "user_fold.npy": {}}
        with pytest.raises(UserError, match="has rows before the first"):
            Earlier(version(store), manifest)


class TestExported:
    """What `python -m lumrec.knowledge.parquet import` takes."""

    @pytest.fixture
    def warehouse(self, store: Path, tmp_path: Path) -> Path:
        export_parquet(store, tmp_path / "warehouse")
        return tmp_path / "warehouse"

    def refused(self, warehouse: Path, said: str) -> None:
        target = warehouse.parent / "runs" / "imported"
        with pytest.raises(UserError, match=said):
            import_parquet(warehouse, target)
        assert not (target / "manifest.json").exists() and not list(warehouse.parent.rglob("ran"))

    def rewrite(self, file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
        pq.write_table(change(pq.read_table(file)), file)

    @pytest.mark.parametrize(
        "metadata",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b"\xff",
            b"[" * 100_000,
            b'{"format": 2}',
            b'{"format": 2, "conditions": 5}',
            b'{"format": 2, "conditions": [{}], "lums": [{}], "dim": 1e9}',
            b'{"format": 2, "conditions": [{}], "lums": [{}], "dim": NaN, "dtype": "O"}',
        ],
    )
    def test_metadata(self, warehouse, metadata):
        for name in ("users.parquet", "items.parquet"):
            self.rewrite(warehouse / name, lambda table: table.replace_schema_metadata({b"lumrec": metadata}))
        self.refused(warehouse, 'its metadata "lumrec"|has another format')

    def test_types_that_unpickle(self, warehouse):
        """pyarrow before version 14 unpickled the metadata of such a type."""
        evil = {
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": pickle.dumps(Runs(warehouse), protocol=0),
        }

        def change(table: pa.Table) -> pa.Table:
            index = table.schema.get_field_index("user_key")
            schema = table.schema.set(index, table.schema.field(index).with_metadata(evil))
            return table.cast(schema).replace_schema_metadata(table.schema.metadata)

        self.rewrite(warehouse / "users.parquet", change)
        import_parquet(warehouse, warehouse.parent / "runs" / "imported")
        assert not list(warehouse.parent.rglob("ran"))

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 8 + b"PAR1", b"PARE" * 9, b"x" * 100])
    def test_no_parquet(self, warehouse, content):
        (warehouse / "users.parquet").write_bytes(content)
        self.refused(warehouse, "users.parquet is no Parquet file")

    @pytest.mark.parametrize("column", ["user_key", "o_0", "fold"])
    def test_columns_that_are_missing_or_of_another_type(self, warehouse, column):
        self.rewrite(warehouse / "users.parquet", lambda table: table.drop_columns([column]))
        self.refused(warehouse, f"column {column} is .absent.")

    def test_keys_that_are_none(self, warehouse):
        def change(table: pa.Table) -> pa.Table:
            digests = pa.array([b"short"] * len(table), pa.binary())
            keys = pa.array([None] * len(table), pa.string())
            return table.set_column(0, table.schema.field(0), keys).set_column(1, table.schema.field(1), digests)

        self.rewrite(warehouse / "users.parquet", change)
        self.refused(warehouse, "key_sha256 of other than 32")
