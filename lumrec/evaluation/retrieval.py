"""Next-item retrieval over the full catalogue: HR@k and NDCG@k, exact.

One query per user: the user's last event of a part of the log is the target, everything before it the history.

    HR@k = share of users whose target ranks among the first k      NDCG@k = mean of [rank ≤ k] / log2(1 + rank)
    rank = 1 + number of candidates whose similarity is not below the target's (ties count against us)

Candidates are all items with a training event, without those in the user's history (the target stays in). An item
without a training event has an untrained vector: it is never recommended, and as a target it counts as a miss.

Shape suffixes: B users, I catalogue items, D width, Q queries, P pairs of user and seen item.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lumrec.batches.packs import PackBuilder, Queries
from lumrec.batches.windows import Windows
from lumrec.data.columns import Column, expand_ranges
from lumrec.data.prepared import PreparedData
from lumrec.data.splits import PARTS
from lumrec.query.conditions import condition_columns
from lumrec.query.group_query import encode_items
from lumrec.run.distributed import rank, world_size
from lumrec.run.errors import UserError
from lumrec.run.limits import count

# Largest size (users × items) of the matrix of scores.
SCORE_BUDGET = 1 << 23


@dataclass(frozen=True)
class RetrievalConfig:
    """Evaluation of the LUM by retrieval of the next item.

    condition: raw values by condition feature that every user is asked with, the same for every target; {} = none.
    oracle: ask a second time with the target's own condition, which nobody knows before the item is chosen: an upper
        bound, reported as oracle/hr@k and oracle/ndcg@k beside the honest figures.
    request_time: true: a query has the time of its target, as in serving. false: it has the time of the last event
        before it, as answers that are stored in advance. This only matters with model.time_bias.
    ks: cut-offs of HR@k and NDCG@k.
    max_users: a fixed sample of the users, for quick evaluations while training; 0 = all.
    tokens_per_pack: tokens of one forward pass.
    """

    condition: dict[str, str] = field(default_factory=dict)
    oracle: bool = False
    request_time: bool = True
    ks: list[int] = count(lambda: [10, 50], least=1)
    max_users: int = count(0)
    tokens_per_pack: int = count(8192, least=1)

    def check(self, at: str) -> None:
        """Raises UserError for invalid cut-offs (`at`: the section, with a dot)."""
        check_cut_offs(at, self.ks)


def check_cut_offs(at: str, ks: Sequence[int]) -> None:
    """Raises UserError for an empty list and for a repeated cut-off."""
    if not ks or len(set(ks)) < len(ks):
        raise UserError(f"{at}ks: got {list(ks)}, expected one or more different cut-offs, such as [10, 50]")


def retrieval_names(ks: Sequence[int], *, oracle: bool = False) -> list[str]:
    """The retrieval metrics that weights can be selected by; higher is better for all of them."""
    names = [f"{name}@{k}" for name in ("hr", "ndcg") for k in ks]
    return names + [f"oracle/{name}" for name in names if oracle]


class Targets(NamedTuple):
    """Targets, one per user (all int64). row_B: event row of the target. first_B: the user's first event row.

    end_B: end of the history (exclusive): the target's row, or the first row of its moment.
    """

    row_B: Tensor
    first_B: Tensor
    end_B: Tensor

    def take(self, index: Tensor | slice) -> Targets:
        """The targets at `index`."""
        return Targets(self.row_B[index], self.first_B[index], self.end_B[index])


def evaluate_retrieval(
    model: nn.Module,
    builder: PackBuilder,
    *,
    part: str,
    config: RetrievalConfig,
    max_events: int,
    users: np.ndarray | None = None,
) -> dict[str, float]:
    """{"hr@10": …, "ndcg@10": …, …, "retrieval_users": …} of a LUM on `part` ("train", "valid" or "test") of its data.

    A user's history is the last max_events - 1 events before the target, whatever part they belong to; without events,
    the LUM answers from the condition only. users: bool [U], the users to evaluate (None: all); a cross-fitted LUM must
    not be selected by the users that are held out from it. Under DMP every rank calls this and gets the metrics over
    all users. Raises UserError where no user has an event in the part, or for a condition that the LUM does not know.
    """
    data = builder.data
    targets = last_events(data, part, users=users, max_users=config.max_users)
    fixed = condition_columns(data, builder.condition_features, [config.condition])
    names = ["", "oracle/"] if config.oracle else [""]
    ranks: dict[str, list[Tensor]] = {name: [torch.zeros(0, dtype=torch.int64)] for name in names}
    training = model.training
    model.eval()
    try:
        e_ID = encode_items(model, builder)
        for mine in _shares(targets, max_events=max_events, tokens_per_pack=config.tokens_per_pack):
            o_BND = _ask(model, builder, mine, fixed, config=config, max_events=max_events)
            for n, name in enumerate(names):
                ranks[name].append(rank_targets(o_BND[:, n], e_ID, data, mine))
    finally:
        model.train(training)
    result: dict[str, float] = {}
    for name in names:
        sums = metric_sums(torch.cat(ranks[name]), config.ks)
        result |= {name + metric: value / len(targets.row_B) for metric, value in sum_over_ranks(sums).items()}
    return result | {"retrieval_users": float(len(targets.row_B))}


def last_events(
    data: PreparedData,
    part: str,
    *,
    users: np.ndarray | None = None,
    among: np.ndarray | None = None,
    max_users: int = 0,
    strictly_earlier: bool = False,
) -> Targets:
    """The last event in `part` of each of `users` (bool [U]) that has one; with `max_users`, of a fixed sample.

    among: bool [E], the events that may be a target; None = all. strictly_earlier: the history ends before the target's
    moment (lumrec/data/moments.py), as for rankers; otherwise it ends before the target in the log's order, as in the
    published protocols of sequence models.
    """
    if part not in PARTS:
        raise UserError(f"part is {part!r}; expected one of {PARTS}")
    is_asked = data.split == PARTS.index(part)
    if users is not None:
        is_asked &= users[data.user]
    if among is not None:
        is_asked &= among
    rows = np.flatnonzero(is_asked)
    if len(rows) == 0:
        raise UserError(f"no event of these users is in the part {part!r} of {data.path}: choose another data.split")
    is_last = np.append(data.user[rows[1:]] != data.user[rows[:-1]], True)
    rows = rows[is_last]
    if 0 < max_users < len(rows):
        rows = np.sort(np.random.default_rng(0).choice(rows, max_users, replace=False))
    end_B = data.before[rows] if strictly_earlier else rows
    return Targets(*map(torch.from_numpy, (rows, data.user_offsets[data.user[rows]], end_B)))


def target_ranks(
    o_BD: Tensor, e_ID: Tensor, target_B: Tensor, *, is_candidate_I: Tensor, seen_user_P: Tensor, seen_item_P: Tensor
) -> Tensor:
    """Rank of each user's target among the candidates, from 1 (int64 [B]); num_items + 1 if it is no candidate.

    is_candidate_I: bool. seen_user_P, seen_item_P: int64, items left out for a user; a target is never left out.
    A similarity that is nan counts against us, as a tie does.

    >>> o, e = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0], [2.0, 0.0], [2.0, 1.0], [1.0, 0.0]])
    >>> every, nobody = torch.ones(4, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    >>> target_ranks(o, e, torch.tensor([1]), is_candidate_I=every, seen_user_P=nobody, seen_item_P=nobody)
    tensor([3])
    """
    score_BI = o_BD @ e_ID.T
    target_score_B = score_BI.gather(1, target_B[:, None])
    ahead_BI = ~(score_BI < target_score_B)
    ahead_BI &= is_candidate_I
    ahead_BI[seen_user_P, seen_item_P] = False
    ahead_BI.scatter_(1, target_B[:, None], False)
    return torch.where(is_candidate_I[target_B], 1 + ahead_BI.sum(1), len(e_ID) + 1)


def user_metrics(rank_B: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """HR@k and NDCG@k of each user (float64 [B])."""
    gain_B = 1 / torch.log2(1 + rank_B.double())
    found: dict[str, Tensor] = {}
    for k in ks:
        hit_B = rank_B <= k
        found |= {f"hr@{k}": hit_B.double(), f"ndcg@{k}": gain_B * hit_B}
    return found


def metric_sums(rank_B: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """HR@k and NDCG@k summed over users.

    >>> metric_sums(torch.tensor([1, 3, 11]), [10])
    {'hr@10': 2.0, 'ndcg@10': 1.5}
    """
    return {name: float(value_B.sum()) for name, value_B in user_metrics(rank_B, ks).items()}


def _shares(targets: Targets, *, max_events: int, tokens_per_pack: int) -> Iterator[Targets]:
    """This rank's targets, split into forward passes: the same number on all ranks, and the last may be empty."""
    users = max(1, tokens_per_pack // (2 * max_events))
    num_users = len(targets.row_B)
    # Histories of similar length go together, so that there is little padding.
    order = torch.argsort((targets.end_B - targets.first_B).clamp(max=max_events), stable=True)
    targets = targets.take(order)
    for turn in range(math.ceil(num_users / (users * world_size()))):
        start = (turn * world_size() + rank()) * users
        yield targets.take(slice(start, start + users))


def _ask(
    model: nn.Module,
    builder: PackBuilder,
    targets: Targets,
    fixed: Mapping[str, Column],
    *,
    config: RetrievalConfig,
    max_events: int,
) -> Tensor:
    """Answers o_BND given the history before each target: to the `fixed` condition and, with `oracle`, the true one."""
    num_users, num_conditions = len(targets.row_B), 2 if config.oracle else 1
    length_B = (targets.end_B - targets.first_B).clamp(max=max_events - 1)
    user_B = torch.from_numpy(builder.data.user)[targets.row_B]
    conditions = {name: column.take(torch.zeros(num_users, dtype=torch.int64)) for name, column in fixed.items()}
    if config.oracle:
        conditions = {
            name: _in_turn(bags, builder.data.event_columns[name].take(targets.row_B))
            for name, bags in conditions.items()
        }
    queries = Queries(
        torch.arange(num_users).repeat_interleave(num_conditions),
        length_B.repeat_interleave(num_conditions),
        conditions,
        builder.time_E[targets.row_B].repeat_interleave(num_conditions) if config.request_time else None,
    )
    # TorchRec cannot look up nothing, so an empty pack reads one item.
    nothing = torch.zeros(int(num_users == 0), dtype=torch.int64)
    pack = builder.pack(Windows(targets.end_B - length_B, length_B, user_B), queries=queries, candidates_C=nothing)
    device = next(model.parameters()).device
    with torch.no_grad():
        o_QD = model(pack.to(device), queries_only=True).o_QD
    return o_QD.float().cpu().view(num_users, num_conditions, o_QD.shape[1])


def _in_turn(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Interleaves the bags (values, lengths) of two equally long columns: first 0, second 0, first 1, …"""
    values, lengths = (torch.cat(parts) for parts in zip(first, second))
    both = Column(values, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))
    return both.take(torch.arange(len(lengths)).view(2, -1).T.flatten())


def rank_targets(o_BD: Tensor, e_ID: Tensor, data: PreparedData, targets: Targets) -> Tensor:
    """Rank of each target (int64 [B]) among all items with a training event, without those in its history."""
    item_E = torch.from_numpy(data.item)
    is_candidate_I = torch.from_numpy(data.item_counts > 0)
    users = max(1, SCORE_BUDGET // len(e_ID))
    ranks = [torch.zeros(0, dtype=torch.int64)]
    for start in range(0, len(o_BD), users):
        row_B, first_B, end_B = targets.take(slice(start, start + users))
        seen_B = end_B - first_B
        ranks.append(
            target_ranks(
                o_BD[start : start + users],
                e_ID,
                item_E[row_B],
                is_candidate_I=is_candidate_I,
                seen_user_P=torch.repeat_interleave(torch.arange(len(row_B)), seen_B),
                seen_item_P=item_E[expand_ranges(first_B, seen_B)],
            )
        )
    return torch.cat(ranks)


def sum_over_ranks(sums: dict[str, float]) -> dict[str, float]:
    """The sums over all ranks, on every rank. Collective."""
    if world_size() == 1:
        return sums
    # A CPU tensor: every process group of ours has a CPU backend.
    total = torch.tensor(list(sums.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(sums, total.tolist()))
