"""A production checkpoint that lumrec had no part in, made once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from digests import digests
from forks import ForkServer


@pytest.fixture(scope="session")
def production(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What production_dlrm.py left, under torchrun on two ranks; not a byte of it may change."""
    folder = tmp_path_factory.mktemp("production")
    forks.run_script(Path(__file__).with_name("production_dlrm.py"), str(folder), world_size=2)
    before = digests(folder)
    yield folder
    assert digests(folder) == before
