"""What tests of several folders share: a small simulated log, prepared, and MovieLens-1M where this machine has it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lumrec.data.prepared import PreparedData


@pytest.fixture(scope="session")
def tiny_words() -> list[str]:
    """key=value words for a run that takes seconds: a simulated log and a small LUM and ranker."""
    return [
        "name=tiny",
        "data.source=simulator",
        "data.split.kind=user",
        "data.simulator.num_users=120",
        "data.simulator.num_items=60",
        "data.simulator.events_per_user=20",
        "model.dim=16",
        "model.num_layers=1",
        "model.max_events=32",
        "pretrain.packing.events_per_pack=512",
        "pretrain.train.epochs=1",
        "pretrain.train.log_every=1",
        "rank.batch_size=512",
        "rank.max_history=10",
        "rank.hidden_dims=[16]",
        "rank.train.epochs=2",
        "rank.train.log_every=2",
    ]


@pytest.fixture(scope="session")
def tiny_prepared(tiny_words: list[str], tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The small simulated log, prepared; neither it nor its folder is to be written to."""
    from lumrec.config import load
    from lumrec.data.prepare import run
    from lumrec.data.prepared import PreparedData

    runs = tmp_path_factory.mktemp("tiny")
    run(load(None, [*tiny_words, f"runs_dir={runs}"]))
    return PreparedData.open(runs / "tiny-prepare")


@pytest.fixture(scope="session")
def ml1m() -> Path:
    """The folder of MovieLens-1M as published; skips where it is not on this machine."""
    root = os.environ.get("LUMREC_DATA", "")
    folder = Path(root or Path.home() / ".cache" / "lumrec") / "ml-1m"
    if not (folder / "ratings.dat").is_file():
        pytest.skip(f"MovieLens-1M is not in {folder}; set LUMREC_DATA to the folder that holds ml-1m")
    return folder
