"""Negative rows for a log that holds only positive events: rows about other items, drawn for rankers.

::

    events of a user   item 3   item 7   item 1      label 1
    drawn              item 9   item 4   item 6      label 0: the user, the moment and the history of the event above

A drawn row is not an event: no history, sequence, count or statistic contains it. It differs from its event only in the
item, and in what is known about that item at that moment.

A model must not recognise drawn rows by how they were drawn: because their items are rarer, older or newer than those
of events, or because the user never had them before. So "matched" draws the item of another event of the same split,
near in time and about as popular (drawn_pool.py); and beside an event whose item the user had before, another item that
the user had before. `facts` measures how well each of the three separates events from drawn rows.

Source: "uniform" is DIN's protocol for Amazon (arXiv 1706.06978, section 6.1): the next review of a user against one
random item.

Shape suffixes: E events, U users, I items, N drawn rows, P pairs of a user and an item of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from lumrec.data.drawn_pool import Slices, make_pool
from lumrec.data.moments import inseparable
from lumrec.data.schema import SchemaConfig, features_by_role
from lumrec.data.splits import PARTS, mix
from lumrec.run import limits
from lumrec.run.errors import UserError
from lumrec.run.limits import count

CALIBRATED = 200_000  # events that calibrate matched draws
ROUNDS = 16  # attempts to draw an item that is allowed
TELLING = 0.05  # an AUC this far from .5 means that drawn rows can be recognised


@dataclass(frozen=True)
class NegativeRowsConfig:
    """How many rows are drawn beside each event of a log of positives, and from which items.

    per_positive: rows drawn for each event, independently.
    sampling: "matched" draws items that are as popular, as new and as often had before as those of the events;
        "uniform" draws uniformly from the items of the training split, "popularity" by how often they occur there.
        The last two never draw an item that the user has anywhere in the log.
    seed: seed of the draws.
    """

    per_positive: int = count(1, least=1, most=10_000)
    sampling: Literal["matched", "uniform", "popularity"] = "matched"
    seed: int = limits.seed()


class NegativeRows:
    """Draws the rows of one block of users after the other, and counts the items of each split.

    count_I: training events of each item. user_ids: raw ids, for messages. blocks: files of all events, which "matched"
    draws from. absolute_time: whether times of different users can be compared.
    """

    def __init__(
        self,
        config: NegativeRowsConfig,
        count_I: np.ndarray,
        user_ids: pl.Series,
        blocks: Sequence[Path] = (),
        *,
        absolute_time: bool = True,
    ) -> None:
        self.config, self.count_I, self.user_ids, self.absolute_time = config, count_I, user_ids, absolute_time
        self.weight_I = ((count_I > 0) if config.sampling == "uniform" else count_I).astype(np.int64)
        self.pool: dict[int, Slices] = {}
        self.up_P = np.full(len(PARTS), 0.5)
        if config.sampling == "matched" and blocks:
            self.pool = make_pool(blocks, count_I, absolute_time=absolute_time)
            self.up_P = self._calibrate(pl.read_parquet(blocks[0], n_rows=CALIBRATED))
        self.num_events = self.num_rows = 0
        # Of each split's events and drawn rows: how often each item; how many are of items that the user had before.
        self.items_PKI = np.zeros((len(PARTS), 2, len(count_I)), np.int64)
        self.repeats_PK = np.zeros((len(PARTS), 2), np.int64)

    def add(self, block: pl.DataFrame) -> pl.DataFrame:
        """Drawn rows of the next block of events: `event` (i64, row of the log) and `item`, in the order of the events.

        Raises UserError where the block has negative events, and for a user who has had every item there is to draw.
        """
        if wrong := int((block["label"] != 1).sum()):
            raise UserError(
                f"data.negatives is for a log of positives only, and {wrong:,} of {len(block):,} events "
                "have label 0: those are the negatives. Leave data.negatives out, or let data.label make all events "
                "positive"
            )
        events = _Events(block, len(self.count_I))
        event_N = np.repeat(np.arange(len(block)), self.config.per_positive)
        number_N = np.arange(len(event_N)) - event_N * self.config.per_positive
        item_N = np.full(len(event_N), -1)
        is_repeat_N = np.zeros(len(event_N), bool)
        if self.config.sampling == "matched":
            item_N, is_repeat_N = self._matched(events, event_N, number_N, self.up_P)
        left = np.flatnonzero(item_N < 0)
        if len(left):
            share_N = self._random(events, event_N[left], number_N[left], 0)
            item_N[left] = self._draw(events.user_E, events.item_E, events.user_E[event_N[left]], share_N)
        self._count(events, event_N, item_N, is_repeat_N)
        drawn = pl.DataFrame({"event": event_N + self.num_events, "item": item_N.astype(np.int32)})
        self.num_events, self.num_rows = self.num_events + len(block), self.num_rows + len(drawn)
        return drawn

    def _matched(
        self, events: _Events, event_N: np.ndarray, number_N: np.ndarray, up_P: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The item of each row, -1 where none was found, and whether it is one that the user had before.

        Each attempt has two candidates, and takes the more popular one with the probability up_P of its split, else
        the less popular one. Beside an event whose item the user had before, candidates are items of the user's earlier
        events that were not shown at that moment; beside all others they are items of the pool that the user never has.
        """
        item_N, is_repeat_N = np.full(len(event_N), -1), np.zeros(len(event_N), bool)
        is_up_N = self._random(events, event_N, number_N, 99) < up_P[events.split_E[event_N]]
        for turn in range(ROUNDS):
            left = np.flatnonzero((item_N < 0) & events.is_repeat_E[event_N])
            event, number = event_N[left], number_N[left]
            first, before = events.first_E[event], events.before_E[event]
            two = [
                events.item_E[
                    first + (self._random(events, event, number, 100 + 2 * turn + which) * (before - first)).astype(int)
                ]
                for which in (0, 1)
            ]
            item_N[left] = self._choose(two, [~events.is_shown(event, drawn) for drawn in two], is_up_N[left])
        is_repeat_N[events.is_repeat_E[event_N] & (item_N >= 0)] = True
        for split, slices in self.pool.items():
            is_in_N = events.split_E[event_N] == split
            for turn in range(ROUNDS):
                left = np.flatnonzero((item_N < 0) & is_in_N)
                event, number = event_N[left], number_N[left]
                time = events.time_E[event] if self.absolute_time else np.zeros(len(event), np.int64)
                count, reach = self.count_I[events.item_E[event]], 2.0 ** (turn // 4 - 3)
                random = [self._random(events, event, number, 200 + 4 * turn + which) for which in range(4)]
                two = [slices.draw(time, count, at, shift, reach) for at, shift in (random[:2], random[2:])]
                item_N[left] = self._choose(two, [~events.is_met(event, drawn) for drawn in two], is_up_N[left])
        return item_N, is_repeat_N

    def _choose(self, two: Sequence[np.ndarray], good: Sequence[np.ndarray], is_up_N: np.ndarray) -> np.ndarray:
        """The more (is_up_N) or less popular of two good candidates, or the only good one; -1 where none is good."""
        first_N, second_N = (np.where(of, drawn, -1) for drawn, of in zip(two, good, strict=True))
        is_more_N = self.count_I[first_N] >= self.count_I[second_N]
        both_N = np.where(is_more_N == is_up_N, first_N, second_N)
        return np.where(good[0] & good[1], both_N, np.maximum(first_N, second_N))

    def _calibrate(self, block: pl.DataFrame) -> np.ndarray:
        """For each split, by bisection, the probability up_P at which popularity has an AUC of .5.

        The user's own items are left out, and those tend to be popular, so one half would draw less popular items.
        """
        events, event_N = _Events(block, len(self.count_I)), np.arange(len(block))
        low_P, high_P = np.zeros(len(PARTS)), np.ones(len(PARTS))
        for _ in range(8):
            up_P = (low_P + high_P) / 2
            item_N, _ = self._matched(events, event_N, np.zeros(len(block), np.int64), up_P)
            for split in range(len(PARTS)):
                is_in = (events.split_E == split) & (item_N >= 0)
                items = (np.bincount(of[is_in], minlength=len(self.count_I)) for of in (events.item_E, item_N))
                is_high = (_auc_of_counts(self.count_I, *items) or 0.5) > 0.5
                (low_P if is_high else high_P)[split] = up_P[split]
        return (low_P + high_P) / 2

    def _random(self, events: _Events, event_N: np.ndarray, number_N: np.ndarray, stream: int) -> np.ndarray:
        """Uniform in [0, 1), float64 [N]: a hash of the seed, the event's row, the draw's index, the stream."""
        order_N = events.order_E[event_N].astype(np.uint64)
        with np.errstate(over="ignore"):
            start = mix(np.array([self.config.seed % 2**64], np.uint64))
            state_N = mix(mix(order_N ^ start) + number_N.astype(np.uint64) + np.uint64(stream << 32))
        return (state_N >> np.uint64(11)).astype(np.float64) / 2.0**53

    def _count(self, events: _Events, event_N: np.ndarray, item_N: np.ndarray, is_repeat_N: np.ndarray) -> None:
        num_items = len(self.count_I)
        for split in range(len(PARTS)):
            is_in_E = events.split_E == split
            is_in_N = is_in_E[event_N]
            self.items_PKI[split] += [
                np.bincount(items, minlength=num_items) for items in (events.item_E[is_in_E], item_N[is_in_N])
            ]
            self.repeats_PK[split] += [(events.is_repeat_E & is_in_E).sum(), (is_repeat_N & is_in_N).sum()]

    def _draw(self, user_E: np.ndarray, item_E: np.ndarray, user_N: np.ndarray, share_N: np.ndarray) -> np.ndarray:
        """The item of each row, int64 [N], at its share (0 … 1) of the weight that the user's own items leave.

        No draw is rejected. Items are laid side by side, each as wide as its weight; the user's own are cut out, and an
        index into the rest is moved behind all own items that begin at or before it::

            items        0 0 1 2 2 2 3 4        own: 0 and 2
            rest             1       3 4        index 1 is item 3: moved by 2 + 3 from index 1 to index 6
        """
        end_I = np.cumsum(self.weight_I)
        begin_I, total = end_I - self.weight_I, int(end_I[-1])
        first = int(user_E[0])  # user_N: ascending
        pair_P = np.unique((user_E - first) * len(self.weight_I) + item_E)
        user_P, item_P = np.divmod(pair_P, len(self.weight_I))
        own_P1 = np.concatenate([[0], np.cumsum(self.weight_I[item_P])])  # weight of all pairs before each
        first_U1 = np.searchsorted(user_P, np.arange(int(user_E[-1]) - first + 2))  # first pair of each user
        left_U = total - (own_P1[first_U1[1:]] - own_P1[first_U1[:-1]])
        if (left_U[user_N - first] == 0).any():
            user = int(user_N[left_U[user_N - first] == 0][0])
            raise UserError(
                f"data.negatives: the user {self.user_ids[user]!r} has events of every item of the training split, so "
                "there is none to draw; leave this user out of the log"
            )
        user_N = user_N - first
        index_N = np.minimum((share_N * left_U[user_N]).astype(np.int64), left_U[user_N] - 1)
        begin_P = begin_I[item_P] - (own_P1[:-1] - own_P1[first_U1[user_P]])  # in what is left
        before_N = np.searchsorted(user_P * (total + 1) + begin_P, user_N * (total + 1) + index_N, side="right")
        moved_N = own_P1[before_N] - own_P1[first_U1[user_N]]
        return np.searchsorted(end_I, index_N + moved_N, side="right")

    def facts(self) -> dict[str, float | None]:
        """How well events and drawn rows can be separated without a model, for each split; None where it has no rows.

        "<split>_popularity_auc": AUC of the training events of each item, a tie one half ("popularity_auc": of test).
        "<split>_unseen_positives", "…_negatives": shares of items without training events.
        "<split>_repeated_positives", "…_negatives": shares of items that the user had before.
        """
        found: dict[str, float | None] = {}
        for split, name in enumerate(PARTS):
            positives_I, negatives_I = self.items_PKI[split]
            found[f"{name}_popularity_auc"] = _auc_of_counts(self.count_I, positives_I, negatives_I)
            for kind, (what, of_I) in enumerate((("positives", positives_I), ("negatives", negatives_I))):
                total = int(of_I.sum())
                found[f"{name}_unseen_{what}"] = int(of_I[self.count_I == 0].sum()) / total if total else None
                found[f"{name}_repeated_{what}"] = int(self.repeats_PK[split, kind]) / total if total else None
        return {"popularity_auc": found["test_popularity_auc"], **found}


class _Events:
    """The columns of one block, sorted by user and time, and lookups in them."""

    def __init__(self, block: pl.DataFrame, num_items: int) -> None:
        self.user_E, self.item_E, self.time_E, self.order_E, rows_back_E = (
            block[name].to_numpy().astype(np.int64) for name in ("user", "item", "timestamp", "order", "rows_back")
        )
        self.split_E, self.num_items = block["split"].to_numpy(), num_items
        self.before_E = np.arange(len(block)) - rows_back_E  # the events of the user before here are earlier
        self.first_E = np.searchsorted(self.user_E, self.user_E)
        pair_E = (self.user_E - self.user_E[0]) * num_items + self.item_E
        self.pair_P, first_P, pair_of_E = np.unique(pair_E, return_index=True, return_inverse=True)
        self.is_repeat_E = first_P[pair_of_E] < self.before_E
        self.moment_E = inseparable(self.before_E)
        self.shown_P = np.unique(self.moment_E * num_items + self.item_E)

    def is_met(self, event_N: np.ndarray, item_N: np.ndarray) -> np.ndarray:
        """Whether the user of each event has the item anywhere in the log (bool [N])."""
        return _is_in(self.pair_P, (self.user_E[event_N] - self.user_E[0]) * self.num_items + item_N)

    def is_shown(self, event_N: np.ndarray, item_N: np.ndarray) -> np.ndarray:
        """Whether the item is that of the event, or of another of the same moment (bool [N])."""
        return _is_in(self.shown_P, self.moment_E[event_N] * self.num_items + item_N)


def draw_lines(facts: Mapping[str, float | None]) -> list[str]:
    """The facts of the draws, one line for each split that has rows."""
    lines = []
    for split in PARTS:
        auc = facts.get(f"{split}_popularity_auc")
        if auc is not None:
            unseen, repeated = (
                [facts[f"{split}_{what}_{kind}"] for kind in ("positives", "negatives")]
                for what in ("unseen", "repeated")
            )
            lines.append(
                f"{split:5}  AUC by item popularity {auc:.4f}; items not in training: {unseen[0]:.1%} of the events, "
                f"{unseen[1]:.1%} of the drawn rows; that the user had before: {repeated[0]:.1%}, {repeated[1]:.1%}"
            )
    return lines


def draw_warnings(config: NegativeRowsConfig, facts: Mapping[str, float | None]) -> list[str]:
    """Where a ranker could recognise drawn rows by how they were drawn, one sentence each."""
    warnings = []
    advice = "" if config.sampling == "matched" else "; data.negatives.sampling=matched draws so that it does not"
    for split in PARTS:
        auc = facts.get(f"{split}_popularity_auc")
        if auc is None:
            continue
        if abs(auc - 0.5) > TELLING:
            warnings.append(
                f"drawn rows of the {split} split can be recognised by popularity: AUC {auc:.4f} where .5 says nothing"
                f"{advice or ' (too few other items to draw from)'}"
            )
        for what, says in (("unseen", "are not in the training split"), ("repeated", "the user had before")):
            positives, negatives = (facts[f"{split}_{what}_{kind}"] or 0.0 for kind in ("positives", "negatives"))
            if abs(positives - negatives) > 2 * TELLING:  # an AUC of .5 + half of the difference
                warnings.append(
                    f"items that {says} are {positives:.1%} of the events and {negatives:.1%} of the drawn rows of the "
                    f"{split} split: that tells them apart{advice}"
                )
    return warnings


def _is_in(sorted_P: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    index_N = np.minimum(np.searchsorted(sorted_P, key_N), len(sorted_P) - 1)
    return sorted_P[index_N] == key_N


def _auc_of_counts(count_I: np.ndarray, positives_I: np.ndarray, negatives_I: np.ndarray) -> float | None:
    _, score_I = np.unique(count_I, return_inverse=True)
    positives_S, negatives_S = (np.bincount(score_I, weights=x) for x in (positives_I, negatives_I))
    pairs = positives_S.sum() * negatives_S.sum()
    below_S = np.cumsum(negatives_S) - negatives_S / 2
    return float((positives_S * below_S).sum() / pairs) if pairs else None


def check_features_of_the_moment(schema: SchemaConfig, blocks: Sequence[Path]) -> None:
    """Raises UserError for a condition or context feature that describes the item: a drawn row has the value of its
    event, so a ranker could recognise it as item and feature do not fit.

    Such a feature is the same in all events of each item that has several, and not the same in the whole log.
    blocks: Parquet files of the events, features by name.
    """
    frame = pl.scan_parquet(list(blocks))
    names = [name for name in features_by_role(schema, "condition") if not schema.features[name].wish]
    names += [*features_by_role(schema, "context"), *features_by_role(schema, "context", dense=True)]
    hashed = {name: pl.col(name).hash() for name in names}
    of_items = frame.group_by("item").agg(
        pl.len().alias("len of item"), *((one.min() == one.max()).alias(name) for name, one in hashed.items())
    )
    several = of_items.filter(pl.col("len of item") > 1).collect(engine="streaming")
    values = frame.select(one.approx_n_unique().alias(name) for name, one in hashed.items()).collect(engine="streaming")
    for name in names:
        if len(several) and several[name].all() and values[name].item() > 1:
            feature = schema.features[name]
            advice = "declare it wish: true" if feature.role == "condition" else "declare it role: item"
            raise UserError(
                f"schema.features.{name}: with data.negatives a {feature.role} must be of the moment, and column "
                f"{feature.column!r} is the same in all events of an item: it would give drawn items away. If it "
                f"is the item's, {advice}; else leave it out"
            )
