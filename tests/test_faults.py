"""A sample of the points at which tests/faults.py stops real commands; `python tests/faults.py` walks them all."""

import subprocess
import sys
from pathlib import Path

SAMPLE = ["publish-small=4", "forget=4", "import=2", "prepare-overwrite=2", "refresh=1", "checkpoint=1"]


def test_a_command_that_was_stopped_anywhere_ends_the_same_when_it_is_run_again():
    walk = [sys.executable, str(Path(__file__).with_name("faults.py")), *SAMPLE]
    run = subprocess.run(walk, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert len(run.stdout.splitlines()) == len(SAMPLE) + 1, run.stdout
