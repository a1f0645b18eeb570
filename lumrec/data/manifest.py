"""The manifest of a prepared folder: what is in it, how it was made, and the checksum of every file.

It holds no times, paths or host names, so that preparing the same log twice gives the same bytes. It is written last:
a folder without it is not a prepared folder.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import sha256

FORMAT_VERSION = 3
NAME = "manifest.json"
UNLISTED = (NAME, "result.json", "config.yaml")  # written beside the data; these hold times and paths


class PreparedDataError(UserError):
    """The folder is no usable prepared data set; the message names the file and how to mend it."""


def write_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The manifest as written: `content`, the format version, each file's checksum, the fingerprint and its own hash.

    The fingerprint changes with any byte of the prepared files, the schema or the split.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNLISTED)
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths
    }
    manifest = {"format_version": FORMAT_VERSION, **content, "files": files}
    identity = {key: manifest[key] for key in ("format_version", "schema", "split", "files")}
    manifest["fingerprint"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    manifest["sha256"] = _hash(manifest)
    (folder / NAME).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n")
    return manifest


def _hash(manifest: dict[str, Any]) -> str:
    """SHA-256 of all that a manifest says but the hash itself."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path, *, verify: bool = True) -> dict[str, Any]:
    """The manifest of a prepared folder whose files are there, of the size written and (`verify`) the same checksum.

    Raises MissingFileError where the folder is missing, PreparedDataError for everything else that is wrong with it.
    """
    if not folder.is_dir():
        raise MissingFileError(
            f"no prepared data at {folder}. Make it: torchx run apps/prepare.py --config <your YAML> "
            + shlex.join([f"runs_dir={folder.parent}", f"run={folder.name}"])
        )
    again = "Prepare it again: apps/prepare.py with overwrite=true."
    if not (folder / NAME).is_file():
        raise PreparedDataError(f"{folder} has no {NAME}: it is no prepared folder, or was cut while copied. {again}")
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # ValueError: not JSON, or not text
        raise PreparedDataError(f"{folder / NAME} cannot be read ({error!r}). {again}") from None
    if version != FORMAT_VERSION:
        raise PreparedDataError(
            f"{folder / NAME}: format version {version!r}; this lumrec reads version {FORMAT_VERSION}. {again}"
        )
    if manifest.get("sha256") != _hash(manifest):
        raise PreparedDataError(f"{folder / NAME} was changed or damaged: its own hash does not fit. {again}")
    if problem := _malformed(folder, manifest):
        raise PreparedDataError(f"{folder / NAME} is damaged: {problem}. {again}")
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise PreparedDataError(f"{path} is missing, though {NAME} lists it. {again}")
        if (size := path.stat().st_size) != facts["bytes"]:
            raise PreparedDataError(f"{path} has {size} bytes, {NAME} says {facts['bytes']}: cut or changed. {again}")
        if verify and (digest := sha256(path)) != facts["sha256"]:
            raise PreparedDataError(
                f"{path} was changed or damaged: sha256 {digest[:16]}…, {NAME} says {facts['sha256'][:16]}…. {again}"
            )
    return manifest


def _malformed(folder: Path, manifest: dict[str, Any]) -> str:
    """What no manifest says that `write_manifest` wrote, in words; "" where there is nothing."""
    kinds = {
        "schema": dict,
        "split": dict,
        "files": dict,
        "table_rows": dict,
        "fingerprint": str,
        "absolute_time": bool,
    }
    for name, kind in kinds.items():
        if type(manifest.get(name)) is not kind:
            return f"it lacks {name}, or has another kind of value there"
    if not all(type(rows) is int and 0 < rows < 2**62 for rows in manifest["table_rows"].values()):
        return "a table has no number of rows"
    for name, facts in manifest["files"].items():
        if not isinstance(facts, dict) or not (
            type(facts.get("bytes")) is int and isinstance(facts.get("sha256"), str)
        ):
            return f"of the file {name!r:.80} it does not say the size and checksum"
        if name.startswith("/") or "\0" in name or {"", ".", ".."} & {*name.split("/")}:
            return f"it lists {name!r:.80}, which is no file in this folder"
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            return f"{name!r:.80} is a link that leads out of the folder"
    return ""
