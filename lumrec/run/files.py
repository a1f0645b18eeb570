"""Writes files that a kill or a power cut leaves intact (temporary file, sync, rename), and reads a run's files."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import logging
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.printable import say

logger = logging.getLogger(__name__)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_file(path: str | Path, key: str, expected: str, *, may_be_folder: bool = False) -> Path:
    """The path, once it is sure that there is a file (or a folder, if `may_be_folder`) that this process may read.

    key: the setting that names it, "" for none; expected: what it should be, such as "a YAML file". Raises
    MissingFileError where there is nothing, and UserError for a folder, a socket, a pipe, and what may not be read.
    """
    path, at = Path(path), f"{key}: " if key else ""
    shown = str(path) if len(str(path)) <= 500 else f"{str(path)[:60]}…"
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        link = f" (it is a link to {os.readlink(path)})" if path.is_symlink() else ""
        here = "" if path.is_absolute() else f" (from {Path.cwd()})"
        raise MissingFileError(f"{at}there is no {shown}{link}; expected {expected}{here}") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{at}{shown} cannot be read ({getattr(error, 'strerror', error)}); expected {expected}"
        ) from None
    is_folder = stat.S_ISDIR(mode)
    if not (stat.S_ISREG(mode) or is_folder and may_be_folder):
        raise UserError(
            f"{at}{shown} is {'a folder' if is_folder else 'no file but a socket, pipe or device'}; expected {expected}"
        )
    if not os.access(path, os.R_OK | (os.X_OK if is_folder else 0)):
        raise UserError(f"{at}{shown} cannot be read ({os.strerror(errno.EACCES)}); expected {expected}")
    return path


def check_outside(path: str | Path, key: str, folder: Path) -> None:
    """Raises UserError for an input in the folder of the run that reads it: with overwrite=true it would be deleted
    before it is read.
    """
    if Path(path).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{key}: {path} lies in {folder}, the folder of this run itself; choose another run=<name>")


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with None instead of NaN and infinities, which JSON does not have."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def read_json(path: Path, *, again: str = "") -> dict[str, Any]:
    """The JSON object in a file. again: what to do if it cannot be read, to end the error's sentence with.

    Raises MissingFileError for a missing file, UserError for one that is empty, cut off, not UTF-8, no JSON object, or
    cannot be read.
    """
    then = f"; {again}" if again else ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFileError(f"{path} is missing{then}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}){then}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: byte {error.start} is not UTF-8{then}") from None
    except (ValueError, RecursionError) as error:
        what = "is empty" if path.stat().st_size == 0 else f"is damaged or cut off: it is not JSON ({error})"
        raise UserError(f"{path} {what}{then}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is a {type(content).__name__}, expected a JSON object{then}")
    return content


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` at the end of the block: readers see the old or the new file.

    That holds also after a power cut.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # if it were a link, its target would be written
    yield temporary
    sync_file(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that readers see the old or the new file, also after a power cut."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def locked(path: Path, *, folder: bool = False, waiting: str = "") -> Iterator[int]:
    """Locks the file (or `folder`) at `path`, which is made if it is missing; gives its descriptor.

    The lock ends with the block, or with the process, however it ends. If another process has the lock, this prints
    `waiting` and waits; without `waiting`, it raises BlockingIOError. Not filelock, which cannot lock a folder, and
    falls back to lock files that a killed process leaves behind.
    """
    while True:
        if folder:
            path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waiting:
                    raise
                say(waiting)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                logger.warning("no locks on this file system (%s): no second process may write %s", error, path)
            if is_at(lock, path):  # the previous owner of the lock may have renamed or removed the file
                yield lock
                return
        finally:
            os.close(lock)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    return path.exists() and os.stat(path).st_ino == os.fstat(descriptor).st_ino


def sync_folder(path: Path) -> None:
    """Syncs the entries of a folder (new names, renames) to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Syncs a folder and everything in it to disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync_file(Path(folder) / name)
        sync_folder(Path(folder))


def remove_folder(path: Path) -> None:
    """Deletes a folder; if killed half-way, it leaves only a hidden `.trash-*`."""
    trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
    os.replace(path, trash)
    shutil.rmtree(trash)


def leftovers(folder: Path, name: str = "*") -> Iterator[Path]:
    """Folders that a killed removal or replacement of `folder / name` left beside it; by default of any name."""
    name = name if name == "*" else glob.escape(name)
    for pattern in (f".trash-{name}-*", f".{name}.old-*"):
        yield from (path for path in folder.glob(pattern) if path.name.rpartition("-")[2].isdecimal())


def replace_folder(new: Path, path: Path) -> None:
    """Replaces the folder `path` by `new` and removes the old one; a reader finds one of them at any time.

    Both must be on one file system. If that cannot exchange two names (NFS), `path` is missing between two renames.
    """
    sync_tree(new)
    if not path.exists():
        os.rename(new, path)
    elif _exchange(new, path):
        shutil.rmtree(new)
    else:
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.rename(path, old)
        os.rename(new, path)
        shutil.rmtree(old)
    sync_folder(path.parent)


def _exchange(one: Path, two: Path) -> bool:
    """Exchanges two names in one step; False if the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(two))


@contextlib.contextmanager
def full_disk_told(path: Path, what: str, *, then: str) -> Iterator[None]:
    """Turns whatever a library raises for a full disk while it writes `what` to `path` into one UserError.

    then: advice for the message.
    """
    try:
        yield
    except BaseException as error:  # torch.distributed.checkpoint raises one that is no Exception
        if not _is_of_full_disk(error, path):
            raise
        free, disk = shutil.disk_usage(path).free / 2**20, os.statvfs(path)
        files = "" if disk.f_favail or not disk.f_files else ", but no more files"
        raise UserError(f"no space left for {what} in {path} ({free:,.0f} MiB free{files}): {then}") from error


def _is_of_full_disk(error: BaseException | None, path: Path) -> bool:
    """Whether an error was caused by a full disk.

    That is: it, or an error in its chain, says so; or a library raised it while the disk is full.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    from_library = False
    while error is not None:
        if getattr(error, "errno", None) in full or any(os.strerror(number) in str(error) for number in full):
            return True
        library = type(error).__module__.partition(".")[0] in ("polars", "pyarrow", "torch", "lmdb")
        from_library |= library or isinstance(error, (OSError, RuntimeError))
        error = error.__cause__ or error.__context__
    return from_library and path.exists() and shutil.disk_usage(path).free < 1 << 20


def reserve(file: Path) -> None:
    """Allocates a file's blocks now: writing a memory map on a full disk would kill the process."""
    with open(file, "r+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def sync_file(path: Path) -> None:
    """Syncs a file to disk."""
    sync_folder(path)


def sha256(path: Path) -> str:
    """Checksum of a file, as hexadecimal digits."""
    return checksum(path, "sha256")


def checksum(path: Path, kind: str) -> str:
    """Checksum of a file by hashlib's algorithm `kind` (md5, sha256, …), as hexadecimal digits."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
