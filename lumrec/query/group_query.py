"""Group query: N conditions asked of each history, which is computed a single time (LUM section 4.2, figure 4).

    serving     c1 i1 c2 i2 c3 i3 | a b        the user's last events; a and b both stand at the position behind them
    rows        c1 i1 c2 i2 c3 i3              one pass for all rows of a window: row 2 is asked with event 1 alone,
                      a b   a b                row 3 with events 1 and 2, as it would have been asked at that time

A query never sees another query, the event that it asks for, or a later one. Row 1 has no history and is not asked.

From nothing to the ten best items for two users, each asked twice (`load_lum` gives a trained LUM):

>>> import tempfile
>>> from lumrec.config import load
>>> from lumrec.data.prepare import open_or_prepare
>>> from lumrec.train.lum import build_lum
>>> runs = tempfile.TemporaryDirectory()
>>> config = load(None, ["data.source=simulator", "data.simulator.num_users=20", f"runs_dir={runs.name}"])
>>> data = open_or_prepare(config)
no prepared data at ...
>>> lum, builder = build_lum(config.model, data)
>>> query = GroupQuery(lum, builder, [{"feedback": "like"}, {"feedback": "dislike"}], max_events=128)
>>> o_BND, e_ID = query.users(torch.tensor([0, 1])), query.items()
>>> (o_BND @ e_ID.T).topk(10).indices.shape
torch.Size([2, 2, 10])

Shape suffixes: B users, R answers (moments asked), N conditions, D width, I catalogue items, W windows.
"""

from __future__ import annotations

import difflib
from typing import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lumrec.data.columns import Column, expand_ranges
from lumrec.data.packing import PackBuilder, Queries
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import features_by_role
from lumrec.data.sequences import AnsweringWindows, Windows, answering_windows
from lumrec.data.splits import TRAIN

# Rows × items of the similarities held at once while their sum is taken (elements): what stays in a core's cache.
SUM_BUDGET = 1 << 19
SORTED_WINDOWS = 4096
ITEM_BLOCK = 1 << 16
# Sums over 2**16 items of exp(±SAFE_EXPONENT) are neither infinite nor denormal in float32.
SAFE_EXPONENT = 60.0
# Beyond this many, conditions that nobody chose would cost more than they tell.
MAX_DEFAULT_CONDITIONS = 16


class GroupQuery:
    """Asks a LUM the same N conditions about many users, or about every row of the log.

    model: a LargeUserModel (plain or under DMP) and the builder that came with it. conditions: raw values by condition
    feature, such as {"feedback": "like"}; a feature that is left out is asked as "not given", {} asks without any. A
    multi-valued feature takes several values with | between them, {"query": "red|shoes"}.

    Raises ValueError for a feature or value that the LUM does not know, naming the nearest.
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
    ) -> None:
        self.model, self.builder, self.data = model, builder, builder.data
        self.conditions = [dict(condition) for condition in conditions]
        self.asked_N = condition_columns(builder.data, builder.condition_features, self.conditions)
        self.max_events = max_events
        self.stride = stride or default_stride(max_events)
        if not 1 <= self.stride < max_events:
            raise ValueError(
                f"the stride of the windows is {self.stride}; expected 1 to {max_events - 1} (max_events - 1), so that "
                "every row of a long history is asked with some of it"
            )
        self.tokens_per_pack = tokens_per_pack
        self.device = next(model.parameters()).device

    def users(self, user_B: Tensor) -> Tensor:
        """Answers after the last event of each user, o_BND (float32): what serving reads."""
        return self._answer_all(serving_windows(self.data, user_B, max_events=self.max_events))

    def rows(self, user_B: Tensor) -> tuple[Tensor, Tensor]:
        """Every event row of these users but each one's first (int64 [R]) and its answers, o_RND.

        Each row is asked with the events before it, see `row_windows`.
        """
        answering = row_windows(self.data, user_B, max_events=self.max_events, stride=self.stride)
        return asked_rows(answering), self._answer_all(answering)

    def items(self) -> Tensor:
        """Every catalogue item as the LUM sees it, e_ID (float32), to be matched with answers by a dot product."""
        return encode_items(self.model, self.builder)

    @torch.no_grad()
    def answer(self, answering: AnsweringWindows) -> Tensor:
        """One forward pass: the answers of these windows' moments, in order, o_RND. No window at all is allowed.

        Under DMP every rank has to call this equally often, with nothing to ask where it has run out of windows.
        """
        num_conditions = len(self.conditions)
        window_R, moment_R = asked_moments(answering)
        queries = Queries(
            window_R.repeat_interleave(num_conditions),
            moment_R.repeat_interleave(num_conditions),
            {
                feature: column_N.take(torch.arange(num_conditions).repeat(len(window_R)))
                for feature, column_N in self.asked_N.items()
            },
        )
        # TorchRec cannot look up nothing at all, so an empty pack reads one item.
        nothing = torch.zeros(int(len(window_R) == 0), dtype=torch.int64)
        pack = self.builder.pack(answering.windows, queries=queries, candidates_C=nothing)
        o_QD = self.model(pack.to(self.device), queries_only=True).o_QD
        return o_QD.float().cpu().view(len(window_R), num_conditions, o_QD.shape[1])

    def _answer_all(self, answering: AnsweringWindows) -> Tensor:
        answers_W = answering.last_W - answering.first_W
        starts_W = answers_W.cumsum(0) - answers_W
        places, parts = [], []
        training = self.model.training
        self.model.eval()
        try:
            for index in packs(
                answering, num_conditions=len(self.conditions), tokens_per_pack=self.tokens_per_pack
            ) or [torch.zeros(0, dtype=torch.int64)]:
                parts.append(self.answer(take(answering, index)))
                places.append(expand_ranges(starts_W[index], answers_W[index]))
        finally:
            self.model.train(training)
        o_RND = torch.empty(sum(map(len, parts)), *parts[0].shape[1:])
        o_RND[torch.cat(places)] = torch.cat(parts)
        return o_RND


def default_stride(max_events: int) -> int:
    """Half a window: a row of a long history is then asked with at least half a window of events before it."""
    return max(1, max_events // 2)


def serving_windows(data: PreparedData, user_B: Tensor, *, max_events: int) -> AnsweringWindows:
    """Each user's last max_events - 1 events, asked once, behind the last of them.

    One less than a window: the query stands where the next event's condition would, and training saw no later position.
    """
    end_B = torch.from_numpy(data.user_offsets)[user_B + 1]
    length_B = (end_B - torch.from_numpy(data.user_offsets)[user_B]).clamp(max=max_events - 1)
    return AnsweringWindows(Windows(end_B - length_B, length_B, user_B), length_B, length_B + 1)


def row_windows(data: PreparedData, user_B: Tensor, *, max_events: int, stride: int) -> AnsweringWindows:
    """Windows in which every event of these users, but the first of each, is asked for exactly once.

    A row of a history that is longer than a window has between max_events - stride and max_events - 1 events before it.
    """
    start_B = torch.from_numpy(data.user_offsets)[user_B]
    length_B = torch.from_numpy(data.user_offsets)[user_B + 1] - start_B
    windows, first_W, last_W = answering_windows(start_B, length_B, user_B, max_events=max_events, stride=stride)
    return AnsweringWindows(windows, first_W.clamp(min=1), last_W)


def packs(answering: AnsweringWindows, *, num_conditions: int, tokens_per_pack: int) -> list[Tensor]:
    """Windows (int64 indices) of each forward pass, of about `tokens_per_pack` tokens: two an event, one a query.

    Windows alike in length and number of answers go together, so that little is padded; within blocks of neighbours
    only, so that their answers are written near to each other.
    """
    length_W, answers_W = answering.windows.length_W, answering.last_W - answering.first_W
    block_W = torch.arange(len(length_W)) // SORTED_WINDOWS
    order = np.lexsort((-answers_W, -length_W, block_W))
    tokens = (2 * length_W + num_conditions * answers_W)[order]
    # A pack ends with the window that fills it up, so one that is longer than a pack has one to itself.
    pack = (tokens.cumsum(0) - tokens) // tokens_per_pack
    _, sizes = torch.unique_consecutive(pack, return_counts=True)
    return list(torch.from_numpy(order).split(sizes.tolist())) if len(order) else []


def take(answering: AnsweringWindows, index_W: Tensor) -> AnsweringWindows:
    """The windows `index_W`, in that order."""
    return AnsweringWindows(answering.windows[index_W], answering.first_W[index_W], answering.last_W[index_W])


def asked_moments(answering: AnsweringWindows) -> tuple[Tensor, Tensor]:
    """Window and moment (int64 [R]) of each answer, windows in order, moments ascending."""
    answers_W = answering.last_W - answering.first_W
    window_R = torch.repeat_interleave(torch.arange(answering.windows.count), answers_W)
    return window_R, expand_ranges(answering.first_W, answers_W)


def asked_rows(answering: AnsweringWindows) -> Tensor:
    """Event row that each answer is asked for (int64 [R]): the one behind the history that it sees."""
    window_R, moment_R = asked_moments(answering)
    return answering.windows.start_W[window_R] + moment_R


@torch.no_grad()
def encode_items(model: nn.Module, builder: PackBuilder, *, block: int = 32768) -> Tensor:
    """Every catalogue item as the LUM sees it, e_ID (float32, on the CPU); the model should be in eval mode."""
    nothing = Windows(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))
    device = next(model.parameters()).device
    parts = []
    for start in range(0, builder.data.num_items, block):
        items = torch.arange(start, min(start + block, builder.data.num_items))
        parts.append(model(builder.pack(nothing, candidates_C=items).to(device), queries_only=True).e_CD.float().cpu())
    return torch.cat(parts)


def log_normalizer(o_XD: Tensor, e_ID: Tensor) -> Tensor:
    """log Σ over all items of exp(o · e), exact, float32 [X]; memory is bounded whatever the size of the catalogue.

    exp(o · e_i - log_normalizer) is the share of item i in the LUM's answer.

    >>> log_normalizer(torch.zeros(1, 2), torch.ones(4, 2)).exp()
    tensor([4.])
    """
    rows = max(1, SUM_BUDGET // min(len(e_ID), ITEM_BLOCK))
    # Where no similarity can be large, as with a cosine, exp cannot overflow and needs no largest one taken off first.
    bound = float(o_XD.norm(dim=1).max() * e_ID.norm(dim=1).max()) if len(o_XD) else 0.0
    log_z_X = o_XD.new_full((len(o_XD),), float("-inf"))
    for block in e_ID.split(ITEM_BLOCK):
        similarity = (part @ block.T for part in o_XD.split(rows))
        if bound <= SAFE_EXPONENT:
            sums = [part.exp_().sum(1).log_() for part in similarity]
        else:
            sums = [part.logsumexp(1) for part in similarity]
        log_z_X = torch.logaddexp(log_z_X, torch.cat(sums))
    return log_z_X


def default_conditions(data: PreparedData, features: Sequence[str]) -> list[dict[str, str]]:
    """What is asked where nobody says: each value of each wish among the condition `features`; without one, [{}].

    The value that training events like best comes first: `wish_score` holds it against the others. Raises ValueError
    where that makes more than 16 conditions: then somebody has to choose.
    """
    wishes = [name for name in features if data.schema.features[name].wish]
    conditions = [{name: value} for name in wishes for value in _by_like_rate(data, name)]
    if len(conditions) > MAX_DEFAULT_CONDITIONS:
        raise ValueError(
            f"the wishes {wishes} have {len(conditions)} values, too many to ask them all; choose some of them in "
            f"query.conditions, such as [{{{wishes[0]}: {conditions[0][wishes[0]]}}}]"
        )
    return conditions or [{}]


def _by_like_rate(data: PreparedData, feature: str) -> list[str]:
    """Values of a condition feature, those with the highest share of positive training events first."""
    rows, lengths = data.event_columns[feature].take(torch.from_numpy(np.flatnonzero(data.split == TRAIN)))
    label = np.repeat(data.label[data.split == TRAIN], lengths.numpy())
    vocabulary = _vocabulary(data, feature)
    count = np.bincount(rows.numpy(), minlength=len(vocabulary) + 1)
    rate = np.bincount(rows.numpy(), weights=label, minlength=len(vocabulary) + 1) / np.maximum(count, 1)
    return sorted(vocabulary, key=lambda value: -rate[vocabulary[value]])


def condition_columns(
    data: PreparedData, features: Sequence[str], conditions: Sequence[Mapping[str, str]]
) -> dict[str, Column]:
    """Vocabulary rows of N conditions: feature -> Column of N entries, an empty one where the feature is not given.

    features: the condition features that the LUM reads. Raises ValueError for another feature, or a value not known.
    """
    if not conditions:
        raise ValueError("no condition is asked; give at least one, [{}] to ask without any")
    declared = features_by_role(data.schema, "condition")
    for name in {name for condition in conditions for name in condition}:
        if name not in features:
            why = "is a condition that this LUM does not read" if name in declared else "is no condition feature"
            raise ValueError(f"{name!r} {why}; it reads {list(features)}{_nearest(name, features)}")
    columns = {}
    for name in features:
        known = _vocabulary(data, name)
        rows = [_rows_of(data, name, condition[name], known) if name in condition else [] for condition in conditions]
        lengths_N = torch.tensor([len(entry) for entry in rows])
        values = torch.tensor([row for entry in rows for row in entry], dtype=torch.int64)
        columns[name] = Column(values, torch.cat([torch.zeros(1, dtype=torch.int64), lengths_N.cumsum(0)]))
    return columns


def _rows_of(data: PreparedData, feature: str, value: str, known: Mapping[str, int]) -> list[int]:
    values = str(value).split("|") if data.schema.features[feature].kind == "multi" else [str(value)]
    for word in values:
        if word not in known:
            raise ValueError(
                f"condition {feature}: {word!r} does not occur in the training part{_nearest(word, list(known))}; "
                f"known are {list(known)[:10]}" + (" …" if len(known) > 10 else "")
            )
    return [known[word] for word in values]


def _vocabulary(data: PreparedData, feature: str) -> dict[str, int]:
    return data.vocabulary(data.schema.features[feature].table or feature)


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
