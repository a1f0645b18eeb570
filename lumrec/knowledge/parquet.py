"""Exports a knowledge store to Parquet for a warehouse, and imports such files as a store.

    python -m lumrec.knowledge.parquet export runs/ml-1m-query warehouse/     writes users.parquet and items.parquet
    python -m lumrec.knowledge.parquet import warehouse/ runs/from-warehouse  publishes a store that servers can read

    users.parquet   user_key (null if it has more than 256 bytes: the store then has only its SHA-256),
                    key_sha256 (of those), asked_at, last_event_at, num_events, num_seen, fold;
                    o_0, o_1, …: a fixed-size list of float32 for each condition; log_z_0, …: unless switched off
    items.parquet   item_key; e_0, e_1, …: a fixed-size list of float32 for each LUM (fold)

Both files describe the columns and conditions in their metadata under "lumrec", as JSON; an import takes the version's
identity from there. The numbers are those that readers of the store see, so an imported store gives the same answers,
bit for bit, in the dtype of the exported one. Rows for training rankers are not exported: they belong to the events of
prepared data, and the query stage makes them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lumrec.knowledge.checks import identity_problem
from lumrec.knowledge.forget import forgotten_among, halves
from lumrec.knowledge.manifest import (
    FORMAT,
    ITEMS_FILE,
    MANIFEST,
    USERS_FILE,
    check_files,
    identity_of,
    read_manifest,
    version_name,
)
from lumrec.knowledge.records import decode_records
from lumrec.knowledge.refresh import BLOCK, digests_of_stored, stored_users
from lumrec.knowledge.store import read_item_keys, read_items
from lumrec.knowledge.writer import BUILDING, KnowledgeWriter, full_disk_told, remove_others
from lumrec.run.errors import UserError
from lumrec.run.failures import command_parser, machine_errno, reported
from lumrec.run.files import check_file, sha256, sync_file
from lumrec.run.folder import RunFolder
from lumrec.run.printable import say

USERS, ITEMS = "users.parquet", "items.parquet"
NUMBERS = ("asked_at", "last_event_at", "num_events", "num_seen", "fold")
METADATA = b"lumrec"


def export_parquet(path: Path, folder: Path) -> dict[str, int]:
    """Writes the users and items of the knowledge published in run folder `path` to `folder`; returns their numbers.

    An earlier export there is replaced, file by file. Raises MissingFileError where nothing is published, UserError
    where it is damaged or has no users, and where `folder` has files with these names that are no export.
    """
    manifest = read_manifest(path)
    if USERS_FILE not in manifest["files"] or ITEMS_FILE not in manifest["files"]:
        raise UserError(
            f"the knowledge in {path} has no users or no item keys: run the query stage with query.users=true"
        )
    version = path / manifest["folder"]
    check_files(version, manifest["files"], checksums=True)
    for name in (USERS, ITEMS):
        if (folder / name).exists():
            _identity(_opened(folder / name), folder / name)  # raises unless it is an export
    folder.mkdir(parents=True, exist_ok=True)
    new = {name: folder / f".{name}.tmp" for name in (USERS, ITEMS)}
    metadata = {METADATA: json.dumps({"format": FORMAT, **identity_of(manifest)}).encode()}
    num_users = 0
    schema = _users_schema(manifest).with_metadata(metadata)
    with pq.ParquetWriter(new[USERS], schema) as writer:
        for keys, record_B in stored_users(version, manifest):
            writer.write_table(_users_table(keys, record_B, schema))
            num_users += len(keys)
    e_KID, item_keys = read_items(version, manifest), read_item_keys(version)
    columns = {"item_key": pa.array(item_keys, pa.string())} | {
        f"e_{k}": _vectors(e_ID) for k, e_ID in enumerate(e_KID)
    }
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), new[ITEMS])
    for name, file in new.items():
        sync_file(file)
        os.replace(file, folder / name)
    return {"users": num_users, "items": len(item_keys)}


def import_parquet(folder: Path, path: Path) -> dict[str, Any]:
    """Publishes users.parquet and items.parquet of `folder` as knowledge in run folder `path`; returns its manifest.

    A store that was imported there before is replaced atomically. Users who were forgotten in a parent folder of `path`
    are left out. Raises MissingFileError for a missing file, UserError for files that do not belong together, are
    damaged, or do not match their metadata, and for a folder that contains anything else.
    """
    users, items = (_opened(folder / name) for name in (USERS, ITEMS))
    identity = _identity(users, folder / USERS)
    if identity != _identity(items, folder / ITEMS):
        raise UserError(f"{folder}: {USERS} and {ITEMS} were exported from different knowledge; export both again")
    _check_columns(users, _users_schema(identity), folder / USERS)
    lums = [pa.field(f"e_{k}", pa.list_(pa.float32(), identity["dim"])) for k in range(len(identity["lums"]))]
    _check_columns(items, pa.schema([pa.field("item_key", pa.string()), *lums]), folder / ITEMS)
    identity |= {"rows": False, "imported": [sha256(folder / USERS), sha256(folder / ITEMS)]}
    digests = [
        digests_of_stored(_stored_keys(b)) for b in users.iter_batches(BLOCK, columns=["user_key", "key_sha256"])
    ]
    digest_X = np.concatenate([np.zeros(0, "S16"), *digests])
    forgotten = {digest for parent in path.absolute().parents for digest in forgotten_among(parent, digest_X)}
    if forgotten:
        identity["forgotten"] = sorted({*identity.get("forgotten", []), *forgotten})
    _check_replaceable(path)
    with closing(RunFolder.locked(path)):
        if (path / MANIFEST).exists():
            manifest = read_manifest(path)
            if version_name(identity_of(manifest)) == version_name(identity):
                remove_others(path, path / manifest["folder"])
                return manifest
        with full_disk_told(path):
            return _import(users, items, identity, path)


def _check_replaceable(path: Path) -> None:
    """Raises UserError for a folder that contains anything that was not made by an import, finished or not."""
    ours = {".lock", BUILDING, MANIFEST, f".{MANIFEST}.tmp"}
    others = [entry.name for entry in path.iterdir() if entry.name not in ours] if path.exists() else []
    others = [name for name in others if not name.startswith(("knowledge-", ".trash-knowledge-"))]
    if others or ((path / MANIFEST).exists() and "imported" not in read_manifest(path)):
        raise UserError(
            f"{path} contains {others[0] if others else 'knowledge'}, which was not made by an import and is never "
            "replaced by one: use a new folder"
        )


def _import(users: pq.ParquetFile, items: pq.ParquetFile, identity: dict[str, Any], path: Path) -> dict[str, Any]:
    num_users, num_items = users.metadata.num_rows, items.metadata.num_rows
    writer = KnowledgeWriter(path, identity, num_events=0, num_users=0, num_items=num_items, max_users=num_users)
    written = 0
    for batch in users.iter_batches(BLOCK):
        keys, record_B = _stored_keys(batch), _records(batch, writer)
        kept = ~np.isin(digests_of_stored(keys), halves(identity.get("forgotten", [])))
        writer.write_users([key for key, is_kept in zip(keys, kept) if is_kept], record_B[kept])
        written += int(kept.sum())
    table = items.read()
    for lum in range(len(identity["lums"])):
        writer.write_items(lum, _tensor(table[f"e_{lum}"].combine_chunks()))
    writer.write_item_keys(table["item_key"].to_pylist())
    writer.commit("all")
    return writer.publish({"counts": {"users": written}, "built_at": int(time.time())})


def _users_schema(identity: dict[str, Any]) -> pa.Schema:
    fields = [pa.field("user_key", pa.string()), pa.field("key_sha256", pa.binary())]
    fields += [pa.field(name, pa.int64()) for name in NUMBERS]
    conditions = range(len(identity["conditions"]))
    fields += [pa.field(f"o_{n}", pa.list_(pa.float32(), identity["dim"])) for n in conditions]
    if identity["log_normalizer"]:
        fields += [pa.field(f"log_z_{n}", pa.float32()) for n in conditions]
    return pa.schema(fields)


def _users_table(keys: list[bytes], record_B: np.ndarray, schema: pa.Schema) -> pa.Table:
    o_BND = decode_records(record_B)
    columns: dict[str, Any] = {
        "user_key": pa.array([key[1:].decode() if key[:1] == b"u" else None for key in keys], pa.string()),
        "key_sha256": pa.array([key[1:] if key[:1] == b"h" else None for key in keys], pa.binary()),
        **{name: pa.array(record_B[name].astype(np.int64)) for name in NUMBERS},
        **{f"o_{n}": _vectors(o_BND[:, n]) for n in range(o_BND.shape[1])},
    }
    if "log_z" in (record_B.dtype.names or ()):
        columns |= {f"log_z_{n}": pa.array(record_B["log_z"][:, n].copy()) for n in range(o_BND.shape[1])}
    return pa.table(columns, schema=schema)


def _stored_keys(batch: pa.RecordBatch) -> list[bytes]:
    texts, digests = batch["user_key"].to_pylist(), batch["key_sha256"].to_pylist()
    if any(text is None and digest is None for text, digest in zip(texts, digests)):
        raise UserError(f"{USERS} has a row without user_key and key_sha256; remove it")
    if any(
        text is None and len(digest) != 32 or text is not None and len(text.encode()) > 256
        for text, digest in zip(texts, digests)
    ):
        raise UserError(
            f"{USERS} has a user_key of more than 256 bytes, or a key_sha256 of other than 32; export it again"
        )
    return [b"h" + digest if text is None else b"u" + text.encode() for text, digest in zip(texts, digests)]


def _records(batch: pa.RecordBatch, writer: KnowledgeWriter) -> np.ndarray:
    conditions = range(len(writer.identity["conditions"]))
    log_z_BN = None
    if writer.identity["log_normalizer"]:
        log_z_BN = torch.from_numpy(np.stack([batch[f"log_z_{n}"].to_numpy() for n in conditions], 1))
    return writer.user_records(
        torch.stack([_tensor(batch[f"o_{n}"]) for n in conditions], 1),
        log_z_BN,
        **{name: batch[name].to_numpy() for name in NUMBERS},
    )


def _vectors(x_XD: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(x_XD).ravel()), x_XD.shape[1])


def _tensor(vectors: pa.FixedSizeListArray) -> Tensor:
    return torch.from_numpy(vectors.flatten().to_numpy().reshape(len(vectors), -1).copy())


def _opened(file: Path) -> pq.ParquetFile:
    check_file(file, "", "what python -m lumrec.knowledge.parquet export makes")
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        if machine_errno(error):
            raise
        raise UserError(f"{file} is no Parquet file, or was cut off ({error}): copy it again") from None


def _identity(file: pq.ParquetFile, name: Path) -> dict[str, Any]:
    stored = (file.schema_arrow.metadata or {}).get(METADATA)
    if stored is None:
        raise UserError(f'{name} lacks the metadata "lumrec", which describes it: export it again and keep that')
    try:
        identity = json.loads(stored)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{name}: its metadata "lumrec" is not JSON ({error}): export it again') from None
    if not isinstance(identity, dict) or identity.pop("format", None) != FORMAT:
        raise UserError(f"{name} has another format than {FORMAT}, which this version of lumrec reads: export it again")
    if problem := identity_problem(identity):
        raise UserError(f'{name}: its metadata "lumrec" is damaged: {problem}; export it again')
    return identity


def _check_columns(file: pq.ParquetFile, expected: pa.Schema, name: Path) -> None:
    for field in expected:
        index = file.schema_arrow.get_field_index(field.name)
        got = file.schema_arrow.field(index).type if index >= 0 else "(absent)"
        if got != field.type:
            raise UserError(f"{name}: column {field.name} is {got}; expected {field.type}, as its metadata says")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser("python -m lumrec.knowledge.parquet", __doc__)
    parser.add_argument("what", choices=("export", "import"))
    parser.add_argument("source", type=Path, help="export: the run folder; import: the folder of the Parquet files")
    parser.add_argument("target", type=Path, help="export: folder for the Parquet files; import: the run folder")
    given = parser.parse_args(arguments)
    with reported():
        if given.what == "export":
            counts = export_parquet(given.source, given.target)
        else:
            counts = import_parquet(given.source, given.target)["counts"]
    say(f"{given.target}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
