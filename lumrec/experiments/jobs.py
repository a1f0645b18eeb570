"""Runs commands that depend on one another, several at a time, each with a log file, and reports their progress."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lumrec.run.errors import UserError
from lumrec.run.shipped import PACKAGE, shipped

ROOT = PACKAGE.parent
LOCAL = "local_cwd"  # the scheduler of TorchX that starts processes in the working directory
TORCHX = [sys.executable, "-m", "torchx.cli.main", "--log_level", "WARNING"]
HEARTBEAT_S = 30.0
TAIL_LINES = 20
SAME_WITHOUT = "the same without TorchX: "  # torchx_run's first line, followed by the plain command
# Variables that torchrun sets for its processes; a job that such a process starts must not inherit them.
TORCHRUN_VARIABLES = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE "
    "MASTER_ADDR MASTER_PORT OMP_NUM_THREADS TORCHELASTIC_ERROR_FILE TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE "
    "TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RESTART_COUNT TORCHELASTIC_SIGNALS_TO_HANDLE"
).split()
# What TorchX prints of a job that it has given to a cluster; those of this machine end with their launcher.
_CLUSTER_JOB = re.compile(r"^(?!local_)\w+://torchx/\S+", re.MULTILINE)
# Colours, and the prefix "rank/0 " that TorchX adds to each line.
_TORCHX_PREFIX = re.compile(r"^(?:\x1b\[[0-9;]*m)*[\w-]+/\d+(?:\x1b\[[0-9;]*m)* ", re.MULTILINE)


class JobFailed(RuntimeError):
    """A job ended with an error; the message has the end of its log and the log's path."""


@dataclass(frozen=True)
class Job:
    """One command. needs: names of jobs that must have succeeded before. exclusive: no other job runs beside it.

    then: called when the job has succeeded, before any other job starts.
    """

    name: str
    command: Sequence[str]
    needs: tuple[str, ...] = ()
    exclusive: bool = False
    then: Callable[[], None] | None = None


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    log: Path
    started: float


def run_jobs(
    jobs: Sequence[Job], *, parallel: int, cores: int, logs: Path, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Runs all jobs, in the given order as far as their needs allow; returns the wall time of each in seconds.

    Each process gets OMP_NUM_THREADS = cores / parallel, an exclusive one gets all cores. The first failure ends the
    other jobs (an unfinished stage continues when it is run again) and raises JobFailed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, seconds = list(jobs), list[_Running](), dict[str, float]()
    start = reported = time.monotonic()
    with _ended_with_us(running):
        while waiting or running:
            while job := _next(waiting, running, set(seconds), parallel):
                waiting.remove(job)
                threads = cores if job.exclusive else max(1, cores // parallel)
                running.append(_start(job, logs / f"{job.name}.log", threads))
                say(f"{_clock(start)} {job.name}: started")
                reported = time.monotonic()
            if not running:
                raise AssertionError(f"jobs that wait for one another: {[job.name for job in waiting]}")
            time.sleep(0.2)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                seconds[one.job.name] = time.monotonic() - one.started
                if one.process.returncode:
                    raise JobFailed(
                        f"stage {one.job.name} failed after {seconds[one.job.name]:.0f} s; the end of its log:\n"
                        + "\n".join(f"    {line}" for line in tail(one.log, TAIL_LINES))
                        + f"\nWhole log: {one.log}"
                    )
                say(
                    f"{_clock(start)} {one.job.name}: done in {seconds[one.job.name]:.0f} s "
                    f"({len(seconds)} of {len(jobs)})"
                )
                if one.job.then is not None:
                    one.job.then()
                reported = time.monotonic()
            if time.monotonic() - reported > HEARTBEAT_S:
                for one in running:
                    say(f"{_clock(start)} {one.job.name}: {' '.join(tail(one.log, 1))[:150] or 'no output yet'}")
                reported = time.monotonic()
    return seconds


def _next(waiting: Sequence[Job], running: Sequence[_Running], done: set[str], parallel: int) -> Job | None:
    if len(running) >= parallel or any(one.job.exclusive for one in running):
        return None
    for job in waiting:
        if done.issuperset(job.needs) and not (job.exclusive and running):
            return job
    return None


def _start(job: Job, log: Path, threads: int) -> _Running:
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN_VARIABLES}
    environment["OMP_NUM_THREADS"] = str(threads)
    if Path.cwd() != ROOT:
        environment["PYTHONSAFEPATH"] = "1"  # a queue.py in the working directory is not Python's (from 3.11 on)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            list(job.command), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    return _Running(job, process, log, time.monotonic())


@contextmanager
def _ended_with_us(running: list[_Running]) -> Iterator[None]:
    """When this block ends, also by SIGTERM, processes that still run get SIGTERM, and SIGKILL ten seconds later; jobs
    that they wait for on a cluster are cancelled."""

    def leave(number: int, _: object) -> None:
        raise KeyboardInterrupt(f"signal {number}")

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for one in running:
            one.process.terminate()
        for one in running:
            try:
                one.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            for job in _CLUSTER_JOB.findall(one.log.read_text(errors="replace")):
                subprocess.run([*TORCHX, "cancel", job])


def tail(log: Path, lines: int) -> list[str]:
    """The last non-empty lines of a TorchX job's log, without TorchX's own lines and prefixes."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        text = file.read().decode(errors="replace")
    text = _TORCHX_PREFIX.sub("", text.replace("\r", "\n"))
    said = [line.rstrip() for line in text.splitlines() if line.strip()]
    return [line for line in said if "://torchx/" not in line and not line.startswith(SAME_WITHOUT)][-lines:]


def _clock(start: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    return f"{minutes:3d}:{seconds:02d}"


def torchx_command(
    stage: str,
    overrides: Sequence[str],
    *,
    config: Path,
    scheduler: str = LOCAL,
    scheduler_args: str = "",
    options: Sequence[str] = (),
) -> list[str]:
    """`torchx run apps/<stage>.py …` on this interpreter, whether or not its folder is on PATH.

    It waits for the job. options: name=value, of the app's job; the last value of a name counts.
    """
    run = [*TORCHX, "run", *(["--scheduler_args", scheduler_args] if scheduler_args else [])]
    if scheduler != LOCAL:
        run += ["--wait", "--log"]
    given = dict(option.split("=", 1) for option in ["j=1x1", *options])
    words = [word for name, value in given.items() for word in ("-j" if name == "j" else f"--{name}", value)]
    return [*run, "--scheduler", scheduler, f"{script_of(stage)}:{stage}", *words, "--config", str(config), *overrides]


def check_job(command: Sequence[str], settings: str, app: str) -> None:
    """Raises UserError, which names the settings, where TorchX does not take a `torchx_command`."""
    words = list(command)
    words.insert(len(TORCHX) + 1, "--dryrun")
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        why = [line for line in said if "error" in line.lower()] or said
        raise UserError(f"{settings}: TorchX does not take the job of {app}: {why[-1]}")


def script_of(stage: str) -> str:
    """Path of this package's app of a stage, whatever the working directory contains.

    It is `apps/<stage>.py` if the working directory is the checkout (so that it is valid for remote jobs), otherwise
    absolute.
    """
    app = shipped("apps") / f"{stage}.py"
    return str(app.relative_to(ROOT) if Path.cwd() == ROOT else app)


def as_typed(command: Sequence[str]) -> str:
    """The command of `torchx_command` as a user would type it."""
    component, *rest = command[list(command).index(LOCAL) + 1 :]
    app = component.split(":")[0]
    return shlex.join(["torchx", "run", app, *(word for word in rest if word not in ("-j", "1x1"))])
