"""Runs every test that draws its examples, again and again with other draws, until the time is up.

    python tests/fuzz.py 60 [words for pytest, such as -k packing or tests/data]

One round is one run of pytest with a seed of its own; the first one also runs the tests marked `fuzz`, whose cases are
listed, not drawn. A test that fails is left out of the later rounds. Its smallest failing example is on the terminal,
and belongs into the test as an `@example`. Exit code: 0 nothing found, 1 something found, 2 no test ran.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PYTEST_DONE = (0, 1)  # all passed, some failed
NO_TESTS = 5
GRACE_S = 60.0


def fuzz(minutes: float, words: Sequence[str]) -> int:
    """Exit code of the whole."""
    end, found, rounds = time.monotonic() + 60 * minutes, list[str](), 0
    while (left_s := end - time.monotonic()) > 0:
        seed = secrets.randbelow(2**32)
        with tempfile.TemporaryDirectory(prefix="lumrec-fuzz-") as folder:
            chosen = "hypothesis or fuzz" if rounds == 0 else "hypothesis"
            command = [sys.executable, "-m", "pytest", "--quiet", "-m", chosen, "--hypothesis-seed", str(seed)]
            command += ["--dist", "worksteal", "-o", f"cache_dir={folder}/cache", "--basetemp", f"{folder}/tests"]
            command += [*words, *(f"--deselect={test}" for test in found)]
            print(f"round {rounds + 1}, {left_s / 60:.0f} minutes left: {shlex.join(command[1:])}", flush=True)
            code = run(command, left_s)
            new = failed(Path(folder) / "cache")
        if code == NO_TESTS and found:
            break  # all that there are have failed
        if code not in PYTEST_DONE:
            print(f"pytest ended with code {code}: no test ran, or not to its end", flush=True)
            return 2
        found += new
        rounds += 1
    print(f"{rounds} rounds, {len(found)} tests failed", *found, sep="\n  ", flush=True)
    return 1 if found else 0


def run(command: Sequence[str], limit_s: float) -> int:
    """Exit code of pytest; after `limit_s` it is interrupted, which counts as the end of its round."""
    environment = {**os.environ, "LUMREC_FUZZ": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(GRACE_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def failed(cache: Path) -> list[str]:
    """The tests that failed, as pytest's cache notes them."""
    file = cache / "v" / "cache" / "lastfailed"
    return sorted(json.loads(file.read_text())) if file.exists() else []


if __name__ == "__main__":
    sys.exit(fuzz(float(sys.argv[1]), sys.argv[2:]))
