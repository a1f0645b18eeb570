"""Forgotten users in the data: kept out of what is prepared, and found in what was prepared before.

`<runs_dir>/forgotten.txt` holds the SHA-256 of each raw user key (see lumrec/knowledge/forget.py). The manifest of
prepared data lists those that were known when it was made; rows of these users are in no file of it.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import polars as pl

from lumrec.data.manifest import read_manifest
from lumrec.data.sources.raw_log import RawLog
from lumrec.run.errors import UserError

FORGOTTEN = "forgotten.txt"
BLANKED = "(a row of a forgotten user)"


def digest(key: str) -> str:
    """SHA-256 of a raw user key, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_forgotten(runs_dir: Path) -> set[str]:
    """SHA-256 of everyone who was forgotten in this runs folder. Raises UserError where the file is damaged."""
    file = runs_dir / FORGOTTEN
    if not file.exists():
        return set()
    lines = file.read_text(encoding="utf-8", errors="replace").split()
    for line in lines:
        if not re.fullmatch("[0-9a-f]{64}", line):
            raise UserError(
                f"{file} is damaged: {line[:80]!r} is no SHA-256 in hexadecimal; restore the file, as nobody in it may "
                "be asked about again"
            )
    return set(lines)


def without_forgotten(raw: RawLog, forgotten: Collection[str]) -> RawLog:
    """The log without the events and catalogue rows of forgotten users."""
    if not forgotten:
        return raw
    frames: dict[str, Any] = {}
    for name in ("events", "users"):
        frame = getattr(raw, name)
        if frame is None:
            continue
        key = pl.col("user_id").cast(pl.String)
        keys = frame.select(key.unique()).collect(engine="streaming")["user_id"].drop_nulls()
        if gone := [one for one in keys if digest(one) in forgotten]:
            frames[name] = frame.filter(key.is_in(gone).fill_null(False).not_())
    # Published files hold known numbers of rows, but not without these users.
    extra = {name: value for name, value in raw.extra.items() if name != "expected"} if frames else raw.extra
    return dataclasses.replace(raw, **frames, extra=extra)


def blank_quarantine(file: Path, forgotten: Collection[str]) -> None:
    """Blanks quarantined rows that name a forgotten user; the row stays, so that the counts are right."""
    frame = pl.read_parquet(file)
    if forgotten and (of_them := [_names_one(text, forgotten) for text in frame["raw"]]):
        raw = pl.when(pl.Series(of_them)).then(pl.lit(BLANKED)).otherwise(pl.col("raw")).alias("raw")
        frame.with_columns(raw).write_parquet(file)


def files_with(folder: Path, forgotten: Collection[str]) -> list[str]:
    """Files of prepared data that hold a forgotten user, "users.parquet (2 users)" each. Raises as `read_manifest`."""
    manifest = read_manifest(folder, verify=False)
    left = set(forgotten) - set(manifest.get("forgotten", []))
    key = manifest["request"].get("data", {}).get("log", {}).get("user")  # may be a feature of any role
    tables = {
        feature.get("table") or name
        for name, feature in manifest["schema"]["features"].items()
        if feature["role"] == "user" or feature.get("column") == key
    }
    columns = {"users.parquet": "user_key"} | {
        name: "key" for name in manifest["files"] if name in {f"vocabulary/{table}.parquet" for table in tables}
    }
    found = {name: _count(pl.read_parquet(folder / name)[column], left) for name, column in columns.items()}
    if "quarantine.parquet" in manifest["files"]:  # which what a server has scored does not have
        raw = pl.read_parquet(folder / "quarantine.parquet")["raw"]
        found["quarantine.parquet"] = sum(_names_one(text, left) for text in raw)
    return [f"{name} ({count})" for name, count in found.items() if count]


def _count(keys: Iterable[Any], forgotten: Collection[str]) -> int:
    return sum(digest(key) in forgotten for key in keys if key is not None) if forgotten else 0


def _names_one(text: str | None, forgotten: Collection[str]) -> bool:
    """Whether a field of a row as it was read is a forgotten key, with any of the usual separators."""
    if not text or not forgotten:
        return False
    fields = {text, *re.split(r'[,;\t|"\s\[\]{}:]+', text)}
    for separator in (",", ";", "\t", "|"):
        fields |= {field for line in csv.reader([text], delimiter=separator) for field in line}
    return any(digest(field.strip()) in forgotten for field in fields)
