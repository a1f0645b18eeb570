"""Fetching a publisher's archive: checked, atomic, with a progress bar on a terminal only."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import List

from tqdm import tqdm

from lumrec.data.sources.raw_log import DataSetMissing


@dataclass(frozen=True)
class Archive:
    """A zip file of a publisher: address, page for people, checksum, the folder inside that holds the files."""

    url: str
    page: str
    sha256: str
    folder: str
    timeout_s: float = 30.0


def fetch_archive(archive: Archive, target: Path, *, files: List[str]) -> Path:
    """`target`, a new folder that holds `files` of the archive; it appears whole or not at all.

    Raises DataSetMissing where the publisher cannot be reached, and ValueError for another checksum.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        zipped = work / "archive.zip"
        try:
            digest = _download(archive, zipped)
        except (urllib.error.URLError, OSError) as error:
            raise DataSetMissing(
                f"could not download {archive.url}: {error}.\n"
                f"Download it by hand (see {archive.page}), unpack it, and put {', '.join(files)} into {target}, or\n"
                f"set data.path to their folder, or LUMREC_DATA to the folder that holds {archive.folder}/.\n"
                "To go on without it: data.source=simulator."
            ) from error
        if digest != archive.sha256:
            raise ValueError(
                f"wrong checksum: {archive.url} has sha256 {digest}, expected {archive.sha256}; nothing was kept.\n"
                f"The download was cut or changed on its way: try again, or place the files by hand in {target}."
            )
        with zipfile.ZipFile(zipped) as contents:
            for name in files:
                with contents.open(f"{archive.folder}/{name}") as source, open(work / name, "wb") as sink:
                    shutil.copyfileobj(source, sink)
        zipped.unlink()
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _download(archive: Archive, path: Path) -> str:
    """sha256 of what was written to `path`."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(archive.url, timeout=archive.timeout_s) as reply, open(path, "wb") as sink:
        total = int(reply.headers.get("Content-Length") or 0)
        with tqdm(
            total=total or None,
            unit="B",
            unit_scale=True,
            desc=archive.url.rsplit("/", 1)[-1],
            disable=not sys.stderr.isatty(),
        ) as bar:
            while chunk := reply.read(1 << 18):
                sink.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()
