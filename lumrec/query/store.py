"""Knowledge store: LUM's answers on disk, for training rows (memory-mapped columns) and for serving (LMDB by user key).

    <run>/manifest.json               names the version in force; replaced by one atomic rename
    <run>/knowledge-<identity>/       one version, never changed after it was published
        rows_o.npy        [E, N, D]   answer to each condition, asked with the history before event row e
        rows_log_z.npy    [E, N]      log Σ over the catalogue of exp(o · e), float32 (unless switched off)
        rows_present.npy  [E]         bool; False where nothing was asked, and the answer is zeros
        items_e.npy       [K, I, D]   every catalogue item, once for each LUM
        user_fold.npy     [U]         int8, which of the K LUMs answers for the user
        store/data.mdb                LMDB: user key -> answers after the user's last event
    <run>/building/                   the next version, while it is being built (see lumrec/query/writer.py)

Shape suffixes: B asked users or rows, E events, U users, I items, N conditions, D width, K LUMs (folds).
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Sequence

import lmdb
import numpy as np
import torch
from torch import Tensor

from lumrec.train.files import sha256

if TYPE_CHECKING:
    from lumrec.data.prepared import PreparedData

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = ("float16", "float32")
USERS_FILE = "store/data.mdb"
# Of each value in the LMDB: see the first fields of UserAnswer.
HEADER = struct.Struct("<qqqii")


class RowKnowledge(NamedTuple):
    """o_BND: float32. log_z_BN: float32, or None where it was not computed. present_BN: bool. fold_B: int64."""

    o_BND: Tensor
    log_z_BN: Tensor | None
    present_BN: Tensor
    fold_B: Tensor


class UserKnowledge(NamedTuple):
    """o_BND: float32. present_BN: bool. age_s_B: float64, seconds since the LUM was asked (NaN where absent).

    log_z_BN: float32 (None where it was not computed). fold_B: int64, which items_e the answer goes with (-1 absent).
    """

    o_BND: Tensor
    present_BN: Tensor
    age_s_B: Tensor
    log_z_BN: Tensor | None
    fold_B: Tensor


class UserAnswer(NamedTuple):
    """What the LMDB holds for one user.

    asked_at, last_event_at: seconds since 1970. num_events: the user's events when asked; num_seen: how many of them,
    the last ones, the LUM saw. fold: which LUM answered. o_ND: in the store's dtype; log_z_N: float32 or None.
    """

    asked_at: int
    last_event_at: int
    num_events: int
    num_seen: int
    fold: int
    o_ND: np.ndarray
    log_z_N: np.ndarray | None


def pack_answer(answer: UserAnswer) -> bytes:
    """The LMDB value of one user."""
    header = HEADER.pack(*answer[:5])
    log_z = b"" if answer.log_z_N is None else answer.log_z_N.astype("<f4").tobytes()
    return header + answer.o_ND.tobytes() + log_z


def unpack_answer(value: bytes, *, shape: tuple[int, int], dtype: np.dtype, with_log_z: bool) -> UserAnswer:
    """The answer in an LMDB value. Raises ValueError where its size does not fit the manifest's shape and dtype."""
    size = shape[0] * shape[1] * dtype.itemsize
    expected = HEADER.size + size + (4 * shape[0] if with_log_z else 0)
    if len(value) != expected:
        raise ValueError(
            f"the store holds a value of {len(value)} bytes; expected {expected}: build the knowledge anew"
        )
    o_ND = np.frombuffer(value, dtype, shape[0] * shape[1], HEADER.size).reshape(shape)
    log_z_N = np.frombuffer(value, "<f4", shape[0], HEADER.size + size) if with_log_z else None
    asked_at, last_event_at, num_events, num_seen, fold = HEADER.unpack_from(value)
    return UserAnswer(asked_at, last_event_at, num_events, num_seen, fold, o_ND, log_z_N)


def user_key_bytes(key: str) -> bytes:
    """The LMDB key of a raw user key. LMDB takes 1 … 511 bytes, so a very long one is stored by its SHA-256."""
    raw = key.encode()
    return b"u" + raw if len(raw) <= 256 else b"h" + hashlib.sha256(raw).digest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the version in force. Raises FileNotFoundError without one, ValueError for another format."""
    file = path / MANIFEST
    if not file.exists():
        raise FileNotFoundError(
            f"there is no knowledge in {path} (no {MANIFEST}); make it with: torchx run apps/query.py "
            "--config <your config>"
        )
    try:
        manifest = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error}); run the query stage again with overwrite=true") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{file} has the format {manifest.get('format')!r}; this version of lumrec reads format {FORMAT}: run the "
            "query stage again"
        )
    return manifest


def check_files(folder: Path, files: dict[str, dict[str, Any]], *, checksums: bool) -> None:
    """Raises FileNotFoundError for a missing file, ValueError for one cut off or (with `checksums`) changed."""
    for name, facts in files.items():
        file = folder / name
        if not file.exists():
            raise FileNotFoundError(f"the knowledge lacks {file}; run the query stage again with overwrite=true")
        if file.stat().st_size != facts["bytes"]:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes; expected {facts['bytes']}: it was cut off or replaced; run "
                "the query stage again with overwrite=true"
            )
        if checksums and sha256(file) != facts["sha256"]:
            raise ValueError(
                f"{file} has changed since it was published (its SHA-256 differs from the manifest's); run the query "
                "stage again with overwrite=true"
            )


def _open_version(path: Path, names: Sequence[str], verify: bool) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of the version in force; `names` are the files that the caller is going to read."""
    for attempt in (0, 1):
        manifest = read_manifest(path)
        folder = path / manifest["folder"]
        files = {name: facts for name, facts in manifest["files"].items() if name in names}
        try:
            check_files(folder, files, checksums=verify)
            return folder, manifest
        except FileNotFoundError:
            # A new version may have been published, and the old one removed, since the manifest was read.
            if attempt or read_manifest(path)["folder"] == manifest["folder"]:
                raise
    raise AssertionError("unreachable")


class Knowledge:
    """Answers for training rows and the items they are matched with, memory-mapped: nothing is read before it is used.

    o: [E, N, D] in the store's dtype; log_z: float32 [E, N]; present: bool [E]; each None where it was switched off.
    items_e: float32 [K, I, D]; user_fold: int8 [U]. conditions: the N conditions asked. hazard: "in_sample" (one LUM,
    which may have been trained on these rows) or "cross_fit" (each user is answered by a LUM that never saw them).
    Similarity is the dot product o · e: the model's temperature is in both sides already.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], data: PreparedData) -> None:
        self.path, self.manifest = folder, manifest
        self.conditions: list[dict[str, str]] = manifest["conditions"]
        self.hazard: str = manifest["hazard"]
        self.num_conditions, self.dim, self.num_folds = len(self.conditions), manifest["dim"], len(manifest["lums"])
        self.items_e = torch.from_numpy(np.load(folder / "items_e.npy").astype(np.float32))
        self.user_fold: np.ndarray = np.load(folder / "user_fold.npy")
        self._row_user = data.user
        names = {"o": "rows_o.npy", "present": "rows_present.npy", "log_z": "rows_log_z.npy"}
        columns = {
            column: np.load(folder / name, mmap_mode="r") for column, name in names.items() if name in manifest["files"]
        }
        self.o: np.ndarray | None = columns.get("o")
        self.present: np.ndarray | None = columns.get("present")
        self.log_z: np.ndarray | None = columns.get("log_z")

    @classmethod
    def open(cls, path: str | Path, data: PreparedData, *, verify: bool = True) -> Knowledge:
        """The knowledge published in run folder `path`.

        verify: compare every file's SHA-256 with the manifest's, once, at opening. Sizes are always compared.
        Raises FileNotFoundError where nothing was published, ValueError where it is damaged or made from other data.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest["data_fingerprint"] != data.fingerprint:
            raise ValueError(
                f"the knowledge in {path} was made from other data (fingerprint {manifest['data_fingerprint']}; the "
                f"prepared data in {data.path} has {data.fingerprint}): run the query stage again"
            )
        names = [name for name in manifest["files"] if name != USERS_FILE]
        return cls(*_open_version(path, names, verify), data)

    def for_rows(self, rows_B: Tensor | np.ndarray) -> RowKnowledge:
        """Answers that the event rows `rows_B` (int64, any order, repeats allowed) got with the history before them.

        Raises ValueError where the knowledge was built without rows (query.rows=false).
        """
        if self.o is None or self.present is None:
            raise ValueError(f"the knowledge in {self.path} holds no rows: run the query stage with query.rows=true")
        rows = np.asarray(rows_B)
        # Sorted reads touch each page of the file once.
        order = np.argsort(rows, kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        in_order = rows[order]
        o = torch.from_numpy(self.o[in_order][back].astype(np.float32))
        present = torch.from_numpy(self.present[in_order][back])
        log_z = None if self.log_z is None else torch.from_numpy(self.log_z[in_order][back])
        fold = torch.from_numpy(self.user_fold[self._row_user[rows]].astype(np.int64))
        return RowKnowledge(o, log_z, present[:, None].expand(-1, self.num_conditions), fold)


class KnowledgeStore:
    """Answers for serving, by raw user key: what the LUM says after the user's last event."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = folder, manifest
        self.conditions: list[dict[str, str]] = manifest["conditions"]
        self._shape = (len(self.conditions), manifest["dim"])
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._with_log_z = manifest["log_normalizer"]
        # No lock file: a published version never changes, so readers need not know of each other.
        self._env = lmdb.open(str(folder / "store"), readonly=True, lock=False)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> KnowledgeStore:
        """The store published in run folder `path`. Raises like `Knowledge.open`, and ValueError without users."""
        manifest = read_manifest(Path(path))
        if USERS_FILE not in manifest["files"]:
            raise ValueError(f"the knowledge in {path} holds no users: run the query stage with query.users=true")
        return cls(*_open_version(Path(path), [USERS_FILE], verify))

    def __len__(self) -> int:
        return self._env.stat()["entries"]

    def close(self) -> None:
        self._env.close()

    def get(self, user_keys: Sequence[str]) -> UserKnowledge:
        """Answers for each key, in order; a user whom the store does not know reads as zeros, not present, age NaN."""
        num_users, (num_conditions, _) = len(user_keys), self._shape
        o = np.zeros((num_users, *self._shape), np.float32)
        log_z = np.zeros((num_users, num_conditions), np.float32)
        present, age_s = np.zeros(num_users, bool), np.full(num_users, np.nan)
        fold = np.full(num_users, -1, np.int64)
        now = time.time()
        with self._env.begin() as transaction:
            for place, key in enumerate(user_keys):
                value = transaction.get(user_key_bytes(key))
                if value is None:
                    continue
                answer = unpack_answer(value, shape=self._shape, dtype=self._dtype, with_log_z=self._with_log_z)
                o[place], present[place], fold[place] = answer.o_ND, True, answer.fold
                age_s[place] = now - answer.asked_at
                if answer.log_z_N is not None:
                    log_z[place] = answer.log_z_N
        return UserKnowledge(
            torch.from_numpy(o),
            torch.from_numpy(present)[:, None].expand(-1, num_conditions),
            torch.from_numpy(age_s),
            torch.from_numpy(log_z) if self._with_log_z else None,
            torch.from_numpy(fold),
        )
