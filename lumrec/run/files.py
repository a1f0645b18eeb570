"""Files that a kill or a power cut leaves whole: written beside, synced, renamed; and how a run's files are read."""

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


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with None in place of NaN and infinities, which JSON cannot hold."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def read_json(path: Path, *, again: str = "") -> dict[str, Any]:
    """The JSON object in a file. again: what to do if it cannot be read, as the end of a sentence.

    Raises MissingFileError for a missing file, UserError for one that is empty, cut, not UTF-8, no JSON object, or that
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
        raise UserError(f"{path} is damaged: it holds a {type(content).__name__}, expected a JSON object{then}")
    return content


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `path` at the end of the block: a reader sees the old file or
    the new one, also after a power cut.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # a link that lies there would be written through
    yield temporary
    sync_file(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a reader sees the old file or the new one, also after a power cut."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def locked(path: Path, *, folder: bool = False, waiting: str = "") -> Iterator[int]:
    """Locks the file (or `folder`) at `path`, which is made where it is missing; gives the descriptor. The lock ends
    with the block, or with the process, however it ends.

    Where another process holds the lock, this prints `waiting` and waits; without `waiting`, it raises BlockingIOError.
    Not filelock: that cannot lock a folder, and falls back to lock files that a killed process leaves behind.
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
                logger.warning("no locks on this file system (%s): let no second process write %s", error, path)
            if is_at(lock, path):  # whoever held the lock may have renamed or removed the file meanwhile
                yield lock
                return
        finally:
            os.close(lock)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path` now."""
    return path.exists() and os.stat(path).st_ino == os.fstat(descriptor).st_ino


def sync_folder(path: Path) -> None:
    """Makes the entries of a folder (new names, renames) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Makes a folder with all that is in it survive a power cut."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync_file(Path(folder) / name)
        sync_folder(Path(folder))


def remove_folder(path: Path) -> None:
    """Deletes a folder so that, killed half-way, it leaves only a hidden `.trash-*` behind."""
    trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
    os.replace(path, trash)
    shutil.rmtree(trash)


def leftovers(folder: Path, name: str = "*") -> Iterator[Path]:
    """Folders that a killed removal or replacement of `folder / name` left beside it; without a name, of any."""
    name = name if name == "*" else glob.escape(name)
    for pattern in (f".trash-{name}-*", f".{name}.old-*"):
        yield from (path for path in folder.glob(pattern) if path.name.rpartition("-")[2].isdecimal())


def replace_folder(new: Path, path: Path) -> None:
    """Puts the folder `new` in the place of `path` and removes what was there; a reader finds one of both at any time.

    Both are on one file system. Where that cannot exchange two names (NFS), `path` is missing between two renames.
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
    """Exchanges two names in one step; False where the system or the file system cannot."""
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
    """Makes one UserError of whatever a library makes of a full disk while it writes `what` to `path`; then: what can
    be done once there is room.
    """
    try:
        yield
    except BaseException as error:  # that of torch.distributed.checkpoint is no Exception
        if not _is_of_full_disk(error, path):
            raise
        free = shutil.disk_usage(path).free / 2**20
        raise UserError(f"no space left for {what} in {path} ({free:,.0f} MiB free): {then}") from error


def _is_of_full_disk(error: BaseException | None, path: Path) -> bool:
    """Whether an error, or one that it came from, says that the disk is full; or is one that libraries raise for a
    file that they could not write to its end, while the disk is full.
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
    """Takes the disk's blocks for a file now: written through a memory map, a full disk would kill the process."""
    with open(file, "r+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def sync_file(path: Path) -> None:
    """Makes the contents of a file survive a power cut."""
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
