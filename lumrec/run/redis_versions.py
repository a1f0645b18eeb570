"""Versions of something under a name in a Redis, of which one is in force: written beside it, published at once.

shop:knowledge              hash: the version in force, and what describes it
shop:knowledge-versions     set: all versions of which there are keys
shop:knowledge-1f03:*       a version, see RedisKeyValue
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from lumrec.run.errors import UserError
from lumrec.run.key_value import RedisKeyValue

LOCK_S = 60


class RedisVersions:
    """Of one kind ("knowledge") at a place (redis://host:6379/0#name). Every method raises key_value.Unavailable."""

    def __init__(self, place: str, kind: str) -> None:
        self.place, self._names = place, RedisKeyValue(place)
        self._in_force = self._names.prefix + kind.encode()
        self._versions = self._in_force + b"-versions"
        self._lock = self._in_force + b"-lock"

    def in_force(self) -> tuple[str, str] | None:
        """The name of the version in force, and its description."""
        with self._names.errors():
            version, text = self._names.client.hmget(self._in_force, ["version", "text"])
        return None if version is None or text is None else (version.decode(), text.decode())

    def all(self) -> list[str]:
        """The names of all versions of which there are keys."""
        with self._names.errors():
            return sorted(version.decode() for version in self._names.client.smembers(self._versions))

    def store(self, version: str, *, timeout_s: float = 5.0) -> RedisKeyValue:
        """The keys of a version."""
        return RedisKeyValue(self.place, prefix=f"{version}:", timeout_s=timeout_s)

    @contextlib.contextmanager
    def writing(self, version: str, text: Callable[[], str]) -> Iterator[Callable[[list[tuple[bytes, bytes]]], None]]:
        """Gives what puts pairs into a new version, which is published with its description at the end of the block.

        The one before stays, for those who have it open; older ones, and what was killed, are removed. Raises UserError
        while another process writes one, and for a minute after it was killed.
        """
        client = self._names.client
        with self._names.errors():
            lock = client.lock(self._lock, timeout=LOCK_S, blocking=False)
            if not lock.acquire():
                raise UserError(f"{self._names.place}: another process writes it, or was killed: try again in a minute")
        try:
            before = self.in_force()
            with self._names.errors():
                client.sadd(self._versions, version)
            store = self.store(version)

            def put(pairs: list[tuple[bytes, bytes]]) -> None:
                store.put(pairs)
                with self._names.errors():
                    lock.reacquire()

            yield put
            with self._names.errors():
                client.hset(self._in_force, mapping={"version": version, "text": text()})
                for each in client.smembers(self._versions) - {version.encode(), before and before[0].encode()}:
                    self.store(each.decode()).remove()
                    client.srem(self._versions, each)
        finally:
            with self._names.errors():
                lock.release()
