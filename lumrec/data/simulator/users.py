"""A block of simulated users: their tastes, sessions, impressions and clicks.

    session (scenario, focus) ── queries ── impressions (item) ── click ~ Bernoulli(p)

    logit p = bias + scenario + propensity of the user + taste · item + focus on a category of the item
              + popularity of the item + fit of its price to the user's segment + match with the query
              + freshness of the item + whether the user saw or clicked it before

Shapes: U users, E events, Z sessions, Q queries, R repeated impressions, M draws, I items, C categories, S scenarios,
P = 2 phases of an interest (at first, and that towards which it drifts), J slots of favourite
categories, K latent width. Events are in order of (user, time) everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import polars as pl

from lumrec.data.simulator.config import SimulatorConfig
from lumrec.data.simulator.counters import pair_runs, user_counters
from lumrec.data.simulator.world import DAY_S, NUM_PRICES, World, draw_share

SEARCH = "search"
SCENARIOS = ("home", SEARCH, "related", "feed", "cart", "offers")
NUM_SEGMENTS = 4
WORDS_PER_CATEGORY, COMMON_WORDS, LONGEST_QUERY = 6, 8, 4
MOST_EVENTS_A_DAY = 2000  # of one user, on average: events are 20 s apart, so twice as many fit into a day
# An interest is a few favourite categories with fixed shares, in slots: common to all scenarios, or of one scenario.
COMMON_SHARES, OWN_SHARES, SHARE_OF_OWN = (0.42, 0.24, 0.14, 0.09, 0.07, 0.04), (0.65, 0.35), 0.3
FRESH_DAYS = 10.0
SEEN_WITHOUT_CLICK = -0.5  # of the weight of a repeat, where the user saw the item before and never clicked it


class Users(NamedTuple):
    """Number of events, segment, click propensity, favourite categories [U, P, J], unit tastes [U, S, P, K]."""

    count_U: np.ndarray
    segment_U: np.ndarray
    propensity_U: np.ndarray
    favourite_UPJ: np.ndarray
    taste_USPK: np.ndarray


class Sessions(NamedTuple):
    """Each session's user, scenario, focus category, share of the later interest; each event's session and second."""

    user_Z: np.ndarray
    scenario_Z: np.ndarray
    focus_Z: np.ndarray
    drift_Z: np.ndarray
    start_E: np.ndarray
    session_E: np.ndarray
    second_E: np.ndarray


def scenario_names(num_scenarios: int) -> list[str]:
    """Names of the scenarios; the second one is the search."""
    return [SCENARIOS[s] if s < len(SCENARIOS) else f"scenario-{s}" for s in range(num_scenarios)]


def simulate_users(config: SimulatorConfig, world: World, num_users: int, rng: np.random.Generator) -> pl.DataFrame:
    """The events of one block of users, as numbers (`simulate.finished` makes the log of them).

    user: index within the block. second: since the log began. query: see `query_words`, -1 where none was typed. The
    counters need only this block: of the user, and of the user on the item.
    """
    users = _users(config, world, num_users, rng)
    user_E = np.repeat(np.arange(num_users, dtype=np.int32), users.count_U)
    sessions = _sessions(config, users, user_E, rng)
    wanted_E, query_E = _queries(users, sessions, rng)
    item_E = _impressions(config, world, users, sessions, user_E, wanted_E, rng)
    logit_E = _logits(config, world, users, sessions, user_E, item_E, wanted_E)
    runs = pair_runs(user_E, item_E, config.num_items)
    luck_E = rng.random(len(user_E), dtype=np.float32)
    click_E, probability_E = _clicks(logit_E.take(runs.event_E), luck_E.take(runs.event_E), runs.before, config.repeat)
    seen_E, clicked_E = runs.before(np.ones_like(click_E, np.int64)), runs.before(click_E)
    label_E = runs.at_events(click_E)
    impressions_E, clicks_E = user_counters(users.count_U, label_E)
    return pl.DataFrame(
        {
            "user": user_E,
            "item": item_E,
            "second": sessions.second_E.astype(np.uint32),
            "click": label_E,
            "probability": runs.at_events(probability_E),
            "scenario": sessions.scenario_Z.take(sessions.session_E),
            "query": query_E,
            "segment": users.segment_U.take(user_E),
            "user_impressions": impressions_E,
            "user_clicks": clicks_E,
            "user_item_impressions": runs.at_events(seen_E.astype(np.uint32)),
            "user_item_clicks": runs.at_events(clicked_E.astype(np.uint32)),
        }
    )


def query_words(query_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the words of all queries, one after the other, and how many each query has (0 where query is -1).

    A query encodes its category, its first word, the count of its words (1 … 3), and a common word or none; words
    are counted by category, WORDS_PER_CATEGORY each, and the common ones are -1, -2, …
    """
    typed_Q = np.flatnonzero(query_E >= 0)
    rest_Q, common_Q = np.divmod(query_E[typed_Q], COMMON_WORDS + 1)
    rest_Q, own_Q = np.divmod(rest_Q, LONGEST_QUERY - 1)
    category_Q, first_Q = np.divmod(rest_Q, WORDS_PER_CATEGORY)
    index_4 = np.arange(LONGEST_QUERY)
    word_Q4 = category_Q[:, None] * WORDS_PER_CATEGORY + (first_Q[:, None] + index_4) % WORDS_PER_CATEGORY
    word_Q4 = np.where(index_4 <= own_Q[:, None], word_Q4, -common_Q[:, None])
    length_Q = own_Q + 1 + (common_Q > 0)
    length_E = np.zeros(len(query_E), np.int64)
    length_E[typed_Q] = length_Q
    return word_Q4[index_4 < length_Q[:, None]], length_E


def _users(config: SimulatorConfig, world: World, num_users: int, rng: np.random.Generator) -> Users:
    spread = 0.8
    count_U = np.exp(rng.normal(np.log(config.events_per_user) - spread**2 / 2, spread, num_users))
    num_slots = len(COMMON_SHARES) + config.num_scenarios * len(OWN_SHARES)
    favourite_UPJ = draw_share(world.running_C, rng.random((num_users, 2, num_slots)))
    centre_UPJK = world.centre_CK.take(favourite_UPJ, axis=0)
    taste_USPK = np.einsum("sj,upjk->uspk", _slot_shares(config.num_scenarios), centre_UPJK, optimize=True)
    personal_UK = rng.standard_normal((num_users, config.latent_dim), dtype=np.float32)
    taste_USPK += 0.5 / np.sqrt(config.latent_dim) * personal_UK[:, None, None, :]
    taste_USPK /= np.maximum(np.linalg.norm(taste_USPK, axis=-1, keepdims=True), 1e-9)
    return Users(
        count_U=np.clip(np.rint(count_U), 1, MOST_EVENTS_A_DAY * config.days).astype(np.int64),
        segment_U=rng.integers(0, NUM_SEGMENTS, num_users, dtype=np.int8),
        propensity_U=rng.standard_normal(num_users, dtype=np.float32),
        favourite_UPJ=favourite_UPJ,
        taste_USPK=taste_USPK.astype(np.float32),
    )


def _slot_shares(num_scenarios: int) -> np.ndarray:
    """Share of each slot of favourites in each scenario [S, J]."""
    common, own = len(COMMON_SHARES), len(OWN_SHARES)
    share_SJ = np.zeros((num_scenarios, common + num_scenarios * own), np.float32)
    share_SJ[:, :common] = np.multiply(COMMON_SHARES, 1 - SHARE_OF_OWN)
    for scenario in range(num_scenarios):
        share_SJ[scenario, common + scenario * own :][:own] = np.multiply(OWN_SHARES, SHARE_OF_OWN)
    return share_SJ


def _interests(
    users: Users, user_M: np.ndarray, scenario_M: np.ndarray, drift_M: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A category of each user's interests in that scenario; with the probability `drift_M`, of the later interests."""
    num_slots = users.favourite_UPJ.shape[2]
    running_SJ = np.cumsum(_slot_shares(users.taste_USPK.shape[1]), axis=1)
    # shares in steps of 1/256, so that a draw is one look-up
    slot_S256 = np.array([np.searchsorted(running_J, (np.arange(256) + 0.5) / 256) for running_J in running_SJ])
    slot_S256 = np.minimum(slot_S256, num_slots - 1)
    byte_M = rng.integers(0, 256, len(user_M), dtype=np.uint8)
    slot_M = slot_S256.reshape(-1).take(scenario_M.astype(np.int64) * 256 + byte_M)
    later_M = rng.random(len(user_M), dtype=np.float32) < drift_M
    return users.favourite_UPJ.reshape(-1).take((user_M.astype(np.int64) * 2 + later_M) * num_slots + slot_M)


def _sessions(config: SimulatorConfig, users: Users, user_E: np.ndarray, rng: np.random.Generator) -> Sessions:
    """Sessions about a day apart, events about 20 s apart within one; a user's seconds increase from event to event."""
    num_events = len(user_E)
    first_U = np.cumsum(users.count_U) - users.count_U
    start_E = rng.random(num_events, dtype=np.float32) < 1 / config.session_events
    start_E[first_U] = True
    session_E = np.cumsum(start_E) - 1
    user_Z = user_E[start_E]
    first_session_U = session_E[first_U]

    inside_E = np.cumsum(1 + (20 * rng.standard_exponential(num_events, dtype=np.float32)).astype(np.int64))
    inside_E -= np.repeat(inside_E[first_U], users.count_U)
    gap_Z = DAY_S * rng.standard_exponential(len(user_Z))
    gap_Z[first_session_U] = rng.random(len(first_U)) * (
        2 / 3 * DAY_S * config.days
    )  # users arrive one after the other
    apart_Z = np.cumsum(gap_Z)
    apart_Z -= (apart_Z - gap_Z)[first_session_U][user_Z]
    # users with more sessions than days have shorter gaps, so that all sessions end with the log
    last_U = first_U + users.count_U - 1
    room_U = DAY_S * config.days - 1 - inside_E[last_U]
    scale_U = np.minimum(1, room_U / np.maximum(apart_Z[session_E[last_U]], 1))
    second_Z = (apart_Z * scale_U[user_Z]).astype(np.int64)

    share_S = 1.0 / np.arange(1, config.num_scenarios + 1) ** 0.7
    scenario_Z = draw_share(np.cumsum(share_S) / share_S.sum(), rng.random(len(user_Z))).astype(np.uint16)
    drift_Z = (config.drift / (DAY_S * config.days) * second_Z).astype(np.float32)
    return Sessions(
        user_Z=user_Z,
        scenario_Z=scenario_Z,
        focus_Z=_interests(users, user_Z, scenario_Z, drift_Z, rng),
        drift_Z=drift_Z,
        start_E=start_E,
        session_E=session_E,
        second_E=inside_E + second_Z.take(session_E),
    )


def _queries(users: Users, sessions: Sessions, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Category searched for and query of each event, -1 outside the search; queries are mostly about the focus."""
    start_E = sessions.start_E | (rng.random(len(sessions.start_E), dtype=np.float32) < 0.2)
    session_Q = sessions.session_E[start_E]
    num = len(session_Q)
    other_Q = _interests(
        users, sessions.user_Z[session_Q], sessions.scenario_Z[session_Q], sessions.drift_Z[session_Q], rng
    )
    category_Q = np.where(rng.random(num, dtype=np.float32) < 0.7, sessions.focus_Z[session_Q], other_Q)
    is_search_S = np.array([name == SEARCH for name in scenario_names(users.taste_USPK.shape[1])])
    is_search_Q = is_search_S[sessions.scenario_Z[session_Q]]
    query_Q = category_Q * WORDS_PER_CATEGORY + rng.integers(0, WORDS_PER_CATEGORY, num, dtype=np.int32)
    query_Q = query_Q * (LONGEST_QUERY - 1) + rng.integers(0, LONGEST_QUERY - 1, num, dtype=np.int32)
    common_Q = rng.integers(1, COMMON_WORDS + 1, num, dtype=np.int32) * (rng.random(num, dtype=np.float32) < 0.3)
    query_Q = query_Q * (COMMON_WORDS + 1) + common_Q
    of_event_E = np.cumsum(start_E) - 1
    both_Q = (np.where(is_search_Q, values_Q, -1).astype(np.int32) for values_Q in (category_Q, query_Q))
    wanted_E, query_E = (values_Q.take(of_event_E) for values_Q in both_Q)
    return wanted_E, query_E


def _impressions(
    config: SimulatorConfig,
    world: World,
    users: Users,
    sessions: Sessions,
    user_E: np.ndarray,
    wanted_E: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """The item shown at each event, launched by then: of the query's category, of the user's interests, or popular.

    Some impressions repeat an earlier one of the same user, more often a recent one.
    """
    num_events = len(user_E)
    day_E = sessions.second_E // DAY_S
    scenario_E, drift_E = (of_Z.take(sessions.session_E) for of_Z in (sessions.scenario_Z, sessions.drift_Z))
    chosen_E = np.where(wanted_E >= 0, wanted_E, _interests(users, user_E, scenario_E, drift_E, rng))
    is_popular_E = rng.random(num_events, dtype=np.float32) < np.where(wanted_E >= 0, 0.3, 0.6).astype(np.float32)
    point_E = rng.random(num_events)
    item_E = np.full(num_events, -1, np.int32)
    rows = np.flatnonzero(~is_popular_E)
    item_E[rows] = world.by_category.draw(chosen_E[rows], day_E[rows], point_E[rows])
    rows = np.flatnonzero(item_E < 0)  # popular, or a category without a launched item
    item_E[rows] = world.all_items.draw(np.zeros(len(rows), np.int64), day_E[rows], point_E[rows])

    before_E = np.arange(num_events) - np.repeat(np.cumsum(users.count_U) - users.count_U, users.count_U)
    is_repeat_E = (rng.random(num_events, dtype=np.float32) < config.repeat_share) & (before_E > 0)
    repeat_R = np.flatnonzero(is_repeat_E)
    back_R = 1 + (before_E[repeat_R] * rng.random(len(repeat_R)) ** 2).astype(np.int64)
    source_E = np.arange(num_events)
    source_E[repeat_R] -= back_R
    while is_repeat_E[source_E[repeat_R]].any():  # a repeat of a repeat shows what that one showed
        source_E[repeat_R] = source_E[source_E[repeat_R]]
    return item_E.take(source_E)


def _logits(
    config: SimulatorConfig,
    world: World,
    users: Users,
    sessions: Sessions,
    user_E: np.ndarray,
    item_E: np.ndarray,
    wanted_E: np.ndarray,
) -> np.ndarray:
    """The click logit (float32) without the effect of earlier impressions of the same item."""
    items, session_E = world.items, sessions.session_E
    early_ZK, late_ZK = (users.taste_USPK[sessions.user_Z, sessions.scenario_Z, phase] for phase in (0, 1))
    taste_ZK = early_ZK + sessions.drift_Z[:, None] * (late_ZK - early_ZK)
    taste_ZK *= 2 * config.taste / np.maximum(np.linalg.norm(taste_ZK, axis=1, keepdims=True), 1e-9)
    offset_Z = config.bias + 0.3 * (sessions.scenario_Z.astype(np.float32) % 3 - 1)
    offset_Z += config.propensity * users.propensity_U[sessions.user_Z]
    item_offset_I = config.popularity * items.popularity_I + config.price
    segment_level_U = users.segment_U * np.float32((NUM_PRICES - 1) / (NUM_SEGMENTS - 1))
    age_E = (sessions.second_E / np.float32(DAY_S)).astype(np.float32) - items.launch_I.take(item_E)

    logit_E = offset_Z.astype(np.float32).take(session_E) + item_offset_I.astype(np.float32).take(item_E)
    logit_E += np.einsum("ek,ek->e", taste_ZK.take(session_E, axis=0), items.latent_IK.take(item_E, axis=0))
    logit_E -= np.float32(config.price) * np.abs(items.level_I.take(item_E) - segment_level_U.take(user_E))
    logit_E += np.float32(config.freshness) * np.exp(-age_E / np.float32(FRESH_DAYS))
    category_E3 = items.category_I3.take(item_E, axis=0)
    in_focus_E = (category_E3 == sessions.focus_Z.take(session_E)[:, None]).any(1)
    logit_E += np.float32(config.focus) * (2 * in_focus_E.astype(np.float32) - 1)
    matches_E = (category_E3 == wanted_E[:, None]).any(1)
    match_E = np.where(wanted_E >= 0, 2 * matches_E.astype(np.float32) - 1, 0)
    return logit_E + np.float32(config.query) * match_E


def _clicks(
    logit_E: np.ndarray, luck_E: np.ndarray, before: Callable[[np.ndarray], np.ndarray], repeat: float
) -> tuple[np.ndarray, np.ndarray]:
    """Clicks (bool) and their probabilities (float32), all in the order of runs of (user, item); see `Runs.before`.

    Within a run each click changes the odds of later events, but no loop is needed: up to the first click the odds are
    those of an item that was not clicked, so the first click is the first event with luck below them; all later events
    have the odds of a clicked item.
    """
    seen_E = before(np.ones(len(logit_E), np.int64)) > 0
    plain_E = _sigmoid(logit_E + np.float32(SEEN_WITHOUT_CLICK * repeat) * seen_E)
    clicked_before_E = before(luck_E < plain_E) > 0
    probability_E = np.where(clicked_before_E, _sigmoid(logit_E + np.float32(repeat)), plain_E)
    return luck_E < probability_E, probability_E


def _sigmoid(x_E: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(100) is infinite in float32, and the probability 0
        return 1 / (1 + np.exp(-x_E))
