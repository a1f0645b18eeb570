"""Counters of the simulated log: equal to counting in plain Python, and blind to what comes later."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.data.simulator import counters as simulator_counters
from lumrec.data.simulator import simulate as simulator
from lumrec.data.simulator.config import SimulatorConfig
from lumrec.data.simulator.counters import ItemCounters, pair_runs, user_counters
from lumrec.data.simulator.simulate import simulate

NUM_ITEMS, NUM_DAYS, NUM_USERS = 4, 5, 3
COUNTERS = [f"{of}_{what}" for of in ("user", "user_item", "item") for what in ("impressions", "clicks")]


def counted(user_E: np.ndarray, item_E: np.ndarray, day_E: np.ndarray, click_E: np.ndarray, folder: Path) -> np.ndarray:
    """All counters [E, 6] of events in order of (user, time), as the simulator makes them."""
    count_U = np.bincount(user_E, minlength=NUM_USERS)
    runs = pair_runs(user_E, item_E, NUM_ITEMS)
    one_E = np.ones(len(user_E), np.int64)
    pairs = [runs.at_events(runs.before(values_E[runs.event_E])) for values_E in (one_E, click_E)]
    items = ItemCounters(NUM_ITEMS, NUM_DAYS, folder)
    items.add(item_E, day_E, click_E)
    items.sum_up()
    return np.stack([*user_counters(count_U, click_E), *pairs, *items.before(item_E, day_E)], axis=1)


@st.composite
def logs(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    """user, item, day and click of at most 30 events, in order of user and day; some users may have none."""
    rows = draw(
        st.lists(
            st.tuples(
                st.integers(0, NUM_USERS - 1),
                st.integers(0, NUM_DAYS - 1),
                st.integers(0, NUM_ITEMS - 1),
                st.booleans(),
            ),
            min_size=1,
            max_size=30,
        )
    )
    user, day, item, click = zip(*sorted(rows, key=lambda row: row[:2]), strict=True)
    return np.array(user, np.int32), np.array(item, np.int32), np.array(day), np.array(click)


@settings(max_examples=60, deadline=None)
@given(logs(), st.data())
def test_a_label_changes_no_counter_of_its_event_or_an_earlier_one(
    tmp_path_factory: pytest.TempPathFactory, log: tuple[np.ndarray, ...], data: st.DataObject
):
    user_E, item_E, day_E, click_E = log
    event = data.draw(st.integers(0, len(user_E) - 1))
    changed_E = click_E.copy()
    changed_E[event] = ~changed_E[event]
    folder = tmp_path_factory.mktemp("flip")
    before, after = (counted(user_E, item_E, day_E, clicks_E, folder) for clicks_E in (click_E, changed_E))
    later_E = day_E > day_E[event]
    later_E |= (user_E == user_E[event]) & (np.arange(len(user_E)) > event)
    assert (before[~later_E] == after[~later_E]).all()
    # and it does change those that should know it
    of_user = (user_E == user_E[event]) & (np.arange(len(user_E)) > event)
    of_item = (item_E == item_E[event]) & (day_E > day_E[event])
    change = np.abs(after.astype(int) - before.astype(int))
    assert (change[:, [0, 2, 4]] == 0).all()  # impressions have no label
    assert (change[:, 1] == of_user).all()
    assert (change[:, 3] == (of_user & (item_E == item_E[event]))).all()
    assert (change[:, 5] == of_item).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_counters_of_a_log_equal_counting_its_earlier_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
):
    monkeypatch.setattr(simulator, "EVENTS_PER_BLOCK", 500)  # several blocks share the counters of items
    config = SimulatorConfig(num_users=80, num_items=30, events_per_user=25, days=9, repeat_share=0.3)
    log = simulate(config, seed=seed, scratch=tmp_path).events.collect()
    assert len(list((tmp_path / "events").iterdir())) == 4
    day_us = 86_400_000_000
    counts: Counter = Counter()
    yesterday: Counter = Counter()
    today = -1
    # one clock for all users; columns of what is expected, by order
    for row in log.sort("time_us", "order").iter_rows(named=True):
        user, item, day = row["user_id"], row["item_id"], row["time_us"] // day_us
        if day != today:
            yesterday, today = counts.copy(), day
        pair = (user, item)
        expected = (
            counts["shown", user], counts["clicked", user], counts["shown", pair], counts["clicked", pair],
            yesterday["item shown", item], yesterday["item clicked", item],
        )  # fmt: skip
        assert tuple(row[name] for name in COUNTERS) == expected
        for key in (user, pair):
            counts["shown", key] += 1
            counts["clicked", key] += int(row["label"])
        counts["item shown", item] += 1
        counts["item clicked", item] += int(row["label"])
    assert (log[COUNTERS].max().to_numpy() > 3).all()


def test_blocks_may_come_in_any_order_and_from_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(simulator_counters, "CHUNK_CELLS", 1)  # sums go item by item
    rng = np.random.default_rng(0)
    blocks = [
        (rng.integers(0, 50, 400), rng.integers(0, 20, 400), rng.random(400) < 0.4) for _ in range(12)
    ]  # item, day, click
    results = []
    for number, (order, threads) in enumerate(((range(12), 1), (reversed(range(12)), 4))):
        folder = tmp_path / str(number)
        folder.mkdir()
        counters = ItemCounters(50, 20, folder)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(counters.add, *zip(*(blocks[place] for place in order), strict=True)))
        counters.sum_up()
        item_N, day_N = np.repeat(np.arange(50), 20), np.tile(np.arange(20), 50)
        results.append(np.stack(counters.before(item_N, day_N)))
    assert (results[0] == results[1]).all()
    item_E, day_E, click_E = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    log = pl.DataFrame({"item": item_E, "day": day_E, "click": click_E})
    for item, day in ((0, 0), (7, 3), (49, 19)):
        past = log.filter((pl.col("item") == item) & (pl.col("day") < day))
        assert results[0][:, item * 20 + day].tolist() == [len(past), past["click"].sum()]


def test_runs_of_one_event_and_of_many():
    runs = pair_runs(np.zeros(1, np.int32), np.zeros(1, np.int32), 1)
    assert runs.before(np.ones(1, np.int64)).tolist() == [0]
    user_E, item_E = np.array([0, 0, 0, 1, 1], np.int32), np.array([2, 0, 2, 2, 2], np.int32)
    runs = pair_runs(user_E, item_E, 3)
    assert runs.at_events(runs.before(np.array([1, 1, 1, 1, 1]))).tolist() == [0, 0, 1, 0, 1]
