"""Rows about items that a user never met, drawn for a log of positives alone: what a ranker tells the events from.

::

    events of a user   item 3   item 7   item 1      label 1
    drawn              item 9   item 4   item 6      label 0: the user, the moment and the history of the event above

A drawn row is no event: no history, sequence, count or statistic has it in. It differs from its event in the item
alone, and in what is known of that item at that moment.

Source: DIN's protocol for Amazon (arXiv 1706.06978, section 6.1): the next review of a user against one random item.

Shape suffixes: E events, U users, I items, N drawn rows, P pairs of a user and an item of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import polars as pl

from lumrec.data.schema import SchemaConfig, features_by_role
from lumrec.data.splits import TEST, mix
from lumrec.errors import UserError

SAMPLING = ("uniform", "popularity")


@dataclass(frozen=True)
class NegativeRowsConfig:
    """How many rows are drawn for each event of a log of positives, and from which items.

    per_positive: rows for each event, drawn independently. sampling: "uniform" over the items that the training part
    has, or "popularity", by how often it has them; never an item that the user meets anywhere in the log. seed: of the
    draws.
    """

    per_positive: int = 1
    sampling: str = "uniform"
    seed: int = 0


def check_negative_rows(config: NegativeRowsConfig) -> None:
    """Raises UserError for settings that cannot work."""
    if config.per_positive < 1 or config.sampling not in SAMPLING:
        raise UserError(
            f"data.negatives: got per_positive {config.per_positive} and sampling {config.sampling!r}; expected at "
            f"least 1 row for each event, and one of {', '.join(SAMPLING)} (leave data.negatives out to draw none)"
        )


class NegativeRows:
    """Draws the rows of one block of users after the other, writes them, and counts what the test part holds.

    count_I: training events of each item. user_ids: raw ids, to name a user by.
    """

    def __init__(self, config: NegativeRowsConfig, count_I: np.ndarray, user_ids: pl.Series) -> None:
        self.config, self.count_I, self.user_ids = config, count_I, user_ids
        weight_I = count_I if config.sampling == "popularity" else count_I > 0
        self.weight_I = weight_I.astype(np.int64)
        self.num_events = self.num_rows = 0
        self.positives_I, self.negatives_I = np.zeros(len(count_I), np.int64), np.zeros(len(count_I), np.int64)

    def add(self, block: pl.DataFrame) -> pl.DataFrame:
        """Drawn rows of the next block of events: `event` (i64, row of the log) and `item`, in the order of the events.

        Raises UserError where the block has a negative of its own, and for a user who has met all there is to draw.
        """
        if wrong := int((block["label"] != 1).sum()):
            raise UserError(
                f"data.negatives is for a log of positives alone, and {wrong:,} of {len(block):,} events of a block "
                "have label 0: those are the negatives. Leave data.negatives out, or let data.label make all events "
                "positive"
            )
        user_E, item_E, order_E = (block[name].to_numpy().astype(np.int64) for name in ("user", "item", "order"))
        event_N = np.repeat(np.arange(len(block)), self.config.per_positive)
        number_N = np.arange(len(event_N)) - event_N * self.config.per_positive
        share_N = _random(self.config.seed, order_E[event_N], number_N)
        item_N = self._draw(user_E, item_E, user_E[event_N], share_N)
        is_test_E = block["split"].to_numpy() == TEST
        self.positives_I += np.bincount(item_E[is_test_E], minlength=len(self.count_I))
        self.negatives_I += np.bincount(item_N[is_test_E[event_N]], minlength=len(self.count_I))
        drawn = pl.DataFrame({"event": event_N + self.num_events, "item": item_N.astype(np.int32)})
        self.num_events, self.num_rows = self.num_events + len(block), self.num_rows + len(drawn)
        return drawn

    def _draw(self, user_E: np.ndarray, item_E: np.ndarray, user_N: np.ndarray, share_N: np.ndarray) -> np.ndarray:
        """The item of each row, int64 [N], at its share (0 … 1) of the weight that the user's own items leave.

        No draw is rejected. Items lie side by side, as wide as their weights; a user's own are cut out, and a place in
        what is left is moved behind all those own items that begin at or before it::

            items        0 0 1 2 2 2 3 4        own: 0 and 2
            left             1       3 4        place 1 is item 3: moved by 2 + 3 from place 1 to place 6
        """
        end_I = np.cumsum(self.weight_I)
        begin_I, total = end_I - self.weight_I, int(end_I[-1])
        first = int(user_E[0])
        pair_P = np.unique((user_E - first) * len(self.weight_I) + item_E)
        user_P, item_P = np.divmod(pair_P, len(self.weight_I))
        own_P1 = np.concatenate([[0], np.cumsum(self.weight_I[item_P])])  # weight of all pairs before each
        first_U1 = np.searchsorted(user_P, np.arange(user_N[-1] - first + 2))  # first pair of each user
        left_U = total - (own_P1[first_U1[1:]] - own_P1[first_U1[:-1]])
        if (left_U == 0).any():
            user = first + int(np.flatnonzero(left_U == 0)[0])
            raise UserError(
                f"data.negatives: the user {self.user_ids[user]!r} has events of every item of the training part, so "
                "that there is none to draw; leave this user out of the log"
            )
        user_N = user_N - first
        place_N = np.minimum((share_N * left_U[user_N]).astype(np.int64), left_U[user_N] - 1)
        begin_P = begin_I[item_P] - (own_P1[:-1] - own_P1[first_U1[user_P]])  # in what is left
        before_N = np.searchsorted(user_P * (total + 1) + begin_P, user_N * (total + 1) + place_N, side="right")
        moved_N = own_P1[before_N] - own_P1[first_U1[user_N]]
        return np.searchsorted(end_I, place_N + moved_N, side="right")

    def popularity_auc(self) -> Optional[float]:
        """AUC of the training events of each item over the rows of the test part: how far popularity alone gets.

        A tie counts one half. None where the test part has no rows.
        """
        _, score_I = np.unique(self.count_I, return_inverse=True)
        positives_S, negatives_S = (np.bincount(score_I, weights=x) for x in (self.positives_I, self.negatives_I))
        pairs = positives_S.sum() * negatives_S.sum()
        below_S = np.cumsum(negatives_S) - negatives_S / 2
        return float((positives_S * below_S).sum() / pairs) if pairs else None


def _random(seed: int, order_N: np.ndarray, number_N: np.ndarray) -> np.ndarray:
    """Uniform in [0, 1), float64 [N]: a hash of the seed, the event's place in the log, and the draw's number."""
    with np.errstate(over="ignore"):
        start = mix(np.array([seed % 2**64], np.uint64))
        state_N = mix(mix(order_N.astype(np.uint64) ^ start) + number_N.astype(np.uint64))
    return (state_N >> np.uint64(11)).astype(np.float64) / 2.0**53


def check_features_of_the_moment(schema: SchemaConfig, events: Path) -> None:
    """Raises UserError for a condition or context feature that is the item's: a drawn row has its event's, not its own
    item's, and a ranker would tell the two apart by whether item and feature agree.

    Told by this: it is the same in all events of each item that has several, and not the same throughout.
    """
    frame = pl.scan_parquet(events / "*.parquet")
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
            mend = "declare it wish: true" if feature.role == "condition" else "declare it role: item"
            raise UserError(
                f"schema.features.{name}: with data.negatives a {feature.role} must be of the moment, and column "
                f"{feature.column!r} is the same in all events of an item: it would tell a drawn item from the real "
                f"one. If it is the item's, {mend}; else leave it out"
            )
