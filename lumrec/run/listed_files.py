"""The files that a manifest (of prepared data or of knowledge) lists, and the manifest's own hash."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lumrec.run.files import sha256


def listed(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of each file, by its path within `folder`."""
    return {
        file.relative_to(folder).as_posix(): {"sha256": sha256(file), "bytes": file.stat().st_size}
        for file in sorted(files)
    }


def own_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a manifest except its entry "sha256"."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def list_problem(folder: Path, files: Any) -> str:
    """What is wrong with `files` as a result of `listed(folder)`, in words; "" if nothing is. Opens no file."""
    if not isinstance(files, dict):
        return "it lists no files"
    for name, facts in files.items():
        stated = facts if isinstance(facts, dict) else {}
        if type(stated.get("bytes")) is not int or not isinstance(stated.get("sha256"), str):
            return f"it does not state the size and checksum of the file {name!r:.80}"
        if name.startswith("/") or "\0" in name or {"", ".", ".."} & {*name.split("/")}:
            return f"it lists {name!r:.80}, which is not a file in this folder"
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            return f"{name!r:.80} is a link that leads out of the folder"
    return ""


def file_problem(file: Path, facts: Mapping[str, Any], *, verify: bool) -> str:
    """What is wrong with a listed file, as the beginning of a sentence; "" if nothing is.

    verify: compare its SHA-256, not only its size.
    """
    if (size := file.stat().st_size) != facts["bytes"]:
        return f"{file} has {size} bytes, its manifest says {facts['bytes']}: it was cut off or changed"
    if verify and (digest := sha256(file)) != facts["sha256"]:
        return f"{file} was changed or damaged: sha256 {digest[:16]}…, its manifest says {facts['sha256'][:16]}…"
    return ""
