"""A whole small experiment: prepared data, one LUM of all users and two of a fold each, all trained for real."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lumrec.config import load
from lumrec.data import prepare
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


DAY, START = 86400, 1_700_000_000
SHOP_USERS = [f"a-key-that-is-found-by-looking-for-it-{user}" if user in (5, 20) else str(user) for user in range(40)]
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


def shop_log(*, tuesday: bool) -> pl.DataFrame:
    """Events of 40 users over eight days on Monday; on Tuesday, nine days of most users, and what else may change.

    Training ends with day 6, so all of this is behind it: users 0 … 9 have new events, user 12 an event corrected and
    user 13 one that came late; "gone" is in the log no more, and "new" is new.
    """
    rng = np.random.default_rng(0)
    count = 40 * 12
    events = _events(
        [user for user in SHOP_USERS for _ in range(12)],
        rng.integers(0, 30, count),
        rng.integers(0, 8 * DAY, count),
        rng.integers(0, 2, count),
    )
    if not tuesday:
        return pl.concat([events, _events(["gone", "gone"], [3, 4], [7 * DAY + 5, 7 * DAY + 9], [1, 0])])
    last = (pl.col("user_id") == "12") & (pl.col("timestamp") == pl.col("timestamp").max().over("user_id"))
    corrected = events.with_columns(clicked=pl.when(last).then(1 - pl.col("clicked")).otherwise("clicked"))
    assert not corrected.equals(events) and events.filter(last)["timestamp"].min() > START + 6 * DAY
    users = ["new", "new", "13", *SHOP_USERS[:10]]
    times = [8 * DAY + 5, 8 * DAY + 9, 7 * DAY + 3, *range(8 * DAY, 8 * DAY + 10)]
    return pl.concat([corrected, _events(users, rng.integers(0, 30, 13), times, [1, 0] + [1] * 11)])


def _events(user, item, seconds, clicked) -> pl.DataFrame:
    item, seconds = [str(number) for number in item], START + np.asarray(seconds)
    return pl.DataFrame({"user_id": user, "item_id": item, "timestamp": seconds, "clicked": np.asarray(clicked)})


@pytest.fixture(scope="session")
def trained_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds monday.csv, tuesday.csv, the data monday and tuesday made of them, and the LUM of Monday: shop-pretrain."""
    runs = tmp_path_factory.mktemp("shop") / "runs"
    runs.mkdir()
    for name in ("monday", "tuesday"):
        shop_log(tuesday=name == "tuesday").write_csv(runs / f"{name}.csv")
        words = [*LOG_WORDS, f"data.log.events={runs}/{name}.csv", f"runs_dir={runs}", f"run={name}"]
        prepare.run(load(None, words))
    pretrain.run(load(None, [*LOG_WORDS, f"runs_dir={runs}", "inputs.prepared=monday"]))
    return runs


@pytest.fixture
def shop(trained_shop: Path, tmp_path: Path):
    """Gives the config of `key=value` words in a copy of the shop's runs that the test may change."""
    runs = tmp_path / "runs"
    shutil.copytree(trained_shop, runs)
    return lambda *words: load(None, [*LOG_WORDS, f"runs_dir={runs}", *words])
