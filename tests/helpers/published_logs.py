"""Small logs in the published layouts, made here, and a config with what the prepare stage reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lumrec.data.common import Common
from lumrec.data.config import DataConfig
from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData


def StageConfig(data: DataConfig, runs_dir: str, *, name: str = "test", **fields: object) -> Common:
    """What preparing reads."""
    return Common(data=data, runs_dir=runs_dir, name=name, **fields)  # type: ignore[arg-type]


MOVIES = [
    "1::Toy Story (1995)::Animation|Children's|Comedy",
    "2::Jumanji (1995)::Adventure|Children's|Fantasy",
    "10::Mis\xe9rables, Les (1995)::Drama|Musical",
    "7::No Year::Comedy",
    "99::Never Rated (2000)::Western",
]
USERS = ["1::F::1::10::48067", "2::M::56::16::70072", "10::M::25::15::55117", "11::M::25::15::55117"]


@pytest.fixture(scope="session")
def stage_config() -> Callable[..., Common]:
    """The config class itself, for fixtures that outlive one test."""
    return StageConfig


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Common]:
    """A config that prepares under the test's own folder; keywords replace its fields."""

    def make(data: DataConfig, **fields: object) -> Common:
        return StageConfig(**{"data": data, "runs_dir": str(tmp_path / "runs"), **fields})  # type: ignore[arg-type]

    return make


@pytest.fixture
def movielens_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a log in the layout of MovieLens-1M: `::` between the fields, latin-1."""

    def write(ratings: Sequence[str], movies: Sequence[str] = MOVIES, users: Sequence[str] = USERS) -> Path:
        folder = tmp_path / "ml-1m"
        folder.mkdir(exist_ok=True)
        for name, lines in (("ratings.dat", ratings), ("movies.dat", movies), ("users.dat", users)):
            (folder / name).write_bytes("".join(line + "\n" for line in lines).encode("latin-1"))
        return folder

    return write


@pytest.fixture
def open_log() -> Callable[[Common], PreparedData]:
    """Prepares what a config asks for, and opens it."""

    def run(config: Common) -> PreparedData:
        prepare(config, Path(config.runs_dir) / "prepared")
        return PreparedData.open(Path(config.runs_dir) / "prepared")

    return run


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No data set on this machine; gives back the cache folder."""
    monkeypatch.delenv("LUMREC_DATA", raising=False)
    monkeypatch.setenv("LUMREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
