"""The simulated log: its numbers are known, so they are checked against them."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lumrec.data.config import DataConfig
from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import validate
from lumrec.data.simulator import simulate as simulator
from lumrec.data.simulator.config import SimulatorConfig
from lumrec.data.simulator.simulate import DEFAULT_SCHEMAS, click_facts, read, simulate
from lumrec.data.sources.raw_log import RawLog

DAY_US = 86_400_000_000
SMALL = SimulatorConfig(num_users=120, num_items=40, events_per_user=20)


@pytest.fixture(scope="module")
def default_raw(tmp_path_factory: pytest.TempPathFactory) -> RawLog:
    return simulate(SimulatorConfig(), seed=0, scratch=tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def default_log(default_raw: RawLog) -> pl.DataFrame:
    return default_raw.events.collect()


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small logs are made in several blocks, of about 400 events each."""
    monkeypatch.setattr(simulator, "EVENTS_PER_BLOCK", 400)


@pytest.fixture
def make(tmp_path: Path):
    """Makes a log in a scratch folder of its own; gives back its events."""

    def events(config: SimulatorConfig, *, seed: int = 0, threads: int = 0) -> pl.DataFrame:
        return _raw(config, tmp_path, seed=seed, threads=threads).events.collect()

    return events


def _raw(config: SimulatorConfig, folder: Path, *, seed: int = 0, threads: int = 0) -> RawLog:
    scratch = folder / f"scratch-{time.monotonic_ns()}"
    scratch.mkdir()
    return simulate(config, seed=seed, scratch=scratch, threads=threads)


def test_the_log_keeps_the_contract_of_sources(tmp_path: Path, in_blocks: None):
    raw = read(DataConfig(source="simulator", simulator=SMALL), seed=3, scratch=tmp_path)
    schema = raw.events.collect_schema()
    assert {name: schema[name] for name in ("user_id", "item_id", "time_us", "order")} == dict.fromkeys(
        ("user_id", "item_id", "time_us", "order"), pl.Int64()
    )
    assert schema["label"] == schema["probability"] == pl.Float32
    assert schema["query"] == pl.List(pl.String)
    events = raw.events.collect()
    assert events["order"].to_list() == list(range(len(events)))
    assert set(events["label"].unique()) == {0.0, 1.0}
    assert raw.items is not None and raw.users is not None
    assert raw.items.collect()["item_id"].to_list() == list(range(SMALL.num_items))
    assert raw.users.collect()["user_id"].to_list() == list(range(SMALL.num_users))
    derived = {"feedback", "hour", "weekday"}  # convert makes them for every source
    for feature in validate(DEFAULT_SCHEMAS["simulator"]).features.values():
        frame = {"item": raw.items, "user": raw.users}.get(feature.role, raw.events)
        assert feature.column in {*frame.collect_schema().names(), *derived}


def test_the_seed_and_not_the_threads_decide_the_log(tmp_path: Path, in_blocks: None):
    first, again, alone, other = (
        _raw(SMALL, tmp_path, seed=seed, threads=threads) for seed, threads in ((3, 4), (3, 4), (3, 1), (4, 1))
    )
    assert len(list(tmp_path.glob("*/events/*.parquet"))) > 4 * 5  # several blocks each
    for name in ("events", "items", "users"):
        frame = getattr(first, name).collect()
        assert frame.equals(getattr(again, name).collect())
        assert frame.equals(getattr(alone, name).collect())
        assert not frame.equals(getattr(other, name).collect())


def test_drafts_do_not_stay(tmp_path: Path, in_blocks: None):
    _raw(SMALL, tmp_path)
    assert not list(tmp_path.glob("*/drafts/*"))


def test_clicks_follow_the_stated_probability(default_log: pl.DataFrame):
    p, y = default_log["probability"].to_numpy().astype(float), default_log["label"].to_numpy()
    assert 0 < p.min() < 0.05
    assert 0.9 < p.max() < 1
    seen, clicked = (default_log[f"user_item_{what}"].to_numpy() > 0 for what in ("impressions", "clicks"))
    for group in (np.ones(len(y), bool), ~seen, seen & ~clicked, clicked):
        for low in np.arange(0, 1, 0.1):
            inside = group & (p >= low) & (p < low + 0.1)
            error = np.sqrt((p[inside] * (1 - p[inside])).sum()) / max(inside.sum(), 1)
            assert abs(y[inside].sum() - p[inside].sum()) <= 4 * error * inside.sum()


def test_best_auc_is_far_from_popularity(default_log: pl.DataFrame):
    log = default_log.rename({"item_id": "item"}).with_columns(
        part=pl.int_range(pl.len()).over("user_id") / pl.len().over("user_id")
    )
    for train, test in (
        (log.filter(pl.col("part") < 0.8), log.filter(pl.col("part") >= 0.9)),
        (log.filter(pl.col("user_id") % 10 < 7), log.filter(pl.col("user_id") % 10 >= 7)),
    ):
        facts = click_facts(train, test, num_items=1000)
        assert facts["best_auc"] == pytest.approx(roc_auc_score(test["label"], test["probability"]), abs=1e-9)
        assert 0.78 < facts["best_auc"] < 0.84
        assert 0.6 < facts["popularity_auc"] < 0.68


def test_the_manifest_states_the_aucs_of_the_prepared_data(tmp_path: Path, stage_config: type):
    config = SimulatorConfig(num_users=150, num_items=100)
    data = DataConfig(source="simulator", simulator=config)
    prepare(stage_config(data=data, runs_dir=str(tmp_path)), tmp_path / "p")
    prepared = PreparedData.open(tmp_path / "p")
    facts, test, train = prepared.manifest["facts"], prepared.split == 2, prepared.split == 0
    assert prepared.probability is not None
    best = roc_auc_score(prepared.label[test], prepared.probability[test])
    assert facts["best_auc"] == pytest.approx(best, abs=1e-9)
    clicks = np.bincount(prepared.item[train], prepared.label[train], minlength=prepared.num_items)
    popularity = roc_auc_score(prepared.label[test], clicks[prepared.item[test]])
    assert facts["popularity_auc"] == pytest.approx(popularity, abs=1e-9)


def test_one_class_gives_no_auc(tmp_path: Path, stage_config: type):
    config = SimulatorConfig(num_users=20, num_items=10, events_per_user=20, bias=-80.0)
    result = prepare(stage_config(DataConfig("simulator", simulator=config), str(tmp_path)), tmp_path / "p")
    assert result["best_auc"] is None
    assert result["test_positive_rate"] == 0


def test_history_tells_what_a_user_will_click(default_log: pl.DataFrame):
    """Earlier clicks of the same user, in all and in the item's category, add to what is known of the item; the online
    counters add more, and nothing passes the true probabilities."""
    log = default_log.with_columns(pl.col("category").to_physical().alias("c"))
    part = log.select(pl.int_range(pl.len()).over("user_id") / pl.len().over("user_id")).to_series().to_numpy()
    train, test = part < 0.8, part >= 0.9
    item, label = log["item_id"].to_numpy(), log["label"].to_numpy()
    rate = (np.bincount(item[train], label[train], 1000) + 3.2) / (np.bincount(item[train], minlength=1000) + 10)
    plain = np.log(rate[item])[:, None]
    history = np.column_stack([plain, _rate_before(log, ["user_id"]), _rate_before(log, ["user_id", "c"])])
    online = np.log1p(log.select("^(user|item|user_item)_(clicks|impressions)$").to_numpy().astype(float))
    auc = {}
    for name, features in (("item", plain), ("history", history), ("all", np.column_stack([history, online]))):
        model = LogisticRegression(max_iter=400).fit(features[train], label[train])
        auc[name] = roc_auc_score(label[test], model.decision_function(features[test]))
    best = roc_auc_score(label[test], log["probability"].to_numpy()[test])
    assert auc["item"] + 0.03 < auc["history"] < auc["history"] + 0.003 < auc["all"] < best - 0.02


def _rate_before(log: pl.DataFrame, group: list[str]) -> np.ndarray:
    """Smoothed share of clicks among the earlier events of the same group."""
    frame = log.select(
        (pl.col("label").cum_sum() - pl.col("label")).over(group).alias("clicks"),
        pl.int_range(pl.len()).over(group).alias("shown"),
    )
    return ((frame["clicks"] + 0.33 * 4) / (frame["shown"] + 4)).to_numpy()


def test_shape_of_the_log(default_raw: RawLog, default_log: pl.DataFrame):
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
    assert default_log["scenario"].cast(pl.String).unique().sort().to_list() == ["home", "related", "search"]
    gap_s = default_log.select(pl.col("time_us").diff().over("user_id") / 1e6).to_series().drop_nulls()
    assert gap_s.min() >= 1  # so that "before" is never a matter of rows within a second
    assert gap_s.median() < 60
    assert (gap_s > 3600).mean() == pytest.approx(1 / 12, abs=0.02)  # sessions
    assert default_raw.items is not None
    items = default_raw.items.collect()
    lengths = items["categories"].list.len()
    assert (lengths.min(), lengths.max()) == (1, 3)
    assert items["categories"].list.n_unique().equals(lengths)
    main = dict(zip(items["item_id"], items["categories"].list.first(), strict=True))
    head = default_log.head(500)
    assert [main[item] for item in head["item_id"]] == head["category"].to_list()


def test_words_of_a_query_tell_the_category_searched_for(default_log: pl.DataFrame):
    words = default_log.select("item_id", "category", pl.col("query").list.first().alias("word")).drop_nulls("word")
    place = words["word"].str.strip_prefix("word-").cast(pl.Int64) // simulator.WORDS_PER_CATEGORY
    same = (words["category"].to_physical().cast(pl.Int64) == place).mean()
    assert same > 3 / 16  # far more often than by chance
    common = default_log["query"].explode().drop_nulls().str.starts_with("common-")
    assert 0.05 < common.mean() < 0.2


def test_crosses_are_made_of_their_parts(default_raw: RawLog, default_log: pl.DataFrame):
    assert default_raw.items is not None and default_raw.users is not None
    log = default_log.join(default_raw.items.collect(), on="item_id").join(default_raw.users.collect(), on="user_id")
    assert log.select((pl.format("{} {}", "segment", "category") == pl.col("segment_category")).all()).item()
    assert log.select((pl.format("{} {}", "scenario", "price_bucket") == pl.col("scenario_price")).all()).item()
    assert log["segment_category"].n_unique() == 4 * 16


def test_prices_are_log_normal_and_buckets_are_fifths(default_raw: RawLog):
    assert default_raw.items is not None
    items = default_raw.items.collect()
    logs = items["price"].log()
    assert logs.mean() == pytest.approx(np.log(20), abs=0.1)
    assert logs.std() == pytest.approx(0.8, abs=0.06)
    assert abs(logs.skew()) < 0.25
    fifths = items.group_by("price_bucket").agg(pl.len(), low=pl.col("price").min(), high=pl.col("price").max())
    fifths = fifths.sort("price_bucket")
    assert fifths["len"].to_list() == [200] * 5
    assert (fifths["low"][1:] >= fifths["high"][:-1]).all()


def test_items_are_not_shown_before_their_launch(default_raw: RawLog, default_log: pl.DataFrame):
    assert default_raw.items is not None
    log = default_log.join(default_raw.items.collect(), on="item_id")
    begin = 1_704_067_200_000_000
    assert (log["time_us"] >= log["launched_us"]).all()
    assert log["time_us"].min() >= begin
    assert log["time_us"].max() < begin + 90 * DAY_US
    late = log.filter(pl.col("launched_us") >= begin)
    assert late["item_id"].n_unique() / log["item_id"].n_unique() == pytest.approx(0.2, abs=0.05)
    assert ((late["launched_us"] - begin) % DAY_US == 0).all()
    cut = begin + 60 * DAY_US
    train, test = log.filter(pl.col("time_us") < cut), log.filter(pl.col("time_us") >= cut)
    cold = set(test["item_id"]) - set(train["item_id"])
    assert 0.03 * 1000 < len(cold) < 0.12 * 1000  # a third of the fifth that is launched late, about


def test_freshness_favours_new_items(make):
    lone = dict(propensity=0, taste=0, focus=0, popularity=0, price=0, query=0, repeat=0, num_scenarios=1)
    log = make(SimulatorConfig(num_users=60, freshness=2.0, **lone))
    p = log["probability"].to_numpy()
    least = 1 / (1 + np.exp(1.4 + 0.3))
    assert p.min() == pytest.approx(least, abs=0.01)
    assert least + 0.3 < p.max() <= 1 / (1 + np.exp(1.4 + 0.3 - 2.0)) + 1e-6


def test_interests_drift(make):
    """Categories of a user's first and last impressions differ more, the more interests drift."""
    likeness = {}
    for drift in (0.0, 1.0):
        log = make(SimulatorConfig(num_users=600, events_per_user=300, num_scenarios=1, drift=drift, repeat_share=0.0))
        day = (log["time_us"] - log["time_us"].min()) // DAY_US
        shares = []
        for part in (log.filter(day < 30), log.filter(day >= 60)):
            counts = np.zeros((600, 16))
            np.add.at(counts, (part["user_id"].to_numpy(), part["category"].to_physical().to_numpy()), 1)
            shares.append(counts)
        both = (shares[0].sum(1) > 20) & (shares[1].sum(1) > 20)
        assert both.sum() > 20
        first, last = (part[both] / part[both].sum(1, keepdims=True) for part in shares)
        # apart from what is popular with all
        first, last = first - first.mean(0), last - last.mean(0)
        likeness[drift] = np.mean((first * last).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(last, axis=1))
    assert likeness[0.0] > 0.55
    assert likeness[1.0] < 0.65 * likeness[0.0]


def test_repeats_show_earlier_items_and_move_the_odds(make):
    lone = dict(propensity=0, taste=0, focus=0, popularity=0, price=0, query=0, freshness=0, num_scenarios=1, bias=0.0)
    config = SimulatorConfig(num_users=50, num_items=5000, zipf=0.0, late_items=0.0, repeat=1.2, **lone)
    seen_share = {}
    for share in (0.0, 0.3, 1.0):
        log = make(replace(config, repeat_share=share))
        seen_share[share] = (log["user_item_impressions"] > 0).mean()
    assert seen_share[0.0] < 0.03  # by chance
    assert seen_share[0.3] == pytest.approx(0.3, abs=0.04)
    assert log.group_by("user_id").agg(pl.col("item_id").n_unique())["item_id"].max() == 1
    # the state of each pair of user and item, followed event by event
    clicked: dict[tuple[int, int], list[float]] = defaultdict(list)
    for user, item, label, p in log.select("user_id", "item_id", "label", "probability").iter_rows():
        past = clicked[user, item]
        logit = -0.3 + (1.2 if any(past) else -0.6 if past else 0.0)
        assert p == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
        past.append(label)


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
        days=st.integers(1, 3),
        late_items=st.sampled_from([0.0, 0.5, 1.0]),
        repeat_share=st.sampled_from([0.0, 0.5, 1.0]),
        drift=st.sampled_from([0.0, 0.5, 1.0]),
        repeat=st.sampled_from([-2.0, 0.0, 2.0]),
    ),
    st.integers(0, 2**31),
)
def test_any_small_config_makes_a_log(tmp_path_factory: pytest.TempPathFactory, config: SimulatorConfig, seed: int):
    raw = simulate(config, seed=seed, scratch=tmp_path_factory.mktemp("any"))
    assert raw.items is not None and raw.users is not None
    events = raw.events.collect()
    assert events["user_id"].n_unique() == config.num_users == len(raw.users.collect())
    assert events.null_count().sum_horizontal().item() == 0
    assert events["probability"].is_between(0, 1).all()
    log = events.join(raw.items.collect(), on="item_id")
    assert len(log) == len(events)
    assert (log["time_us"] >= log["launched_us"]).all()
    assert (events["time_us"].max() - 1_704_067_200_000_000) < config.days * DAY_US
    assert (events.select(pl.col("time_us").diff().over("user_id")).to_series().drop_nulls() > 0).all()


def test_users_with_many_events_stay_within_the_log(make):
    log = make(SimulatorConfig(num_users=30, events_per_user=500, days=1, session_events=1))
    assert log.group_by("user_id").len()["len"].max() > 1000
    assert log["time_us"].max() < 1_704_067_200_000_000 + DAY_US
    assert log.select(pl.col("time_us").diff().over("user_id")).to_series().drop_nulls().min() >= 1_000_000


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_items", 0, "at least 1"),
        ("num_users", -3, "at least 1"),
        ("days", 0, "at least 1"),
        ("repeat_share", -0.1, "at least 0 and at most 1"),
        ("late_items", 1.5, "at least 0 and at most 1"),
        ("drift", float("nan"), "a finite number"),
        ("zipf", -1.0, "at least 0"),
        ("zipf", float("nan"), "a finite number"),
        ("taste", float("nan"), "a finite number"),
        ("bias", float("-inf"), "a finite number"),
        ("num_items", 1 << 25, "at most 16,777,216"),
        ("events_per_user", 50_000, "at most 45,000 (500 a day, data.simulator.days=90)"),
    ],
)
def test_what_makes_no_log_is_named(tmp_path: Path, field: str, value: float, expected: str):
    with pytest.raises(ValueError) as raised:
        simulate(replace(SimulatorConfig(), **{field: value}), seed=0, scratch=tmp_path)
    assert str(raised.value) == f"data.simulator.{field}: got {value}, expected {expected}"
    assert not list(tmp_path.iterdir())


def test_blocks_of_users_do_not_depend_on_the_number_of_users(make, in_blocks: None):
    small, large = (make(replace(SMALL, num_users=num)) for num in (80, 100))  # of 20 users each
    of_items = ["item_impressions", "item_clicks"]  # more users, more counts
    assert large["user_id"].n_unique() == 100
    assert large.head(len(small)).drop(of_items).equals(small.drop(of_items))
    assert (large.head(len(small))["item_impressions"] >= small["item_impressions"]).all()


def test_it_is_fast_enough(make):
    """At least 1,000,000 events a second on two cores: half a second here; two minutes, because machines stall."""
    start = time.process_time()
    make(SimulatorConfig(num_users=5000))
    assert time.process_time() - start < 120
