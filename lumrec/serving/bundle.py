"""A scorer bundle: everything that scoring with a trained ranker needs, in one folder that is published whole.

    <ranker run>-bundle/manifest.json   names the version in force and holds its own hash; replaced by one atomic rename
                        bundle-<id>/    one version, never changed after it was published
        graph.pt2, graph.json   the ranker (lumrec/serving/graph.py)
        tables/                 its embedding tables, memory-mapped (lumrec/serving/tables.py)
        keys/data.mdb           raw values to rows of the tables, item keys to items (lumrec/serving/keys.py)
        items/                  features of the items, and how each was liked over time (lumrec/features/items.py)
        items/titles.parquet    raw key and title of each item
        golden.parquet          rows with their inputs and scores, checked at opening (lumrec/serving/golden.py)
        MODEL_CARD.md           data, metrics and limits, to read

What requests are made of (schema, statistics, history) and the knowledge that the ranker reads are in the manifest.
LUMs and two towers are published in the same way, with the files of lum_graph.py or tower_graph.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lumrec.data.prepared import PreparedData
from lumrec.features.items import Catalogue, ItemHistory
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import leftovers, read_json, sync_tree, write_atomically
from lumrec.run.listed_files import file_problem, list_problem, listed, own_hash
from lumrec.serving.graph import Graph, load_graph
from lumrec.serving.keys import Keys
from lumrec.serving.requests import RequestBuilder, RequestSpec
from lumrec.serving.tables import open_tables

FORMAT = 1
MANIFEST, GRAPH, TABLES, ITEMS, TITLES = "manifest.json", "graph.pt2", "tables", "items", "items/titles.parquet"
CARD = "MODEL_CARD.md"
VERSION = "bundle-[0-9a-f]{12}"
AGAIN = "export it again: lumrec export, with overwrite=true"
Kind = Literal["ranker", "LUM", "towers"]
# What the manifest of a ranker must hold, and of which type.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "ranker": dict,
    "data": dict,
    "spec": dict,
    "needs": (dict, type(None)),
    "table_rows": dict,
    "num_items": int,
    "compile": str,
    "tolerance": float,
}


@dataclass(frozen=True)
class Bundle:
    """One version, opened. folder: its files. builder: makes batches of requests. graph: scores them."""

    folder: Path
    manifest: dict[str, Any]
    builder: RequestBuilder
    graph: Graph

    @property
    def version(self) -> str:
        """Another one for each export."""
        return self.folder.name

    def titles(self) -> tuple[list[str], list[str]]:
        """Raw key and title of each item, by index. Read from the file at each call."""
        table = pq.read_table(self.folder / TITLES, columns=["item_key", "title"])
        return table["item_key"].to_pylist(), table["title"].to_pylist()


def folder_of(ranker: Path) -> Path:
    """The folder of a ranker's bundle, which is beside its run folder."""
    return ranker.with_name(f"{ranker.name}-bundle")


def read_manifest(path: Path, kind: Kind = "ranker") -> dict[str, Any]:
    """The manifest of the version in force of a bundle that holds a `kind`; no other file is opened.

    Raises MissingFileError without one, UserError where one bit has changed, for another format or kind, and for what
    is no manifest of a bundle.
    """
    file = path / MANIFEST
    if not file.exists():
        raise MissingFileError(
            f"there is no bundle in {path} (no {MANIFEST}); make it with: lumrec export run=<run of a {kind}>"
        )
    manifest = read_json(file, again=AGAIN)
    if "spec" not in manifest or "folder" not in manifest:
        raise UserError(f"{file} is no manifest of a bundle: name the folder that lumrec export wrote")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{file} has the format {manifest.get('format')!r}; this lumrec reads format {FORMAT}: {AGAIN}")
    if manifest.get("sha256") != own_hash(manifest):
        raise UserError(f"{file} has changed since it was published (its own SHA-256 does not fit): {AGAIN}")
    if (holds := manifest.get("kind", "ranker")) != kind:  # rankers were exported first, without a kind
        raise UserError(f"the bundle in {path} holds a trained {holds}, expected a {kind}: name the bundle of a {kind}")
    if problem := _malformed(path, manifest, _TYPES if kind == "ranker" else {}):
        raise UserError(f"{file} is damaged: {problem}; {AGAIN}")
    return manifest


def _malformed(path: Path, manifest: dict[str, Any], types: Mapping[str, Any]) -> str:
    """What is wrong with the contents of a manifest, in words; "" if nothing is."""
    for name, kind in types.items():
        if not isinstance(manifest.get(name), kind):
            return f"it lacks {name}, or has another kind of value there"
    if not re.fullmatch(VERSION, str(manifest["folder"])):
        return f"it names the folder {manifest['folder']!r:.80}"
    if not all(type(rows) is int and 0 < rows < 2**31 for rows in manifest.get("table_rows", {}).values()):
        return "a table has no number of rows"
    return list_problem(path / manifest["folder"], manifest.get("files"))


def open_bundle(path: Path, *, sha256: str = "", trust_compiled: bool = False, verify: bool = True) -> Bundle:
    """The version in force in `path`, memory-mapped; it stays readable after a newer one has replaced it.

    sha256: that of the manifest, as the export printed it; "" = any. trust_compiled: open a bundle that was compiled
    (export.compile=aoti), whose graph is a library of machine code. verify: compare every file's SHA-256 with the
    manifest's. Raises MissingFileError for a missing file, UserError for whatever is not as it was published.
    """
    for attempt in (0, 1):
        manifest = read_manifest(path)
        if sha256 and manifest["sha256"] != sha256:
            raise UserError(f"the bundle in {path} has the SHA-256 {manifest['sha256']}, expected {sha256}")
        if manifest["compile"] != "none" and not trust_compiled:
            raise UserError(
                f"the bundle in {path} was compiled: it holds machine code, which runs with your rights. Open it with "
                "trust_compiled=true where you know who made it, or export it with export.compile=none"
            )
        try:
            check_files(path / manifest["folder"], manifest, verify=verify)
            return open_parts(path / manifest["folder"], manifest)
        except (OSError, lmdb.Error, pa.ArrowException) as error:
            # A new version may have been published, and the old one removed, since the manifest was read.
            if attempt or read_manifest(path)["folder"] == manifest["folder"]:
                if isinstance(error, (lmdb.Error, pa.ArrowException)):
                    raise UserError(f"the bundle in {path} is damaged ({error}); {AGAIN}") from None
                raise
    raise AssertionError("unreachable")


def version_of(path: Path, kind: Kind) -> Path:
    """The folder of the version in force of a bundle, each of whose files has the SHA-256 that the manifest says."""
    manifest = read_manifest(path, kind)
    folder = path / manifest["folder"]
    check_files(folder, manifest, verify=True)
    return folder


def check_files(folder: Path, manifest: dict[str, Any], *, verify: bool) -> None:
    """Raises MissingFileError or UserError where a file of a version is not as it was published.

    verify: compare every file's SHA-256 (else only its size).
    """
    for name, facts in manifest["files"].items():
        if not (folder / name).exists():
            raise MissingFileError(f"the bundle lacks {folder / name}; {AGAIN}")
        if problem := file_problem(folder / name, facts, verify=verify):
            raise UserError(f"{problem}; {AGAIN}")


def open_parts(folder: Path, manifest: dict[str, Any]) -> Bundle:
    """A version whose files have been checked, or are being written: reads everything except the golden rows."""
    try:
        spec = RequestSpec.from_json(manifest["spec"])
        catalogue = Catalogue.open(folder / ITEMS, spec.schema)
        items = ItemHistory.open(folder / ITEMS) if spec.statistics.kind == "all" else None
        problem = _catalogue_problem(catalogue, spec, manifest["num_items"])
        problem = problem or (_history_problem(items, manifest["num_items"]) if items else "")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise UserError(f"the bundle in {folder} is damaged: {problem:.300}; {AGAIN}")
    keys = Keys(folder, manifest["table_rows"], num_items=manifest["num_items"])
    builder = RequestBuilder(spec, keys, catalogue, items)
    compiled = manifest["compile"] != "none"  # `open_bundle` has checked that compiled ones are trusted
    graph = load_graph(folder / GRAPH, open_tables(folder / TABLES), trust_compiled=compiled)
    return Bundle(folder, manifest, builder, graph)


def _catalogue_problem(catalogue: Catalogue, spec: RequestSpec, num_items: int) -> str:
    """What is wrong with the features of the items, in words; "" if nothing is."""
    for name, (values, offsets) in catalogue.columns.items():
        num_rows = spec.table_rows.get(spec.schema.features[name].table, 0)
        if values.dtype != torch.int64 or (len(values) and not 0 <= values.min() <= values.max() < num_rows):
            return f"{name} of the items leads out of its table"
        if offsets is None:
            fits = values.shape == (num_items + 1,)
        else:
            fits = offsets.dtype == torch.int64 and offsets.shape == (num_items + 2,) and int(offsets[0]) == 0
            fits = fits and int(offsets[-1]) == len(values) and bool((offsets.diff() >= 0).all())
        if not fits:
            return f"{name} does not have one entry for each of {num_items} items"
    if any(dense.dtype != np.float32 or dense.shape != (num_items + 1,) for dense in catalogue.dense.values()):
        return f"a dense feature does not have one number for each of {num_items} items"
    return ""


def _history_problem(items: ItemHistory, num_items: int) -> str:
    """What is wrong with the history of the items' likes, in words; "" if nothing is."""
    dtypes = [array.dtype for array in items] == [np.int64, np.int64, np.float64]
    if not dtypes or [array.ndim for array in items] != [1, 1, 1] or len(items.label_P1) != len(items.key_P) + 1:
        return "the history of the items is of another shape or type"
    if any((np.diff(array) < 0).any() for array in (items.second_S, items.key_P)):
        return "the history of the items is not sorted"
    return "" if (items.key_P < num_items * max(1, len(items.second_S))).all() else "it has a history of no item"


def write_titles(folder: Path, data: PreparedData) -> None:
    """Writes raw key and title of each item of the data."""
    table = pa.table({"item_key": data.item_keys(), "title": data.item_titles()})
    pq.write_table(table, folder / TITLES, write_page_checksum=True)


@contextlib.contextmanager
def new_version(path: Path) -> Iterator[Path]:
    """An empty folder for the files of the next version; it is removed if the block fails."""
    folder = path / f"bundle-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def publish(path: Path, folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The manifest: `content`, the checksum of every file and its own; from here on readers open this version.

    Earlier versions are removed; a process that has opened one can still read it.
    """
    sync_tree(folder)
    files = listed(folder, (file for file in folder.rglob("*") if file.is_file()))
    manifest = {"format": FORMAT, "folder": folder.name, **content, "files": files}
    manifest["sha256"] = own_hash(manifest)
    write_atomically(path / MANIFEST, json.dumps(manifest, indent=2, allow_nan=False) + "\n")
    for other in (*path.glob("bundle-*"), *leftovers(path)):
        if other != folder and (re.fullmatch(VERSION, other.name) or other.name.startswith(".")):
            shutil.rmtree(other)
    return manifest
