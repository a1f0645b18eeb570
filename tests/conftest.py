"""What tests of several folders share: how examples are drawn, a small simulated log, and MovieLens-1M where it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from forks import ForkServer
from hypothesis import HealthCheck, Phase, settings

from lumrec.stages.registry import STAGES

if TYPE_CHECKING:
    from lumrec.data.prepared import PreparedData

pytest_plugins = [
    "published_logs",
    "small_bundle",
    "small_experiments",
    "production",
    "two_rank_job",
    "stages_in_forks",
]
pytest_plugins += ["redis_servers"]

# `make test` draws the same examples on every machine, and does not shrink one that fails: that takes minutes.
# `make fuzz` (tests/fuzz.py) draws other examples, FUZZ_FACTOR times as many, and shrinks those that fail.
FUZZ, FUZZ_FACTOR = bool(os.environ.get("LUMREC_FUZZ")), 5
if FUZZ:
    settings.register_profile(
        "lumrec", print_blob=True, suppress_health_check=list(HealthCheck), deadline=None, database=None
    )
else:
    phases, too_slow = [Phase.explicit, Phase.generate], [HealthCheck.too_slow]
    settings.register_profile(
        "lumrec", derandomize=True, phases=phases, suppress_health_check=too_slow, deadline=None, database=None
    )
settings.load_profile("lumrec")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With LUMREC_FUZZ, more examples than a test itself asks for, others each time."""
    tests = {test for item in items if hasattr(test := getattr(item, "obj", None), "hypothesis")} if FUZZ else set()
    for test in tests:
        asked = test._hypothesis_internal_use_settings  # a number in a test's own @settings goes over any profile's
        test._hypothesis_internal_use_settings = settings(
            asked,
            max_examples=FUZZ_FACTOR * asked.max_examples,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
        )


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
    from lumrec.data.prepared import PreparedData
    from lumrec.experiments.config import load

    runs = tmp_path_factory.mktemp("tiny")
    STAGES["prepare"].run(load(None, [*tiny_words, f"runs_dir={runs}"]))
    return PreparedData.open(runs / "tiny-prepare")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts runs of one or several processes in tens of milliseconds."""
    server = ForkServer(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def ml1m() -> Path:
    """The folder of MovieLens-1M as published; skips where it is not on this machine."""
    root = os.environ.get("LUMREC_DATA", "")
    folder = Path(root or Path.home() / ".cache" / "lumrec") / "ml-1m"
    if not (folder / "ratings.dat").is_file():
        pytest.skip(f"MovieLens-1M is not in {folder}; set LUMREC_DATA to the folder that holds ml-1m")
    return folder
