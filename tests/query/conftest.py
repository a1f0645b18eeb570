"""A whole small experiment: prepared data, one LUM of all users and two of a fold each, all trained for real."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lumrec.config import load
from lumrec.train import pretrain

WORDS = [
    "name=tiny",
    "data.source=simulator",
    "data.simulator.num_users=60",
    "data.simulator.num_items=120",
    "data.simulator.events_per_user=30",
    "model.dim=16",
    "model.max_events=16",
    "pretrain.train.max_steps=4",
    "pretrain.packing.events_per_pack=256",
    "query.tokens_per_pack=600",
]


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds tiny-prepare, tiny-pretrain, tiny-pretrain-0of2 and tiny-pretrain-1of2; not to be changed."""
    runs = tmp_path_factory.mktemp("trained") / "runs"
    for words in ([], ["fold=0/2"], ["fold=1/2"]):
        pretrain.run(load(None, [*WORDS, f"runs_dir={runs}", *words]))
    return runs


@pytest.fixture
def experiment(trained_runs: Path, tmp_path: Path):
    """Gives the config of `key=value` words in a copy of the trained runs that the test may change."""
    runs = tmp_path / "runs"
    shutil.copytree(trained_runs, runs)
    return lambda *words: load(None, [*WORDS, f"runs_dir={runs}", *words])
