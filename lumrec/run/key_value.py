"""Key-value stores that many processes read and change: LMDB (a folder) and Redis (a URL), behind one interface.

    runs/shop-user_state/state-1f03              a folder: LMDB, no server, for processes of one machine
    redis://cache.internal:6379/0#shop           Redis; what is behind # begins the name of each of its keys
    unix:///run/redis.sock#shop                  the same through a socket

One `update` reads some values, and changes them together with counters and marks, in one transaction: a process that is
killed at any point has changed all of it or nothing. LMDB lets one writer in at a time. In Redis the values that were
read are watched, and the change is computed again if another process has changed one of them.

A mark is a note that a key has to be looked at (its user has new events). `unmark` removes it unless it was set again.

Durability: LMDB has each update on the disk when it returns. Redis has it as the server is configured: with its
appendonly file, or not at all after a crash of the server.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import lmdb
import numpy as np

from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.shared_lmdb import DATA_FILE, read_write

SCHEMES = ("redis", "rediss", "unix")
BLOCK = 4096
DOWN_S = 1.0
MOST_CONFLICTS = 1000
_COUNTER = struct.Struct("<qd")
_MOVED = b"moved"  # among the counters
# Removes the marks that have not been set again since they were read.
_UNMARK = """
for i = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then redis.call('HDEL', KEYS[1], ARGV[i]) end
end
"""


class Unavailable(OSError):
    """A key-value store that cannot be reached, does not answer in time, or is damaged."""


class Moved(Unavailable):
    """A store that was written again elsewhere: open that."""


class Changes(NamedTuple):
    """What an update writes. put: new values. delete: keys that lose their value and their mark. add: what each counter
    grows by, (number, sum). mark: keys to be looked at, each with a value that is another one each time."""

    put: Mapping[bytes, bytes] = {}
    delete: Sequence[bytes] = ()
    add: Mapping[bytes, tuple[int, float]] = {}
    mark: Mapping[bytes, bytes] = {}


Change = Callable[[list[bytes | None]], Changes]


class KeyValue(abc.ABC):
    """See the top of the file. Keys have 1 to 511 bytes. Every method raises Unavailable."""

    @abc.abstractmethod
    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, None where it has none."""

    @abc.abstractmethod
    def counters(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Number (int64) and sum (float64) of each counter; 0 where nothing was added."""

    @abc.abstractmethod
    def update(self, keys: Sequence[bytes], change: Change) -> None:
        """Writes what `change` makes of the values of `keys`, in one transaction. It may be called several times."""

    @abc.abstractmethod
    def put(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        """Writes values; another process may see some of them before the others."""

    @abc.abstractmethod
    def scan(self) -> Iterator[list[tuple[bytes, bytes]]]:
        """All keys with their values, in blocks, in no order; a key that is changed meanwhile has either value."""

    @abc.abstractmethod
    def marked(self, most: int) -> dict[bytes, bytes]:
        """Marks, at most so many."""

    @abc.abstractmethod
    def unmark(self, seen: Mapping[bytes, bytes]) -> None:
        """Removes these marks, but not those that have another value by now."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of keys that have a value."""


class LmdbKeyValue(KeyValue):
    """In the folder `path`. Raises MissingFileError where it holds none and `create` is False."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        if create:
            path.mkdir(parents=True, exist_ok=True)
        elif not (path / DATA_FILE).exists():
            raise MissingFileError(f"there is no {path / DATA_FILE}")
        with self._errors():
            self._env = read_write(path, max_dbs=3)
            self._values, self._counters, self._marks = map(self._env.open_db, (b"values", b"counters", b"marks"))

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._errors(), self._env.begin(db=self._values) as transaction:
            return [transaction.get(key) for key in keys]

    def counters(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        with self._errors(), self._env.begin(db=self._counters) as transaction:
            pairs = np.array([_COUNTER.unpack(transaction.get(key, bytes(16))) for key in keys]).reshape(-1, 2)
        return pairs[:, 0].astype(np.int64), pairs[:, 1]

    def update(self, keys: Sequence[bytes], change: Change) -> None:
        with self._errors(), self._env.begin(write=True, db=self._values) as transaction:
            if transaction.get(_MOVED, db=self._counters) is not None:
                raise Moved(f"{self.path} was written again in another folder")
            changes = change([transaction.get(key) for key in keys])
            for key, value in changes.put.items():
                transaction.put(key, value)
            for key in changes.delete:
                transaction.delete(key)
                transaction.delete(key, db=self._marks)
            for key, (number, total) in changes.add.items():
                before = _COUNTER.unpack(transaction.get(key, bytes(16), db=self._counters))
                transaction.put(key, _COUNTER.pack(before[0] + number, before[1] + total), db=self._counters)
            for key, value in changes.mark.items():
                transaction.put(key, value, db=self._marks)

    def put(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        with self._errors(), self._env.begin(write=True, db=self._values) as transaction:
            transaction.cursor().putmulti(list(pairs))

    def scan(self) -> Iterator[list[tuple[bytes, bytes]]]:
        last, more = b"", True
        while more:  # a transaction for each block: one that lasts keeps every page that is replaced meanwhile
            with self._errors(), self._env.begin(db=self._values) as transaction, transaction.cursor() as cursor:
                more = cursor.set_range(last + b"\0") if last else cursor.first()
                block = list(islice(cursor.iternext(), BLOCK)) if more else []
            if block:
                last = block[-1][0]
                yield block

    def marked(self, most: int) -> dict[bytes, bytes]:
        with self._errors(), self._env.begin(db=self._marks) as transaction, transaction.cursor() as cursor:
            return dict(islice(cursor, most))

    def unmark(self, seen: Mapping[bytes, bytes]) -> None:
        with self._errors(), self._env.begin(write=True, db=self._marks) as transaction:
            for key, value in seen.items():
                if transaction.get(key) == value:
                    transaction.delete(key)

    def __len__(self) -> int:
        with self._errors(), self._env.begin(db=self._values) as transaction:
            return transaction.stat(self._values)["entries"]

    def move_to(
        self, path: Path, are_gone: Callable[[list[bytes]], np.ndarray], publish: Callable[[], None]
    ) -> LmdbKeyValue:
        """Copies all but some keys into a new store in the folder `path`, and gives that.

        LMDB keeps what is deleted in the unused bytes of its pages; a new file has none of it. are_gone: which of some
        keys are left out (bool). Nobody writes to this store from the copy on: `update` raises Moved, after `publish`,
        which is called once all is copied, has said where the new one is. Here the keys are removed too, for readers
        that have not heard of it.
        """
        other = LmdbKeyValue(path)
        with self._errors(), self._env.begin(write=True) as transaction:
            for mine, theirs in zip(self._tables(), other._tables()):
                entries = iter(transaction.cursor(db=mine))
                left_out: list[bytes] = []
                while block := list(islice(entries, BLOCK)):
                    is_gone = [False] * len(block) if mine is self._counters else are_gone([key for key, _ in block])
                    with other._env.begin(write=True, db=theirs) as copied:
                        copied.cursor().putmulti([pair for pair, gone in zip(block, is_gone) if not gone])
                    left_out += [key for (key, _), gone in zip(block, is_gone) if gone]
                for key in left_out:
                    transaction.delete(key, db=mine)
            publish()
            transaction.put(_MOVED, b"", db=self._counters)
        return other

    def _tables(self) -> tuple[Any, Any, Any]:
        return self._values, self._counters, self._marks

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise Unavailable(f"{self.path} cannot be read or written ({error})") from error


class RedisKeyValue(KeyValue):
    """In Redis, all keys of it beginning with the name of the place; see `redis_place`."""

    def __init__(self, place: str, *, timeout_s: float = 5.0, prefix: str = "") -> None:
        """timeout_s: of each command. prefix: put behind the name, for several stores of one name."""
        self.place = without_password(place)
        self.client, name = redis_place(place, timeout_s=timeout_s)
        self._redis = importlib.import_module("redis")
        self._down_until, self._down_because = 0.0, ""
        self.prefix = f"{name}:{prefix}".encode()
        self._counts, self._sums, self._marks = (self.prefix + each for each in (b"counts", b"sums", b"marks"))

    def _key(self, key: bytes) -> bytes:
        return self.prefix + b"=" + key

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if not keys:
            return []
        with self.errors():
            return self.client.mget([self._key(key) for key in keys])

    def counters(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if not keys:
            return np.zeros(0, np.int64), np.zeros(0)
        with self.errors():
            numbers, sums = (self.client.hmget(table, list(keys)) for table in (self._counts, self._sums))
        return np.array([int(n or 0) for n in numbers]), np.array([float(x or 0) for x in sums])

    def update(self, keys: Sequence[bytes], change: Change) -> None:
        with self.errors():
            for _ in range(MOST_CONFLICTS):
                with self.client.pipeline(transaction=True) as pipe, contextlib.suppress(self._redis.WatchError):
                    if keys:
                        pipe.watch(*map(self._key, keys))
                    values = pipe.mget([self._key(key) for key in keys]) if keys else []
                    self._queue(pipe, change(values))
                    pipe.execute()
                    return
        raise Unavailable(f"{self.place}: other processes changed the same keys {MOST_CONFLICTS} times in a row")

    def _queue(self, pipe: Any, changes: Changes) -> None:
        pipe.multi()
        if changes.put:
            pipe.mset({self._key(key): value for key, value in changes.put.items()})
        if changes.delete:
            pipe.delete(*map(self._key, changes.delete))
            pipe.hdel(self._marks, *changes.delete)
        for key, (number, total) in changes.add.items():
            pipe.hincrby(self._counts, key, number)
            pipe.hincrbyfloat(self._sums, key, total)
        if changes.mark:
            pipe.hset(self._marks, mapping=dict(changes.mark))

    def put(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        with self.errors():
            for first in range(0, len(pairs), BLOCK):
                self.client.mset({self._key(key): value for key, value in pairs[first : first + BLOCK]})

    def scan(self) -> Iterator[list[tuple[bytes, bytes]]]:
        start = len(self._key(b""))
        for keys in self._keys(self._key(b"")):
            with self.errors():
                values = self.client.mget(keys)
            yield [(key[start:], value) for key, value in zip(keys, values) if value is not None]

    def _keys(self, beginning: bytes) -> Iterator[list[bytes]]:
        """All keys that begin so, in blocks; each once."""
        with self.errors():
            pattern = re.sub(rb"([\\*?\[\]^])", rb"\\\1", beginning) + b"*"
            found = iter(set(self.client.scan_iter(match=pattern, count=BLOCK)))
        while block := list(islice(found, BLOCK)):
            yield block

    def marked(self, most: int) -> dict[bytes, bytes]:
        with self.errors():
            _, found = self.client.hscan(self._marks, count=most)
        return dict(islice(found.items(), most))

    def unmark(self, seen: Mapping[bytes, bytes]) -> None:
        with self.errors():
            self.client.eval(_UNMARK, 1, self._marks, *(word for pair in seen.items() for word in pair))

    def __len__(self) -> int:
        return sum(map(len, self._keys(self._key(b""))))

    def remove(self) -> None:
        """Removes everything that begins with this store's prefix."""
        for keys in self._keys(self.prefix):
            with self.errors():
                self.client.unlink(*keys)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raises Unavailable for the errors of the client. A Redis that did not answer in time is not asked again for a
        second: one that hangs holds up one call a second."""
        if time.monotonic() < self._down_until:
            raise Unavailable(self._down_because)
        try:
            yield
        except (self._redis.RedisError, OSError) as error:
            if isinstance(error, Unavailable):
                raise
            says = f"{self.place} does not answer ({error})"
            if isinstance(error, self._redis.TimeoutError):
                self._down_until, self._down_because = time.monotonic() + DOWN_S, says
            raise Unavailable(says) from error


def is_redis(place: str | Path) -> bool:
    """Whether a place is the URL of a Redis; else it is a folder."""
    return isinstance(place, str) and urlsplit(place).scheme in SCHEMES


def redis_place(place: str, *, timeout_s: float) -> tuple[Any, str]:
    """A Redis client for the URL `place`, and the name behind its #. No connection is made yet.

    Raises UserError for a URL without a name, or that the client does not understand, and where the client is missing.
    """
    try:
        redis = importlib.import_module("redis")
    except ModuleNotFoundError:
        raise UserError(f"{without_password(place)}: install the client: pip install 'lumrec[redis]'") from None
    url, _, name = place.partition("#")
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(
            f"{without_password(place)} names no store in that Redis; expected one behind #, of letters, digits, '.', "
            "'_' and '-', such as redis://localhost:6379/0#shop"
        )
    # No retries by the client: a transaction that did reach the server would be repeated blindly.
    retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
    try:
        client = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=retry)
    except ValueError as error:
        raise UserError(f"{without_password(place)} is no URL of a Redis: {error}") from None
    return client, name


def without_password(place: str) -> str:
    """A URL as it may be shown: with *** for the password."""
    password = urlsplit(place).password
    return place.replace(f":{password}@", ":***@") if password else place
