"""Downloads a publisher's archive: checks it, resumes after a cut, and shows a progress bar on a terminal.

Files in the cache:
    .ml-20m.zip.part         the bytes received so far; locked while a process writes to it
    .ml-20m.zip.part.state   the server's name for that version of the archive
    ml-20m/                  appears complete, once the checksum is right and the files are unpacked
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import posixpath
import re
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from lumrec.data.sources.raw_log import DataSetMissing
from lumrec.run.errors import UserError
from lumrec.run.files import checksum, is_at, locked

log = logging.getLogger(__name__)
CHUNK = 1 << 18
RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
UNSATISFIED = re.compile(r"bytes \*/(\d+)")


@dataclass(frozen=True)
class Archive:
    """A .zip or .tar.gz of a publisher: address, page for people, the folder inside that holds the files.

    checksum: "md5:…" or "sha256:…", as published; "" if the publisher updates the archive from time to time.
    """

    url: str
    page: str
    checksum: str
    folder: str
    timeout_s: float = 30.0


def fetch_archive(archive: Archive, target: Path, *, files: Sequence[str], by_hand: str) -> Path:
    """`target`, a new folder that holds `files` of the archive; it appears complete or not at all.

    Waits where another process downloads the same archive. Raises DataSetMissing where the publisher cannot be reached
    (the message ends with `by_hand`), and UserError for another checksum or a broken archive.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    name = archive.url.rsplit("/", 1)[-1]
    with _claimed(target.parent / f".{name}.part") as part:
        if target.is_dir():  # another process has downloaded it meanwhile
            return target
        try:
            _download(archive, part)
        except (http.client.HTTPException, OSError) as error:
            left = f"\n{part.stat().st_size:,} bytes are kept: the next try goes on from there." if _size(part) else ""
            raise DataSetMissing(f"could not download {archive.url}: {error}.{left}\n{by_hand}") from error
        try:
            _check(archive, part)
            _unpack(archive, part, target, files)
        except ValueError:
            _remove(part)
            raise
        _remove(part)
    return target


@contextlib.contextmanager
def _claimed(part: Path) -> Iterator[Path]:
    """The partial file, locked; it is removed if it is empty, else kept for the next try."""
    with locked(part, waiting=f"waiting for another process that downloads {part}") as lock:
        try:
            yield part
        finally:
            if _size(part) == 0 and is_at(lock, part):
                _remove(part)


def _download(archive: Archive, part: Path) -> None:
    """Fills `part` with the whole archive; resumes after a cut as long as each try adds bytes.

    Raises OSError or HTTPException after a try that added none.
    """
    while True:
        before = _size(part)
        try:
            return _receive(archive, part)
        except urllib.error.HTTPError:
            raise
        except (http.client.HTTPException, OSError) as error:
            if _size(part) <= before:
                raise
            log.warning("%s: %s; going on after %s bytes", archive.url, error, f"{_size(part):,}")


def _receive(archive: Archive, part: Path, *, resume: bool = True) -> None:
    """One connection: appends to `part` where the server resumes the same version, else starts over."""
    have, version = _size(part), _version(part, archive)
    headers = {"Range": f"bytes={have}-", "If-Range": version} if resume and have and version else {}
    try:
        reply = urllib.request.urlopen(urllib.request.Request(archive.url, headers=headers), timeout=archive.timeout_s)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not headers:
            raise
        whole = UNSATISFIED.match(error.headers.get("Content-Range") or "")
        if whole and int(whole[1]) == have:  # it was complete
            return
        return _receive(archive, part, resume=False)
    with reply:
        length = reply.headers.get("Content-Length") or ""
        total = int(length) if length.isdecimal() and len(length) < 20 else 0
        if headers and reply.status == http.HTTPStatus.PARTIAL_CONTENT:
            found = RANGE.match(reply.headers.get("Content-Range") or "")
            other = _name_of_version(reply.headers) not in ("", version)
            if not found or int(found[1]) != have or other:
                return _receive(archive, part, resume=False)
            total = int(found[2])
        else:
            have = 0
            os.truncate(part, 0)
            state = {"url": archive.url, "version": _name_of_version(reply.headers)}
            _state(part).write_text(json.dumps(state) + "\n", encoding="utf-8")
        have += _copy(reply, part, total=total, have=have, name=archive.url.rsplit("/", 1)[-1])
    if total and have != total:
        raise OSError(f"the connection was cut after {have:,} of {total:,} bytes")


def _copy(reply: http.client.HTTPResponse, part: Path, *, total: int, have: int, name: str) -> int:
    """Number of bytes appended."""
    got = 0
    bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=name, disable=not sys.stderr.isatty())
    # unbuffered on both sides: what was received is in the file, even if the process is killed
    with open(part, "ab", buffering=0) as sink, bar:
        while chunk := reply.read1(CHUNK):
            sink.write(chunk)
            got += len(chunk)
            bar.update(len(chunk))
    return got


def _name_of_version(headers: Mapping[str, str]) -> str:
    """Identifies this version of the archive: a strong ETag, else the date; "" where there is neither."""
    tag = headers.get("ETag") or ""
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified") or ""


def _version(part: Path, archive: Archive) -> str:
    """The version of the archive that `part` belongs to; "" where that is unknown."""
    try:
        state = json.loads(_state(part).read_text(encoding="utf-8"))
        return str(state["version"]) if state["url"] == archive.url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _check(archive: Archive, part: Path) -> None:
    """Raises UserError where the archive has another checksum than the published one."""
    kind, _, expected = (archive.checksum or "sha256:").partition(":")
    digest = checksum(part, kind)
    if not expected:
        changes = "has no published checksum, as it is updated from time to time"
        log.warning("%s %s; this one has %s %s", archive.url, changes, kind, digest)
    elif digest != expected:
        raise UserError(
            f"wrong checksum: {archive.url} has {kind} {digest}, expected {expected}; nothing was kept.\n"
            "The download was changed on its way, or the publisher has changed the archive: try again, or place the "
            "files by hand."
        )


def _unpack(archive: Archive, part: Path, target: Path, files: Sequence[str]) -> None:
    """Makes the folder `target` with `files` of the archive, and nothing else from it."""
    work = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
    work.mkdir()
    try:
        wanted = {f"{archive.folder}/{name}": work / name for name in files}
        for name, source in _members(part, wanted, is_zip=archive.url.endswith(".zip")):
            with source, open(wanted[name], "wb") as sink:
                shutil.copyfileobj(source, sink, CHUNK)
        if missing := [name for name in files if not (work / name).is_file()]:
            raise UserError(f"{archive.url} does not hold {', '.join(missing)} in {archive.folder}/; nothing was kept")
        os.rename(work, target)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive.url} cannot be unpacked: {error}; nothing was kept, try again") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _members(path: Path, wanted: Collection[str], *, is_zip: bool) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and contents of the `wanted` files in an archive."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            for name in set(wanted) & set(archive.namelist()):
                yield name, archive.open(name)
    else:
        with tarfile.open(path, "r|gz") as stream:
            for member in stream:
                name = posixpath.normpath(member.name)
                if name in wanted and member.isfile() and (source := stream.extractfile(member)):
                    yield name, source


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.state")


def _remove(part: Path) -> None:
    for path in (part, _state(part)):
        path.unlink(missing_ok=True)
