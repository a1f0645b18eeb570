"""LMDB files, each opened once in a process: LMDB must not be opened twice there, so that its users share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb

DATA_FILE = "data.mdb"
# Address space, not space on the disk: an LMDB cannot grow beyond it.
MAP_SIZE = 1 << 40
MAX_READERS = 1024
_OPEN: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()


def read_only(folder: Path, *, max_dbs: int = 0) -> lmdb.Environment:
    """The LMDB whose data.mdb is in `folder`. Closed with the last reference to it.

    There is no lock file: what is read here never changes after it was published, so readers need not know of each
    other.
    """
    return _shared(folder, readonly=True, lock=False, max_dbs=max_dbs)


def read_write(folder: Path, *, max_dbs: int = 0) -> lmdb.Environment:
    """The LMDB in `folder`, made where there is none, which many processes read and change. Closed as above."""
    return _shared(folder, map_size=MAP_SIZE, max_readers=MAX_READERS, max_dbs=max_dbs)


def _shared(folder: Path, **options: Any) -> lmdb.Environment:
    if (folder / DATA_FILE).exists() and (env := _OPEN.get(_name(folder))):
        return env
    # Keys are read in no order: what the system would read ahead of a page is not what comes next.
    env = lmdb.open(str(folder), readahead=False, **options)
    return _OPEN.setdefault(_name(folder), env)


def _name(folder: Path) -> str:
    return f"{folder.resolve()} {(folder / DATA_FILE).stat().st_ino}"  # a copy may have taken the place of a file
