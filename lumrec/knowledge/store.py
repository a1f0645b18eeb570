"""Knowledge store: LUM answers on disk, for training rows (memory-mapped columns) and for serving (LMDB by user key).

    <run>/manifest.json               names the current version and has its own hash; replaced by one atomic rename
    <run>/knowledge-<identity>-<id>/  one version, never changed after it was published
        rows_o.npy        [E, N, D]   answer to each condition, asked with the history before event row e
        rows_scale.npy    [E, N]      float32, only with dtype int8 (lumrec/knowledge/records.py)
        rows_log_z.npy    [E, N]      log Σ over the catalogue of exp(o · e), float32 (unless switched off)
        rows_present.npy  [E]         bool; False where nothing was asked, and the answer is zeros
        items_e.npy       [K, I, D]   every catalogue item, once for each LUM; with int8, items_scale.npy [K, I]
        items.parquet     [I]         raw key of each item
        user_fold.npy     [U]         int8, index of the LUM that answers for the user
        users.npy         [U]         digests of key and history, event rows: for refreshes and deletions
        store/data.mdb                LMDB: user key -> answers after the user's last event
    <run>/building/                   progress of the next version while it is built (see writer.py)
    <runs_dir>/forgotten.txt          SHA-256 of every user who is never asked about again (lumrec/knowledge/forget.py)

Why LMDB: it is a library, not a server. Many processes read it through one memory map without locks and find an entry
in a few page reads, and a killed build leaves it intact. Arrow and Parquet have no look-up by key.

Shape suffixes: B asked users or rows, E events, U users, I items, N conditions, D width, K LUMs (folds).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lumrec.data.prepared import PreparedData
from lumrec.knowledge.answers import Answers, LmdbAnswers, fetched
from lumrec.knowledge.checks import read_array, read_row_column
from lumrec.knowledge.manifest import AGAIN, ITEM_FILES, ITEMS_FILE, USERS_FILE, check_files, read_manifest
from lumrec.knowledge.records import (
    ABSENT_FOLD,
    bytes_to_records,
    decode,
    decode_records,
    identity_user_dtype,
    records_to_bytes,
    user_key_bytes,
)
from lumrec.modules.knowledge import KnowledgeBatch
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.key_value import is_redis, without_password
from lumrec.run.shared_lmdb import read_only

logger = logging.getLogger(__name__)
Reader = TypeVar("Reader")
TIMEOUT_S = 0.05


class RowKnowledge(NamedTuple):
    """o_BND: float32. log_z_BN: float32, or None where it was not computed. present_BN: bool. fold_B: int64."""

    o_BND: Tensor
    log_z_BN: Tensor | None
    present_BN: Tensor
    fold_B: Tensor


class UserKnowledge(NamedTuple):
    """o_BND: float32. present_BN: bool. age_s_B: float64, seconds since the LUM was asked (NaN where absent).

    log_z_BN: float32 (None where it was not computed). fold_B: int64, index of the LUM that answered (-1 = absent).
    """

    o_BND: Tensor
    present_BN: Tensor
    age_s_B: Tensor
    log_z_BN: Tensor | None
    fold_B: Tensor


def read_items(folder: Path, manifest: dict[str, Any]) -> np.ndarray:
    """Item embeddings of the version in `folder`, decoded, float32 [K, I, D]."""
    return decode(*_mapped_items(folder, manifest))


def _mapped_items(folder: Path, manifest: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    """Values and scale of the item embeddings, memory-mapped."""
    num_lums, dtype = len(manifest["lums"]), np.dtype(manifest["dtype"]).newbyteorder("<")
    values = read_array(folder / "items_e.npy", (num_lums, None, manifest["dim"]), dtype)
    if dtype != np.int8:
        return values, None
    return values, read_array(folder / "items_scale.npy", values.shape[:2], "<f4")


def read_item_keys(folder: Path) -> list[str]:
    """Raw key of each item of the version in `folder`, in the order of its embeddings."""
    return _item_keys_file(folder).read()["item_key"].to_pylist()


def _item_keys_file(folder: Path) -> pq.ParquetFile:
    """The open file of item keys; it can still be read after its version is removed."""
    keys = pq.ParquetFile(pa.OSFile(str(folder / ITEMS_FILE)))
    if keys.schema_arrow.names != ["item_key"] or keys.schema_arrow.field("item_key").type != pa.string():
        raise UserError(f"{folder / ITEMS_FILE} has {keys.schema_arrow.names}, expected item_key of type text; {AGAIN}")
    return keys


def environment(folder: Path) -> lmdb.Environment:
    """The LMDB of the version in `folder`, read-only, shared by the readers of a process."""
    return read_only((folder / USERS_FILE).parent)


def _open_version(
    path: Path, wanted: Callable[[str], bool], verify: bool, make: Callable[[Path, dict[str, Any]], Reader]
) -> Reader:
    """Opens the current version by `make(folder, manifest)`; `wanted` selects the names of the files that it reads."""
    for attempt in (0, 1):
        manifest = read_manifest(path)
        folder = path / manifest["folder"]
        try:
            files = {name: facts for name, facts in manifest["files"].items() if wanted(name)}
            check_files(folder, files, checksums=verify)
            return make(folder, manifest)
        except (OSError, lmdb.Error, pa.ArrowException) as error:
            # A new version may have replaced this one since the manifest was read.
            if attempt or read_manifest(path)["folder"] == manifest["folder"]:
                if isinstance(error, (lmdb.Error, pa.ArrowException)):
                    raise UserError(f"the knowledge in {folder} is damaged ({error}); {AGAIN}") from None
                raise
    raise AssertionError("unreachable")


def _reopen(reader: Callable[..., Reader], folder: Path, *rest: Any) -> Reader:
    """Opens a reader in another process on its version of this process. Raises MissingFileError if that is gone."""
    if not folder.exists():
        raise MissingFileError(
            f"the version {folder} was replaced by a newer one before another process could open it: open the store in "
            "that process, or again in this one"
        )
    return reader(folder, *rest)


def _open_redis(
    reader: type[KnowledgeStore], place: str, version: str | None, *, verify: bool, timeout_s: float
) -> KnowledgeStore:
    """The store at a place in a Redis; version: None is that in force, else it has to be this one."""
    with fetched(place, ITEM_FILES, timeout_s=timeout_s) as (path, answers):
        manifest = read_manifest(path)
        if version not in (None, manifest["folder"]):
            raise MissingFileError(f"the version {version} in {without_password(place)} was replaced: open it again")
        folder = path / manifest["folder"]
        items = {name: facts for name, facts in manifest["files"].items() if name in ITEM_FILES}
        check_files(folder, items, checksums=verify)
        store = reader(folder, manifest, answers=answers)
    again = partial(_open_redis, verify=verify, timeout_s=timeout_s)
    store._reopen = again, (reader, place, manifest["folder"])
    return store


class Knowledge:
    """Answers for training rows, and the items to match them with; memory-mapped, so that only what is used is read.

    o: [E, N, D] in the store's dtype, with scale, float32 [E, N], for int8; log_z: float32 [E, N]; present: bool [E];
    each None where it was switched off. items_e: float32 [K, I, D]; user_fold: int8 [U]. conditions: the N conditions
    asked. hazard: "in_sample" (one LUM, which may have been trained on these rows), "cross_fit" (each user's answers
    come from a LUM that was not trained on that user) or "time_split" (one LUM, trained on the training events until
    the time `learnt_until`, in seconds; rankers train on the rows after it). Similarity is the dot product o · e: both
    vectors already include the model's temperature.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], row_user: np.ndarray) -> None:
        """row_user: int64 [E], the user of each event row."""
        self.path, self.manifest = folder, manifest
        self.conditions: list[dict[str, str]] = manifest["conditions"]
        self.hazard: str = manifest["hazard"]
        self.learnt_until: int | None = manifest.get("learnt_until")
        self.num_conditions, self.dim, self.num_folds = len(self.conditions), manifest["dim"], len(manifest["lums"])
        self.items_e = torch.from_numpy(read_items(folder, manifest))
        num_users = int(row_user.max(initial=-1)) + 1
        self.user_fold: np.ndarray = read_array(folder / "user_fold.npy", (None,), np.int8, mapped=False)
        if len(self.user_fold) < num_users or not (self.user_fold < self.num_folds).all() or (self.user_fold < 0).any():
            raise UserError(f"{folder / 'user_fold.npy'} does not name one of {self.num_folds} LUMs for each user")
        self._row_user = row_user
        columns = {
            column: read_row_column(folder, manifest, column, num_events=len(row_user))
            for column in ("o", "scale", "present", "log_z")
            if f"rows_{column}.npy" in manifest["files"]
        }
        self.o: np.ndarray | None = columns.get("o")
        self.scale: np.ndarray | None = columns.get("scale")
        self.present: np.ndarray | None = columns.get("present")
        self.log_z: np.ndarray | None = columns.get("log_z")

    def __reduce__(self) -> tuple:
        return _reopen, (type(self), self.path, self.manifest, self._row_user)

    @classmethod
    def open(cls, path: str | Path, data: PreparedData, *, verify: bool = True) -> Knowledge:
        """The knowledge published in run folder `path`.

        verify: compare every file's SHA-256 with the manifest's, once, when opening. Sizes are always compared. Raises
        MissingFileError where nothing was published, UserError where it is damaged or made from other data.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if "imported" in manifest:
            raise UserError(
                f"the knowledge in {path} was imported: it has users and items for serving, but no rows to train on; "
                "run the query stage to make them"
            )
        if manifest["data_fingerprint"] != data.fingerprint:
            raise UserError(
                f"the knowledge in {path} was made from other data (fingerprint {manifest['data_fingerprint']}; the "
                f"prepared data in {data.path} has {data.fingerprint}): run the query stage again"
            )
        row_user = data.user
        return _open_version(
            path, lambda name: name != USERS_FILE, verify, lambda folder, manifest: cls(folder, manifest, row_user)
        )

    def for_rows(self, rows_B: Tensor | np.ndarray) -> RowKnowledge:
        """Answers for the event rows `rows_B` (int64, any order, repeats allowed), given the history before them.

        Raises UserError where the knowledge was built without rows (query.rows=false).
        """
        if self.o is None or self.present is None:
            raise UserError(f"the knowledge in {self.path} has no rows: run the query stage with query.rows=true")
        rows = np.asarray(rows_B)
        # Sorted reads touch each page of the file once.
        order = np.argsort(rows, kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        in_order = rows[order]
        scale = None if self.scale is None else self.scale[in_order][back]
        o = torch.from_numpy(decode(self.o[in_order][back], scale))
        present = torch.from_numpy(self.present[in_order][back])
        log_z = None if self.log_z is None else torch.from_numpy(self.log_z[in_order][back])
        fold = torch.from_numpy(self.user_fold[self._row_user[rows]].astype(np.int64))
        return RowKnowledge(o, log_z, present[:, None].expand(-1, self.num_conditions), fold)

    def batch(self, rows_B: np.ndarray, items_B: np.ndarray) -> KnowledgeBatch:
        """A ranker's input for event rows: their answers and the embeddings of the items (int64) to be scored."""
        return _batch(self.for_rows(rows_B), self.items_e, torch.from_numpy(items_B))


class KnowledgeStore:
    """Answers for serving, by raw user key: the LUM's answers after the user's last event.

    In a run folder (LMDB), or in a Redis where lumrec/knowledge/redis_load.py put them. Where a follower answers newer
    events, its answers are given in place of the published ones.

    conditions: the N conditions asked. absent_because: the reason why the store could not be read; "" if it can be, and
    always after `open`. It keeps its version, including items, whatever is published and removed later. Sent to another
    process (such as a worker of a DataLoader), it opens the same version there.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], *, absent_because: str = "", answers: Answers | None = None
    ) -> None:
        self.path, self.manifest, self.absent_because = folder, manifest, absent_because
        self.conditions: list[dict[str, str]] = manifest["conditions"]
        self._with_log_z: bool = manifest["log_normalizer"]
        self._num_folds = len(manifest["lums"])
        self._record = identity_user_dtype(manifest)
        nobody = np.zeros(1, self._record)
        nobody["fold"] = ABSENT_FOLD
        self._nobody = records_to_bytes(nobody)[0]
        self.answers = None if absent_because else answers or LmdbAnswers(folder)
        self._items: tuple[pq.ParquetFile, np.ndarray, np.ndarray | None] | None = None
        if ITEMS_FILE in manifest.get("files", {}):
            self._items = _item_keys_file(folder), *_mapped_items(folder, manifest)
        self._reopen: tuple[Callable[..., KnowledgeStore], tuple] = _reopen, (type(self), folder, manifest)

    def __reduce__(self) -> tuple:
        if self.absent_because:
            return partial(type(self), absent_because=self.absent_because), (self.path, self.manifest)
        return self._reopen

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True, timeout_s: float = TIMEOUT_S) -> KnowledgeStore:
        """The store published in run folder `path`, or loaded into a Redis: redis://localhost:6379/0#name.

        timeout_s: of each look-up in a Redis. Raises like `Knowledge.open`, UserError without users, and
        key_value.Unavailable for a Redis that does not answer.
        """
        if is_redis(path):
            return _open_redis(cls, str(path), None, verify=verify, timeout_s=timeout_s)
        manifest = read_manifest(Path(path))
        if USERS_FILE not in manifest["files"]:
            raise UserError(f"the knowledge in {path} has no users: run the query stage with query.users=true")
        return _open_version(Path(path), lambda name: name in (USERS_FILE, *ITEM_FILES), verify, cls)

    @classmethod
    def open_or_absent(
        cls, path: str | Path, *, num_conditions: int, dim: int, with_log_z: bool = True, verify: bool = True
    ) -> KnowledgeStore:
        """The store in `path`; if it cannot be read, a store in which every user is absent.

        For a server that must answer in any case. num_conditions, dim, with_log_z: what its ranker expects; a store
        with another shape counts as one that cannot be read. The reason is logged as a warning.
        """
        try:
            store = cls.open(path, verify=verify)
            got = (len(store.conditions), store.manifest["dim"], store._with_log_z)
            if got == (num_conditions, dim, with_log_z):
                return store
            reason = f"{path} has (conditions, dim, log_normalizer) {got}, not {(num_conditions, dim, with_log_z)}"
        except (OSError, UserError, lmdb.Error) as error:
            reason = str(error)
        logger.warning("no knowledge, every user is absent: %s", reason)
        shape = {"conditions": [{}] * num_conditions, "dim": dim, "dtype": "float32", "log_normalizer": with_log_z}
        shape["lums"] = [{}]
        return cls(Path(path), shape, absent_because=reason)

    def __len__(self) -> int:
        return 0 if self.answers is None else len(self.answers)

    def get(self, user_keys: Sequence[str]) -> UserKnowledge:
        """Answers for each key, in order; for a user whom the store does not know: zeros, not present, and age NaN.

        Raises UserError for keys that are no text, and for records that are damaged; key_value.Unavailable where the
        store does not answer (`get_or_absent` does not raise then).
        """
        if isinstance(user_keys, (str, bytes)):
            raise UserError(f"expected a list of user keys, got the single key {user_keys!r}: pass [{user_keys!r}]")
        values = [] if self.answers is None else self.answers.get([*map(user_key_bytes, user_keys)])
        return self._knowledge([value or self._nobody for value in values or [self._nobody] * len(user_keys)])

    def get_or_absent(self, user_keys: Sequence[str]) -> tuple[UserKnowledge, str]:
        """What `get` gives and ""; where the store does not answer or is damaged, everybody absent, and why."""
        try:
            return self.get(user_keys), self.absent_because
        except (OSError, lmdb.Error, UserError) as error:
            return self._knowledge([self._nobody] * len(user_keys)), str(error)

    def _knowledge(self, values: Sequence[bytes]) -> UserKnowledge:
        record_B = bytes_to_records(values, self._record)
        present_B = record_B["fold"] != ABSENT_FOLD
        if not ((record_B["fold"] >= ABSENT_FOLD) & (record_B["fold"] < self._num_folds)).all():
            raise UserError(f"the knowledge in {self.path} is damaged: a user's answers belong to no LUM; {AGAIN}")
        return UserKnowledge(
            torch.from_numpy(decode_records(record_B)),
            torch.from_numpy(present_B)[:, None].expand(-1, len(self.conditions)),
            torch.from_numpy(np.where(present_B, time.time() - record_B["asked_at"], np.nan)),
            torch.from_numpy(record_B["log_z"].astype(np.float32)) if self._with_log_z else None,
            torch.from_numpy(record_B["fold"].astype(np.int64)),
        )

    def batch(self, user_keys: Sequence[str], item_keys: Sequence[str]) -> KnowledgeBatch:
        """A ranker's input for (user, item) pairs, by raw keys; pairs with an unknown user or item are absent."""
        row_of, e_KID = self._catalogue
        item_B = torch.tensor([row_of.get(key, -1) for key in item_keys], dtype=torch.int64)
        return _batch(self.get(user_keys), e_KID, item_B)

    @cached_property
    def _catalogue(self) -> tuple[dict[str, int], Tensor]:
        keys, e_KID = self.items()
        return {key: row for row, key in enumerate(keys)}, e_KID

    def items(self) -> tuple[list[str], Tensor]:
        """Raw key of each item, and its embedding by each LUM, e_KID (float32)."""
        keys = self.item_keys()
        assert self._items is not None
        return keys, torch.from_numpy(decode(*self._items[1:]))

    def item_keys(self) -> list[str]:
        """Raw key of each item."""
        if self._items is None:
            raise UserError(f"the knowledge in {self.path} has no items ({self.absent_because or 'an old version'})")
        return self._items[0].read()["item_key"].to_pylist()

    def item_embeddings(self, row_B: np.ndarray, fold_B: np.ndarray) -> Tensor:
        """Embedding of some items, by their index in `items` (-1 is any), each by its LUM, float32 [B, D]. Reads no
        more of the file than these."""
        assert self._items is not None
        _, values, scale = self._items
        return torch.from_numpy(decode(values[fold_B, row_B], None if scale is None else scale[fold_B, row_B]))


def _batch(answers: RowKnowledge | UserKnowledge, e_KID: Tensor, item_B: Tensor) -> KnowledgeBatch:
    """The answers with the embedding of each item by the LUM that answered; index -1 is an unknown item."""
    present_BN = answers.present_BN & (item_B >= 0)[:, None]
    return KnowledgeBatch(answers.o_BND, e_KID[answers.fold_B, item_B], answers.log_z_BN, present_BN, answers.fold_B)
