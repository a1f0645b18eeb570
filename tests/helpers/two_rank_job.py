"""One job of two gloo processes, run once for all tests that need it."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def two_ranks(forks, tmp_path_factory) -> Path:
    """The folder of the runs that two_ranks.py made under torchrun's environment variables."""
    folder = tmp_path_factory.mktemp("two-ranks")
    forks.run_script(Path(__file__).with_name("two_ranks.py"), str(folder), world_size=2)
    return folder
