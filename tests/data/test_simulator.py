"""The simulated log: its numbers are known, so they are checked against them."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lumrec.data.prepare import DataConfig, prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.simulator import SimulatorConfig, read


@pytest.fixture(scope="module")
def default_log() -> pl.DataFrame:
    return read(SimulatorConfig(), seed=0).events.collect()


@pytest.fixture(scope="module")
def default_data(tmp_path_factory: pytest.TempPathFactory, stage_config: type) -> PreparedData:
    path = tmp_path_factory.mktemp("simulated") / "prepared"
    prepare(stage_config(data=DataConfig(source="simulator"), runs_dir=str(path.parent)), path)
    return PreparedData.open(path)


def test_the_seed_decides_the_log():
    config = SimulatorConfig(num_users=50, num_items=30, events_per_user=10)
    first, again, other = read(config, seed=3), read(config, seed=3), read(config, seed=4)
    for name in ("events", "items", "users"):
        assert getattr(first, name).collect().equals(getattr(again, name).collect())
    assert not first.events.collect().equals(other.events.collect())


def test_clicks_follow_the_stated_probability(default_log: pl.DataFrame):
    p, y = default_log["probability"].to_numpy().astype(float), default_log["label"].to_numpy()
    assert 0 < p.min() < 0.05
    assert 0.9 < p.max() < 1
    for low in np.arange(0, 1, 0.1):
        inside = (p >= low) & (p < low + 0.1)
        error = np.sqrt((p[inside] * (1 - p[inside])).sum()) / inside.sum()
        assert abs(y[inside].mean() - p[inside].mean()) < 4 * error


def test_best_auc_is_that_of_the_probabilities_on_the_test_part(default_data: PreparedData):
    test = default_data.split == 2
    assert default_data.probability is not None
    facts = default_data.manifest["facts"]
    best = roc_auc_score(default_data.label[test], default_data.probability[test])
    assert facts["best_auc"] == pytest.approx(best, abs=1e-9)
    train = default_data.split == 0
    clicks = np.bincount(default_data.item[train], default_data.label[train], minlength=default_data.num_items)
    popularity = roc_auc_score(default_data.label[test], clicks[default_data.item[test]])
    assert facts["popularity_auc"] == pytest.approx(popularity, abs=1e-9)
    assert 0.78 < best < 0.83
    assert 0.62 < popularity < 0.68


def test_history_tells_what_a_user_will_click(default_data: PreparedData):
    """A model of earlier clicks of the same user in the item's categories beats one that knows the item alone."""
    item = default_data.item
    main = default_data.item_columns["categories"]
    assert main.offsets is not None
    category = main.values.numpy()[main.offsets.numpy()[:-1]][item]
    train, test = default_data.split == 0, default_data.split == 2
    label = default_data.label
    rate = (np.bincount(item[train], label[train], default_data.num_items) + 3.5) / (default_data.item_counts + 10)
    of_user = _rate_before(default_data.user, label)
    of_category = _rate_before(default_data.user * 100 + category, label)
    plain = np.log(rate[item])[:, None]
    with_history = np.column_stack([plain, of_user, of_category])
    auc = {}
    for name, features in (("item", plain), ("history", with_history)):
        model = LogisticRegression().fit(features[train], label[train])
        auc[name] = roc_auc_score(label[test], model.decision_function(features[test]))
    assert auc["item"] + 0.03 < auc["history"] < default_data.manifest["facts"]["best_auc"]


def _rate_before(group: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Smoothed share of clicks among the earlier events of the same group."""
    frame = pl.DataFrame({"group": group, "label": label}).with_columns(
        (pl.col("label").cum_sum() - pl.col("label")).over("group").alias("clicks"),
        pl.int_range(pl.len()).over("group").alias("shown"),
    )
    return ((frame["clicks"] + 0.36 * 4) / (frame["shown"] + 4)).to_numpy()


def test_shape_of_the_log(default_log: pl.DataFrame):
    per_user = default_log.group_by("user_id").len()["len"]
    assert per_user.len() == 2000
    assert 90 < per_user.mean() < 110
    assert per_user.max() > 4 * per_user.median()  # long-tailed
    shown = default_log.group_by("item_id").len().sort("len", descending=True)["len"].to_numpy()
    assert shown[: len(shown) // 10].sum() > 0.35 * shown.sum()  # popularity is skewed
    searches = default_log.filter(pl.col("scenario") == "search")
    assert default_log.filter(pl.col("scenario") != "search")["query"].list.len().max() == 0
    assert searches["query"].list.len().min() >= 1
    assert searches["query"].list.len().max() > 2
    assert default_log["scenario"].unique().sort().to_list() == ["home", "related", "search"]
    assert set(default_log["feedback"].unique()) == {"like", "dislike"}
    time = default_log.select(pl.col("timestamp").diff().over("user_id"))["timestamp"].drop_nulls()
    assert time.min() >= 0
    assert time.median() < 60
    assert (time > 3600).mean() == pytest.approx(1 / 12, abs=0.02)  # sessions
    items = read(SimulatorConfig(), seed=0).items.collect()
    lengths = items["categories"].list.len()
    assert (lengths.min(), lengths.max()) == (1, 3)
    assert items["categories"].list.n_unique().equals(lengths)
    main = dict(zip(items["item_id"], items["categories"].list.first()))
    assert [main[item] for item in default_log["item_id"].head(500)] == default_log["category"].head(500).to_list()


@settings(max_examples=12, deadline=None)
@given(
    st.builds(
        SimulatorConfig,
        num_users=st.integers(1, 5),
        num_items=st.integers(1, 5),
        events_per_user=st.integers(1, 4),
        num_scenarios=st.integers(1, 8),
        num_categories=st.integers(1, 20),
        latent_dim=st.integers(1, 3),
        session_events=st.integers(1, 3),
    ),
    st.integers(0, 2**31),
)
def test_any_small_config_makes_a_log(config: SimulatorConfig, seed: int):
    log = read(config, seed=seed)
    events = log.events.collect()
    assert events["user_id"].n_unique() == config.num_users
    assert events.null_count().sum_horizontal().item() == 0
    assert events["probability"].is_between(0, 1).all()
    assert set(events["item_id"]) <= set(log.items.collect()["item_id"])


def test_one_class_gives_no_auc(tmp_path: Path, stage_config: type):
    config = SimulatorConfig(num_users=20, num_items=10, events_per_user=20, bias=-80.0)
    result = prepare(stage_config(DataConfig("simulator", simulator=config), str(tmp_path)), tmp_path / "p")
    assert result["best_auc"] is None
    assert result["test_positive_rate"] == 0


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="data.simulator.num_items: got 0, expected at least 1"):
        read(SimulatorConfig(num_items=0), seed=0)


def test_blocks_of_users_do_not_depend_on_the_number_of_users():
    small, large = (
        SimulatorConfig(num_users=4096, events_per_user=2),
        SimulatorConfig(num_users=5000, events_per_user=2),
    )
    first = read(small, seed=1).events.collect()
    assert read(large, seed=1).events.collect().head(len(first)).equals(first)
    assert len(read(large, seed=1).users.collect()) == 5000


def test_it_is_fast_enough():
    """At least 300,000 events a second on an idle core; far fewer are asked here, where others may be at work."""
    start = time.perf_counter()
    events = read(replace(SimulatorConfig(), num_users=1000), seed=0).events.collect()
    assert len(events) / (time.perf_counter() - start) > 50_000
