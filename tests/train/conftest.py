"""One job of two gloo processes, run once for all tests that need it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory) -> Path:
    """The folder of the runs that tests/train/two_ranks.py made under torchrun's environment variables."""
    folder = tmp_path_factory.mktemp("two-ranks")
    script = Path(__file__).resolve().with_name("two_ranks.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
