"""A simulated interaction log whose click probabilities are known, so that the best possible AUC is known too.

Users have interests (categories and a latent taste) that differ by scenario; they come in sessions with a focus of
their own; in the search scenario they type queries of several words. Items have one to three categories, a price and
Zipf popularity. Shapes: U users, I items, C categories, S scenarios, K latent width, E events, Z sessions, Q queries.

    session (scenario, focus) ── queries ── impressions (item) ── click ~ Bernoulli(p)

    logit p = bias + scenario + propensity of the user + taste · item + focus on a category of the item
              + popularity of the item + fit of its price to the user's segment + match with the query

The probability knows the hidden state (latent taste, focus), so its AUC is a bound that no model passes but by luck.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Tuple

import numpy as np
import polars as pl
import pyarrow as pa

from lumrec.data.schema import FeatureConfig, SchemaConfig, TableConfig
from lumrec.data.sources.raw_log import RawLog
from lumrec.evaluation.metrics import auc

USERS_PER_BLOCK = 4096  # users simulated together: bounds the memory, and is part of what a seed means
START = 1_704_067_200  # 2024-01-01 UTC
DAY_S = 86_400
SEARCH = "search"
SCENARIOS = ("home", SEARCH, "related", "feed", "cart", "offers")
NUM_SEGMENTS = 4
NUM_PRICES = 5
WORDS_PER_CATEGORY = 6
COMMON_WORDS = 8

DEFAULT_SCHEMA = SchemaConfig(
    tables={"item_id": TableConfig(32), "categories": TableConfig(16)},
    features={
        "item_id": FeatureConfig("item"),
        "categories": FeatureConfig("item", kind="multi"),
        "price_bucket": FeatureConfig("item"),
        "feedback": FeatureConfig("condition", wish=True),
        "scenario": FeatureConfig("condition"),
        "query": FeatureConfig("condition", kind="multi"),
        "category": FeatureConfig("condition", table="categories"),
        "clicked": FeatureConfig("feedback", column="feedback"),
        "segment": FeatureConfig("user"),
        "hour": FeatureConfig("context"),
        "weekday": FeatureConfig("context"),
    },
)


@dataclass(frozen=True)
class SimulatorConfig:
    """Size of the simulated log and weight of each part of the click logit; the seed is the run's.

    events_per_user: mean of a long-tailed number (log-normal, at least 1). zipf: exponent of item popularity.
    session_events: mean length of a session. taste, focus, popularity, price, query: weights in the logit.
    """

    num_users: int = 2000
    num_items: int = 1000
    events_per_user: int = 100
    num_scenarios: int = 3
    num_categories: int = 16
    latent_dim: int = 8
    session_events: int = 12
    zipf: float = 0.9
    bias: float = -1.5
    propensity: float = 0.4
    taste: float = 1.15
    focus: float = 0.45
    popularity: float = 0.3
    price: float = 0.3
    query: float = 0.6


class Items(NamedTuple):
    """The catalogue: membership in categories, main category, price, standardised log popularity, its weight, taste."""

    category_IC: np.ndarray
    main_I: np.ndarray
    price_I: np.ndarray
    popularity_I: np.ndarray
    weight_I: np.ndarray
    latent_IK: np.ndarray


class World(NamedTuple):
    """What does not depend on users: items, latent centres of categories [C, K], how to draw items by category."""

    items: Items
    centre_CK: np.ndarray
    by_category: np.ndarray  # items in order of (category, index), each item once for each of its categories
    cumulative: np.ndarray  # category + cumulative share of popularity within it, ascending
    cumulative_all: np.ndarray


class Visits(NamedTuple):
    """What surrounds each event: start of a session, scenario, focus category, category searched for (or -1), query."""

    session_start_E: np.ndarray
    scenario_E: np.ndarray
    focus_E: np.ndarray
    wanted_E: np.ndarray
    words_E: pl.Series


def read(config: SimulatorConfig, *, seed: int) -> RawLog:
    """The simulated log; the same for the same config and seed. Raises ValueError for sizes that make no log."""
    for name, least in (("num_users", 1), ("num_items", 1), ("events_per_user", 1), ("num_scenarios", 1),
                        ("num_categories", 1), ("latent_dim", 1), ("session_events", 1)):  # fmt: skip
        if getattr(config, name) < least:
            raise ValueError(f"data.simulator.{name}: got {getattr(config, name)}, expected at least {least}")
    world = _world(config, np.random.default_rng([seed, 0]))
    blocks = [
        _block(config, world, first, np.random.default_rng([seed, 1, first]))
        for first in range(0, config.num_users, USERS_PER_BLOCK)
    ]
    events = (
        pl.concat([block for block, _ in blocks]).with_row_index("order").with_columns(pl.col("order").cast(pl.Int64))
    )
    return RawLog(
        events=events.lazy(),
        items=_item_frame(world.items).lazy(),
        users=pl.concat([users for _, users in blocks]).lazy(),
        files=[],
        note=f"a simulated log (seed {seed})",
        extra={"simulated": True},
    )


def scenario_names(num_scenarios: int) -> List[str]:
    """Names of the scenarios; the second one is the search."""
    return [SCENARIOS[s] if s < len(SCENARIOS) else f"scenario-{s}" for s in range(num_scenarios)]


def click_facts(train: pl.DataFrame, test: pl.DataFrame, num_items: int) -> Dict[str, float]:
    """best_auc: AUC of the true probabilities on the test events; popularity_auc: of each item's clicks in training.

    NaN where the test events hold one class only.
    """
    clicks_I = np.bincount(train["item"], weights=train["label"], minlength=num_items)
    label_E = test["label"].to_numpy()
    return {
        "best_auc": auc(label_E, test["probability"].to_numpy()),
        "popularity_auc": auc(label_E, clicks_I[test["item"].to_numpy()]),
    }


def _world(config: SimulatorConfig, rng: np.random.Generator) -> World:
    num_items, num_categories = config.num_items, config.num_categories
    centre_CK = rng.standard_normal((num_categories, config.latent_dim)).astype(np.float32)
    centre_CK /= np.linalg.norm(centre_CK, axis=1, keepdims=True)
    share_C = 1.0 / np.arange(1, num_categories + 1) ** 0.5
    count_I = rng.choice([1, 2, 3], num_items, p=[0.5, 0.35, 0.15])
    drawn_I3 = rng.choice(num_categories, (num_items, 3), p=share_C / share_C.sum())
    category_IC = np.zeros((num_items, num_categories), np.float32)
    for place in range(3):
        rows = np.flatnonzero(count_I > place)
        category_IC[rows, drawn_I3[rows, place]] = 1.0
    latent_IK = category_IC @ centre_CK + 0.8 * rng.standard_normal((num_items, config.latent_dim)) / np.sqrt(
        config.latent_dim
    )
    weight_I = 1.0 / (rng.permutation(num_items) + 1.0) ** config.zipf
    log_weight_I = np.log(weight_I)
    items = Items(
        category_IC=category_IC,
        main_I=drawn_I3[:, 0],
        price_I=rng.integers(0, NUM_PRICES, num_items),
        popularity_I=((log_weight_I - log_weight_I.mean()) / max(log_weight_I.std(), 1e-9)).astype(np.float32),
        weight_I=weight_I,
        latent_IK=(latent_IK / np.linalg.norm(latent_IK, axis=1, keepdims=True)).astype(np.float32),
    )
    category, by_category = np.nonzero(category_IC.T)
    weight = weight_I[by_category]
    total_C = np.bincount(category, weights=weight, minlength=num_categories)
    running = np.cumsum(weight) - np.concatenate([[0.0], np.cumsum(total_C)])[category]
    return World(
        items=items,
        centre_CK=centre_CK,
        by_category=by_category,
        cumulative=category + running / total_C[category],
        cumulative_all=np.cumsum(weight_I) / weight_I.sum(),
    )


def _block(
    config: SimulatorConfig, world: World, first: int, rng: np.random.Generator
) -> Tuple[pl.DataFrame, pl.DataFrame]:
    """Events and users of one block of users, numbered from `first`; the events of a user are in order of time."""
    num_users = min(USERS_PER_BLOCK, config.num_users - first)
    names = scenario_names(config.num_scenarios)
    segment_U = rng.integers(0, NUM_SEGMENTS, num_users)
    interest_USC, taste_USK = _interests(config, world, num_users, rng)
    spread = 0.8
    count_U = np.exp(rng.normal(np.log(config.events_per_user) - spread**2 / 2, spread, num_users))
    count_U = np.maximum(np.rint(count_U), 1).astype(np.int64)
    user_E = np.repeat(np.arange(num_users), count_U)
    first_E = np.zeros(len(user_E), bool)
    first_E[np.cumsum(count_U) - count_U] = True

    visits = _visits(config, user_E, first_E, interest_USC, rng)
    item_E = _impressions(world, user_E, visits.scenario_E, visits.wanted_E, interest_USC, rng)
    items = world.items
    price_gap_E = np.abs(items.price_I[item_E] - segment_U[user_E] * (NUM_PRICES - 1) / (NUM_SEGMENTS - 1))
    matches_E = np.where(visits.wanted_E >= 0, 2 * items.category_IC[item_E, visits.wanted_E] - 1, 0)
    logit_E = (
        config.bias
        + 0.3 * (visits.scenario_E % 3 - 1)
        + config.propensity * rng.standard_normal(num_users)[user_E]
        + 2 * config.taste * np.einsum("ek,ek->e", taste_USK[user_E, visits.scenario_E], items.latent_IK[item_E])
        + config.focus * (2 * items.category_IC[item_E, visits.focus_E] - 1)
        + config.popularity * items.popularity_I[item_E]
        + config.price * (1 - price_gap_E)
        + config.query * matches_E
    )
    probability_E = (1 / (1 + np.exp(-logit_E))).astype(np.float32)
    click_E = rng.random(len(user_E)) < probability_E
    time_E = _times(first_E, visits.session_start_E, rng)
    user_key = pl.Series("user_id", np.arange(first, first + num_users)).cast(pl.String)
    feedback = pl.Series("feedback", ["dislike", "like"], dtype=pl.String)
    events = pl.DataFrame(
        {
            "user_id": user_key.gather(user_E),
            "item_id": pl.Series("item_id", item_E).cast(pl.String),
            "timestamp": pl.Series("timestamp", time_E, dtype=pl.Int64),
            "label": pl.Series("label", click_E, dtype=pl.Float32),
            "probability": pl.Series("probability", probability_E),
            "feedback": feedback.gather(click_E.astype(np.int64)),
            "scenario": pl.Series("scenario", names, dtype=pl.String).gather(visits.scenario_E),
            "query": visits.words_E,
            "category": _category_names(config.num_categories).gather(items.main_I[item_E]),
            "hour": pl.Series("hour", time_E // 3600 % 24).cast(pl.String),
            "weekday": pl.Series("weekday", (time_E // DAY_S + 3) % 7 + 1).cast(pl.String),
        }
    )
    return events, pl.DataFrame({"user_id": user_key, "segment": pl.Series("segment", segment_U).cast(pl.String)})


def _visits(
    config: SimulatorConfig, user_E: np.ndarray, first_E: np.ndarray, interest_USC: np.ndarray, rng: np.random.Generator
) -> Visits:
    """Sessions, each with a scenario and a focus, and the queries typed in them, spread over the events."""
    names = scenario_names(config.num_scenarios)
    session_start_E = first_E | (rng.random(len(user_E)) < 1 / config.session_events)
    session_E = np.cumsum(session_start_E) - 1
    user_Z = user_E[session_start_E]
    share_S = 1.0 / np.arange(1, len(names) + 1) ** 0.7
    scenario_Z = rng.choice(len(names), len(user_Z), p=share_S / share_S.sum())
    focus_Z = _draw_category(interest_USC[user_Z, scenario_Z], rng)

    # queries are mostly about the focus; outside the search scenario none is typed
    query_start_E = session_start_E | (rng.random(len(user_E)) < 0.2)
    query_E = np.cumsum(query_start_E) - 1
    session_Q = session_E[query_start_E]
    other_Q = _draw_category(interest_USC[user_Z[session_Q], scenario_Z[session_Q]], rng)
    category_Q = np.where(rng.random(len(session_Q)) < 0.7, focus_Z[session_Q], other_Q)
    is_search_Q = np.array([name == SEARCH for name in names])[scenario_Z[session_Q]]
    return Visits(
        session_start_E=session_start_E,
        scenario_E=scenario_Z[session_E],
        focus_E=focus_Z[session_E],
        wanted_E=np.where(is_search_Q, category_Q, -1)[query_E],
        words_E=_queries(category_Q, is_search_Q, rng).gather(query_E),
    )


def _interests(
    config: SimulatorConfig, world: World, num_users: int, rng: np.random.Generator
) -> Tuple[np.ndarray, np.ndarray]:
    """Shares of categories [U, S, C] and unit tastes [U, S, K]: a part common to all scenarios, one of their own."""
    shape = (num_users, config.num_scenarios)
    common_UC = rng.standard_gamma(0.25, (num_users, config.num_categories)).astype(np.float32) + 1e-3
    own_USC = rng.standard_gamma(0.25, (*shape, config.num_categories)).astype(np.float32) + 1e-3
    common_UC /= common_UC.sum(-1, keepdims=True)
    own_USC /= own_USC.sum(-1, keepdims=True)
    interest_USC = 0.7 * common_UC[:, None, :] + 0.3 * own_USC
    personal_UK = 0.5 * rng.standard_normal((num_users, config.latent_dim)) / np.sqrt(config.latent_dim)
    taste_USK = interest_USC @ world.centre_CK + personal_UK[:, None, :]
    taste_USK /= np.linalg.norm(taste_USK, axis=-1, keepdims=True)
    return interest_USC, taste_USK.astype(np.float32)


def _draw_category(share_NC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One category from each row of shares."""
    running_NC = np.cumsum(share_NC, axis=1)
    point_N1 = rng.random((len(share_NC), 1)) * running_NC[:, -1:]
    return np.minimum((running_NC < point_N1).sum(1), share_NC.shape[1] - 1)


def _impressions(
    world: World,
    user_E: np.ndarray,
    scenario_E: np.ndarray,
    wanted_E: np.ndarray,
    interest_USC: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Item shown at each event: of the query's category (wanted_E >= 0), of the user's interests, or just popular."""
    policy_E = rng.random(len(user_E))
    chosen_E = _draw_category(interest_USC[user_E, scenario_E], rng)
    chosen_E = np.where(wanted_E >= 0, wanted_E, chosen_E)
    popular_E = policy_E < np.where(wanted_E >= 0, 0.3, 0.6)
    point_E = rng.random(len(user_E))
    empty_E = (
        np.bincount(np.floor(world.cumulative - 1e-12).astype(int), minlength=interest_USC.shape[2])[chosen_E] == 0
    )
    by_popularity_E = np.minimum(np.searchsorted(world.cumulative_all, point_E), len(world.cumulative_all) - 1)
    place_E = np.minimum(np.searchsorted(world.cumulative, chosen_E + point_E), len(world.cumulative) - 1)
    return np.where(popular_E | empty_E, by_popularity_E, world.by_category[place_E])


def _queries(category_Q: np.ndarray, is_search_Q: np.ndarray, rng: np.random.Generator) -> pl.Series:
    """The words of each query (list of str): one to three words of the category, then perhaps a common one."""
    num = len(category_Q)
    own_Q = rng.integers(1, 4, num)
    common_Q = rng.random(num) < 0.3
    start_Q = rng.integers(0, WORDS_PER_CATEGORY, num)
    word_Q4 = category_Q[:, None] * WORDS_PER_CATEGORY + (start_Q[:, None] + np.arange(4)) % WORDS_PER_CATEGORY
    common = -1 - rng.integers(0, COMMON_WORDS, num)
    word_Q4 = np.where(np.arange(4) < own_Q[:, None], word_Q4, common[:, None])
    length_Q = np.where(is_search_Q, own_Q + common_Q, 0)
    flat = word_Q4[np.arange(4) < length_Q[:, None]]
    text = pl.select(
        pl.when(pl.lit(pl.Series(flat)) >= 0)
        .then(pl.lit("word-") + pl.lit(pl.Series(flat)).cast(pl.String))
        .otherwise(pl.lit("common") + pl.lit(pl.Series(flat)).cast(pl.String))
    ).to_series()
    offsets = np.concatenate([[0], np.cumsum(length_Q)])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), text.to_arrow().cast(pa.large_string()))
    return pl.Series("query", lists)


def _times(first_E: np.ndarray, session_start_E: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Seconds (i64), not decreasing within a user; a day or so between sessions, seconds within one."""
    gap_E = np.where(session_start_E, rng.exponential(DAY_S, len(first_E)), rng.exponential(20.0, len(first_E)))
    gap_E = np.where(first_E, rng.random(len(first_E)) * 60 * DAY_S, gap_E).astype(np.int64)
    running_E = np.cumsum(gap_E)
    start_of_user_E = (running_E - gap_E)[first_E][np.cumsum(first_E) - 1]
    return START + running_E - start_of_user_E


def _category_names(num_categories: int) -> pl.Series:
    return pl.Series("category", [f"category-{c}" for c in range(num_categories)], dtype=pl.String)


def _item_frame(items: Items) -> pl.DataFrame:
    num_items, num_categories = items.category_IC.shape
    # the main category first, then the others by number
    order_IC = items.category_IC.copy()
    order_IC[np.arange(num_items), items.main_I] = 2.0
    item, place = np.nonzero(np.sort(order_IC, axis=1)[:, ::-1] > 0)
    category = np.argsort(-order_IC, axis=1, kind="stable")[item, place]
    categories = (
        pl.DataFrame({"item": item, "categories": _category_names(num_categories).gather(category)})
        .group_by("item", maintain_order=True)
        .agg("categories")
    )
    return pl.DataFrame(
        {
            "item_id": pl.Series(np.arange(num_items)).cast(pl.String),
            "categories": categories["categories"],
            "price_bucket": pl.Series(items.price_I).cast(pl.String),
        }
    )
