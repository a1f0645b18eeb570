"""Forgets users permanently: removes them from every knowledge store in a runs folder and never asks about them again.

    python -m lumrec.knowledge.forget runs --keys-file keys.txt       one raw user key per line
    python -m lumrec.knowledge.forget runs 17 4711

First it writes the SHA-256 of each key to <runs>/forgotten.txt; from then on every query run, refresh, import and
prepare in this folder leaves these users out. Then it writes each published version again without them and removes the
old one, so that none of its files has their keys or answers. It also removes unfinished builds and the leftovers of
killed commands. A process that has a store open reads the old version until it opens the store again. It
removes the users from user states and fresh answers at once, and their later events are refused. With --redis
redis://host:6379/0#name (several times if needed) it removes them from a Redis too; a copy that the server keeps on
its disk (RDB, AOF) has to be written again by the server (BGSAVE, BGREWRITEAOF).

Then it searches everything else in the folder (following links) for the users' keys: prepared data, exported Parquet
files, logs, configs. It does not rewrite these, because other models and results were made from them. It lists each
with what to do, and ends with exit code 2 until none is left. With --prepare it prepares data that contain the users
again, from the log that their config names; models and results of these data must then be made again too. If the
command is killed, run it again to complete it.

It searches for the keys of this call: in Parquet files for values, in others (.gz among them) for bytes. Keys of less
than 8 bytes, such as 42, occur anywhere: of these it finds values of Parquet columns named after users. Not searched:
weights of a LUM that was trained on the users, and anything outside the folder.
"""

from __future__ import annotations

import dataclasses
import gzip
import html
import json
import logging
import os
import shutil
import sys
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import markupsafe
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lumrec.data.common import Common
from lumrec.data.forgotten import FORGOTTEN, files_with, read_forgotten
from lumrec.data.forms import text_of
from lumrec.data.prepare import prepare
from lumrec.knowledge.digests import key_digests
from lumrec.knowledge.live_users import STATE, forget_in_folder, forget_in_redis
from lumrec.knowledge.manifest import ITEMS_FILE, MANIFEST, check_files, identity_of, read_manifest
from lumrec.knowledge.records import user_digest
from lumrec.knowledge.refresh import Earlier, digests_of_stored, stored_users, take_over_rows, take_over_users
from lumrec.knowledge.store import read_item_keys, read_items
from lumrec.knowledge.writer import (
    BUILDING,
    IDENTITY,
    KnowledgeWriter,
    full_disk_told,
    in_force,
    remove_others,
    versions,
)
from lumrec.metrics.compare import RANKS, SCORES
from lumrec.run.config_file import stored
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.failures import command_parser, reported
from lumrec.run.files import check_file, leftovers, locked, write_atomically
from lumrec.run.folder import RunFolder
from lumrec.run.key_value import without_password
from lumrec.run.logs import start_logging
from lumrec.run.printable import say

logger = logging.getLogger(__name__)
SEARCHABLE_BYTES = 8
NOT_SEARCHED = (".npy", ".distcp")  # only numbers
BLOCK = 1 << 24


class Incomplete(UserError):
    """Files in the runs folder still contain forgotten users; `removed` is what `forget` would have returned."""

    def __init__(self, message: str, removed: dict[str, int]) -> None:
        super().__init__(message)
        self.removed = removed


def forgotten_among(runs_dir: Path, digest_X: np.ndarray) -> list[str]:
    """SHA-256 (sorted) of the users with these digests (S16) who were forgotten in this runs folder."""
    forgotten = sorted(read_forgotten(runs_dir))
    known = set(digest_X.tolist())
    return [digest for digest, half in zip(forgotten, halves(forgotten).tolist()) if half in known]


def drop_forgotten(index_U: np.ndarray, fold_U: np.ndarray, forgotten: Sequence[str]) -> None:
    """Blanks the entries of forgotten users (SHA-256) in a version's index, in place; their row ranges are kept."""
    gone_U = np.isin(index_U["key"], halves(forgotten))
    index_U["key"][gone_U], index_U["history"][gone_U], fold_U[gone_U] = b"", 0, 0


def forget(
    runs_dir: Path, user_keys: Sequence[str], *, prepare_again: bool = False, redis: Sequence[str] = ()
) -> dict[str, int]:
    """Forgets users in `runs_dir`, and at places in a Redis; returns run name or place → number of users removed. See
    the top of this file.

    user_keys: raw keys; an empty list completes a killed call. Users who were forgotten earlier are removed too.
    prepare_again: prepare data that contain one of them again, in the same folder and from the same log. Keys that are
    in no store are logged as a warning. Raises Incomplete, after everything else is done; it names the stores that are
    being written or cannot be read, and everything else that still contains one of the users.
    """
    if not runs_dir.is_dir():
        raise MissingFileError(f"there is no runs folder {runs_dir}; expected the folder of the query runs")
    digests = {user_digest(key): key for key in user_keys}
    with closing(RunFolder.locked(runs_dir)):
        before = read_forgotten(runs_dir)
        forgotten = before | set(digests)
        write_atomically(runs_dir / FORGOTTEN, "".join(f"{digest}\n" for digest in sorted(forgotten)))
    removed: dict[str, int] = {}
    left: list[str] = []
    held: set[bytes] = set()
    for path in _folders(runs_dir, left):
        try:
            _remove_leftovers(path)
            if _holds_knowledge(path) or (path / STATE).exists():
                found = _forget_in(path, sorted(forgotten))
                removed[os.path.relpath(path, runs_dir)] = len(found)
                held |= set(found.tolist())
        except (UserError, OSError) as error:
            left.append(str(error))
    for place in redis:
        try:
            found = forget_in_redis(place, forgotten)
            removed[without_password(place)] = len(found)
            held |= set(found.tolist())
        except (UserError, OSError) as error:
            left.append(str(error))
    left += _still_named(runs_dir, forgotten, user_keys, prepare_again)
    new = {digest: key for digest, key in digests.items() if digest not in before}
    if nobody := [key for key, half in zip(new.values(), halves([*new]).tolist()) if half not in held]:
        logger.warning("%d of the keys are in no store: %s", len(nobody), ", ".join(map(repr, nobody[:100])))
    if left:
        raise Incomplete(
            f"{len(forgotten)} users are listed in {runs_dir / FORGOTTEN} and will not be asked about again, but some "
            f"files still contain them; correct these and run the same command again: {'; '.join(left)}",
            removed,
        )
    return removed


def _folders(root: Path, left: list[str]) -> list[Path]:
    """`root` and every folder in it, following links, each once; adds folders that cannot be read to `left`."""
    found, seen = [], set()

    def unreadable(error: OSError) -> None:
        left.append(f"{error.filename} cannot be read ({error.strerror})")

    for name, inner, _ in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(name)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner.sort()
        found.append(Path(name))
    return found


def _remove_leftovers(path: Path) -> None:
    """Removes the leftovers of killed commands in a folder: they contain users, and nothing reads them."""
    if not path.exists():  # it was itself such a leftover
        return
    for folder in leftovers(path):
        logger.info("removing %s, which a killed command left", folder)
        shutil.rmtree(folder)
    for folder in path.glob(".*.preparing"):
        try:
            with locked(folder, folder=True):
                shutil.rmtree(folder)
        except BlockingIOError:
            raise UserError(f"{folder} is being written by a prepare stage: wait for it") from None
    (path / ".users.parquet.tmp").unlink(missing_ok=True)


def _holds_knowledge(path: Path) -> bool:
    """Whether a folder contains knowledge, published or unfinished."""
    return bool(versions(path)) or (path / BUILDING / IDENTITY).exists()


def _forget_in(path: Path, forgotten: Sequence[str]) -> np.ndarray:
    """Writes the version published in `path` again without the users, and removes them from a user state and fresh
    answers there; returns the digests (S16) of those it had.
    """
    with closing(RunFolder.locked(path)):
        live = forget_in_folder(path, forgotten)
        published = in_force(path)
        if (path / BUILDING).exists():
            logger.info("%s: dropping an unfinished build", path)
        remove_others(path, published)
        if published is None:
            return live
        manifest = read_manifest(path)
        check_files(published, manifest["files"], checksums=True)
        with full_disk_told(path):
            return np.union1d(live, _rewrite_without(path, manifest, forgotten))


def _rewrite_without(path: Path, manifest: dict[str, Any], forgotten: Sequence[str]) -> np.ndarray:
    folder, identity = path / manifest["folder"], identity_of(manifest)
    if ITEMS_FILE not in manifest["files"] or (identity["rows"] and "users.npy" not in manifest["files"]):
        raise UserError(
            f"the knowledge in {path} was made by an older version of lumrec and does not record the users of its "
            "rows: run its query stage again with overwrite=true"
        )
    earlier = Earlier(folder, manifest)
    index_U, fold_U, wanted = earlier.index_U.copy(), earlier.fold_U.copy(), halves(forgotten)
    with_answer = [digests_of_stored(keys) for keys, _ in stored_users(folder, manifest)] if identity["users"] else []
    stored = np.concatenate([np.zeros(0, "S16"), *with_answer])
    found = np.union1d(np.intersect1d(stored, wanted), np.intersect1d(index_U["key"], wanted))
    if not len(found):
        return found
    drop_forgotten(index_U, fold_U, forgotten)
    now = [digest for digest, half in zip(forgotten, wanted) if half in found]
    items_e = read_items(folder, manifest)
    rows = earlier.column("present")
    writer = KnowledgeWriter(
        path,
        {**identity, "forgotten": sorted({*identity.get("forgotten", []), *now})},
        num_events=0 if rows is None else len(rows),
        num_users=len(index_U),
        num_items=items_e.shape[1],
        max_users=len(stored),
        made_by=manifest["made_by"],
    )
    kept = np.flatnonzero(index_U["key"] != b"")
    for lum in range(len(items_e)):
        writer.write_items(lum, torch.from_numpy(items_e[lum]))
    if identity["rows"]:
        take_over_rows(writer, earlier, kept, index_U["first_row"][kept])
    if identity["users"]:
        take_over_users(writer, earlier, np.setdiff1d(stored, wanted))
    if len(index_U):
        writer.write_user_index(fold_U, index_U)
    writer.write_item_keys(read_item_keys(folder))
    writer.commit("all")
    counts = dict(manifest["counts"])
    if identity["users"]:
        gone = len(np.intersect1d(stored, wanted))
        counts |= {"users": len(stored) - gone, "users_absent": counts.get("users_absent", 0) + gone}
    if identity["rows"]:
        present = writer.columns["rows_present.npy"]
        counts |= {"rows": int(present.sum()), "rows_absent": int((~present).sum())}
    facts = {"counts": counts, "built_at": int(time.time()), "answers_per_s": manifest.get("answers_per_s")}
    writer.publish(facts)
    return found


def halves(digests: Sequence[str]) -> np.ndarray:
    """The first half of each SHA-256, as in a version's index, S16."""
    return np.array([bytes.fromhex(digest)[:16] for digest in digests], "S16")


def _still_named(
    runs_dir: Path, forgotten: Collection[str], user_keys: Sequence[str], prepare_again: bool
) -> list[str]:
    """A sentence for each file in the runs folder that still contains forgotten users."""
    named: list[str] = []
    for path in _folders(runs_dir, []):
        if (path / "users.parquet").exists():
            try:
                if prepare_again and (path / MANIFEST).exists() and files_with(path, forgotten):
                    _prepare_again(path, runs_dir)
                named += _in_users_file(path, forgotten)
            except (UserError, OSError, pa.ArrowException) as error:
                named.append(f"it is unknown whether {path} contains them: {error}")
    for path in _folders(runs_dir, []) if user_keys else []:
        ours = (path / "users.parquet").exists()
        for file in sorted(path.iterdir()):
            if not file.is_file() or _has_only_numbers(file) or (ours and file.suffix == ".parquet"):
                continue
            try:
                count = (_in_parquet if file.suffix == ".parquet" else _in_bytes)(file, user_keys)
            except (OSError, EOFError, zlib.error, pl.exceptions.PolarsError) as error:
                named.append(f"it is unknown whether {file} contains them: {error}")
                continue
            if count:
                named.append(f"{file} ({count} of the keys): remove them from it, or remove the file")
    return named


def _has_only_numbers(file: Path) -> bool:
    """Whether lumrec wrote a file whose users are numbers, which are no keys though some look like them."""
    data, run = file.parent.parent, file.parent
    of_data = run.name in ("events", "negatives") and (data / MANIFEST).exists() and (data / "users.parquet").exists()
    of_run = file.name in (SCORES, RANKS) and (run / "result.json").exists()
    return file.suffix in NOT_SEARCHED or of_data or of_run


def _prepare_again(path: Path, runs_dir: Path) -> None:
    """Prepares the data in `path` again, with the config that they were prepared with."""
    made_with = stored(path / "config.yaml", Common)
    prepare(dataclasses.replace(made_with, runs_dir=str(runs_dir), overwrite=True), path)


def _in_users_file(path: Path, forgotten: Collection[str]) -> list[str]:
    """A sentence if a folder with users.parquet (prepared data or an export) contains forgotten users."""
    if (path / MANIFEST).exists():
        found = files_with(path, forgotten)
        again = "prepare it again with overwrite=true, or add --prepare to this command"
        return [f"{path}: {', '.join(found)}: {again}"] if found else []
    count, wanted = 0, halves(sorted(forgotten))
    for batch in pq.ParquetFile(path / "users.parquet").iter_batches(columns=["user_key"]):
        count += int(np.isin(key_digests(batch["user_key"].drop_null().to_pylist()), wanted).sum())
    return [f"{path / 'users.parquet'} ({count}): export it again, or remove it"] if count else []


def _in_parquet(file: Path, keys: Sequence[str]) -> int:
    """Number of these keys that are values of a Parquet file; short ones only in columns named after users."""
    frame, found = pl.scan_parquet(file), set()
    for name, kind in frame.collect_schema().items():
        wanted = keys if "user" in name.lower() else _searchable(keys)
        forms = {key: key for key in wanted} | {key.encode().hex(): key for key in wanted}
        for text in _texts(pl.col(name), kind):
            same = frame.select(text=text).filter(pl.col("text").is_in(list(forms))).unique()
            found |= {forms[form] for form in same.collect(engine="streaming")["text"]}
    return len(found)


def _texts(value: pl.Expr, kind: pl.DataType) -> Iterator[pl.Expr]:
    """The texts of a column: of numbers too, of bytes in hexadecimal, and of what lists and structs hold."""
    if isinstance(kind, (pl.List, pl.Array)):
        yield from _texts(value.explode(), cast(pl.DataType, kind.inner))
    elif isinstance(kind, pl.Struct):
        for field in kind.fields:
            yield from _texts(value.struct.field(field.name), cast(pl.DataType, field.dtype))
    elif kind.is_numeric() or kind in (pl.String, pl.Categorical, pl.Enum):
        yield text_of(value, kind)
    elif kind == pl.Binary:
        yield value.bin.encode("hex")


def _searchable(keys: Sequence[str]) -> list[str]:
    return [key for key in keys if len(key.encode()) >= SEARCHABLE_BYTES]


def _in_bytes(file: Path, keys: Sequence[str]) -> int:
    """Number of these keys that occur in a file of any kind, as they are or as JSON and HTML spell them."""
    words = {
        text.encode(): key
        for key in _searchable(keys)
        for text in (key, json.dumps(key)[1:-1], html.escape(key), str(markupsafe.escape(key)))
    }
    found: set[str] = set()
    longest = max(map(len, words), default=0)
    with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as opened:
        tail = b""
        while words and (block := opened.read(BLOCK)):
            found |= {key for word, key in words.items() if word in tail + block}
            tail = block[-longest:]
    return len(found)


def read_keys_file(file: Path) -> list[str]:
    """The keys in a file, one per line, without surrounding blanks, blank lines, a byte-order mark and CRLF.

    Raises MissingFileError, and UserError for a file that is not UTF-8, has no key, or has one that contains a carriage
    return or NUL.
    """
    check_file(file, "the keys file", "one raw user key a line")
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}): write it again in that encoding") from None
    if not (keys := [key for line in lines if (key := line.strip())]):
        raise UserError(f"{file} has no key; expected one raw user key per line")
    if bad := [key for key in keys if "\r" in key or "\0" in key]:
        raise UserError(f"{file}: {bad[0][:80]!r} contains a carriage return or NUL; expected one raw key per line")
    return keys


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser("python -m lumrec.knowledge.forget", __doc__)
    parser.add_argument("runs_dir", type=Path, help="folder of the runs, as in runs_dir=")
    parser.add_argument("keys", nargs="*", metavar="KEY", help="raw user keys")
    parser.add_argument("--keys-file", type=Path, help="file with one raw user key per line")
    parser.add_argument("--prepare", action="store_true", help="prepare data that contain the users again without them")
    parser.add_argument("--redis", action="append", default=[], metavar="URL", help="redis://host:6379/0#name")
    given = parser.parse_args(arguments)
    start_logging()
    problem = ""
    with reported():
        keys = [*given.keys, *(read_keys_file(given.keys_file) if given.keys_file else [])]
        try:
            removed = forget(given.runs_dir, keys, prepare_again=given.prepare, redis=given.redis)
        except Incomplete as error:
            problem, removed = str(error), error.removed
    say(f"{len(set(keys))} users listed in {given.runs_dir / FORGOTTEN}; users removed from each store:")
    for name, count in removed.items():
        say(f"  {name}: {count}")
    if problem:
        say(f"lumrec: {problem}", file=sys.stderr)
        sys.exit(2)
    say("Remove them from the log too. A LUM that was trained on them still has what it learned from them.")


if __name__ == "__main__":
    main()
