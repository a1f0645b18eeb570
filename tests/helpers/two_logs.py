"""A simulated log and the same log two weeks later, for the tests of continual training.

By then there are more events, items and users, and the scenario "voice"; a LUM can read one more condition (`category`)
and one more feature of items (`price_bucket`).
"""

import json
from pathlib import Path
from typing import Any

import polars as pl
import torch

from lumrec.batches.windows import Windows, behind
from lumrec.data.prepared import PreparedData
from lumrec.data.simulator.config import SimulatorConfig
from lumrec.data.simulator.simulate import simulate
from lumrec.experiments.config import Config, load
from lumrec.query.group_query import GroupQuery, encode_items

ASKED = [{"feedback": "like"}, {"feedback": "dislike", "scenario": "home"}, {}]
FEATURES = {
    "item_id": {"role": "item"},
    "categories": {"role": "item", "kind": "multi"},
    "feedback": {"role": "condition", "wish": True},
    "scenario": {"role": "condition"},
    "clicked": {"role": "feedback", "column": "feedback"},
}
# In another order, with a condition on a table that is there and an item feature on a new one.
GROWN_FEATURES = {
    "category": {"role": "condition", "table": "categories"},
    "price_bucket": {"role": "item"},
    **dict(reversed(FEATURES.items())),
    "query": {"role": "condition", "kind": "multi"},
}
TABLES = {"item_id": {"width": 16}, "categories": {"width": 8}}
# Name of the experiment → its log and its features.
EXPERIMENTS = {"before": ("before", FEATURES), "after": ("after", FEATURES), "grown": ("after", GROWN_FEATURES)}
MODEL = {"dim": 16, "num_layers": 1, "max_events": 16}
PRETRAIN = {
    "select": "",
    "negatives": {"full": True},
    "packing": {"events_per_pack": 256, "condition_dropout": 0.0},
    "train": {"epochs": 3, "log_every": 4, "optimizer": {"dense_lr": 0.01}},
}


def write_logs(folder: Path) -> None:
    """Events and items of each log; the later one begins with the same events."""
    (scratch := folder / "scratch").mkdir()
    config = SimulatorConfig(num_users=60, num_items=80, events_per_user=20, days=30, late_items=0.3)
    raw = simulate(config, seed=1, scratch=scratch, threads=1)
    assert raw.items is not None
    events = raw.events.rename({"time_us": "timestamp"}).drop("order", "probability").collect()
    cut = events["timestamp"].quantile(0.6)
    is_later, is_voice = pl.col("timestamp") >= cut, pl.col("item_id") % 3 == 0
    events = events.with_columns(
        pl.when(is_later & is_voice)
        .then(pl.lit("voice"))
        .otherwise(pl.col("scenario").cast(pl.String))
        .alias("scenario")
    )
    for name, log in (("before", events.filter(~is_later)), ("after", events)):
        log.write_parquet(folder / f"{name}.parquet")
        items = raw.items.filter(pl.col("item_id").is_in(log["item_id"].implode())).collect()
        items.write_parquet(folder / f"{name}-items.parquet")


def config_of(folder: Path, name: str, *words: str) -> Config:
    """The config of an experiment; the later ones build on the vocabularies of "before" and go on from its LUM."""
    log, features = EXPERIMENTS[name]
    is_first = name == "before"
    files = {"events": str(folder / f"{log}.parquet"), "items": str(folder / f"{log}-items.parquet"), "time_unit": "us"}
    settings = {
        "data": {"source": "log", "log": files, "vocabulary_from": "" if is_first else "before-prepare"},
        "schema": {"tables": TABLES, "features": features},
        "model": MODEL,
        "pretrain": PRETRAIN | {"start_from": "" if is_first else "before-pretrain"},
    }
    sections = [f"{section}={json.dumps(values)}" for section, values in settings.items()]
    return load(None, [f"name={name}", f"runs_dir={folder / 'runs'}", *sections, *words])


def answers(
    lum: torch.nn.Module, builder: Any, before: PreparedData, asked: Any = ASKED
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a LUM of either log says of the users and items of `before`: o_BND after their last events there, e_ID."""
    data, max_events = builder.data, MODEL["max_events"]
    users = {key: number for number, key in enumerate(data.user_keys())}
    items = {key: number for number, key in enumerate(data.item_keys())}
    user_B = torch.tensor([users[key] for key in before.user_keys()])
    start_B = torch.from_numpy(data.user_offsets)[user_B]
    count_B = torch.from_numpy(before.user_offsets).diff()
    length_B = count_B.clamp(max=max_events - 1)
    windows = Windows(start_B + count_B - length_B, length_B, user_B)
    query = GroupQuery(lum, builder, asked, max_events=max_events)
    training = lum.training
    lum.eval()
    o_BND = query.answer(behind(windows))
    e_ID = encode_items(lum, builder)[torch.tensor([items[key] for key in before.item_keys()])]
    lum.train(training)
    return o_BND, e_ID
