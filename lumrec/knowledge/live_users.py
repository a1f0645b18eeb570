"""Forgets users where data change while they are read: in user states, and in fresh answers over a knowledge store.

Servers go on; from the next request on they find nothing of these users. A state notes the SHA-256 of each, and takes
in no event of them any more. LMDB keeps bytes of what was deleted, so that its file is written again without them.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Collection
from functools import partial
from pathlib import Path

import numpy as np

from lumrec.knowledge.answers import FRESH, KIND
from lumrec.knowledge.refresh import digests_of_stored
from lumrec.run.files import read_json, replace_folder, write_atomically
from lumrec.run.key_value import Changes, KeyValue, LmdbKeyValue
from lumrec.run.redis_versions import RedisVersions
from lumrec.run.shared_lmdb import DATA_FILE

STATE, STATE_KIND = "state.json", "state"


def tombstone(digest: str) -> bytes:
    """The key in a user state whose presence says that a user (SHA-256) was forgotten."""
    return b"f" + bytes.fromhex(digest)


def forget_in_folder(path: Path, forgotten: Collection[str]) -> np.ndarray:
    """Digests (S16) of users (SHA-256) whom the user state, or the fresh answers, in a folder held; they are removed.

    Raises Unavailable, and UserError for a damaged state.json.
    """
    search = _Search(forgotten)
    if (path / STATE).exists():
        described = read_json(path / STATE)
        version = str(described.get("version"))
        remove_versions(path, but=version)  # builds that were killed
        store, new = LmdbKeyValue(path / version, create=False), new_version()
        store.update([], lambda _: Changes(put={tombstone(digest): b"" for digest in forgotten}))
        if search.finds(store):
            publish = partial(
                write_atomically, path / STATE, json.dumps({**described, "version": new}, indent=2) + "\n"
            )
            store.move_to(path / new, search.are_gone, publish)
            remove_versions(path, but=new)
    for folder in path.glob(f"{FRESH}*"):
        if (folder / DATA_FILE).exists() and search.finds(store := LmdbKeyValue(folder)):
            new_folder = folder.with_name(f".{folder.name}.without")
            shutil.rmtree(new_folder, ignore_errors=True)
            store.move_to(new_folder, search.are_gone, lambda: None)
            replace_folder(new_folder, folder)
    return search.found


def forget_in_redis(place: str, forgotten: Collection[str]) -> np.ndarray:
    """Digests (S16) of users (SHA-256) whom any version of the knowledge or the user state at a place in a Redis held
    (redis://host:6379/0#name); they are removed. Raises Unavailable.
    """
    search = _Search(forgotten)
    for kind in (KIND, STATE_KIND):
        versions = RedisVersions(place, kind)
        for name in versions.all():
            store = versions.store(name)
            if kind == STATE_KIND:  # first, so that no event comes in behind the search
                store.update([], lambda _: Changes(put={tombstone(digest): b"" for digest in forgotten}))
            for block in store.scan():
                keys = [key for key, _ in block]
                are_gone = search.are_gone(keys, fresh=kind == KIND)
                changes = Changes(delete=[key for key, is_gone in zip(keys, are_gone.tolist()) if is_gone])
                if changes.delete:
                    store.update([], partial(_always, changes))
    return search.found


def _always(changes: Changes, _: list[bytes | None]) -> Changes:
    return changes


class _Search:
    """Looks for users (SHA-256) among the keys of stores. found: digests (S16) of those that it has met."""

    def __init__(self, forgotten: Collection[str]) -> None:
        self._halves = np.array([bytes.fromhex(digest)[:16] for digest in forgotten], "S16")
        self.found = np.zeros(0, "S16")

    def are_gone(self, keys: list[bytes], *, fresh: bool = False) -> np.ndarray:
        """Which of these keys are of one of the users, bool. fresh: an f before a user's key is a fresh answer."""
        users = [key.removeprefix(b"f") if fresh else key for key in keys]
        is_user = np.array([user[:1] in (b"u", b"h") for user in users], bool)
        digest_X = digests_of_stored([user for user, is_one in zip(users, is_user) if is_one])
        is_gone = np.zeros(len(keys), bool)
        is_gone[is_user] = np.isin(digest_X, self._halves)
        self.found = np.union1d(self.found, digest_X[is_gone[is_user]])
        return is_gone

    def finds(self, store: KeyValue) -> bool:
        """Whether a store has a key of one of the users."""
        return any([self.are_gone([key for key, _ in block]).any() for block in store.scan()])


def new_version() -> str:
    """A name for the next version of a user state."""
    return f"{STATE_KIND}-{uuid.uuid4().hex[:12]}"


def remove_versions(path: Path, *, but: str | None) -> None:
    """Removes all versions of the user state in a folder but one."""
    for folder in path.glob(f"{STATE_KIND}-*"):
        if folder.name != but:
            shutil.rmtree(folder)
