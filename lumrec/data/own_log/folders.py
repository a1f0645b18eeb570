"""The files of a log: those that names, folders and globs lead to, and the columns in the names of their folders.

log/scene=home/day=2024-05-20/part-0.parquet    columns scene "home" and day "2024-05-20" for every row of the file
log/today → log/day=2024-05-21                  links to folders are followed, unless that folder is read already
log/_SUCCESS, log/.part-0.parquet.crc           job markers and checksums are skipped
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from lumrec.data.sources.raw_log import DataSetMissing
from lumrec.run.errors import UserError, did_you_mean
from lumrec.run.files import check_file

log = logging.getLogger(__name__)

NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # what Hive and Spark write for a missing value


def find_files(patterns: Sequence[str], key: str) -> list[Path]:
    """The files that names, folders and globs lead to, in order of their names, each once.

    Folders are read with those below them, links included; files and folders whose names begin with _ or . (job markers
    and checksums) are skipped. A folder or file that several names lead to is read once, with a warning in the log.
    Raises DataSetMissing where a pattern leads to no file, UserError for a broken link or an unreadable folder.
    """
    found: dict[Path, Path] = {}  # real path → the path by which it was found
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir() or path.is_file():
            starts, rest = [path], []
        else:  # behind **, glob itself would follow links in a circle
            cut = path.parts.index("**") if "**" in path.parts else len(path.parts)
            starts = [Path(name) for name in sorted(glob.glob(str(Path(*path.parts[:cut]))))]
            starts = [start for start in sorted(starts, key=Path.is_symlink) if not _is_hidden(start)]
            rest = list(path.parts[cut:])
        seen: set[Path] = set()
        files = [
            file
            for start in starts
            for file in (_walk(start, key, seen) if start.is_dir() else [start])
            if not rest or _matches(list(file.relative_to(start).parts), rest)
        ]
        if not files:
            what = "is a folder without a file to read" if path.is_dir() else "leads to no file"
            beside = sorted(str(file) for file in path.parent.iterdir()) if path.parent.is_dir() else []
            raise DataSetMissing(
                f"{key}: {pattern!r} {what} (from {Path.cwd()}){did_you_mean(str(path), beside, cutoff=0.5)}"
            )
        for file in files:
            if not file.is_file():
                raise UserError(f"{key}: {file} is no file{_leads_to(file)}; remove it, or name the files by a glob")
            check_file(file, key, "a file of the log")
            first = found.setdefault(file.resolve(), file)
            if first != file:
                log.warning("%s: %s is the same file as %s, and read once", key, file, first)
    return sorted(found.values(), key=str)


def _walk(folder: Path, key: str, seen: set[Path]) -> Iterator[Path]:
    """The files in a folder and in those below it; adds to `seen` the folders that were read."""
    real = folder.resolve()
    holds_itself = folder.is_symlink() and folder.parent.resolve().is_relative_to(real)
    if real in seen or holds_itself:
        if folder.is_symlink():  # else a glob has led to it a second time
            why = "contains it" if holds_itself else "is read already"
            log.warning("%s: the link %s is skipped, as its target %s %s", key, folder, real, why)
        return
    seen.add(real)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        raise UserError(
            f"{key}: {folder} cannot be read ({error.strerror}); correct its permissions, or leave it out"
        ) from None
    for entry in entries:
        path = folder / entry.name
        if _is_hidden(Path(entry.name)):
            if entry.name.lower().endswith((".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")):
                log.warning("%s: %s is skipped, as its name begins with %s", key, path, entry.name[0])
        elif entry.is_dir():
            yield from _walk(path, key, seen)
        else:
            yield path


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a path match those of a glob, in which ** is any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:] or ["*"]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def partitions(file: Path) -> dict[str, str | None]:
    """The columns in the names of a file's folders (key=value, as Hive and Spark write them), as text.

    Raises UserError where a column has two values, or a name is not UTF-8.

    >>> partitions(Path("log/scene=a%20b/day=__HIVE_DEFAULT_PARTITION__/part-0.parquet"))
    {'scene': 'a b', 'day': None}
    """
    found: dict[str, str | None] = {}
    for part in file.parts[:-1]:
        name, equals, value = part.partition("=")
        if not (equals and name):
            continue
        try:
            name, value = (unquote(text, errors="strict") for text in (name, value))
        except UnicodeDecodeError:
            raise UserError(f"{file}: the folder {part!r} is not UTF-8 once its %XX are decoded; rename it") from None
        new = None if value in (NO_PARTITION, "") else value
        if found.setdefault(name, new) != new:
            raise UserError(
                f"{file}: its folders give column {name!r} two values, {found[name]!r} and {new!r}; expected one. "
                "Rename one of the folders"
            )
    return found


def _is_hidden(path: Path) -> bool:
    """Whether a name begins with _ or . (a partition's may: _day=2024-05-20)."""
    return path.name[:1] == "." or (path.name[:1] == "_" and "=" not in path.name)


def _leads_to(file: Path) -> str:
    return f": it is a link to {os.readlink(file)}, which is not there" if file.is_symlink() else ""
