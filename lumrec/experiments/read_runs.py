"""Finds and reads run folders without trusting their contents.

No link is followed, only small regular files are opened, and their contents are only displayed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from lumrec.data.common import MOST_NESTED
from lumrec.experiments.config import Config, load
from lumrec.run.changes import changes
from lumrec.run.config_file import as_text
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.printable import printable
from lumrec.run.typed_yaml import field_types, parse, plain
from lumrec.stages.registry import STAGES

MOST_BYTES = 1 << 18  # of a file; those of real runs have about ten thousand
MOST_FOLDERS = 20_000
LONGEST = 300  # characters of a text that are shown
COMPARED = ("rank", "pretrain", "retrieve")  # stages whose results are metrics of a model
NO_RUNS = ("checkpoints", "tensorboard", "logs", "events", "vocabulary", "negatives")  # folders in a run's folder


class LeftOut(NamedTuple):
    """A run that is in no table. name: its path below the folder of runs. why: the reason."""

    name: str
    why: str


def short(text: object) -> str:
    """The text as one printable line, cut off if it is long."""
    shown = printable(text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


@dataclass(frozen=True)
class StoredRun:
    """A finished run. name: its path below the folder of runs. inputs: fingerprints of the data and models it read.

    changed: dotted key → value as text, of the stage's settings that differ from their defaults. data, split: in words.
    """

    name: str
    stage: str
    result: Mapping[str, Any]
    versions: Mapping[str, Any]
    inputs: Mapping[str, str]
    changed: Mapping[str, str]
    data: str
    split: str
    seed: str
    fold: str

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the prepared data; "" where it is not known."""
        return self.inputs.get("data") or self.inputs.get("prepared") or ""

    @property
    def commit(self) -> str:
        return short(self.versions.get("commit") or "unknown")

    @property
    def started(self) -> str:
        return short(self.versions.get("started") or "unknown")

    def number(self, name: str) -> float | None:
        """The result's value if it is a finite number, otherwise None."""
        value = self.result.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]
        except OverflowError:  # an integer beyond every float
            return None


def read_runs(runs_dir: Path) -> tuple[list[StoredRun], list[LeftOut]]:
    """The finished rankers, LUMs and towers below a folder; and the runs that were not read, with the reason.

    Raises MissingFileError where there is no such folder.
    """
    if not runs_dir.is_dir():
        raise MissingFileError(f"there is no folder {runs_dir}; expected the folder of the runs, such as runs")
    runs, left_out = [], []
    for folder, why in _folders(runs_dir):
        name = str(folder.relative_to(runs_dir))
        try:
            if why:
                raise UserError(why)
            if run := read_run(folder, name):
                runs.append(run)
        except UserError as error:
            left_out.append(LeftOut(short(name), short(error)))
    return runs, left_out


def _folders(runs_dir: Path) -> Iterator[tuple[Path, str]]:
    """(folder, "") for each run, and (folder, reason) for each folder that is not read."""
    errors: list[OSError] = []
    for number, (path, names, files) in enumerate(os.walk(runs_dir, onerror=errors.append)):
        folder = Path(path)
        if number >= MOST_FOLDERS:
            yield folder, f"is not read, nor any folder after it: there are over {MOST_FOLDERS:,} folders"
            return
        depth = len(folder.relative_to(runs_dir).parts)
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in NO_RUNS)
        for name in names:
            if (folder / name).is_symlink():
                yield folder / name, "is a link, which is not followed: run this again on the folder it leads to"
        if "versions.json" in files and depth:
            yield folder, ""
            names.clear()  # a run contains no other run
        elif "manifest.json" in files:  # prepared data
            names.clear()
        elif depth >= MOST_NESTED:
            names.clear()
        elif depth and "config.yaml" in files and not names:
            yield folder, "has no versions.json: it is no run folder, or was interrupted when it was made"
    yield from ((Path(error.filename), f"cannot be read ({error.strerror})") for error in errors)


def read_run(folder: Path, name: str) -> StoredRun | None:
    """The finished run in a folder; None for a finished run of a stage without metrics of a model.

    Raises UserError with the reason for a run that is unfinished or cannot be read.
    """
    versions = _json(folder / "versions.json")
    stage = str(versions.get("stage"))
    if stage not in STAGES:
        raise UserError("its versions.json names no stage: it is from an earlier version of lumrec, or not from lumrec")
    config = parse(_content(folder / "config.yaml"), "config.yaml")
    if not isinstance(config, Mapping):
        raise UserError("config.yaml holds no settings")
    if not os.path.lexists(folder / "result.json"):
        raise UserError(_unfinished(folder))
    result = _json(folder / "result.json")
    if stage not in COMPARED:
        return None
    try:
        inputs = _json(folder / "inputs.json")
    except MissingFileError:
        inputs = {}
    data, own = _section(config, "data"), tuple(f"{section}." for section in STAGES[stage].sections)
    split = _section(data, "split")
    known = {key: value for key, value in config.items() if key in field_types(Config)}
    try:
        changed = {
            printable(key): printable(as_text(plain(value))) for key, (value, _) in changes(known, load()).items()
        }
    except RecursionError:
        raise UserError("config.yaml is nested too deeply") from None
    moved = ", ".join(f"{key} {split[key]}" for key in split if key != "kind" and f"data.split.{key}" in changed)
    return StoredRun(
        name=short(name),
        stage=stage,
        result=result,
        versions=versions,
        inputs={printable(key): printable(value) for key, value in inputs.items()},
        changed={key: value for key, value in changed.items() if key.startswith(own)},
        data=short(f"{data.get('source')} (prepared data {inputs.get('data') or inputs.get('prepared')})"),
        split=short(f"{split.get('kind')}{f' ({moved})' if moved else ''}"),
        seed=short(config.get("seed", 0)),
        fold=short(config.get("fold", "")),
    )


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _unfinished(folder: Path) -> str:
    """The reason why a run has no result, as far as its folder and its pipeline's log show it."""
    if failed := sorted(name for name in os.listdir(folder) if name.startswith("non-finite-")):
        return f"failed: the loss or a gradient was not finite ({failed[0]})"
    logs = folder.parent / "logs"
    with contextlib.suppress(MissingFileError):
        log = b"" if logs.is_symlink() else _content(logs / f"{folder.name}.log", tail=True)
        if said := re.findall(rb"lumrec: (.+)", log):
            return f"failed: {said[-1].decode(errors='replace')}"
    written = max(_time(folder / name) for name in ("config.yaml", "metrics.jsonl"))
    when = datetime.fromtimestamp(written, tz=timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"unfinished: it is running, was interrupted, or failed; last written {when}"


def _time(path: Path) -> float:
    return os.lstat(path).st_mtime if os.path.lexists(path) else 0.0


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_content(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path.name} is damaged: it is not JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is damaged: it holds no JSON object")
    return content


def _content(path: Path, *, tail: bool = False) -> bytes:
    """The contents of a small regular file; with `tail`, the end of a large one.

    Raises MissingFileError; UserError for links, pipes, devices, folders and large files.
    """
    try:
        with open(path, "rb", opener=_opened) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path.name} is not a regular file")
            if status.st_size > MOST_BYTES and not tail:
                raise UserError(f"{path.name} has {status.st_size:,} bytes; expected at most {MOST_BYTES:,}")
            file.seek(max(0, status.st_size - MOST_BYTES))
            return file.read(MOST_BYTES)
    except FileNotFoundError:
        raise MissingFileError(f"there is no {path.name}") from None
    except OSError as error:
        why = "is a link, which is not followed" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        raise UserError(f"{path.name} {why}") from None


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
