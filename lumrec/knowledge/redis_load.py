"""Loads a published knowledge store into a Redis, from where servers of many machines read it.

    python -m lumrec.knowledge.redis_load runs/shop-query redis://cache.internal:6379/0#shop

The users, the files of items and the manifest are copied; rows, which only training reads, stay in the run folder. The
manifest is written last: until then, readers open the version before. That one is kept until the next load, for those
who have it open; older ones, and what a killed load left, are removed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lumrec.knowledge.answers import MANIFEST, MANIFEST_KEY, piece_key
from lumrec.knowledge.manifest import ITEM_FILES, USERS_FILE, check_files, read_manifest
from lumrec.knowledge.records import records_to_bytes
from lumrec.knowledge.refresh import stored_users
from lumrec.run.errors import UserError
from lumrec.run.failures import reported
from lumrec.run.key_value import RedisKeyValue
from lumrec.run.logs import start_logging
from lumrec.run.printable import say

logger = logging.getLogger(__name__)
PIECE = 1 << 26
LOCK_S = 60.0


def load(path: Path, place: str) -> dict[str, float | str]:
    """Copies the version published in run folder `path` to a place in a Redis (redis://host:6379/0#name).

    Returns its name, the users, and how long it took. Raises MissingFileError where nothing is published, UserError for
    a damaged version, one without users, and while another process loads to the same place, Unavailable where the
    Redis does not answer.
    """
    start = time.perf_counter()
    manifest = read_manifest(path)
    folder = path / manifest["folder"]
    if USERS_FILE not in manifest["files"]:
        raise UserError(f"the knowledge in {path} holds no users: run the query stage with query.users=true")
    files = {name: facts for name, facts in manifest["files"].items() if name in (USERS_FILE, *ITEM_FILES)}
    check_files(folder, files, checksums=True)
    names = RedisKeyValue(place)
    version = RedisKeyValue(place, prefix=f"{manifest['folder']}:")
    versions_key, manifest_key = names.prefix + b"versions", names.prefix + MANIFEST_KEY
    with names.errors(), _locked(names) as lock:
        before = names.client.get(names.prefix + b"version")
        names.client.sadd(versions_key, manifest["folder"])
        num_users = 0
        for keys, record_B in stored_users(folder, manifest):
            version.put(list(zip(keys, records_to_bytes(record_B), strict=True)))
            num_users += len(keys)
            lock.reacquire()
        for name in set(files) & set(ITEM_FILES):
            with open(folder / name, "rb") as file:
                while piece := file.read(PIECE):
                    version.put([(piece_key(name, file.tell() - len(piece)), piece)])
                    lock.reacquire()
        names.client.mset({manifest_key: (path / MANIFEST).read_bytes(), names.prefix + b"version": manifest["folder"]})
        for each in names.client.smembers(versions_key) - {manifest["folder"].encode(), before}:
            RedisKeyValue(place, prefix=f"{each.decode()}:").remove()
            names.client.srem(versions_key, each)
    return {"version": manifest["folder"], "users": num_users, "wall_s": time.perf_counter() - start}


@contextlib.contextmanager
def _locked(names: RedisKeyValue) -> Iterator[Any]:
    """A lock in the Redis, which ends by itself some time after a kill. Raises UserError where another has it."""
    lock = names.client.lock(names.prefix + b"loading", timeout=LOCK_S, blocking=False)
    if not lock.acquire():
        raise UserError(f"{names.place}: another process loads knowledge there, or was killed: try again in a minute")
    try:
        yield lock
    finally:
        lock.release()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lumrec.knowledge.redis_load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", type=Path, help="folder of a query run, or of an import")
    parser.add_argument("url", help="redis://host:port/db#name, rediss://… or unix:///path#name")
    given = parser.parse_args(arguments)
    start_logging()
    with reported():
        loaded = load(given.run_folder, given.url)
        say(f"{loaded['users']} users of {loaded['version']} loaded in {loaded['wall_s']:.1f} s")


if __name__ == "__main__":
    main()
