"""Reports an exception in one sentence, unless it is a bug, which shows its traceback.

user error       a UserError: its message is the sentence
machine error    a full or read-only disk, no permission, too many open files, no memory: reported with the file
lost connection  the connection to another process that has ended: that process or the launcher reports the reason
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from lumrec.run.errors import UserError
from lumrec.run.printable import say

# Errors of the machine, with advice. Every other OSError is a bug, such as a file of ours that is missing.
MACHINE = {
    errno.ENOSPC: "free some space there, and run the same command again",
    errno.EDQUOT: "free some space in your quota, and run the same command again",
    errno.EROFS: "choose a folder that can be written: runs_dir=<folder>",
    errno.EACCES: "change its permissions, or choose another folder or file",
    errno.EPERM: "change its permissions, or choose another folder or file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has no file handles left",
    errno.EIO: "the disk or its connection is failing: check it, and run the same command again",
    errno.ESTALE: "the network folder is gone: mount it again, and run the same command again",
    errno.ENOTDIR: "a file is in the place of a folder; choose another folder",
    errno.EISDIR: "a folder is in the place of a file; choose another file",
    errno.EEXIST: "a file is in the place of a folder; choose another folder",
    errno.ELOOP: "its links form a circle",
    errno.EFBIG: "the file system does not allow files of this size; choose another folder",
    errno.ENOMEM: "",
}
NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|CUDA out of memory|std::bad_alloc|OutOfMemory")
LOST = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|Socket closed|Timed out waiting|"
    r"failed to connect|remote process exited|recvBytes failed|Connect timeout",
    re.IGNORECASE,
)


def sentence(error: BaseException) -> str:
    """A sentence that reports an error of the user or the machine; "" for a bug."""
    if isinstance(error, UserError):
        return str(error)
    for each in (error, error.__cause__):
        if each is None:
            continue
        if isinstance(each, MemoryError) or NO_MEMORY.search(f"{type(each).__name__}: {each}"):
            return f"out of memory ({_line(each)}): lower the batch or pack size, or use a machine with more"
        if number := machine_errno(each):
            if number == errno.ENOMEM:
                return f"out of memory ({_line(each)}): use a machine with more"
            return f"{file_of(each)}: {os.strerror(number).lower()}; {MACHINE[number]}"
    return ""


def machine_errno(error: BaseException) -> int:
    """The errno of an error of the machine, also if a library's error contains it; 0 for any other error."""
    if isinstance(error, OSError) and error.errno is not None:  # Polars raises OSErrors that have only a text
        return error.errno if error.errno in MACHINE else 0
    module = type(error).__module__.partition(".")[0]
    if module in ("builtins", "lumrec") and not isinstance(error, (OSError, RuntimeError)):
        return 0
    match = re.search(r"\((?:os error|errno:?) (\d+)\)|\[Errno (\d+)\]", str(error))
    if match:
        number = int(match[1] or match[2])
        return number if number in MACHINE else 0
    says = str(error).lower()
    return next(
        (number for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) if os.strerror(number).lower() in says), 0
    )


def file_of(error: BaseException) -> str:
    """The file that an error of the machine is about: the one that it names, otherwise the one being written."""
    if isinstance(error, OSError) and error.filename is not None:
        return os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(error.filename)
    named = re.findall(r"[\"'](/[^\"']+)[\"']|: (/\S+)$", str(error))
    files = [quoted or last for quoted, last in named if not (quoted or last).endswith(".py")]  # not of its traceback
    return files[0] if files else _open_file(error.__traceback__) or "a file"


def _open_file(trace: TracebackType | None) -> str:
    """The innermost path among the local variables of lumrec's functions; "" if there is none."""
    found = ""
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__")).startswith("lumrec."):
            for name in ("temporary", "target", "path", "file", "folder", "work"):
                value = trace.tb_frame.f_locals.get(name)
                if isinstance(value, Path):
                    found = str(value)
                    break
        trace = trace.tb_next
    return found


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error only means that another process of this job has ended."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or isinstance(error, UserError):
        return False
    is_network = isinstance(error, (RuntimeError, ConnectionError)) or type(error).__module__.startswith("torch")
    return is_network and LOST.search(str(error)) is not None


def tell(message: str) -> None:
    """Prints the message on stderr, once: if all ranks fail alike, torchrun ends the others while they wait here."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(3.0)
        message = f"(rank {rank}) {message}"
    say(f"lumrec: {message}", file=sys.stderr)


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Inside, characters that the terminal cannot show are escaped; a closed pipe (| head) ends the program."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # >&-; the next file that is opened would have this number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would report an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # the shell's exit code for SIGPIPE


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser for the main of a command that is not an app; its description is shown as it is written."""
    return argparse.ArgumentParser(
        prog=command, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """For the main of a command that is not an app: prints the sentence of an error and ends with exit code 2."""
    with terminal():
        try:
            yield
        except Exception as error:
            if not (said := sentence(error)):
                raise
            say(f"lumrec: {said}", file=sys.stderr)
            sys.exit(2)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
