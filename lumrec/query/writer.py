"""Builds a version of the knowledge beside the one in force, unit by unit, and publishes it by an atomic rename.

    <run>/building/identity.json      what is being built; a build of anything else is thrown away and begun anew
    <run>/building/progress-<rank>    finished units, one a line, written after their data has reached the disk
    <run>/building/*.npy, store/      as in the published version (lumrec/query/store.py)

All ranks of one machine write the same files: rows at their own places of the memory-mapped columns, users through
LMDB, which lets one writer in at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Sequence

import lmdb
import numpy as np
import torch.distributed as dist
from torch import Tensor

from lumrec.query.store import FORMAT, HEADER, MANIFEST, USERS_FILE, UserAnswer, pack_answer, user_key_bytes
from lumrec.train.files import remove_folder, sha256, sync_folder, write_atomically
from lumrec.train.parallel import rank, world_size
from lumrec.train.run import on_rank_zero

logger = logging.getLogger(__name__)
BUILDING = "building"
IDENTITY = "identity.json"
# LMDB's address space per user beside the value itself: key, node and page overheads, and pages that are half full.
LMDB_OVERHEAD = 1024


def version_name(identity: dict[str, Any]) -> str:
    """Folder of the version that `identity` describes; another identity has another folder."""
    return f"knowledge-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]}"


class KnowledgeWriter:
    """The version under construction. Every rank makes one with the same arguments; `publish` ends it.

    identity: everything that decides the answers (JSON); also the head of the manifest. It must hold conditions, dim,
    lums, dtype, rows, users and log_normalizer. finished: units that this build, or a killed one before it, committed.
    """

    def __init__(
        self, path: Path, identity: dict[str, Any], *, num_events: int, num_users: int, num_items: int
    ) -> None:
        self.path, self.identity = path, identity
        self.folder = path / BUILDING
        self.dtype = np.dtype(identity["dtype"]).newbyteorder("<")
        num_conditions, dim, num_lums = len(identity["conditions"]), identity["dim"], len(identity["lums"])
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "items_e.npy": ((num_lums, num_items, dim), self.dtype),
            "user_fold.npy": ((num_users,), np.dtype("i1")),
        }
        if identity["rows"]:
            shapes["rows_o.npy"] = ((num_events, num_conditions, dim), self.dtype)
            shapes["rows_present.npy"] = ((num_events,), np.dtype("?"))
            if identity["log_normalizer"]:
                shapes["rows_log_z.npy"] = ((num_events, num_conditions), np.dtype("<f4"))
        self._value_bytes = HEADER.size + num_conditions * (dim * self.dtype.itemsize + 4) + LMDB_OVERHEAD
        self._map_size = (1 << 24) + 2 * num_users * (self._value_bytes + LMDB_OVERHEAD)
        self.finished: set[str] = on_rank_zero(lambda: self._begin(shapes))
        self.columns = {name: np.lib.format.open_memmap(self.folder / name, mode="r+") for name in shapes}
        self._env = self._open_lmdb() if identity["users"] else None
        self._progress = open(self.folder / f"progress-{rank()}", "a", encoding="utf-8")  # noqa: SIM115

    def _begin(self, shapes: dict[str, tuple[tuple[int, ...], Any]]) -> set[str]:
        """Rank 0: continues the build that a killed process left, where it is of this identity, or begins one."""
        stored = self.folder / IDENTITY
        renamed = self.path / version_name(self.identity)
        if not self.folder.exists() and (renamed / IDENTITY).exists():
            os.replace(renamed, self.folder)  # killed between the two renames that publish
        if stored.exists() and json.loads(stored.read_text()) == self.identity:
            finished = {line for file in self.folder.glob("progress-*") for line in _whole_lines(file)}
            if finished:
                logger.info("%s: continuing a killed build, %d units of it are finished", self.folder, len(finished))
            return finished
        if self.folder.exists():
            logger.info("%s: dropping the unfinished build of other knowledge", self.folder)
            remove_folder(self.folder)
        self.folder.mkdir(parents=True)
        for name, (shape, dtype) in shapes.items():
            # A new file reads as zeros: rows that nobody asks for are absent.
            np.lib.format.open_memmap(self.folder / name, mode="w+", dtype=dtype, shape=shape).flush()
        if self.identity["users"]:
            (self.folder / "store").mkdir()
            self._open_lmdb().close()
        write_atomically(stored, json.dumps(self.identity, indent=2))
        return set()

    def _open_lmdb(self) -> lmdb.Environment:
        return lmdb.open(str(self.folder / "store"), map_size=self._map_size)

    def write_items(self, lum: int, e_ID: Tensor) -> None:
        """Item embeddings of LUM `lum`; one rank is enough."""
        self.columns["items_e.npy"][lum] = self.stored(e_ID, "items")

    def write_user_fold(self, fold_U: np.ndarray) -> None:
        self.columns["user_fold.npy"][:] = fold_U

    def write_rows(self, row_R: Tensor, o_RND: Tensor, log_z_RN: Tensor | None) -> None:
        """Answers at the places of their event rows."""
        rows = row_R.numpy()
        self.columns["rows_o.npy"][rows] = self.stored(o_RND)
        if log_z_RN is not None:
            self.columns["rows_log_z.npy"][rows] = log_z_RN.numpy()
        self.columns["rows_present.npy"][rows] = True

    def write_users(self, keys: Sequence[str], answers: Sequence[UserAnswer]) -> None:
        """Answers of users, by their raw keys, in one transaction."""
        assert self._env is not None
        with self._env.begin(write=True) as transaction:
            for key, answer in zip(keys, answers, strict=True):
                transaction.put(user_key_bytes(key), pack_answer(answer))

    def stored(self, x: Tensor, what: str = "answers") -> np.ndarray:
        """`x` in the dtype of the store. Raises ValueError where a value is too large for it, or no number at all."""
        with np.errstate(over="ignore"):
            values = x.numpy().astype(self.dtype)
        if not np.isfinite(values).all():
            raise ValueError(
                f"the LUM's {what} hold values that are no {self.dtype.name} numbers (largest "
                f"{float(x.abs().max()):g}); set query.dtype=float32, or look at the LUM's loss if they are not finite"
            )
        return values

    def commit(self, unit: str) -> None:
        """Marks `unit` as finished, once everything written before has reached the disk."""
        for column in self.columns.values():
            column.flush()
        self._progress.write(unit + "\n")
        self._progress.flush()
        os.fsync(self._progress.fileno())
        self.finished.add(unit)

    def publish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The manifest: `identity`, `facts`, and the checksum of every file; from here on it is what readers open.

        Every rank calls it, after its last commit. The version that was in force before is removed; who has opened it
        reads on.
        """
        self._close()
        if world_size() > 1:
            dist.barrier()
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
        files = sorted(file for file in self.folder.rglob("*") if file.is_file() and file.suffix in (".npy", ".mdb"))
        manifest = {
            "format": FORMAT,
            "folder": version_name(self.identity),
            **self.identity,
            **facts,
            "files": {
                str(file.relative_to(self.folder)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
                for file in files
            },
        }
        target = self.path / manifest["folder"]
        if target.exists():
            # Of the same identity, but not in force or damaged, or this build would not have been begun.
            remove_folder(target)
        os.replace(self.folder, target)
        sync_folder(self.path)
        write_atomically(self.path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        for rest in [*target.glob("progress-*"), target / IDENTITY]:
            rest.unlink()
        for old in self.path.glob("knowledge-*"):
            if old != target:
                remove_folder(old)
        return manifest

    def _compact_lmdb(self) -> None:
        """Replaces the LMDB by a copy without free pages and lock file: as small as it gets, never written again."""
        compact = self.folder / "compact"
        shutil.rmtree(compact, ignore_errors=True)
        compact.mkdir()
        env = self._open_lmdb()
        env.copy(str(compact), compact=True)
        env.close()
        os.replace(compact / "data.mdb", self.folder / USERS_FILE)
        shutil.rmtree(compact)
        (self.folder / "store" / "lock.mdb").unlink()


def _whole_lines(file: Path) -> list[str]:
    """Lines that were written to their end; a kill may have cut the last."""
    return [line[:-1] for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
