"""Turns the conditions of a config or a request into the vocabulary rows of each query.

A condition holds raw values by feature. A value may mean several values, each in a condition by itself:

    {feedback: like}                    this condition
    {category: "*"}                     each value that training events have, the most frequent first
    {category: top 3}                   the three most frequent values of the history, which differ by user and moment.
                                        `top 2 of 3` is only the second of them
    {feedback: "*", category: top 3}    every combination of both

A value in the vocabulary always means itself, so a category called "top 40" can be asked.

Shape suffixes: N conditions, R answers (moments asked), W windows, T events of these, V values, Q = R · N queries.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lumrec.batches.windows import Windows
from lumrec.data.columns import Column, expand_ranges
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import features_by_role
from lumrec.data.splits import TRAIN
from lumrec.run.errors import UserError, did_you_mean

ALL = "*"
TOP = re.compile(r"top (\d+)")
TOP_RANK = re.compile(r"top (\d+) of (\d+)")
# With more than this, default conditions would cost more than they are worth.
MAX_DEFAULT_CONDITIONS = 16
MAX_CONDITIONS = 256

_VOCABULARIES: WeakKeyDictionary[PreparedData, dict[str, dict[str, int]]] = WeakKeyDictionary()

# Values and lengths of each query's bag of one feature.
Bags = tuple[Tensor, Tensor]


class Conditions:
    """N conditions for each history: the same for all histories, or a separate list for each (as in a request).

    features: the condition features that the LUM reads. slots: the conditions, expanded; where each history has its
    own, those of all histories one after another. unknown_as_zero: a value that is not known is read as row 0
    ("unknown"), as in the log; otherwise it raises.

    Raises UserError for a feature or value that is not known, and names the nearest.
    """

    def __init__(
        self,
        data: PreparedData,
        features: Sequence[str],
        slots: Sequence[Mapping[str, str]],
        *,
        num_histories: int | None = None,
        unknown_as_zero: bool = False,
    ) -> None:
        self.data, self.per_history = data, num_histories is not None
        self.slots = [dict(slot) for slot in slots]
        self.count = len(self.slots) // max(1, num_histories or 1)
        known = {name: _vocabulary(data, name) for name in features}
        fixed = [
            {name: value for name, value in slot.items() if not _top_rank(value, known.get(name, {}))}
            for slot in self.slots
        ]
        ranks = {
            name: torch.tensor([_top_rank(slot.get(name, ""), known[name]) for slot in self.slots], dtype=torch.int64)
            for name in features
        }
        _check_features(data, features, self.slots)
        self.columns = condition_columns(data, features, fixed, unknown_as_zero=unknown_as_zero)
        self.top_ranks = {name: rank_N for name, rank_N in ranks.items() if bool(rank_N.any())}

    def of_other_events(self, data: PreparedData) -> Conditions:
        """The same conditions for the events in `data`, which has the same vocabularies."""
        other = copy.copy(self)
        other.data = data
        return other

    def bags(self, windows: Windows, window_R: Tensor, moment_R: Tensor, *, history_W: Tensor) -> dict[str, Bags]:
        """Feature -> bags of Q queries: the N conditions of each answer, answers in order.

        history_W: int64, index of each window's history; used where each history has its own conditions.
        """
        entry_RN = torch.arange(self.count).repeat(len(window_R), 1)
        if self.per_history:
            entry_RN += self.count * history_W[window_R][:, None]
        entry_Q = entry_RN.flatten()
        bags = {name: column.take(entry_Q) for name, column in self.columns.items()}
        for name, rank_N in self.top_ranks.items():
            rank_Q = rank_N[entry_Q]
            top_RV = top_values(self.data.event_columns[name], windows, window_R, moment_R, k=int(rank_N.max()))
            answer_Q = torch.arange(len(window_R)).repeat_interleave(self.count)
            own_Q = F.pad(top_RV, (1, 0))[answer_Q, rank_Q]
            bags[name] = _filled(bags[name], own_Q)
        return bags

    def spelled(
        self, windows: Windows, window_R: Tensor, moment_R: Tensor, *, history_W: Tensor
    ) -> list[dict[str, str]]:
        """Each query's condition in raw values: "top 2 of 3" is replaced by its value, row 0 by "(unknown)"."""
        found: list[dict[str, str]] = [{} for _ in range(self.count * len(window_R))]
        for name, (values, lengths_Q) in self.bags(windows, window_R, moment_R, history_W=history_W).items():
            raw = {row: value for value, row in _vocabulary(self.data, name).items()}
            for condition, bag in zip(found, values.split(lengths_Q.tolist())):
                if len(bag):
                    condition[name] = "|".join(raw.get(row, "(unknown)") for row in bag.tolist())
        return found


def expand(
    data: PreparedData,
    features: Sequence[str],
    conditions: Sequence[Mapping[str, str]],
    *,
    max_conditions: int = MAX_CONDITIONS,
) -> list[dict[str, str]]:
    """The conditions with each "*" and "top k" replaced by its values; see the top of this file.

    Raises UserError for an unknown feature, for more than `max_conditions` conditions, and for a repeated one.
    """
    _check_features(data, features, conditions)
    choices = [{name: _choices(data, name, value) for name, value in each.items()} for each in conditions]
    counts = [math.prod(map(len, choice.values())) for choice in choices]
    if sum(counts) > max_conditions:
        parts = ", ".join(f"{condition} makes {count:,}" for condition, count in zip(conditions, counts) if count > 1)
        raise UserError(
            f"query.conditions makes {sum(counts):,} conditions, and query.max_conditions is {max_conditions}"
            f"{f' ({parts})' if parts else ''}: ask for fewer, or raise query.max_conditions; each costs time and "
            "space for every user"
        )
    expanded = [dict(zip(choice, values)) for choice in choices for values in product(*choice.values())]
    twice = [slot for slot, count in Counter(tuple(sorted(slot.items())) for slot in expanded).items() if count > 1]
    if twice:
        raise UserError(f"query.conditions asks {dict(twice[0])} twice; leave one out")
    return expanded


def _choices(data: PreparedData, feature: str, value: str) -> list[str]:
    """The values that `value` means."""
    value, known = str(value), _vocabulary(data, feature)
    if value in known:
        return [value]
    if value == ALL:
        rows, _ = data.event_columns[feature].take(torch.from_numpy(np.flatnonzero(data.split == TRAIN)))
        count = np.bincount(rows.numpy(), minlength=len(known) + 1)
        return sorted((word for word, row in known.items() if count[row]), key=lambda word: (-count[known[word]], word))
    if match := TOP.fullmatch(value):
        if len(match[1]) > 9:
            raise UserError(f"condition {feature}: top {match[1][:20]}… asks for more than there can be")
        k = int(match[1])
        if k < 1:
            raise UserError(f"condition {feature}: {value!r} asks for nothing; expected top 1 or more")
        return [f"top {rank} of {k}" for rank in range(1, k + 1)]
    return [value]


def _top_rank(value: str, known: Mapping[str, int]) -> int:
    """Rank of "top 2 of 3" (here 2); 0 for any other value."""
    match = TOP_RANK.fullmatch(str(value))
    if match is None or str(value) in known:
        return 0
    if max(len(match[1]), len(match[2])) > 9 or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"got the condition {value!r}; expected a rank from 1 to {match[2]}")
    return int(match[1])


def top_values(column: Column, windows: Windows, window_R: Tensor, moment_R: Tensor, *, k: int) -> Tensor:
    """The k most frequent values of the events before each answer, the most frequent first (int64 [R, k]).

    Of equally frequent values, the one that occurred last comes first. Row 0 ("unknown") does not count; it fills up
    where there are fewer than k values. Memory: events × (highest number of different values in one window).
    """
    first_W = windows.length_W.cumsum(0) - windows.length_W
    rows, lengths_T = column.take(expand_ranges(windows.start_W, windows.length_W))
    event_V = torch.repeat_interleave(torch.arange(len(lengths_T)), lengths_T)[rows > 0]
    rows = rows[rows > 0]
    # Values are numbered within each window, so that the count tensors are as narrow as possible.
    window_T = torch.repeat_interleave(torch.arange(windows.count), windows.length_W)
    key, number_V = torch.unique(torch.stack([window_T[event_V], rows]), dim=1, return_inverse=True)
    values_W = torch.bincount(key[0], minlength=windows.count)
    local_V = number_V - (values_W.cumsum(0) - values_W)[key[0][number_V]]
    width = max(k, int(values_W.max()) if len(values_W) else 0)
    count_TV = torch.zeros(len(lengths_T) + 1, width, dtype=torch.int64)
    last_TV = torch.zeros_like(count_TV)
    count_TV.index_put_((event_V + 1, local_V), torch.ones_like(event_V), accumulate=True)
    last_TV[event_V + 1, local_V] = event_V + 1
    count_TV, last_TV = count_TV.cumsum(0), last_TV.cummax(0).values
    begin_R = first_W[window_R]
    count_RV = count_TV[begin_R + moment_R] - count_TV[begin_R]
    score_RV = count_RV * (len(lengths_T) + 1) + last_TV[begin_R + moment_R]
    best_RV = score_RV.masked_fill(count_RV == 0, -1).topk(k, dim=1)
    row_WV = torch.zeros(windows.count, width, dtype=torch.int64)
    row_WV[window_T[event_V], local_V] = rows
    return torch.where(best_RV.values > 0, row_WV[window_R].gather(1, best_RV.indices), 0)


def _filled(bags: Bags, own_Q: Tensor) -> Bags:
    """The bags, with the value `own_Q` added where it is not 0 (those bags are empty before)."""
    values, lengths_Q = bags
    extra_Q = own_Q > 0
    of_query = torch.cat([torch.repeat_interleave(torch.arange(len(own_Q)), lengths_Q), extra_Q.nonzero().squeeze(1)])
    return torch.cat([values, own_Q[extra_Q]])[of_query.argsort(stable=True)], lengths_Q + extra_Q.long()


def default_conditions(data: PreparedData, features: Sequence[str]) -> list[dict[str, str]]:
    """The conditions that are asked by default: each value of each wish among `features`; [{}] if there is none.

    The value with the highest share of positive training events comes first: `wish_score` compares it with the others.
    Raises UserError for more than 16 conditions: then the user has to choose.
    """
    wishes = [name for name in features if data.schema.features[name].wish]
    conditions = [{name: value} for name in wishes for value in _by_like_rate(data, name)]
    if len(conditions) > MAX_DEFAULT_CONDITIONS:
        raise UserError(
            f"the wishes {wishes} have {len(conditions)} values, too many to ask them all; choose some of them in "
            f"query.conditions, such as [{{{wishes[0]}: {conditions[0][wishes[0]]}}}]"
        )
    return conditions or [{}]


def _by_like_rate(data: PreparedData, feature: str) -> list[str]:
    """Values of a condition feature, in descending order of their share of positive training events."""
    rows, lengths = data.event_columns[feature].take(torch.from_numpy(np.flatnonzero(data.split == TRAIN)))
    label = np.repeat(data.label[data.split == TRAIN], lengths.numpy())
    vocabulary = _vocabulary(data, feature)
    count = np.bincount(rows.numpy(), minlength=len(vocabulary) + 1)
    rate = np.bincount(rows.numpy(), weights=label, minlength=len(vocabulary) + 1) / np.maximum(count, 1)
    return sorted(vocabulary, key=lambda value: -rate[vocabulary[value]])


def condition_columns(
    data: PreparedData,
    features: Sequence[str],
    conditions: Sequence[Mapping[str, str]],
    *,
    unknown_as_zero: bool = False,
) -> dict[str, Column]:
    """Vocabulary rows of N conditions: feature -> Column of N entries, an empty one where the feature is not given.

    features: the condition features that the LUM reads. Raises UserError for another feature, or a value not known.
    """
    if not conditions:
        raise UserError("no condition is asked; give at least one, [{}] to ask without any")
    _check_features(data, features, conditions)
    columns = {}
    for name in features:
        known = _vocabulary(data, name)
        rows = [
            _rows_of(data, name, condition[name], known, unknown_as_zero) if name in condition else []
            for condition in conditions
        ]
        lengths_N = torch.tensor([len(entry) for entry in rows])
        values = torch.tensor([row for entry in rows for row in entry], dtype=torch.int64)
        columns[name] = Column(values, torch.cat([torch.zeros(1, dtype=torch.int64), lengths_N.cumsum(0)]))
    return columns


def _check_features(data: PreparedData, features: Sequence[str], conditions: Sequence[Mapping[str, str]]) -> None:
    declared = features_by_role(data.schema, "condition")
    for name in {name for condition in conditions for name in condition}:
        if name not in features:
            why = "is a condition that this LUM does not read" if name in declared else "is no condition feature"
            raise UserError(f"{name!r} {why}; it reads {list(features)}{did_you_mean(name, features)}")


def _rows_of(
    data: PreparedData, feature: str, value: str, known: Mapping[str, int], unknown_as_zero: bool
) -> list[int]:
    values = str(value).split("|") if data.schema.features[feature].kind == "multi" else [str(value)]
    for word in values:
        if word not in known and not unknown_as_zero:
            raise UserError(
                f"condition {feature}: {word!r} does not occur in the training part{did_you_mean(word, known)}; "
                f"known are {list(known)[:10]}" + (" …" if len(known) > 10 else "")
            )
    return [known.get(word, 0) for word in values]


def _vocabulary(data: PreparedData, feature: str) -> dict[str, int]:
    """Raw value -> row of a feature; its file is read only once, so that requests do not wait for it."""
    tables = _VOCABULARIES.setdefault(data, {})
    name = data.schema.features[feature].table or feature
    if name not in tables:
        tables[name] = data.vocabulary(name)
    return tables[name]


def spoken(condition: dict[str, str]) -> str:
    """A condition as text: feedback=like and scenario=home."""
    return " and ".join(f"{name}={value}" for name, value in condition.items()) or "(no condition)"
