"""Group query: asks N conditions about each history, which is computed only once (LUM section 4.2, figure 4).

    serving     c1 i1 c2 i2 c3 i3 | a b        the user's last events; a and b both have the position after them
    rows        c1 i1 c2 i2 c3 i3              one pass for all rows of a window: row 2 is asked with only event 1,
                      a b   a b                row 3 with events 1 and 2, as a server would have asked at that time

A query never sees another query, nor events of its own moment or later. Rows of one moment (lumrec/data/moments.py)
share one answer. Rows of a user's first moment have no history and are not asked.

A complete example, the ten best items for two users under two conditions (`load_lum` gives a trained LUM):

>>> import tempfile
>>> from lumrec.experiments.config import load
>>> from lumrec.data.prepare import open_or_prepare
>>> from lumrec.models.lum import build_lum
>>> runs = tempfile.TemporaryDirectory()
>>> config = load(None, ["data.source=simulator", "data.simulator.num_users=20", f"runs_dir={runs.name}"])
>>> data = open_or_prepare(config)
no prepared data at ...
>>> lum, builder = build_lum(config.model, data)
>>> query = GroupQuery(lum, builder, [{"feedback": "like"}, {"feedback": "dislike"}], max_events=128)
>>> o_BND, e_ID = query.users(torch.tensor([0, 1])), query.items()
>>> (o_BND @ e_ID.T).topk(10).indices.shape
torch.Size([2, 2, 10])

A request brings its own conditions; `ask` takes raw user keys:

>>> query.ask(["3", "7"], [{"category": "top 2"}, {"feedback": "like"}]).shape
torch.Size([2, 3, 64])

Shape suffixes: B users, R answers (moments asked), E event rows, N conditions, D width, I catalogue items, W windows.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lumrec.batches.packs import PackBuilder, Queries
from lumrec.batches.windows import AnsweringWindows, Windows, answering_windows, behind
from lumrec.data.columns import expand_ranges
from lumrec.data.prepared import PreparedData
from lumrec.modules.large_user_model import Pack
from lumrec.query.conditions import MAX_CONDITIONS, Conditions, expand
from lumrec.run.errors import UserError

SORTED_WINDOWS = 4096
_USERS: WeakKeyDictionary[PreparedData, dict[str, int]] = WeakKeyDictionary()


class GroupQuery:
    """Asks a LUM about many users, or about every row of the log, under the same N conditions.

    model: a LargeUserModel (plain or under DMP) and the builder that came with it. conditions: raw values by condition
    feature, such as {"feedback": "like"}; a feature that is left out counts as "not given", and {} asks without any
    condition. A multi-valued feature takes several values with | between them, {"query": "red|shoes"}. "*" and "top 3"
    mean several values (see conditions.py); self.conditions holds them expanded. stride: see `row_windows`; 0 = half a
    window.

    Raises UserError for a feature or value that the LUM does not know, naming the nearest, and for more than
    `max_conditions` conditions.
    """

    def __init__(
        self,
        model: nn.Module,
        builder: PackBuilder,
        conditions: Sequence[Mapping[str, str]],
        *,
        max_events: int,
        stride: int = 0,
        tokens_per_pack: int = 8192,
        max_conditions: int = MAX_CONDITIONS,
    ) -> None:
        self.model, self.builder, self.data = model, builder, builder.data
        self._words = builder.data  # whose vocabularies are read
        features = builder.condition_features
        self.conditions = expand(builder.data, features, conditions, max_conditions=max_conditions)
        self.asked = Conditions(builder.data, features, self.conditions)
        self.max_events, self.max_conditions = max_events, max_conditions
        self.stride = stride or default_stride(max_events)
        if not 1 <= self.stride < max_events:
            raise UserError(
                f"the stride of the windows is {self.stride}; expected 1 to {max_events - 1} (max_events - 1), so that "
                "every row of a long history has some events before it"
            )
        self.tokens_per_pack = tokens_per_pack
        self.device = next(model.parameters()).device

    def of_other_events(self, data: PreparedData) -> GroupQuery:
        """The same query for the events in `data`, which has the vocabularies of this query's data."""
        other = copy.copy(self)
        other.data, other.builder = data, self.builder.of_other_events(data)
        other.asked = self.asked.of_other_events(data)
        return other

    def users(self, user_B: Tensor) -> Tensor:
        """Answers after the last event of each user, o_BND (float32): what serving reads."""
        return self.answer_all(serving_windows(self.data, user_B, max_events=self.max_events), self.asked)

    def ask(
        self,
        users: Sequence[str] | Windows,
        conditions: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        *,
        asked_at_B: Tensor | None = None,
        unknown_as_zero: bool = False,
    ) -> Tensor:
        """Answers to the conditions of a request, such as its search query, o_BND (float32).

        users: raw keys, each asked after the last event; or windows of the log's rows, each asked after its end.
        conditions: N for everyone, or a list of N for each. asked_at_B: int64, seconds, the time of each query (read by
        a LUM with model.time_bias); None = the time of the last event. unknown_as_zero: a value that the LUM does not
        know, such as a new word of a search query, is read as "unknown", as in the log; otherwise it raises.

        Raises UserError for an unknown key, feature or value (naming the nearest), for lists of different lengths, and
        for a window that is too long for the LUM.
        """
        if isinstance(users, Windows):
            windows = users
            if windows.count and int(windows.length_W.max()) >= self.max_events:
                raise UserError(
                    f"got a history of {int(windows.length_W.max())} events, but this LUM sees up to "
                    f"{self.max_events - 1} before a query (model.max_events - 1); pass the last ones"
                )
        else:
            windows = serving_windows(self.data, user_rows(self.data, users), max_events=self.max_events).windows
        asked = self.of_request(windows.count, conditions, unknown_as_zero=unknown_as_zero)
        return self.answer_all(behind(windows), asked, asked_at_B)

    def of_request(self, num_histories: int, conditions: Sequence[Any], *, unknown_as_zero: bool = False) -> Conditions:
        """The conditions of a request, see `ask`."""
        data, features = self._words, self.builder.condition_features
        if not conditions or isinstance(conditions[0], Mapping):
            slots = expand(data, features, conditions, max_conditions=self.max_conditions)
            return Conditions(data, features, slots, unknown_as_zero=unknown_as_zero).of_other_events(self.data)
        counts = {len(each) for each in conditions}
        if len(conditions) != num_histories or len(counts) != 1:
            raise UserError(
                f"{len(conditions)} lists of {sorted(counts)} conditions are given for {num_histories} users; expected "
                "one list for each, all of the same length (fill up a shorter list with {})"
            )
        slots = [condition for each in conditions for condition in each]
        asked = Conditions(data, features, slots, num_histories=num_histories, unknown_as_zero=unknown_as_zero)
        return asked.of_other_events(self.data)

    def rows(self, user_B: Tensor) -> tuple[Tensor, Tensor]:
        """The event rows of these users, without each user's first moment (int64 [E]), and their answers, o_END.

        Each row's history is the events before its moment, see `row_windows`.
        """
        answering = row_windows(self.data, user_B, max_events=self.max_events, stride=self.stride)
        row_E, answer_E = answered_rows(self.data, answering)
        return row_E, self.answer_all(answering, self.asked)[answer_E]

    def items(self) -> Tensor:
        """The LUM's embedding of every catalogue item, e_ID (float32); similarity to an answer is the dot product."""
        return encode_items(self.model, self.builder)

    def answer(self, answering: AnsweringWindows) -> Tensor:
        """One forward pass: the answers of these windows, in order, o_RND. There may be no window.

        Under DMP every rank must call this equally often, without windows if it has none left.
        """
        return self._answer(answering, self.asked, torch.arange(answering.windows.count))

    @torch.no_grad()
    def _answer(
        self, answering: AnsweringWindows, asked: Conditions, history_W: Tensor, asked_at_W: Tensor | None = None
    ) -> Tensor:
        pack = self.pack(answering, asked, history_W, asked_at_W)
        o_QD = self.model(pack.to(self.device), queries_only=True).o_QD
        return o_QD.float().cpu().view(len(answering.window_R), asked.count, o_QD.shape[1])

    def pack(
        self, answering: AnsweringWindows, asked: Conditions, history_W: Tensor, asked_at_W: Tensor | None = None
    ) -> Pack:
        """The pack that asks these windows. history_W: see `Conditions.bags`. asked_at_W: see `ask`."""
        window_R, seen_R = answering.window_R, answering.seen_R
        window_Q = window_R.repeat_interleave(asked.count)
        queries = Queries(
            window_Q,
            seen_R.repeat_interleave(asked.count),
            asked.bags(answering.windows, window_R, seen_R, history_W=history_W),
            None if asked_at_W is None else asked_at_W[window_Q],
        )
        # TorchRec cannot look up nothing, so an empty pack reads one item.
        nothing = torch.zeros(int(len(window_R) == 0), dtype=torch.int64)
        return self.builder.pack(answering.windows, queries=queries, candidates_C=nothing)

    def answer_all(self, answering: AnsweringWindows, asked: Conditions, asked_at_W: Tensor | None = None) -> Tensor:
        """The answers of these windows to `asked`, in order, o_RND, in as many packs as it takes."""
        answers_W = answering.answers_W
        starts_W = answers_W.cumsum(0) - answers_W
        indices, parts = [], []
        training = self.model.training
        self.model.eval()
        try:
            for index in packs(answering, num_conditions=asked.count, tokens_per_pack=self.tokens_per_pack) or [
                torch.zeros(0, dtype=torch.int64)
            ]:
                at = None if asked_at_W is None else asked_at_W[index]
                parts.append(self._answer(answering.take(index), asked, index, at))
                indices.append(expand_ranges(starts_W[index], answers_W[index]))
        finally:
            self.model.train(training)
        o_RND = torch.empty(sum(map(len, parts)), *parts[0].shape[1:])
        o_RND[torch.cat(indices)] = torch.cat(parts)
        return o_RND


def user_rows(data: PreparedData, keys: Sequence[str]) -> Tensor:
    """The users (int64) with these raw keys. Raises UserError for one that is not in the log, naming the nearest.

    The keys of all users are read once and cached.
    """
    if data not in _USERS:
        _USERS[data] = {key: user for user, key in enumerate(data.user_keys())}
    known = _USERS[data]
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=3, cutoff=0.0)
            raise UserError(f"the log holds no user {key!r}; the nearest of its {len(known):,} are {', '.join(near)}")
    return torch.tensor([known[key] for key in keys], dtype=torch.int64)


def default_stride(max_events: int) -> int:
    """Half a window: every row of a long history then has at least half a window of events before it."""
    return max(1, max_events // 2)


def serving_windows(data: PreparedData, user_B: Tensor, *, max_events: int) -> AnsweringWindows:
    """Windows of each user's last max_events - 1 events, asked once, after the last of them.

    One less than a window: the query takes the position of the next event, and training saw no later position.
    """
    end_B = torch.from_numpy(data.user_offsets)[user_B + 1]
    length_B = (end_B - torch.from_numpy(data.user_offsets)[user_B]).clamp(max=max_events - 1)
    return behind(Windows(end_B - length_B, length_B, user_B))


def row_windows(data: PreparedData, user_B: Tensor, *, max_events: int, stride: int) -> AnsweringWindows:
    """Windows that ask exactly once about every moment of these users, without each user's first.

    In a history longer than a window, a moment has between max_events - stride and max_events - 1 events before it. A
    moment's time is that of its first row.
    """
    offsets = torch.from_numpy(data.user_offsets)
    start_B, end_B = offsets[user_B], offsets[user_B + 1]
    is_asked_E = torch.zeros(data.num_events, dtype=torch.bool)
    is_asked_E[torch.from_numpy(data.before)] = True
    is_asked_E[start_B[start_B < end_B]] = False
    every = answering_windows(start_B, end_B - start_B, user_B, max_events=max_events, stride=stride)
    is_asked_R = is_asked_E[every.row_R]
    answers_W = torch.bincount(every.window_R[is_asked_R], minlength=every.windows.count)
    return AnsweringWindows(every.windows, answers_W, every.seen_R[is_asked_R]).take(answers_W.nonzero().squeeze(1))


def answered_rows(data: PreparedData, answering: AnsweringWindows) -> tuple[Tensor, Tensor]:
    """The event rows that these answers are for, and the index of each row's answer (both int64 [E]).

    An answer is for all rows of the moment that begins where its history ends, wherever these are in the log.
    """
    offsets, users = torch.from_numpy(data.user_offsets), torch.unique(answering.windows.user_W)
    row_E = expand_ranges(offsets[users], offsets[users + 1] - offsets[users])
    before_E = torch.from_numpy(data.before)[row_E]
    asked, order = torch.sort(answering.row_R)
    index_E = torch.searchsorted(asked, before_E).clamp(max=max(0, len(asked) - 1))
    is_answered_E = asked[index_E] == before_E if len(asked) else torch.zeros(len(row_E), dtype=torch.bool)
    return row_E[is_answered_E], order[index_E[is_answered_E]]


def packs(answering: AnsweringWindows, *, num_conditions: int, tokens_per_pack: int) -> list[Tensor]:
    """Windows (int64 indices) of each forward pass, about `tokens_per_pack` tokens: two per event, one per query.

    Windows of similar length and number of answers go together, so that there is little padding, but only within blocks
    of neighbours, so that their answers are written near each other.
    """
    length_W, answers_W = answering.windows.length_W, answering.answers_W
    block_W = torch.arange(len(length_W)) // SORTED_WINDOWS
    order = np.lexsort((-answers_W, -length_W, block_W))
    tokens = (2 * length_W + num_conditions * answers_W)[order]
    # A pack ends with the window that fills it up, so a window that is longer than a pack fills one by itself.
    pack = (tokens.cumsum(0) - tokens) // tokens_per_pack
    _, sizes = torch.unique_consecutive(pack, return_counts=True)
    return list(torch.from_numpy(order).split(sizes.tolist())) if len(order) else []


@torch.no_grad()
def encode_items(model: nn.Module, builder: PackBuilder, *, block: int = 32768) -> Tensor:
    """The LUM's embedding of every catalogue item, e_ID (float32, on the CPU); the model should be in eval mode."""
    nothing = Windows(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))
    device = next(model.parameters()).device
    parts = []
    for start in range(0, builder.data.num_items, block):
        items = torch.arange(start, min(start + block, builder.data.num_items))
        parts.append(model(builder.pack(nothing, candidates_C=items).to(device), queries_only=True).e_CD.float().cpu())
    return torch.cat(parts)
