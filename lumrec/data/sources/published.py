"""Published data sets: where they are on this machine, how to get those that are missing, and their labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lumrec.data.sources.download import Archive, fetch_archive
from lumrec.data.sources.raw_log import DataSetMissing, LabelConfig
from lumrec.run.errors import UserError
from lumrec.run.printable import say

COUNTED = ("events_read", "users", "items", "items_with_events")  # counts that publishers give


@dataclass(frozen=True)
class Place:
    """Where the files of one data set may be, and where they come from.

    title: its name for people. folders: names of its folder in $LUMREC_DATA and the cache; a download goes to the
    first. stand_ins: names of folders to use where none of those exists. files: what a folder must hold. missing:
    gives those of `files` that a folder lacks, where other names or formats are accepted too. page: the publisher's,
    for people. archive: what to download; None: the files are placed by hand.
    """

    title: str
    folders: tuple[str, ...]
    files: tuple[str, ...]
    page: str
    archive: Archive | None = None
    missing: Callable[[Path], list[str]] | None = None
    stand_ins: tuple[str, ...] = ()

    def lacks(self, folder: Path) -> list[str]:
        """The files that the folder lacks."""
        if self.missing is not None:
            return self.missing(folder)
        return [name for name in self.files if not (folder / name).is_file()]

    def by_hand(self) -> str:
        """How to place the files without a download by lumrec."""
        folder = self.folders[0]
        get = (
            f"Download {self.archive.url} (see {self.page}), unpack it," if self.archive else f"Get them at {self.page}"
        )
        return (
            f"{get} and either set data.path to the folder that holds {', '.join(self.files)}, or put that folder at "
            f"$LUMREC_DATA/{folder} or {cache_folder() / folder}.\nTo go on without it: data.source=simulator."
        )


def cache_folder() -> Path:
    """Folder of downloaded data sets: $LUMREC_CACHE, else ~/.cache/lumrec."""
    return Path(os.environ.get("LUMREC_CACHE") or Path.home() / ".cache" / "lumrec")


def resolve(place: Place, path: str = "") -> tuple[Path, str]:
    """Folder of the data set and how it was found: `path`, else $LUMREC_DATA, the cache, a stand-in, a download.

    Raises DataSetMissing where the folder found lacks files, or where no folder is found and it cannot be downloaded;
    UserError where the download has another checksum.
    """
    found = find_folder(path, place.folders) or find_folder("", place.stand_ins)
    if found is None and place.archive is not None:
        target = cache_folder() / place.folders[0]
        say(f"{place.title} is neither in LUMREC_DATA nor in {target}: downloading {place.archive.url}")
        found = fetch_archive(place.archive, target, files=place.files, by_hand=place.by_hand()), "download"
    if found is None:
        wanted = " or ".join(f"{root}/{name}" for root in ("$LUMREC_DATA", cache_folder()) for name in place.folders)
        raise DataSetMissing(f"{place.title} not found: there is no {wanted}.\n{place.by_hand()}")
    folder, origin = found
    if missing := place.lacks(folder):
        state = "exists but lacks" if folder.is_dir() else "does not exist; expected there:"
        raise DataSetMissing(
            f"{place.title} not found: the folder {folder} (from {origin}) {state} {', '.join(missing)}.\n"
            f"{place.by_hand()}"
        )
    return folder, origin


def find_folder(path: str, names: Sequence[str]) -> tuple[Path, str] | None:
    """A data set's folder and how it was found; None where there is none.

    A given `path` is returned whether it exists or not; else it is the first of `names` that is a folder in
    $LUMREC_DATA, else in the cache.
    """
    if path:
        return Path(path).expanduser(), "data.path"
    root = os.environ.get("LUMREC_DATA", "")
    for parent, origin in [*([(Path(root), "LUMREC_DATA")] if root else []), (cache_folder(), "cache")]:
        for name in names:
            if (parent / name).is_dir():
                return parent / name, origin
    return None


def label_in_use(asked: LabelConfig, default: LabelConfig, *, columns: Sequence[str], source: str) -> LabelConfig:
    """What counts as positive: what the config asks for, else the source's default.

    columns: those that may be a label. Raises UserError for any other.
    """
    column = asked.column or default.column
    if column not in columns:
        raise UserError(
            f"data.label.column: got {column!r}; the columns of {source} that can be a label: {', '.join(columns)}"
        )
    if column == default.column and asked.at_least is None and not asked.values:
        return default
    return replace(asked, column=column)
