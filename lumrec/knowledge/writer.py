"""Builds a version of the knowledge beside the current one, unit by unit, and publishes it by an atomic rename.

    <run>/building/identity.json      identity and folder of the version that is being built; other builds are discarded
    <run>/building/progress-<rank>    finished units, one per line, written after their data has reached the disk
    <run>/knowledge-<identity>-<id>/  the files of the version, in the folder in which they will be published

The rename of manifest.json, which names the version, publishes it. Everything before leaves the current version
unchanged; everything after is cleaning up, which `remove_others` repeats after a kill.

All ranks of one machine write the same files: rows at their own positions of the memory-mapped columns, users through
LMDB, which allows one writer at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from lumrec.knowledge.answers import FRESH
from lumrec.knowledge.digests import USER_INDEX
from lumrec.knowledge.manifest import FORMAT, ITEMS_FILE, MANIFEST, USERS_FILE, read_manifest, version_name
from lumrec.knowledge.records import encode, identity_user_dtype, make_records, records_to_bytes
from lumrec.run import files
from lumrec.run.distributed import barrier, on_rank_zero, rank
from lumrec.run.errors import UserError
from lumrec.run.files import leftovers, read_json, reserve, sync_file, sync_tree, write_atomically
from lumrec.run.listed_files import listed, own_hash

logger = logging.getLogger(__name__)
BUILDING = "building"
IDENTITY = "identity.json"
VERSION = "knowledge-[0-9a-f]{16}(-[0-9a-f]+)?"
PUBLISHED = (".npy", ".mdb", ".parquet")
# LMDB's address space per user in addition to the value: key, node and page overheads, and half-full pages.
LMDB_OVERHEAD = 1024


def in_force(path: Path) -> Path | None:
    """Folder of the version published in `path`; None if there is none. Raises UserError for a damaged manifest."""
    return path / read_manifest(path)["folder"] if (path / MANIFEST).exists() else None


def remove_others(path: Path, published: Path | None) -> None:
    """Removes every version but `published` from the run folder `path`, and the leftovers of builds and kills.

    With a version go the fresher answers over it.
    """
    shutil.rmtree(path / BUILDING, ignore_errors=True)
    fresh = [folder for folder in path.glob(f"{FRESH}*") if published is None or folder.name != FRESH + published.name]
    for folder in (*versions(path), *fresh, *leftovers(path)):
        if folder != published:
            shutil.rmtree(folder)


def versions(path: Path) -> list[Path]:
    """Folders of versions in the run folder `path`, published or not."""
    return [folder for folder in path.glob("knowledge-*") if re.fullmatch(VERSION, folder.name)]


def column_shapes(
    identity: dict[str, Any], *, num_events: int, num_users: int, num_items: int
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each memory-mapped column of a version."""
    num_conditions, dim, num_lums = len(identity["conditions"]), identity["dim"], len(identity["lums"])
    dtype, single = np.dtype(identity["dtype"]).newbyteorder("<"), np.dtype("<f4")
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"items_e.npy": ((num_lums, num_items, dim), dtype)}
    if dtype == np.int8:
        shapes["items_scale.npy"] = ((num_lums, num_items), single)
    if num_users:
        shapes |= {"user_fold.npy": ((num_users,), np.dtype("i1")), "users.npy": ((num_users,), USER_INDEX)}
    if identity["rows"]:
        shapes["rows_o.npy"] = ((num_events, num_conditions, dim), dtype)
        shapes["rows_present.npy"] = ((num_events,), np.dtype("?"))
        if dtype == np.int8:
            shapes["rows_scale.npy"] = ((num_events, num_conditions), single)
        if identity["log_normalizer"]:
            shapes["rows_log_z.npy"] = ((num_events, num_conditions), single)
    return shapes


def full_disk_told(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turns the error of a full disk into a UserError that says how the build in `path` can continue."""
    return files.full_disk_told(
        path,
        "the knowledge",
        then="the current version can still be read. Free some space and run the same command again: the build "
        "continues where it stopped",
    )


class KnowledgeWriter:
    """The version under construction. Every rank makes one with the same arguments; `publish` ends it.

    identity: everything that determines the answers (JSON), with the keys conditions, dim, lums, dtype, rows, users and
    log_normalizer; it becomes part of the manifest. num_users: users in the data; 0 for an import, which has no index
    of users. max_users: users that the LMDB will have, if more. basis: the version that answers are taken over from, if
    any; a build with another basis starts again. made_by: id of the run that builds (RunFolder.id), for the manifest.
    finished: units that this build, or a killed one before it, committed. folder: that of the version's files.
    """

    def __init__(
        self,
        path: Path,
        identity: dict[str, Any],
        *,
        num_events: int,
        num_users: int,
        num_items: int,
        max_users: int = 0,
        basis: str = "",
        made_by: str = "",
    ) -> None:
        self.path, self.identity, self._basis, self._made_by = path, identity, basis, made_by
        self.record = identity_user_dtype(identity)
        shapes = column_shapes(identity, num_events=num_events, num_users=num_users, num_items=num_items)
        self._map_size = (1 << 24) + 2 * max(num_users, max_users) * (self.record.itemsize + LMDB_OVERHEAD)
        name, self.finished = on_rank_zero(lambda: self._begin(shapes))
        self.folder = path / name
        self.columns = {name: np.lib.format.open_memmap(self.folder / name, mode="r+") for name in shapes}
        self._env = self._open_lmdb(self.folder) if identity["users"] else None
        self._progress = open(path / BUILDING / f"progress-{rank()}", "a", encoding="utf-8")  # noqa: SIM115

    def _begin(self, shapes: dict[str, tuple[tuple[int, ...], Any]]) -> tuple[str, set[str]]:
        """Rank 0: continues the build of a killed process, if it has this identity, or starts a new one.

        Returns the name of the version's folder and the finished units.
        """
        control = self.path / BUILDING
        wanted = {"identity": self.identity, "basis": self._basis, "made_by": self._made_by}
        stored = _stored_build(control)
        name = stored.pop("folder", "")
        try:
            published = in_force(self.path)
        except UserError as error:  # no reader can open it, so it may be removed
            logger.warning("the knowledge that will be replaced cannot be read: %s", error)
            published = None
        if stored == wanted and (self.path / name).is_dir() and self.path / name != published:
            finished = {line for file in control.glob("progress-*") for line in _whole_lines(file)}
            if finished:
                logger.info("%s: continuing a killed build, %d units of it are finished", self.path, len(finished))
            return name, finished
        if control.exists():
            logger.info("%s: dropping the unfinished build of other knowledge", self.path)
        remove_others(self.path, published)
        name = f"{version_name(self.identity)}-{uuid.uuid4().hex[:8]}"
        folder = self.path / name
        control.mkdir(parents=True)
        folder.mkdir()
        try:
            for column, (shape, dtype) in shapes.items():
                # A new file reads as zeros: rows that are not asked are absent.
                np.lib.format.open_memmap(folder / column, mode="w+", dtype=dtype, shape=shape).flush()
                reserve(folder / column)
        except OSError:
            remove_others(self.path, published)  # it is empty, and others need the space
            raise
        if self.identity["users"]:
            (folder / "store").mkdir()
            self._open_lmdb(folder).close()
        write_atomically(control / IDENTITY, json.dumps({**wanted, "folder": name}, indent=2))
        return name, set()

    def _open_lmdb(self, folder: Path) -> lmdb.Environment:
        return lmdb.open(str(folder / "store"), map_size=self._map_size)

    def write_items(self, lum: int, e_ID: Tensor) -> None:
        """Item embeddings of LUM number `lum`; one rank writes them."""
        self._put("items_e.npy", "items_scale.npy", lum, e_ID, "items")

    def write_item_keys(self, keys: Sequence[str]) -> None:
        """Raw key of each item; one rank writes them."""
        pq.write_table(pa.table({"item_key": pa.array(keys, pa.string())}), self.folder / ITEMS_FILE)
        sync_file(self.folder / ITEMS_FILE)

    def write_user_index(self, fold_U: np.ndarray, index_U: np.ndarray) -> None:
        """Fold of each user, and USER_INDEX (lumrec/knowledge/digests.py)."""
        self.columns["user_fold.npy"][:] = fold_U
        self.columns["users.npy"][:] = index_U

    def write_rows(self, rows_R: np.ndarray, o_RND: Tensor, log_z_RN: Tensor | None) -> None:
        """Answers for event rows."""
        self._put("rows_o.npy", "rows_scale.npy", rows_R, o_RND, "answers")
        if log_z_RN is not None:
            self.columns["rows_log_z.npy"][rows_R] = log_z_RN.numpy()
        self.columns["rows_present.npy"][rows_R] = True

    def _put(self, name: str, scale_name: str, index: Any, x: Tensor, what: str) -> None:
        values, scale = encode(x, self.identity["dtype"], what=what)
        self.columns[name][index] = values
        if scale is not None:
            self.columns[scale_name][index] = scale

    def write_users(self, keys: Sequence[bytes], record_B: np.ndarray) -> None:
        """Records of users (dtype `record`) by their LMDB keys, in one transaction."""
        assert self._env is not None
        with self._env.begin(write=True) as transaction:
            transaction.cursor().putmulti(list(zip(keys, records_to_bytes(record_B), strict=True)))

    def user_records(self, o_BND: Tensor, log_z_BN: Tensor | None, **fields: Any) -> np.ndarray:
        """Records [B] of these answers; `fields`: asked_at, last_event_at, num_events, num_seen, fold."""
        return make_records(self.record, self.identity["dtype"], o_BND, log_z_BN, **fields)

    def commit(self, unit: str) -> None:
        """Marks `unit` as finished, once everything written before has reached the disk."""
        for column in self.columns.values():
            column.flush()
        self._progress.write(unit + "\n")
        self._progress.flush()
        os.fsync(self._progress.fileno())
        self.finished.add(unit)

    def publish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Publishes the version; returns its manifest: identity, `facts`, the checksum of every file and its own.

        Every rank calls it, after its last commit. From then on readers open this version. The previous one is removed;
        readers that have it open can still read it.
        """
        self._close()
        barrier()
        return on_rank_zero(lambda: self._publish(facts))

    def _close(self) -> None:
        for column in self.columns.values():
            column.flush()
        self.columns = {}
        self._progress.close()
        if self._env is not None:
            self._env.close()
            self._env = None

    def _publish(self, facts: dict[str, Any]) -> dict[str, Any]:
        if self.identity["users"]:
            self._compact_lmdb()
        sync_tree(self.folder)
        published = (file for file in self.folder.rglob("*") if file.is_file() and file.suffix in PUBLISHED)
        manifest = {
            "format": FORMAT,
            "folder": self.folder.name,
            **self.identity,
            **facts,
            "made_by": self._made_by,
            "files": listed(self.folder, published),
        }
        manifest["sha256"] = own_hash(manifest)
        write_atomically(self.path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        remove_others(self.path, self.folder)
        return manifest

    def _compact_lmdb(self) -> None:
        """Replaces the LMDB by a copy without free pages and without a lock file: it is never written again."""
        compact = self.folder / "compact"
        shutil.rmtree(compact, ignore_errors=True)
        compact.mkdir()
        env = self._open_lmdb(self.folder)
        env.copy(str(compact), compact=True)
        env.close()
        os.replace(compact / "data.mdb", self.folder / USERS_FILE)
        shutil.rmtree(compact)
        (self.folder / "store" / "lock.mdb").unlink()


def _stored_build(control: Path) -> dict[str, Any]:
    """The description of an unfinished build; {} where it cannot be read."""
    try:
        return read_json(control / IDENTITY)
    except UserError:
        return {}


def _whole_lines(file: Path) -> list[str]:
    """The complete lines of a file; a kill may have cut off the last."""
    return [line[:-1] for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
