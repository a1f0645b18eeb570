"""Opens each LMDB file once per process, as LMDB requires, and shares it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb

DATA_FILE = "data.mdb"
# Address space, not space on the disk: an LMDB cannot grow beyond it.
MAP_SIZE = 1 << 40
MAX_READERS = 1024
_OPENING = threading.Lock()
_OPEN: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()


def read_only(folder: Path, *, max_dbs: int = 0) -> lmdb.Environment:
    """The LMDB whose data.mdb is in `folder`, read-only. It is closed with the last reference to it.

    It needs no lock file, because published files never change.
    """
    return _shared(folder, readonly=True, lock=False, max_dbs=max_dbs)


def read_write(folder: Path, *, max_dbs: int = 0) -> lmdb.Environment:
    """The LMDB in `folder`, made if there is none, for many readers and writers. Closed like `read_only`."""
    return _shared(folder, map_size=MAP_SIZE, max_readers=MAX_READERS, max_dbs=max_dbs)


def _shared(folder: Path, **options: Any) -> lmdb.Environment:
    with _OPENING:  # LMDB's locks break where a process opens a file twice, also at the same moment
        if (folder / DATA_FILE).exists() and (env := _OPEN.get(_name(folder))):
            return env
        # Keys are read in random order, so reading ahead would load pages that are not needed.
        env = lmdb.open(str(folder), readahead=False, **options)
        return _OPEN.setdefault(_name(folder), env)


def _name(folder: Path) -> str:
    return f"{folder.resolve()} {(folder / DATA_FILE).stat().st_ino}"  # the file may have been replaced by a copy
