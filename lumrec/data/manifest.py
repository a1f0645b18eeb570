"""The manifest of a prepared folder: its contents, how it was made, and the checksum of every file.

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
from lumrec.run.listed_files import file_problem, list_problem, listed, own_hash

FORMAT_VERSION = 4
NAME = "manifest.json"
UNLISTED = (NAME, "result.json", "config.yaml")  # written beside the data; these hold times and paths


class PreparedDataError(UserError):
    """The folder is no usable prepared data set; the message names the file and how to repair it."""


def write_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The manifest as written: `content`, the format version, each file's checksum, the fingerprint and its own hash.

    The fingerprint changes with any byte of the prepared files, the schema or the split.
    """
    files = listed(folder, (path for path in folder.rglob("*") if path.is_file() and path.name not in UNLISTED))
    manifest = {"format_version": FORMAT_VERSION, **content, "files": files}
    identity = {key: manifest[key] for key in ("format_version", "schema", "split", "files")}
    manifest["fingerprint"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    manifest["sha256"] = own_hash(manifest)
    (folder / NAME).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n")
    return manifest


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
    if manifest.get("sha256") != own_hash(manifest):
        raise PreparedDataError(f"{folder / NAME} was changed or damaged: its own hash does not fit. {again}")
    if problem := _malformed(folder, manifest):
        raise PreparedDataError(f"{folder / NAME} is damaged: {problem}. {again}")
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise PreparedDataError(f"{path} is missing, though {NAME} lists it. {again}")
        if problem := file_problem(path, facts, verify=verify):
            raise PreparedDataError(f"{problem}. {again}")
    return manifest


def _malformed(folder: Path, manifest: dict[str, Any]) -> str:
    """What is wrong with the contents of a manifest, in words; "" if nothing is."""
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
    return list_problem(folder, manifest["files"])
