"""What the server's page shows of a user: the last events, the LUM's best items, and what the LUM moves in a ranking.

Shape suffixes: N conditions, I items of the store, D width of the LUM, k items shown.
"""

from __future__ import annotations

import copy
from datetime import datetime, timezone
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lumrec.features.history import SECOND
from lumrec.query.conditions import spoken
from lumrec.serving.requests import ScoreRequest

NUM_EVENTS, NUM_BEST, NUM_RANKED = 12, 10, 15
NUM_OF_CONDITION, NUM_CANDIDATES = 50, 300


class PastEvent(NamedTuple):
    """day: "" in a log without times. liked: whether its label is positive."""

    day: str
    title: str
    liked: bool


class Best(NamedTuple):
    """An item, its probability among all items under a condition, and whether the user has had it."""

    title: str
    share: float | None
    seen: bool


class Ranked(NamedTuple):
    """An item in a ranking. moved: places up (positive) or down from the other ranking to this one."""

    title: str
    score: float
    moved: int


class View(NamedTuple):
    """What is shown of a user. conditions: in words, with the best items of each. problems: what cannot be read."""

    user: str
    num_events: int
    events: list[PastEvent]
    conditions: list[tuple[str, list[Best]]]
    without: list[Ranked]
    with_lum: list[Ranked]
    num_candidates: int
    num_moved: int
    problems: list[str]


class Page:
    """Looks at users with one scorer; titles and embeddings are read once."""

    def __init__(self, scorer: Any) -> None:
        self.scorer = scorer

    @cached_property
    def _titles(self) -> tuple[list[str], list[str]]:
        keys, titles = self.scorer.bundle.titles()
        return keys, [title or key for key, title in zip(keys, titles)]

    @cached_property
    def _store_items(self) -> tuple[np.ndarray, Tensor]:
        """Index in the bundle of each item of the store (-1: none), and the embeddings, e_KID."""
        keys, e_KID = self.scorer.store.items()
        return self.scorer.bundle.builder.keys.items(keys), e_KID

    def look(self, user: str) -> View:
        """What is shown of a user. In the thread that scores: the scorer is used."""
        scorer, (keys, titles) = self.scorer, self._titles
        problems: list[str] = []
        item_E, label_E, time_E, num_events = self._history(user, problems)
        has_clock = scorer.bundle.builder.spec.has_clock
        shown = slice(max(0, len(item_E) - NUM_EVENTS), None)
        events = [
            PastEvent(_day(time) if has_clock else "", titles[item] if item < len(titles) else "(unknown)", label > 0)
            for item, label, time in zip(item_E[shown].tolist(), label_E[shown].tolist(), time_E[shown].tolist())
        ][::-1]
        best, chosen = self._best(user, set(item_E.tolist()), problems)
        # The candidates: what the LUM finds best, and between them some of everything.
        step = max(1, len(keys) // NUM_CANDIDATES)
        candidates = list(dict.fromkeys([*chosen, *range(0, len(keys), step)]))[:NUM_CANDIDATES]
        without: list[Ranked] = []
        with_lum: list[Ranked] = []
        num_moved = 0
        if candidates:
            request = ScoreRequest(user, [keys[item] for item in candidates])
            plain = copy.copy(scorer)
            plain.store = None
            order = [(-each.score_many([request])[0].scores) for each in (plain, scorer)]
            without, with_lum, num_moved = _moves([titles[item] for item in candidates], *order)
        return View(user, num_events, events, best, without, with_lum, len(candidates), num_moved, problems)

    def _history(self, user: str, problems: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        nothing = np.zeros(0, np.int64)
        if self.scorer.state is None:
            problems.append("this server reads no user state, so that every user is unknown (serve.state)")
            return nothing, nothing, nothing, 0
        try:
            history = self.scorer.state.get([user])[0]
        except Exception as error:  # the page shows what can be read
            problems.append(f"the user's state cannot be read: {error}")
            return nothing, nothing, nothing, 0
        if history is None:
            problems.append("this user has no events: the ranking is what a new user gets")
            return nothing, nothing, nothing, 0
        events = history.events
        return events.item, events.label, events.time, len(events)

    def _best(self, user: str, seen: set[int], problems: list[str]) -> tuple[list[tuple[str, list[Best]]], list[int]]:
        """The best items under each condition, and the indices of those and some more."""
        scorer = self.scorer
        if not scorer.needs_knowledge:
            problems.append("this ranker reads no knowledge of a LUM, so that both rankings are the same")
            return [], []
        if scorer.store is None:
            problems.append("the knowledge store cannot be read: the LUM's answers are absent")
            return [], []
        answers, problem = scorer.store.get_or_absent([user])
        if problem or not bool(answers.present_BN.any()):
            problems.append(problem or "the LUM has no answer for this user")
            return [], []
        index_I, e_KID = self._store_items
        titles = self._titles[1]
        similarity_NI = answers.o_BND[0] @ e_KID[int(answers.fold_B[0])].T
        similarity_NI[:, index_I < 0] = -np.inf
        conditions, chosen = [], []
        for n, condition in enumerate(scorer.store.conditions):
            places = similarity_NI[n].topk(min(NUM_OF_CONDITION, similarity_NI.shape[1])).indices
            items = [int(index_I[place]) for place in places.tolist() if index_I[place] >= 0]
            log_z = None if answers.log_z_BN is None else float(answers.log_z_BN[0, n])
            conditions.append(
                (
                    spoken(condition),
                    [
                        Best(
                            titles[item],
                            None if log_z is None else float(np.exp(float(similarity_NI[n, place]) - log_z)),
                            item in seen,
                        )
                        for item, place in zip(items[:NUM_BEST], places.tolist())
                    ],
                )
            )
            chosen += items
        return conditions, chosen


def _moves(titles: list[str], without: np.ndarray, with_lum: np.ndarray) -> tuple[list[Ranked], list[Ranked], int]:
    """The heads of both rankings, each with where its items are in the other; and how many items moved at all.

    without, with_lum: the candidates' scores, negative.

    >>> before, after, num_moved = _moves(["a", "b", "c"], -np.array([0.9, 0.8, 0.1]), -np.array([0.5, 0.2, 0.7]))
    >>> [(each.title, each.moved) for each in after], num_moved
    ([('c', 2), ('a', -1), ('b', -1)], 3)
    """
    orders = [scores.argsort(kind="stable") for scores in (without, with_lum)]
    places = [np.argsort(order) for order in orders]
    moved = places[0] - places[1]
    heads = [
        [Ranked(titles[item], float(-scores[item]), int(moved[item])) for item in order[:NUM_RANKED].tolist()]
        for order, scores in zip(orders, (without, with_lum))
    ]
    return heads[0], heads[1], int((moved != 0).sum())


def _day(time_us: int) -> str:
    return datetime.fromtimestamp(time_us // SECOND, tz=timezone.utc).date().isoformat()
