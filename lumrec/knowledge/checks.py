"""Checks the files of a knowledge store before they are used, whoever wrote them and their checksums."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lumrec.knowledge.records import DTYPES
from lumrec.run.errors import UserError
from lumrec.run.listed_files import list_problem

MOST = 2**20  # largest number of conditions, of LUMs, and of elements of a vector
_FILE = re.compile(r"\w+\.(npy|parquet)|store/data\.mdb", re.ASCII)


def identity_problem(identity: Any) -> str:
    """What is wrong with the identity of a version, in words; "" if nothing is."""
    if not isinstance(identity, dict):
        return "it does not describe its contents"
    conditions, lums = identity.get("conditions"), identity.get("lums")
    if not (isinstance(conditions, list) and 0 < len(conditions) <= MOST and all(map(_is_condition, conditions))):
        return "its conditions are not features and values"
    if not (isinstance(lums, list) and 0 < len(lums) <= MOST and all(isinstance(lum, dict) for lum in lums)):
        return "its LUMs are not named"
    if type(identity.get("dim")) is not int or not 0 < identity["dim"] <= MOST:
        return f"its dim is {identity.get('dim')!r:.40}"
    if not isinstance(identity.get("dtype"), str) or identity["dtype"] not in DTYPES:
        return f"its dtype is {identity.get('dtype')!r:.40}"
    if any(type(identity.get(name)) is not bool for name in ("rows", "users", "log_normalizer")):
        return "rows, users or log_normalizer is neither true nor false"
    if any(not isinstance(identity.get(name), str) for name in ("hazard", "data_fingerprint")):
        return "its hazard or the fingerprint of its data is not text"
    if type(identity.get("learnt_until", 0)) is not int:
        return "learnt_until is not a time"
    forgotten = identity.get("forgotten", [])
    if not (isinstance(forgotten, list) and all(re.fullmatch("[0-9a-f]{64}", str(digest)) for digest in forgotten)):
        return "its list of forgotten users has entries that are not SHA-256"
    return ""


def _is_condition(condition: Any) -> bool:
    return isinstance(condition, dict) and all(isinstance(value, str) for value in condition.values())


def files_problem(folder: Path, files: Any) -> str:
    """What is wrong with a manifest's list of the version's files, in words; "" if nothing is."""
    if isinstance(files, dict) and (others := [name for name in files if not _FILE.fullmatch(name)]):
        return f"it lists {others[0]!r:.80}, which is not a file of a version"
    return list_problem(folder, files)


def read_array(file: Path, shape: Sequence[int | None], dtype: Any, *, mapped: bool = True) -> np.ndarray:
    """An array from a .npy file, memory-mapped or not; pickled objects are never read. shape: None means any length.

    Raises UserError for another shape or dtype, and for a damaged file.
    """
    try:
        array = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except Exception as error:  # a damaged header can make NumPy's reader raise almost anything
        raise UserError(
            f"{file} is not an array of numbers ({' '.join(str(error).split())[:200]}): it is damaged"
        ) from None
    fits = isinstance(array, np.ndarray) and array.ndim == len(shape)
    if not fits or array.dtype != dtype or any(n not in (None, m) for n, m in zip(shape, array.shape)):
        got = f"{list(array.shape)} of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise UserError(f"{file} holds {got}, expected [{expected}] of {np.dtype(dtype)}: it is damaged")
    return array


def read_row_column(
    folder: Path, manifest: dict[str, Any], column: str, *, num_events: int | None = None
) -> np.ndarray:
    """rows_<column>.npy of a version, memory-mapped: "o", "scale", "present" or "log_z"."""
    vectors = (num_events, len(manifest["conditions"]))
    shape, dtype = {
        "o": ((*vectors, manifest["dim"]), np.dtype(manifest["dtype"]).newbyteorder("<")),
        "scale": (vectors, np.dtype("<f4")),
        "present": (vectors[:1], np.dtype("?")),
        "log_z": (vectors, np.dtype("<f4")),
    }[column]
    return read_array(folder / f"rows_{column}.npy", shape, dtype)
