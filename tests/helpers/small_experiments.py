"""A whole small experiment: prepared data, one LUM of all users and two of a fold each, all trained for real."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from shop_log import shop_log
from tiny_knowledge import WORDS as TINY

from lumrec.experiments.config import load
from lumrec.stages.registry import STAGES

WORDS = [*TINY, "query.tokens_per_pack=600"]


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds tiny-prepare, tiny-pretrain, tiny-pretrain-0of2 and tiny-pretrain-1of2; not to be changed."""
    runs = tmp_path_factory.mktemp("trained") / "runs"
    for words in ([], ["fold=0/2"], ["fold=1/2"]):
        STAGES["pretrain"].run(load(None, [*WORDS, f"runs_dir={runs}", *words]))
    return runs


@pytest.fixture
def experiment(trained_runs: Path, tmp_path: Path):
    """Gives the config of `key=value` words in a copy of the trained runs that the test may change."""
    runs = tmp_path / "runs"
    shutil.copytree(trained_runs, runs)
    return lambda *words: load(None, [*WORDS, f"runs_dir={runs}", *words])


LOG_WORDS = [
    "name=shop",
    "data.source=log",
    "data.label={column: clicked, at_least: 1}",
    "data.split={kind: time, times: ['2023-11-20T22:13:20', '2023-11-21T22:13:20']}",
    "schema.features={item_id: {role: item}, feedback: {role: condition, wish: true}}",
    "model.dim=16",
    "model.max_events=8",
    "pretrain.packing.events_per_pack=256",
    "pretrain.train.max_steps=3",
    "query.tokens_per_pack=600",
]


@pytest.fixture(scope="session")
def trained_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data monday and tuesday of the shop's log, which is beside it, and the LUM of Monday: shop-pretrain."""
    runs = tmp_path_factory.mktemp("shop") / "runs"
    for name in ("monday", "tuesday"):
        log = runs.with_name(f"{name}.csv")
        shop_log(tuesday=name == "tuesday").write_csv(log)
        words = [*LOG_WORDS, f"data.log.events={log}", f"runs_dir={runs}", f"run={name}"]
        STAGES["prepare"].run(load(None, words))
    STAGES["pretrain"].run(load(None, [*LOG_WORDS, f"runs_dir={runs}", "inputs.prepared=monday"]))
    return runs


@pytest.fixture
def shop(trained_shop: Path, tmp_path: Path):
    """Gives the config of `key=value` words in a copy of the shop's runs that the test may change."""
    runs = tmp_path / "runs"
    shutil.copytree(trained_shop, runs)
    return lambda *words: load(None, [*LOG_WORDS, f"runs_dir={runs}", *words])
