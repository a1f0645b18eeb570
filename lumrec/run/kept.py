"""Arrays that are computed once, and kept in a folder for every process and every later run: mapped, not read."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lumrec.run.distributed import on_rank_zero
from lumrec.run.errors import UserError
from lumrec.run.files import full_disk_told, locked, read_json, sha256, sync_tree, write_atomically
from lumrec.run.listed_files import file_problem, list_problem, listed, own_hash

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
# Makes an array of a name, shape and dtype, to be filled.
NewArray = Callable[[str, tuple[int, ...], Any], np.ndarray]


def in_memory(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A NewArray whose arrays are not kept."""
    return np.empty(shape, dtype)


def source_of(*classes: type) -> list[str]:
    """SHA-256 of the files that define these classes: other code may compute something else."""
    return [sha256(Path(inspect.getfile(each))) for each in classes]


def kept_arrays(
    folder: Path, name: str, identity: Mapping[str, Any], make: Callable[[NewArray], Any]
) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays that `make` makes by the function it is given, and what it returns (plain values). Collective.

    They are computed by rank 0, the first time, and kept under `folder` by all that they depend on (`identity`, plain
    values); every rank maps them, so that they take no memory of its own. Files that are damaged are made again. Where
    `folder` cannot be written, each process computes them in its memory, and a line says so.
    """
    path = folder / f"{name}-{own_hash(identity)[:16]}"
    if not on_rank_zero(lambda: _is_made(path, identity, make)):
        arrays: dict[str, np.ndarray] = {}
        return arrays, make(lambda of, shape, dtype: arrays.setdefault(of, in_memory(of, shape, dtype)))
    manifest = read_json(path / MANIFEST)
    # "c" maps like "r", and torch does not warn that the memory cannot be written to.
    return {of: np.load(path / f"{of}.npy", mmap_mode="c") for of in manifest["arrays"]}, manifest["facts"]


def _is_made(path: Path, identity: Mapping[str, Any], make: Callable[[NewArray], Any]) -> bool:
    """Whether the arrays are there, whole; makes them where they are not. False where the folder cannot be written."""
    try:
        path.parent.mkdir(exist_ok=True)
        with locked(path.parent / ".lock", waiting=f"waiting for another process, which writes {path.parent}"):
            if not (path.exists() and _is_whole(path, identity)):
                with full_disk_told(path.parent, "what is kept", then="make room and run the same command again"):
                    _make(path, identity, make)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        logger.warning(
            "%s cannot be written (%s): each process computes in its memory what would be there", path, error
        )
        return False
    return True


def _is_whole(path: Path, identity: Mapping[str, Any]) -> bool:
    try:
        manifest = read_json(path / MANIFEST)
        problem = list_problem(path, manifest["files"])
        for name in () if problem else manifest["files"]:
            problem = problem or file_problem(path / name, manifest["files"][name], verify=True)
        if not problem and manifest["identity"] == json.loads(json.dumps(identity)):
            return True
    except (UserError, OSError, LookupError, TypeError) as error:
        problem = str(error)
    logger.warning("%s is computed again: %s", path, problem or "it was made of other data")
    return False


def _make(path: Path, identity: Mapping[str, Any], make: Callable[[NewArray], Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    for old in (temporary, path):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir()
    names = []

    def new(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        names.append(name)
        return np.lib.format.open_memmap(temporary / f"{name}.npy", "w+", np.dtype(dtype), shape)

    try:
        facts = make(new)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    files = listed(temporary, temporary.glob("*.npy"))
    manifest = {"identity": identity, "facts": facts, "arrays": names, "files": files}
    write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    sync_tree(temporary)
    os.rename(temporary, path)
