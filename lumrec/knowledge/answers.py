"""Where a knowledge store's readers find a user's answers: in the version that was published, and fresher ones over it.

    <run>/knowledge-…/store/data.mdb    published, never changed
    <run>/fresh-knowledge-…/data.mdb    answers to newer events of users of that version (lumrec/serving/follow.py)

In a Redis a version is all of this, under the name behind the URL's # (lumrec/knowledge/redis_load.py writes it):

    shop:knowledge                      the manifest of the version in force
    shop:knowledge-…:=u42               the record of user 42, as in the LMDB
    shop:knowledge-…:=fu42              a fresher one
    shop:knowledge-…:=/items_e.npy/0    the files of items, in pieces

Shape suffixes: B users.
"""

from __future__ import annotations

import abc
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lumrec.knowledge.manifest import MANIFEST, read_manifest
from lumrec.run.errors import MissingFileError
from lumrec.run.key_value import Changes, LmdbKeyValue, RedisKeyValue, is_redis, without_password
from lumrec.run.redis_versions import RedisVersions
from lumrec.run.shared_lmdb import DATA_FILE, read_only

KIND = "knowledge"
FRESH = "fresh-"
LOOK_AGAIN_S = 1.0


class Answers(abc.ABC):
    """Records (bytes) by LMDB key, see lumrec/knowledge/records.py."""

    @abc.abstractmethod
    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The newest record of each user, None where there is none. Raises Unavailable."""

    @abc.abstractmethod
    def put_fresh(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        """Puts records over the published ones. Raises Unavailable."""

    @abc.abstractmethod
    def remove_fresh(self, keys: Sequence[bytes]) -> None:
        """Removes records that lie over the published ones. Raises Unavailable."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of users in what was published."""


class LmdbAnswers(Answers):
    """Of the version in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._published = read_only(folder / "store")
        self._fresh_file = folder.with_name(FRESH + folder.name) / DATA_FILE
        self._fresh: LmdbKeyValue | None = None
        self._fresh_inode, self._look_at = 0, 0.0

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._published.begin() as transaction:
            values = [transaction.get(key) for key in keys]
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_AGAIN_S
            self._look()
        if self._fresh is None:
            return values
        return [old if new is None else new for new, old in zip(self._fresh.get(keys), values)]

    def put_fresh(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        if pairs:
            self._opened().put(pairs)

    def remove_fresh(self, keys: Sequence[bytes]) -> None:
        if keys:
            self._opened().update([], lambda _: Changes(delete=keys))

    def _look(self) -> None:
        """Opens the fresh answers if there are any, or others in their place (some were forgotten)."""
        inode = self._fresh_file.stat().st_ino if self._fresh_file.exists() else 0
        if inode != self._fresh_inode:
            self._fresh = LmdbKeyValue(self._fresh_file.parent) if inode else None
            self._fresh_inode = inode

    def _opened(self) -> LmdbKeyValue:
        self._look()
        if self._fresh is None:
            LmdbKeyValue(self._fresh_file.parent)
            self._look()
        assert self._fresh is not None
        return self._fresh

    def __len__(self) -> int:
        return self._published.stat()["entries"]


class RedisAnswers(Answers):
    """Of a version in a Redis."""

    def __init__(self, store: RedisKeyValue) -> None:
        self._store = store

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        values = self._store.get([*keys, *(b"f" + key for key in keys)])
        return [old if new is None else new for old, new in zip(values[: len(keys)], values[len(keys) :])]

    def put_fresh(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        self._store.put([(b"f" + key, record) for key, record in pairs])

    def remove_fresh(self, keys: Sequence[bytes]) -> None:
        if keys:
            self._store.update([], lambda _: Changes(delete=[b"f" + key for key in keys]))

    def __len__(self) -> int:
        return sum(key[:1] in (b"u", b"h") for block in self._store.scan() for key, _ in block)


@contextlib.contextmanager
def fetched(place: str, files: Sequence[str], *, timeout_s: float) -> Iterator[tuple[Path, RedisAnswers]]:
    """The version in force at a place in a Redis: a run folder with its manifest and these of its files, which lasts as
    long as the block, and its answers.

    timeout_s: of each look-up of answers. Raises MissingFileError where nothing was loaded, Unavailable where the Redis
    does not answer, and as `read_manifest`.
    """
    versions = RedisVersions(place, KIND)
    if (found := versions.in_force()) is None:
        raise MissingFileError(
            f"there is no knowledge in {without_password(place)}; load it with: python -m lumrec.knowledge.redis_load "
            "RUN_FOLDER URL"
        )
    with tempfile.TemporaryDirectory(prefix="lumrec-knowledge-") as name:
        path = Path(name)
        (path / MANIFEST).write_text(found[1], encoding="utf-8")
        manifest = read_manifest(path)
        pieces = versions.store(manifest["folder"])
        for file in set(files) & set(manifest["files"]):
            target = path / manifest["folder"] / file
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as opened:
                while piece := pieces.get([piece_key(file, opened.tell())])[0]:
                    opened.write(piece)
        yield path, RedisAnswers(versions.store(manifest["folder"], timeout_s=timeout_s))


def version_in_force(place: str | Path) -> str:
    """The name of the version that a reader would open now, in a run folder or a Redis; "" where there is none.

    Raises UserError for a damaged manifest, Unavailable where the Redis does not answer.
    """
    if is_redis(place):
        found = RedisVersions(str(place), KIND).in_force()
        return found[0] if found else ""
    return read_manifest(Path(place))["folder"] if (Path(place) / MANIFEST).exists() else ""


def piece_key(file: str, first: int) -> bytes:
    """Key of the piece of a file that begins with byte `first`."""
    return f"/{file}/{first}".encode()
