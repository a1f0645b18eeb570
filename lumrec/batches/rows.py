"""Rows of a ranker: each event of the log (or drawn row) with the history before it, in batches without padding.

Shape suffixes: B rows, N rows of a part, T history events of all rows behind each other, U unique tokens, E events.
"""

import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lumrec.data.columns import Column, expand_ranges
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import features_by_role
from lumrec.data.splits import TRAIN, moment_of_share
from lumrec.features.history import earlier_of_category
from lumrec.features.items import categories
from lumrec.features.statistics import Statistics
from lumrec.knowledge.store import Knowledge
from lumrec.modules.rankers.base import RankBatch
from lumrec.modules.tokens import make_kjt
from lumrec.run.errors import UserError
from lumrec.run.kept import NewArray, in_memory

logger = logging.getLogger(__name__)


class RowTokens(NamedTuple):
    """kjt: stride U + B (see RankBatch). item_C, history_T: int64, indices of the tokens of the items and histories.
    extras: what RankBatch has only for some rankers."""

    kjt: KeyedJaggedTensor
    num_tokens: int
    item_C: Tensor
    history_T: Tensor
    offsets_B1: Tensor
    extras: dict[str, Tensor]


class TokenNumbers(NamedTuple):
    """token_E: the number of each event's pair (item, feedback). event_of_pair: an event of each pair, int64."""

    token_E: np.ndarray
    event_of_pair: np.ndarray


def number_tokens(data: PreparedData, new: NewArray = in_memory) -> TokenNumbers:
    """Numbers the pairs (item, feedback) of a log. new: makes the two arrays."""
    pair_E = _pair(data.item, [data.event_columns[name] for name in features_by_role(data.schema, "feedback")])
    _, event_of_pair, token_E = np.unique(pair_E, return_index=True, return_inverse=True)
    kept = TokenNumbers(new("token", token_E.shape, np.int32), new("event_of_pair", event_of_pair.shape, np.int64))
    kept.token_E[:], kept.event_of_pair[:] = token_E, event_of_pair
    return kept


def training_rows(data: PreparedData, knowledge: Knowledge | None, window: Sequence[float] = ()) -> np.ndarray:
    """Rows of the training part (int64 [N]); with knowledge of a time split, those that its LUM was not trained on.

    window: two shares of the training part by time; only the rows between them are used; () = all. A row's time is that
    of its moment.
    Raises UserError if that leaves no rows, and for an invalid window.
    """
    is_training, time_E = data.split == TRAIN, data.timestamp[data.before]
    if window:
        after, until = _bounds_of(data, window)
        is_training &= (time_E > after) & (time_E <= until)
        logger.info("rows in the window %s of the training part: %s", list(window), f"{is_training.sum():,}")
    if knowledge is not None and knowledge.learnt_until is not None:
        is_training &= time_E > knowledge.learnt_until
        logger.info("rows that the LUM has not learnt from: %s to train on", f"{is_training.sum():,}")
        if not is_training.any():
            raise UserError("the LUM was trained on all training rows: lower pretrain.time_share")
    return np.flatnonzero(is_training)


def _bounds_of(data: PreparedData, window: Sequence[float]) -> tuple[float, float]:
    if len(window) != 2 or not 0.0 <= window[0] < window[1] <= 1.0:
        raise UserError(f"rank.time_window is {list(window)}; expected two shares, such as [0.75, 1]")
    if not data.absolute_time:
        raise UserError(
            "rank.time_window needs one clock for all users, and this log only has the time between a user's own events"
        )
    after, until = (moment_of_share(data.split, data.timestamp, share) if share else -math.inf for share in window)
    return after, until


class RowBuilder:
    """Makes batches out of rows (events of the prepared data) for a ranker that reads the given features.

    features: the tables' KJT order; a token of the history is made of the schema's item and feedback features.
    row_features: of the user, or of the event itself (context). max_history: events before the row's moment
    (lumrec/data/moments.py) at most; 0 = none.
    statistics: by row; knowledge: by event row; each may be left out. reads: what RankBatch has only for some rankers
    (Ranker.reads). category: the item feature whose first value is an item's category; "" = the first multi-valued one.
    tokens: of `number_tokens`, where they are known.

    A batch is put together without a loop over rows, and each token (an item with its feedback) that occurs in it is
    looked up once: 4096 rows with 50 events each hold 200,000 tokens, but far fewer different ones.
    """

    def __init__(
        self,
        data: PreparedData,
        *,
        features: Sequence[str],
        row_features: Sequence[str],
        max_history: int,
        statistics: Statistics | None = None,
        knowledge: Knowledge | None = None,
        reads: Sequence[str] = (),
        category: str = "",
        tokens: TokenNumbers | None = None,
    ) -> None:
        if max_history < 0:
            raise UserError(f"max_history is {max_history}; expected 0 or more events")
        self.data, self.statistics, self.knowledge, self.max_history = data, statistics, knowledge, max_history
        self.features, self.row_features = list(features), list(row_features)
        self.item_features = features_by_role(data.schema, "item")
        self.feedback_features = features_by_role(data.schema, "feedback")
        self.dense_RF = np.zeros((data.num_rows, 0), np.float32) if statistics is None else statistics.values_RF
        # Token ids: first every pair (item, feedback) of the log, by number, then every item as a target.
        self.token_E, self.event_of_pair = number_tokens(data) if tokens is None else tokens
        self.reads = frozenset(reads)
        if self.reads & {"category_U", "category_count_T"}:
            self.category_I = categories(data.item_columns, category)
        if "category_count_T" in self.reads:
            self.category_count_E = earlier_of_category(data.user, self.category_I[data.item], data.before)
        self._scratch = threading.local()

    def batch(self, rows: np.ndarray) -> RankBatch:
        """The batch of `rows` (int64, events or drawn rows, any order, repeats allowed, at least one)."""
        of_rows = self.data.rows(rows)
        tokens = self.tokens(of_rows.event, of_rows.item)
        return RankBatch(
            tokens=tokens.kjt,
            num_tokens=tokens.num_tokens,
            target_B=tokens.item_C,
            history_T=tokens.history_T,
            offsets_B1=tokens.offsets_B1,
            dense_BF=torch.from_numpy(self.dense_RF[rows]),
            label_B=torch.from_numpy(of_rows.label),
            row_B=torch.from_numpy(rows),
            knowledge=self.knowledge.batch(of_rows.event, of_rows.item) if self.knowledge is not None else None,
            **tokens.extras,
        )

    def tokens(self, rows: np.ndarray, items_C: np.ndarray) -> RowTokens:
        """Tokens of the rows' histories and of some catalogue items (int64 [C]), each once, and the rows' own bags."""
        end_B = self.data.before[rows]
        begin_B = np.maximum(self.data.user_offsets[self.data.user[rows]], end_B - self.max_history)
        offsets_B1 = np.concatenate([[0], np.cumsum(end_B - begin_B)])
        history_events_T = expand_ranges(torch.from_numpy(begin_B), torch.from_numpy(end_B - begin_B)).numpy()
        ids = np.concatenate([self.token_E[history_events_T], len(self.event_of_pair) + items_C])
        token_U, place = self._unique(ids)
        return RowTokens(
            kjt=make_kjt(self.features, self._columns(token_U, rows), stride=len(token_U) + len(rows)),
            num_tokens=len(token_U),
            item_C=torch.from_numpy(place[len(history_events_T) :]),
            history_T=torch.from_numpy(place[: len(history_events_T)]),
            offsets_B1=torch.from_numpy(offsets_B1),
            extras=self._extras(token_U, rows, history_events_T, offsets_B1),
        )

    def _extras(
        self, token_U: np.ndarray, rows: np.ndarray, history_events_T: np.ndarray, offsets_B1: np.ndarray
    ) -> dict[str, Tensor]:
        """What this builder's ranker reads beside the tables."""
        data, extras = self.data, {}
        if self.reads & {"item_U", "category_U"}:
            item_U = self._items(token_U)
            if "item_U" in self.reads:
                extras["item_U"] = torch.from_numpy(item_U)
            if "category_U" in self.reads:
                extras["category_U"] = torch.from_numpy(self.category_I[item_U])
        if "age_T" in self.reads:
            asked_at_B = data.timestamp[data.before[rows]]
            age_T = np.repeat(asked_at_B, np.diff(offsets_B1)) - data.timestamp[history_events_T]
            extras["age_T"] = torch.from_numpy(age_T.astype(np.float32))
        if "category_count_T" in self.reads:
            extras["category_count_T"] = torch.from_numpy(self.category_count_E[history_events_T])
        return extras

    def _items(self, token_U: np.ndarray) -> np.ndarray:
        """The item of each token, int64 [U]."""
        item_U = token_U - len(self.event_of_pair)
        is_pair_U = item_U < 0
        item_U[is_pair_U] = self.data.item[self.event_of_pair[token_U[is_pair_U]]]
        return item_U

    def _columns(self, token_U: np.ndarray, rows: np.ndarray) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Values and lengths of every feature over U token bags and B row bags (see RankBatch)."""
        data, num_tokens, num_pairs = self.data, len(token_U), len(self.event_of_pair)
        is_pair_U = token_U < num_pairs
        event_P, item_U = self.event_of_pair[token_U[is_pair_U]], self._items(token_U)
        index_U, index_P, index_B = (torch.from_numpy(x) for x in (item_U, event_P, rows))
        bag_U, bag_B = torch.arange(num_tokens), torch.arange(num_tokens, num_tokens + len(rows))
        bag_P = torch.from_numpy(np.flatnonzero(is_pair_U))
        user_B = torch.from_numpy(data.user[rows])
        columns = {}

        def put(name: str, column: Column, index: Tensor, bag: Tensor) -> None:
            """Fills bags (in ascending order) with entries of a column; the feature's other bags are empty."""
            values, lengths = column.take(index)
            columns[name] = (
                values,
                torch.zeros(num_tokens + len(rows), dtype=torch.int64).index_copy_(0, bag, lengths),
            )

        for name in self.item_features:
            put(name, data.item_columns[name], index_U, bag_U)
        for name in self.feedback_features:
            put(name, data.event_columns[name], index_P, bag_P)
        for name in self.row_features:
            if name in data.user_columns:
                put(name, data.user_columns[name], user_B, bag_B)
            else:
                put(name, data.event_columns[name], index_B, bag_B)
        return columns

    def _unique(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distinct ids, and the index of each of `ids` among them: like np.unique, but without sorting.

        A scratch array over all ids keeps the last position of each id, which leaves one position per id.
        """
        place_of = getattr(self._scratch, "place_of", None)  # one per thread: loader and evaluation may overlap
        if place_of is None:
            place_of = self._scratch.place_of = np.empty(len(self.event_of_pair) + self.data.num_items, np.int64)
        place_of[ids] = np.arange(len(ids))
        unique_U = ids[place_of[ids] == np.arange(len(ids))]
        place_of[unique_U] = np.arange(len(unique_U))
        return unique_U, place_of[ids]


class RowLoader:
    """Batches of an epoch in a seeded order; the state is (epoch, batches done), so any batch can be made again.

    Rows are divided evenly: with R ranks every epoch has a multiple of R batches whose sizes differ by at most one, so
    no step has a rank without rows, and no last batch is small. Raises UserError with fewer rows than ranks. Another
    number of ranks divides the epoch's remaining rows again (if fewer are left than ranks, up to R - 1 rows come
    twice).
    """

    def __init__(
        self,
        builder: RowBuilder,
        rows: np.ndarray,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; expected at least 1")
        if len(rows) < world_size:
            raise UserError(
                f"the training part has {len(rows)} rows for {world_size} process(es); expected at least one each: "
                "look at the split of the prepared data"
            )
        # Half the memory, here and in each epoch's order, which does not depend on it.
        self.rows = rows.astype(np.int32) if rows.max(initial=0) < 2**31 else rows
        self.builder, self.seed = builder, seed
        self.rank, self.world_size = rank, world_size
        self.batch_size = batch_size
        self.epoch, self.first, self.done = 0, 0, 0

    def _bounds(self, world_size: int) -> np.ndarray:
        """Where the batches begin and end, from the row `first` on; those of one step follow each other."""
        left = len(self.rows) - self.first
        steps = min(-(-left // (self.batch_size * world_size)), left // world_size)
        return self.first + np.linspace(0, left, steps * world_size + 1).astype(np.int64)

    def __len__(self) -> int:
        num_rows = len(self.rows)
        return min(-(-num_rows // (self.batch_size * self.world_size)), num_rows // self.world_size)

    def __iter__(self) -> Iterator[Any]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        bounds = self._bounds(self.world_size)
        for step in range(self.done, (len(bounds) - 1) // self.world_size):
            number = step * self.world_size + self.rank
            self.done = step + 1
            first_of_step = step * self.world_size
            num_rows = int(bounds[first_of_step + self.world_size] - bounds[first_of_step])
            rows = order[bounds[number] : bounds[number + 1]].astype(np.int64)
            yield self.make_batch(rows, number=number, num_rows=num_rows)
        self.epoch, self.first, self.done = self.epoch + 1, 0, 0

    def make_batch(self, rows: np.ndarray, *, number: int, num_rows: int) -> Any:
        """The batch of these rows, the `number`-th of the epoch since row `first`; the ranks' step has `num_rows`."""
        return self.builder.batch(rows)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "first": self.first, "done": self.done, "world_size": self.world_size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.first, self.done = state["epoch"], state["first"], state["done"]
        if state["world_size"] != self.world_size:
            dealt = int(self._bounds(state["world_size"])[self.done * state["world_size"]])
            self.first, self.done = min(dealt, len(self.rows) - self.world_size), 0


def evaluation_batches(
    builder: RowBuilder, rows: np.ndarray, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[np.ndarray, RankBatch]]:
    """Each row once over all ranks: (indices into `rows` [B], batch); every rank gets the same number of batches.

    If there are too few rows, a rank gets a row that another has too: with sharded tables every rank must call the
    model.
    """
    length = -(-len(rows) // (batch_size * world_size))
    bounds = np.linspace(0, len(rows), length * world_size + 1).astype(np.int64)
    for step in range(length):
        number = step * world_size + rank
        place_B = np.arange(bounds[number], bounds[number + 1])
        if not len(place_B):
            place_B = np.array([min(bounds[number], len(rows) - 1)])
        yield place_B, builder.batch(rows[place_B])


def _pair(item_E: np.ndarray, feedback: Sequence[Column]) -> np.ndarray:
    """A number for each event, the same for events with the same item and feedback."""
    pair_E = item_E.astype(np.int64)
    for column in feedback:
        code_E = _codes(column)
        # Numbered again each time, so that the product cannot overflow.
        pair_E = np.unique(pair_E, return_inverse=True)[1] * (int(code_E.max(initial=0)) + 1) + code_E
    return pair_E


def _codes(column: Column) -> np.ndarray:
    """A number for each entry, the same for entries with the same values."""
    if column.offsets is None:
        return column.values.numpy()
    lengths = column.offsets.diff().numpy()
    longest = int(lengths.max(initial=0))
    padded = np.full((len(lengths), longest), -1, np.int64)
    padded[np.arange(longest) < lengths[:, None]] = column.values.numpy()
    return np.unique(padded, axis=0, return_inverse=True)[1].reshape(-1)
