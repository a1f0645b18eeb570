"""The manifest of a knowledge store: the current version, its identity, and its files."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from lumrec.knowledge.checks import files_problem, identity_problem
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import read_json
from lumrec.run.listed_files import file_problem, own_hash

FORMAT = 2
MANIFEST = "manifest.json"
USERS_FILE = "store/data.mdb"
ITEMS_FILE = "items.parquet"
ITEM_FILES = (ITEMS_FILE, "items_e.npy", "items_scale.npy")
# Entries of a manifest that are not part of its version's identity.
FACTS = ("format", "folder", "counts", "built_at", "made_by", "answers_per_s", "files", "sha256")
AGAIN = "run the query stage again with overwrite=true (or import it again)"


def version_name(identity: dict[str, Any]) -> str:
    """The prefix of the folder names of versions with this identity; each build adds its own id."""
    return f"knowledge-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]}"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the current version.

    Raises MissingFileError without one, and UserError if it was changed, has another format, or is no manifest of
    knowledge.
    """
    file = path / MANIFEST
    if not file.exists():
        raise MissingFileError(
            f"there is no knowledge in {path} (no {MANIFEST}); make it with: torchx run apps/query.py "
            "--config <your config>"
        )
    manifest = read_json(file, again=AGAIN)
    if "format" not in manifest or "folder" not in manifest:
        raise UserError(f"{file} is no manifest of a knowledge store: expected the folder of a query run")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{file} has the format {manifest['format']!r}; this version of lumrec reads format {FORMAT}: {AGAIN}"
        )
    if manifest.get("sha256") != own_hash(manifest):
        raise UserError(f"{file} has changed since it was published (it does not match its own SHA-256): {AGAIN}")
    if not re.fullmatch(re.escape(version_name(identity_of(manifest))) + r"-[0-9a-f]+", str(manifest["folder"])):
        raise UserError(
            f"{file} names the folder {manifest['folder']!r}, but its other entries lead to "
            f"{version_name(identity_of(manifest))}-…: {AGAIN}"
        )
    folder = path / str(manifest["folder"])
    if problem := identity_problem(identity_of(manifest)) or files_problem(folder, manifest.get("files")):
        raise UserError(f"{file} is damaged: {problem}; {AGAIN}")
    return manifest


def identity_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The identity of a version, which determines its answers; its folder is named after it."""
    return {name: value for name, value in manifest.items() if name not in FACTS}


def check_files(folder: Path, files: dict[str, dict[str, Any]], *, checksums: bool) -> None:
    """Raises MissingFileError for a missing file, UserError for one cut off or (with `checksums`) changed."""
    for name, facts in files.items():
        file = folder / name
        if not file.exists():
            raise MissingFileError(f"the knowledge lacks {file}; {AGAIN}")
        if problem := file_problem(file, facts, verify=checksums):
            raise UserError(f"{problem}; {AGAIN}")
