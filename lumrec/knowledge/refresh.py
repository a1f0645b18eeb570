"""Takes over the answers of users whose history has not changed, so that only the other users are asked.

    earlier    a: 3 events    b: 2 events    c: 5 events
    data now   a: 3 events    c: 6 events    d: 1 event      a is taken over, c and d are asked, b is removed

A history has changed if its digest has. The digest covers everything that the LUM reads (lumrec/knowledge/digests.py),
so it also detects late and corrected events. Everything else that determines an answer must be the same. log_z is taken
over if the items are bit for bit the same; otherwise it is computed again from the stored answers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumrec.data.columns import expand_ranges
from lumrec.knowledge.checks import read_array, read_row_column
from lumrec.knowledge.digests import USER_INDEX
from lumrec.knowledge.log_normalizer import log_normalizer
from lumrec.knowledge.manifest import MANIFEST, check_files, identity_of, read_manifest
from lumrec.knowledge.records import bytes_to_records, decode, decode_records, identity_user_dtype
from lumrec.knowledge.store import environment, read_items
from lumrec.knowledge.writer import KnowledgeWriter
from lumrec.run.changes import differing
from lumrec.run.errors import UserError

logger = logging.getLogger(__name__)
# Parts of the identity that may differ between two versions when one takes over answers from the other.
MAY_DIFFER = ("data_fingerprint", "forgotten")
BLOCK = 1 << 15


class Earlier:
    """A published version to take answers over from. index_U: its USER_INDEX (empty if imported). fold_U: folds."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.index_U, self.fold_U = np.zeros(0, USER_INDEX), np.zeros(0, np.int8)
        if "users.npy" in manifest["files"]:
            self.index_U = read_array(folder / "users.npy", (None,), USER_INDEX, mapped=False)
            self.fold_U = read_array(folder / "user_fold.npy", (len(self.index_U),), np.int8, mapped=False)
        self._check_rows()

    def _check_rows(self) -> None:
        first_U, length_U, present = self.index_U["first_row"], self.index_U["num_events"], self.column("present")
        if (first_U < 0).any() or (length_U < 0).any():
            raise UserError(f"{self.folder / 'users.npy'} is damaged: a user has rows before the first")
        if present is not None and len(first_U) and (first_U + length_U).max() > len(present):
            raise UserError(f"{self.folder / 'users.npy'} is damaged: a user has rows after the last, {len(present):,}")

    def column(self, name: str) -> np.ndarray | None:
        """A column of the rows ("o", "scale", "present", "log_z"), memory-mapped; None if there is none."""
        file = f"rows_{name}.npy"
        return read_row_column(self.folder, self.manifest, name) if file in self.manifest["files"] else None

    def find(self, key_U: np.ndarray) -> np.ndarray:
        """Each user's index in this version, by the digest of the key (S16), int64 [U]; -1 = not in it."""
        if len(self.index_U) == 0:
            return np.full(len(key_U), -1)
        order = np.argsort(self.index_U["key"], kind="stable")
        found_U = order[np.searchsorted(self.index_U["key"], key_U, sorter=order).clip(max=len(order) - 1)]
        return np.where((self.index_U["key"][found_U] == key_U) & (key_U != b""), found_U, -1)


def stored_users(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[list[bytes], np.ndarray]]:
    """LMDB keys and records of the users of a version, in blocks, by key."""
    record = identity_user_dtype(manifest)
    with environment(folder).begin() as transaction:
        entries = iter(transaction.cursor())
        while block := list(islice(entries, BLOCK)):
            yield [key for key, _ in block], bytes_to_records([value for _, value in block], record)


def find_earlier(path: Path, identity: dict[str, Any], *, required: bool, made_by: str | None = None) -> Earlier | None:
    """The version published in run folder `path`, if a version with `identity` can take over its answers.

    If not, logs the reason and returns None; with `required`, raises UserError, and MissingFileError where nothing is
    published. made_by: id of the run that must have made the version; one that overwrite=true replaces does not count.
    """
    if not (path / MANIFEST).exists() and not required:
        return None
    try:
        manifest = read_manifest(path)
        if made_by not in (None, manifest["made_by"]):
            return None
        differences = [each for each in differing(identity_of(manifest), identity) if each[0] not in MAY_DIFFER]
        if differences:
            name, old, new = differences[0]
            raise UserError(
                f"the knowledge in {path} was made with other settings or LUMs: {name} is {old!r} there, {new!r} here "
                f"(they differ in: {', '.join(name for name, _, _ in differences)})"
            )
        if "users.npy" not in manifest["files"]:
            raise UserError(f"the knowledge in {path} has no index of its users (users.npy): build it again once")
        check_files(path / manifest["folder"], manifest["files"], checksums=True)
    except UserError as error:
        if required:
            raise
        logger.info("no answers are taken over: %s", error)
        return None
    return Earlier(path / manifest["folder"], manifest)


def take_over(
    writer: KnowledgeWriter, earlier: Earlier, lum: int, earlier_U: np.ndarray, first_row_U: np.ndarray, e_ID: Tensor
) -> None:
    """Writes the answers of the users at the indices `earlier_U` of `earlier` into the new version.

    lum: index of the LUM that answered all of them. first_row_U: first event row of each user in the new version. e_ID:
    the LUM's items as readers will see them.
    """
    items = None if np.array_equal(read_items(earlier.folder, earlier.manifest)[lum], e_ID.numpy()) else e_ID
    if items is not None and writer.identity["log_normalizer"]:
        logger.info("the items have changed: log_z of the answers that are taken over is computed again")
    if writer.identity["rows"]:
        take_over_rows(writer, earlier, earlier_U, first_row_U, e_ID=items)
    if writer.identity["users"]:
        take_over_users(writer, earlier, earlier.index_U["key"][earlier_U], e_ID=items)


def take_over_rows(
    writer: KnowledgeWriter,
    earlier: Earlier,
    earlier_U: np.ndarray,
    first_row_U: np.ndarray,
    *,
    e_ID: Tensor | None = None,
) -> None:
    """`take_over` for rows. e_ID: items to compute log_z from; None = log_z is taken over too."""
    length_U = torch.from_numpy(earlier.index_U["num_events"][earlier_U])
    old_R = expand_ranges(torch.from_numpy(earlier.index_U["first_row"][earlier_U]), length_U).numpy()
    new_R = expand_ranges(torch.from_numpy(first_row_U), length_U).numpy()
    for start in range(0, len(old_R), BLOCK):
        part = slice(start, start + BLOCK)
        _take_rows(writer, earlier, old_R[part], new_R[part], e_ID)


def take_over_users(
    writer: KnowledgeWriter, earlier: Earlier, digest_X: np.ndarray, *, e_ID: Tensor | None = None
) -> None:
    """`take_over` for serving, of the users with these digests (S16)."""
    digest_X = np.sort(digest_X)
    for keys, record_B in stored_users(earlier.folder, earlier.manifest):
        chosen = _isin(digests_of_stored(keys), digest_X)
        record_B = record_B[chosen].copy()
        if e_ID is not None and writer.identity["log_normalizer"]:
            record_B["log_z"] = _log_z(decode_records(record_B), e_ID).numpy()
        writer.write_users([key for key, is_chosen in zip(keys, chosen) if is_chosen], record_B)


def _take_rows(
    writer: KnowledgeWriter, earlier: Earlier, old_R: np.ndarray, new_R: np.ndarray, e_ID: Tensor | None
) -> None:
    """Writes the earlier rows `old_R` as rows `new_R`; e_ID as in `take_over_rows`."""
    present = earlier.column("present")
    stored, scale, log_z = (earlier.column(name) for name in ("o", "scale", "log_z"))
    assert present is not None and stored is not None
    asked_R = present[old_R]
    old_R, new_R = old_R[asked_R], new_R[asked_R]
    o_RND = torch.from_numpy(decode(stored[old_R], None if scale is None else scale[old_R]))
    log_z_RN = None
    if log_z is not None:
        log_z_RN = torch.from_numpy(log_z[old_R]) if e_ID is None else _log_z(o_RND.numpy(), e_ID)
    writer.write_rows(new_R, o_RND, log_z_RN)


def _log_z(o_BND: np.ndarray, e_ID: Tensor) -> Tensor:
    return log_normalizer(torch.from_numpy(o_BND).flatten(0, 1), e_ID).view(o_BND.shape[:2])


def digests_of_stored(keys: list[bytes]) -> np.ndarray:
    """The digests (S16, see digests.py) of users from their LMDB keys (see `user_key_bytes`)."""
    return np.array([key[1:17] if key[:1] == b"h" else sha256(key[1:]).digest()[:16] for key in keys], "S16")


def _isin(digest_B: np.ndarray, sorted_X: np.ndarray) -> np.ndarray:
    if len(sorted_X) == 0:
        return np.zeros(len(digest_B), bool)
    return sorted_X[np.searchsorted(sorted_X, digest_B).clip(max=len(sorted_X) - 1)] == digest_B
