"""LMDB files that are only read, each opened once in a process."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakValueDictionary

import lmdb

_OPEN: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()


def read_only(folder: Path, *, max_dbs: int = 0) -> lmdb.Environment:
    """The LMDB whose data.mdb is in `folder`. Closed with the last reference to it.

    LMDB must not be opened twice in one process, so that its readers there share it. There is no lock file: what is
    read here never changes after it was published, so readers need not know of each other.
    """
    name = f"{folder.resolve()} {(folder / 'data.mdb').stat().st_ino}"  # a copy may have taken the place of a file
    env = _OPEN.get(name)
    if env is None:
        # Keys are read in no order: what the system would read ahead of a page is not what comes next.
        env = _OPEN[name] = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, max_dbs=max_dbs)
    return env
