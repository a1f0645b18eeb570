"""Loads a published knowledge store into a Redis, from where servers of many machines read it.

    python -m lumrec.knowledge.redis_load runs/shop-query redis://cache.internal:6379/0#shop

The users, the files of items and the manifest are copied; rows, which only training reads, stay in the run folder. The
manifest is written last: until then, readers open the version before. That one is kept until the next load, for those
who have it open; older ones, and what a killed load left, are removed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from lumrec.knowledge.answers import KIND, piece_key
from lumrec.knowledge.manifest import ITEM_FILES, MANIFEST, USERS_FILE, check_files, read_manifest
from lumrec.knowledge.records import records_to_bytes
from lumrec.knowledge.refresh import stored_users
from lumrec.run.errors import UserError
from lumrec.run.failures import command_parser, reported
from lumrec.run.logs import start_logging
from lumrec.run.printable import say
from lumrec.run.redis_versions import RedisVersions

logger = logging.getLogger(__name__)
PIECE = 1 << 26


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
    num_users = 0
    manifest_text = (path / MANIFEST).read_text(encoding="utf-8")
    with RedisVersions(place, KIND).writing(manifest["folder"], lambda: manifest_text) as put:
        for keys, record_B in stored_users(folder, manifest):
            put(list(zip(keys, records_to_bytes(record_B), strict=True)))
            num_users += len(keys)
        for name in set(files) & set(ITEM_FILES):
            with open(folder / name, "rb") as file:
                while piece := file.read(PIECE):
                    put([(piece_key(name, file.tell() - len(piece)), piece)])
    return {"version": manifest["folder"], "users": num_users, "wall_s": time.perf_counter() - start}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser("python -m lumrec.knowledge.redis_load", __doc__)
    parser.add_argument("run_folder", type=Path, help="folder of a query run, or of an import")
    parser.add_argument("url", help="redis://host:port/db#name, rediss://… or unix:///path#name")
    given = parser.parse_args(arguments)
    start_logging()
    with reported():
        loaded = load(given.run_folder, given.url)
        say(f"{loaded['users']} users of {loaded['version']} loaded in {loaded['wall_s']:.1f} s")


if __name__ == "__main__":
    main()
