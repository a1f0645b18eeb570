"""A production checkpoint that lumrec had no part in, made once."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "train"), str(Path(__file__).resolve().parent)]

from forks import ForkServer  # noqa: E402


@pytest.fixture(scope="session")
def production(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What production_dlrm.py left, under torchrun on two ranks; not a byte of it may change."""
    folder = tmp_path_factory.mktemp("production")
    forks.run_script(Path(__file__).with_name("production_dlrm.py"), str(folder), world_size=2)
    before = digests(folder)
    yield folder
    assert digests(folder) == before


def digests(folder: Path) -> dict[str, str]:
    """Checksum of every file below a folder."""
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="session")
def warm_forks(forks: ForkServer) -> ForkServer:
    """The fork server under the name that these tests know it by."""
    return forks
