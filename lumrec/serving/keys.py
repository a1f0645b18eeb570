"""Keys of a bundle in one LMDB: raw values to rows of embedding tables, and raw item keys to item indices.

    table:<name>   raw value, as text → row of the table, int32; what is not in it is row 0, "unknown"
    items          raw item key → index of the item, int32; what is not in it is -1

No process holds all keys in memory: LMDB finds each in a few page reads of a file that all processes share.

Shape suffixes: N keys that are looked up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from lumrec.run.errors import UserError
from lumrec.run.shared_lmdb import read_only

UNKNOWN_ROW, UNKNOWN_ITEM = 0, -1
FILE = "keys/data.mdb"
ITEMS = b"items"
MOST_KEY = 256  # bytes; LMDB takes 511 at most, so a longer key is stored by its SHA-256
BYTES_PER_KEY = 256  # of LMDB's address space beside the key itself


def key_bytes(key: str) -> bytes:
    """The LMDB key of a raw value. Half a surrogate pair, which JSON can hold and no log can, gives a key of no value.

    Raises UserError for a key that is no text.
    """
    if not isinstance(key, str):
        raise UserError(
            f"a key is text, as the log has it; got the {type(key).__name__} {key!r:.80}: say {str(key)!r:.80}"
        )
    raw = key.encode(errors="surrogatepass")
    return b"k" + raw if len(raw) <= MOST_KEY else b"h" + hashlib.sha256(raw).digest()


def write_keys(folder: Path, tables: Mapping[str, Mapping[str, int]], items: Sequence[str]) -> None:
    """Writes `FILE` of a bundle's folder. tables: raw value to row, of each table. items: raw keys by index."""
    (folder / FILE).parent.mkdir(parents=True)
    content = {_table(name): sorted(_entries(rows.items())) for name, rows in tables.items()}
    content[ITEMS] = sorted(_entries(zip(items, range(len(items)), strict=True)))
    size = sum(len(key) + BYTES_PER_KEY for entries in content.values() for key, _ in entries)
    env = lmdb.open(str((folder / FILE).parent), map_size=2 * size + (1 << 24), max_dbs=len(content))
    for name, entries in content.items():
        database = env.open_db(name)
        with env.begin(write=True) as transaction:
            transaction.cursor(database).putmulti(entries, append=True)
    env.close()
    (folder / FILE).with_name("lock.mdb").unlink()


def _table(name: str) -> bytes:
    return b"table:" + name.encode()


def _entries(rows: Iterable[tuple[str, int]]) -> Iterable[tuple[bytes, bytes]]:
    return ((key_bytes(key), row.to_bytes(4, "little", signed=True)) for key, row in rows)


class Keys:
    """Looks up the keys that `write_keys` wrote; any number of processes and threads read at once.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_keys(folder, {"genres": {"Drama": 1, "Comedy": 2}}, ["m7", "m3"])
    >>> keys = Keys(folder, {"genres": 3}, num_items=2)
    >>> keys.rows("genres", ["Comedy", "Western"]).tolist(), keys.items(["m3", "m7", "m9"]).tolist()
    ([2, 0], [1, 0, -1])
    """

    def __init__(self, folder: Path, table_rows: Mapping[str, int], *, num_items: int) -> None:
        """table_rows: rows of each table, row 0 included. Raises UserError for a file that is not of these tables."""
        self._folder, self._num_rows, self.num_items = folder, dict(table_rows), num_items
        try:
            self._env = read_only((folder / FILE).parent, max_dbs=len(table_rows) + 1)
            self._tables = {name: self._env.open_db(_table(name), create=False) for name in table_rows}
            self._items = self._env.open_db(ITEMS, create=False)
            with self._env.begin() as transaction:
                num_keys = transaction.stat(self._items)["entries"]
        except lmdb.Error as error:
            raise UserError(f"{folder / FILE} is damaged ({error}): export the bundle again") from None
        if num_keys != num_items:
            raise UserError(f"{folder / FILE} holds {num_keys} items, expected {num_items}: export the bundle again")

    def rows(self, table: str, values: Sequence[str]) -> np.ndarray:
        """The row of each raw value in one table, int64 [N]; 0 where it is unknown."""
        return self._look_up(self._tables[table], values, UNKNOWN_ROW, self._num_rows[table])

    def items(self, keys: Sequence[str]) -> np.ndarray:
        """The index of each raw item key, int64 [N]; -1 where it is unknown."""
        return self._look_up(self._items, keys, UNKNOWN_ITEM, self.num_items)

    def _look_up(self, database: Any, keys: Sequence[str], unknown: int, limit: int) -> np.ndarray:
        default = unknown.to_bytes(4, "little", signed=True)
        with self._env.begin(database) as transaction:
            found = b"".join(map(transaction.get, map(key_bytes, keys), repeat(default)))
        if len(found) != 4 * len(keys):
            raise UserError(f"{self._folder / FILE} is damaged: a row has not 4 bytes; export the bundle again")
        row_N = np.frombuffer(found, "<i4").astype(np.int64)
        if len(row_N) and not unknown <= row_N.min() <= row_N.max() < limit:
            raise UserError(f"{self._folder / FILE} is damaged: a row is beyond {limit}; export the bundle again")
        return row_N
