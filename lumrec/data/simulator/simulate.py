"""A simulated interaction log whose click probabilities are known, so that the best possible AUC is known too.

Users have interests (favourite categories and a latent taste) that differ by scenario and drift; each session has a
focus; in the search scenario users type queries of several words; some impressions repeat earlier ones. Items have one
to three categories, a log-normal price and Zipf popularity, and some are launched while the log runs. Beside ids the
log has what an online model reads: counters of what was known before the event, and crosses. The click logit is in
users.py. The probability uses the hidden state (latent taste, focus), so a model can only exceed its AUC by chance.

    world (items, launches)
      └─ block of users ─▶ draft of numbers ─▶ item counts by day     first pass: blocks in any order, in threads
           └─ draft + item counts of earlier days + texts ─▶ events of the log   second pass

Only a few blocks are in memory at a time, whatever the number of users. The log depends only on config and seed.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from lumrec.data.config import DataConfig
from lumrec.data.schema import FeatureConfig, SchemaConfig, TableConfig
from lumrec.data.simulator.config import SimulatorConfig
from lumrec.data.simulator.counters import ItemCounters
from lumrec.data.simulator.users import (
    COMMON_WORDS,
    NUM_SEGMENTS,
    WORDS_PER_CATEGORY,
    query_words,
    scenario_names,
    simulate_users,
)
from lumrec.data.simulator.world import DAY_S, NUM_PRICES, START_S, World, category_names, item_frame, make_world
from lumrec.data.sources.raw_log import RawLog
from lumrec.metrics.ranking import auc
from lumrec.run import limits

EVENTS_PER_BLOCK = 1 << 18  # about as many are simulated together; another number gives another log for a seed
MOST_THREADS = 8  # each holds a block, about 100 MB

DEFAULT_SCHEMAS = {
    "simulator": SchemaConfig(
        tables={"item_id": TableConfig(32), "categories": TableConfig(16)},
        features={
            "item_id": FeatureConfig("item"),
            "categories": FeatureConfig("item", kind="multi"),
            "price_bucket": FeatureConfig("item"),
            "price": FeatureConfig("item", kind="dense", scale="log"),
            "feedback": FeatureConfig("condition", wish=True),
            "scenario": FeatureConfig("condition"),
            "query": FeatureConfig("condition", kind="multi"),
            "category": FeatureConfig("condition", table="categories"),
            "clicked": FeatureConfig("feedback", column="feedback"),
            "segment": FeatureConfig("user"),
            "hour": FeatureConfig("context"),
            "weekday": FeatureConfig("context"),
            "user_impressions": FeatureConfig("context", kind="dense", scale="log"),
            "user_clicks": FeatureConfig("context", kind="dense", scale="log"),
            "user_item_impressions": FeatureConfig("context", kind="dense", scale="log"),
            "user_item_clicks": FeatureConfig("context", kind="dense", scale="log"),
            "item_impressions": FeatureConfig("context", kind="dense", scale="log"),
            "item_clicks": FeatureConfig("context", kind="dense", scale="log"),
            "segment_category": FeatureConfig("context"),
            "scenario_price": FeatureConfig("context"),
        },
    )
}


@dataclass(frozen=True)
class Block:
    """One block of users, and the files of its draft, events and users."""

    index: int
    first_user: int
    num_users: int
    draft: Path
    events: Path
    users: Path


def read(data: DataConfig, *, seed: int, scratch: Path) -> RawLog:
    """The simulated log of `data.simulator`, as Parquet files in `scratch`; see `simulate`."""
    return simulate(data.simulator, seed=seed, scratch=scratch)


def simulate(config: SimulatorConfig, *, seed: int, scratch: Path, threads: int = 0) -> RawLog:
    """The simulated log, as Parquet files in `scratch`; the same for the same config and seed.

    threads: blocks that are simulated at a time; 0 = one for each core this process may use, at most MOST_THREADS.
    Raises UserError for settings outside their limits.
    """
    limits.check(config, "data.simulator")
    world = make_world(config, np.random.default_rng([seed, 0]))
    blocks = _blocks(config, scratch)
    counters = ItemCounters(config.num_items, config.days, scratch)

    def first_pass(block: Block) -> int:
        draft = simulate_users(config, world, block.num_users, np.random.default_rng([seed, 1, block.index]))
        counters.add(draft["item"].to_numpy(), draft["second"].to_numpy() // DAY_S, draft["click"].to_numpy())
        draft.write_ipc(block.draft, compression="uncompressed")
        return len(draft)

    def second_pass(block: Block, first_order: int) -> None:
        draft = pl.read_ipc(block.draft)
        _write(finished(config, world, counters, draft, block.first_user, first_order), block.events)
        users = draft.filter(pl.col("user_impressions") == 0)  # the first event of each
        users = users.select(pl.col("user").cast(pl.Int64).alias("user_id") + block.first_user, "segment")
        _write(users, block.users)
        block.draft.unlink()

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(threads or min(cores, MOST_THREADS)) as pool:
        sizes = list(pool.map(first_pass, blocks))
        counters.sum_up()
        list(pool.map(second_pass, blocks, (np.cumsum(sizes) - sizes).tolist()))
    return RawLog(
        events=pl.scan_parquet([block.events for block in blocks]),
        items=item_frame(world.items, config.num_categories).lazy(),
        users=pl.scan_parquet([block.users for block in blocks]),
        files=[],
        note=f"a simulated log (seed {seed})",
        extra={"simulated": True},
    )


def finished(
    config: SimulatorConfig,
    world: World,
    counters: ItemCounters,
    draft: pl.DataFrame,
    first_user: int,
    first_order: int,
) -> pl.DataFrame:
    """The events of the log from the draft of `simulate_users`: keys, texts, counters of items, crosses."""
    item_E, second_E = draft["item"].to_numpy(), draft["second"].to_numpy()
    scenario_E, segment_E = draft["scenario"].to_numpy(), draft["segment"].to_numpy()
    impressions_E, clicks_E = counters.before(item_E, second_E // DAY_S)
    main_E = world.items.category_I3[:, 0].take(item_E)
    bucket_E = world.items.bucket_I.take(item_E)
    scenarios, categories = scenario_names(config.num_scenarios), category_names(config.num_categories)
    segment_category = [f"{segment} {category}" for segment in range(NUM_SEGMENTS) for category in categories]
    scenario_price = [f"{scenario} {bucket}" for scenario in scenarios for bucket in range(NUM_PRICES)]
    return draft.select(
        (pl.col("user").cast(pl.Int64) + first_user).alias("user_id"),
        pl.col("item").cast(pl.Int64).alias("item_id"),
        ((pl.col("second").cast(pl.Int64) + START_S) * 1_000_000).alias("time_us"),
        pl.int_range(pl.len(), dtype=pl.Int64).alias("order") + first_order,
        pl.col("click").cast(pl.Float32).alias("label"),
        "probability",
        _names("scenario", scenario_E, scenarios),
        _query_lists(draft["query"].to_numpy(), config.num_categories),
        _names("category", main_E, categories),
        "user_impressions",
        "user_clicks",
        "user_item_impressions",
        "user_item_clicks",
        pl.Series("item_impressions", impressions_E),
        pl.Series("item_clicks", clicks_E),
        _names("segment_category", segment_E * np.int64(config.num_categories) + main_E, segment_category),
        _names("scenario_price", scenario_E * np.int64(NUM_PRICES) + bucket_E, scenario_price),
    )


def click_facts(train: pl.DataFrame, test: pl.DataFrame, num_items: int) -> dict[str, float]:
    """best_auc: AUC of the true probabilities on the test events; popularity_auc: of each item's clicks in training.

    NaN where the test events hold one class only.
    """
    clicks_I = np.bincount(train["item"], weights=train["label"], minlength=num_items)
    label_E = test["label"].to_numpy()
    return {
        "best_auc": auc(label_E, test["probability"].to_numpy()),
        "popularity_auc": auc(label_E, clicks_I[test["item"].to_numpy()]),
    }


def _blocks(config: SimulatorConfig, scratch: Path) -> list[Block]:
    """Blocks of the same number of users (the last may have fewer), with the paths of their files."""
    for folder in ("drafts", "events", "users"):
        (scratch / folder).mkdir()
    size = max(1, EVENTS_PER_BLOCK // config.events_per_user)
    blocks = []
    for index, first in enumerate(range(0, config.num_users, size)):
        name = f"part-{index:06d}"
        events, users = (scratch / folder / f"{name}.parquet" for folder in ("events", "users"))
        num_users = min(size, config.num_users - first)
        blocks.append(Block(index, first, num_users, scratch / "drafts" / f"{name}.arrow", events, users))
    return blocks


def _write(frame: pl.DataFrame, path: Path) -> None:
    frame.write_parquet(path, compression="lz4", statistics=False)


def _names(column: str, code_E: np.ndarray, names: list[str]) -> pl.Series:
    """A column of names, by their indices; as Enum, which needs a tenth of the memory of strings."""
    return pl.Series(column, code_E.astype(np.uint32)).cat.to(pl.Enum(names))


def _query_lists(query_E: np.ndarray, num_categories: int) -> pl.Series:
    """The words of each query (list of str), an empty list where no query was typed."""
    own = [f"word-{word}" for word in range(num_categories * WORDS_PER_CATEGORY)]
    common = [f"common-{word}" for word in range(COMMON_WORDS, 0, -1)]  # numbered -1, -2, … from the end
    word_W, length_E = query_words(query_E)
    words = pl.Series([*own, *common]).gather(np.where(word_W < 0, word_W + len(own) + len(common), word_W))
    offsets = np.concatenate([[0], np.cumsum(length_E)])
    values = words.to_arrow(compat_level=pl.CompatLevel.newest())  # as views, which are not copied
    return pl.Series("query", pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values))
