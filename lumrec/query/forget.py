"""Forgets users for good: out of every knowledge store under a runs folder, and never asked again.

    python -m lumrec.query.forget runs --keys-file keys.txt       one raw user key a line
    python -m lumrec.query.forget runs 17 4711

First the SHA-256 of each key goes into <runs>/forgotten.txt; from then on no query run or refresh in this folder asks
the LUM about these users, whatever data it reads. Then each published version is written anew without them, and the old
one removed, so that neither their keys nor their answers are in any file of it; unfinished builds are dropped. A run of
this command that was killed is completed by the same command. Who had a store open reads the old version until they
open it again. Not touched, since other stages own them: the log, the prepared data (prepare it again without these
users), what was exported, and the weights of a LUM that was trained on them.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch

from lumrec.errors import MissingFileError, UserError
from lumrec.printable import say
from lumrec.query.records import user_digest
from lumrec.query.refresh import Earlier, digests_of_stored, stored_users, take_over_rows, take_over_users
from lumrec.query.store import ITEMS_FILE, MANIFEST, check_files, identity_of, read_item_keys, read_items, read_manifest
from lumrec.query.writer import BUILDING, IDENTITY, KnowledgeWriter, full_disk_told
from lumrec.stages import start_logging
from lumrec.train.files import remove_folder, write_atomically
from lumrec.train.run import RunFolder

logger = logging.getLogger(__name__)
FORGOTTEN = "forgotten.txt"


def forgotten_among(runs_dir: Path, digest_X: np.ndarray) -> list[str]:
    """SHA-256 (sorted) of those among the users with these digests (S16) who were forgotten in this runs folder."""
    forgotten = sorted(_read_forgotten(runs_dir))
    known = set(digest_X.tolist())
    return [digest for digest, half in zip(forgotten, halves(forgotten).tolist()) if half in known]


def drop_forgotten(index_U: np.ndarray, fold_U: np.ndarray, forgotten: Sequence[str]) -> None:
    """Blanks the entries of forgotten users (SHA-256) in a version's index, in place; where their rows were is left."""
    gone_U = np.isin(index_U["key"], halves(forgotten))
    index_U["key"][gone_U], index_U["history"][gone_U], fold_U[gone_U] = b"", 0, 0


def forget(runs_dir: Path, user_keys: Sequence[str]) -> dict[str, int]:
    """Users removed from each knowledge store under `runs_dir`, by the run's name; see the top of this file.

    user_keys: raw keys; none at all completes what a killed call left. Everyone who was forgotten before is looked for
    too. Raises UserError, after all other stores are done, for those that are being written or cannot be read.
    """
    if not runs_dir.is_dir():
        raise MissingFileError(f"there is no runs folder {runs_dir}; name the one that holds the query runs")
    lock = RunFolder.locked(runs_dir)
    try:
        forgotten = _read_forgotten(runs_dir) | set(map(user_digest, user_keys))
        write_atomically(runs_dir / FORGOTTEN, "".join(f"{digest}\n" for digest in sorted(forgotten)))
    finally:
        lock.close()
    removed, problems = {}, []
    for path in _stores(runs_dir):
        try:
            removed[str(path.relative_to(runs_dir))] = _forget_in(path, sorted(forgotten))
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            "the users are noted and will not be asked again, but some knowledge could not be written anew without "
            f"them; mend it and say the same again: {'; '.join(problems)}"
        )
    return removed


def _stores(runs_dir: Path) -> list[Path]:
    """Run folders that hold knowledge, published or unfinished."""
    published = (file.parent for file in runs_dir.rglob(MANIFEST) if (file.parent / "config.yaml").exists())
    imported = (file.parent.parent for file in runs_dir.rglob("knowledge-*/store"))
    unfinished = (file.parent.parent for file in runs_dir.rglob(f"{BUILDING}/{IDENTITY}"))
    holds = {path for path in published if "lums" in json.loads((path / MANIFEST).read_text())}
    return sorted(holds | set(imported) | set(unfinished))


def _forget_in(path: Path, forgotten: Sequence[str]) -> int:
    """Number of users whom the version published in `path` held; it is written anew where there is one."""
    run = RunFolder.locked(path)
    try:
        if (path / BUILDING).exists():
            logger.info("%s: dropping an unfinished build", path)
            remove_folder(path / BUILDING)
        for trash in path.glob(".trash-*"):  # what a killed removal of an old version left
            shutil.rmtree(trash)
        if not (path / MANIFEST).exists():
            return 0
        manifest = read_manifest(path)
        check_files(path / manifest["folder"], manifest["files"], checksums=True)
        with full_disk_told(path):
            return _rewrite_without(path, manifest, forgotten)
    finally:
        run.close()


def _rewrite_without(path: Path, manifest: dict[str, Any], forgotten: Sequence[str]) -> int:
    folder, identity = path / manifest["folder"], identity_of(manifest)
    if ITEMS_FILE not in manifest["files"] or (identity["rows"] and "users.npy" not in manifest["files"]):
        raise UserError(
            f"the knowledge in {path} was made by an older version of lumrec, and does not say whose its rows are: run "
            "its query stage again with overwrite=true"
        )
    earlier = Earlier(folder, manifest)
    index_U, fold_U, wanted = earlier.index_U.copy(), earlier.fold_U.copy(), halves(forgotten)
    with_answer = [digests_of_stored(keys) for keys, _ in stored_users(folder, manifest)] if identity["users"] else []
    stored = np.concatenate([np.zeros(0, "S16"), *with_answer])
    found = np.union1d(np.intersect1d(stored, wanted), np.intersect1d(index_U["key"], wanted))
    if not len(found):
        return 0
    drop_forgotten(index_U, fold_U, forgotten)
    now = [digest for digest, half in zip(forgotten, wanted) if half in found]
    items_e = read_items(folder)
    rows = earlier.column("rows_present.npy")
    writer = KnowledgeWriter(
        path,
        {**identity, "forgotten": sorted({*identity.get("forgotten", []), *now})},
        num_events=0 if rows is None else len(rows),
        num_users=len(index_U),
        num_items=items_e.shape[1],
        max_users=len(stored),
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
    writer.publish({"counts": counts, "built_at": int(time.time())})
    return len(found)


def halves(digests: Sequence[str]) -> np.ndarray:
    """What a version's index holds of each SHA-256, S16."""
    return np.array([bytes.fromhex(digest)[:16] for digest in digests], "S16")


def _read_forgotten(runs_dir: Path) -> set[str]:
    file = runs_dir / FORGOTTEN
    return set(file.read_text().split()) if file.exists() else set()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lumrec.query.forget", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs_dir", type=Path, help="folder of the runs, as in runs_dir=")
    parser.add_argument("keys", nargs="*", metavar="KEY", help="raw user keys")
    parser.add_argument("--keys-file", type=Path, help="file with one raw user key a line")
    given = parser.parse_args(arguments)
    start_logging()
    try:
        keys = [*given.keys, *(given.keys_file.read_text(encoding="utf-8").splitlines() if given.keys_file else [])]
        removed = forget(given.runs_dir, keys)
    except (ValueError, FileNotFoundError) as error:
        say(f"lumrec: {error}", file=sys.stderr)
        sys.exit(2)
    say(f"{len(keys)} users noted in {given.runs_dir / FORGOTTEN}; users removed from each store:")
    for name, count in removed.items():
        say(f"  {name}: {count}")
    say("Remove them from the log and prepare it again; a LUM that was trained on them keeps what it learned of them.")


if __name__ == "__main__":
    main()
