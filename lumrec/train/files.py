"""Files that a kill or a power cut leaves whole: written beside, synced, renamed."""

import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with None in place of NaN and infinities, which JSON cannot hold."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a reader sees the old file or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the entries of a folder (new names, renames) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Deletes a folder so that, killed half-way, it leaves only a hidden `.trash-*` behind."""
    trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
    os.replace(path, trash)
    shutil.rmtree(trash)


def sync_file(path: Path) -> None:
    """Makes the contents of a file survive a power cut."""
    sync_folder(path)


def sha256(path: Path) -> str:
    """Checksum of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
