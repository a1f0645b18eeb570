"""Where sequences of different lengths lie behind each other, and the buckets in which they are computed.

Shape suffixes: T tokens of all sequences behind each other, B sequences, Q query tokens, P padded places of a bucket.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# A bucket holds sequences whose lengths are at least this share of its longest: the rest is padding that is computed.
BUCKET_FILL = 0.7


@dataclass
class Bucket:
    """Sequences of similar length that are computed as one padded batch.

    token_P: int64 [sequences * max_tokens], flat token of each place (padding repeats the sequence's first token).
    query_P: int64 [sequences * max_queries], flat query of each place; prefix_P: tokens that it sees.
    """

    num_sequences: int
    max_tokens: int
    max_queries: int
    token_P: Tensor
    query_P: Tensor
    prefix_P: Tensor


@dataclass
class JaggedLayout:
    """Where the tokens and queries of B sequences lie, and in which buckets they are computed.

    offsets_B1: int64, sequence b has the tokens offsets[b]:offsets[b + 1]; query_offsets_B1: the same of its queries.
    token_place_T, query_place_Q: int64, place of each token (query) in the concatenated buckets.
    """

    offsets_B1: Tensor
    buckets: list[Bucket]
    token_place_T: Tensor
    query_place_Q: Tensor
    query_offsets_B1: Tensor

    def to(self, device: torch.device | str) -> "JaggedLayout":
        """The same layout with its indices on `device`."""

        def moved(x: Tensor) -> Tensor:
            return x.to(device)

        buckets = [
            replace(b, token_P=moved(b.token_P), query_P=moved(b.query_P), prefix_P=moved(b.prefix_P))
            for b in self.buckets
        ]
        places = moved(self.token_place_T), moved(self.query_place_Q)
        return JaggedLayout(moved(self.offsets_B1), buckets, *places, moved(self.query_offsets_B1))


def make_layout(
    lengths_B: Tensor, *, query_sequence_Q: Tensor | None = None, query_prefix_Q: Tensor | None = None
) -> JaggedLayout:
    """The layout of sequences with `lengths_B` tokens (int64, 0 allowed), on the CPU.

    query_sequence_Q: sequence that each query asks, ascending. query_prefix_Q: how many tokens of it the query sees.
    Raises ValueError where a query is out of order, asks an unknown sequence or sees more tokens than there are.

    >>> layout = make_layout(torch.tensor([3, 1]))
    >>> layout.offsets_B1
    tensor([0, 3, 4])
    >>> [(bucket.num_sequences, bucket.max_tokens) for bucket in layout.buckets]
    [(1, 3), (1, 1)]
    """
    num_sequences = len(lengths_B)
    offsets_B1 = F.pad(lengths_B.cumsum(0), (1, 0))
    if query_sequence_Q is None or query_prefix_Q is None:
        query_sequence_Q = query_prefix_Q = torch.zeros(0, dtype=torch.int64)
    _check_queries(lengths_B, query_sequence_Q, query_prefix_Q)
    queries_B = torch.bincount(query_sequence_Q, minlength=num_sequences)
    query_offsets_B1 = F.pad(queries_B.cumsum(0), (1, 0))

    token_place_T = torch.empty(int(lengths_B.sum()), dtype=torch.int64)
    query_place_Q = torch.empty(len(query_sequence_Q), dtype=torch.int64)
    buckets: list[Bucket] = []
    token_base = query_base = 0
    for members in _bucket_members(lengths_B, queries_B):
        max_tokens, max_queries = int(lengths_B[members].max()), int(queries_B[members].max())
        token_P, token_real = _padded_index(offsets_B1[members], lengths_B[members], max_tokens)
        query_P, query_real = _padded_index(query_offsets_B1[members], queries_B[members], max_queries)
        prefix_P = torch.zeros(len(query_P), dtype=torch.int64)
        prefix_P[query_real] = query_prefix_Q[query_P[query_real]]
        token_place_T[token_P[token_real]] = token_base + token_real
        query_place_Q[query_P[query_real]] = query_base + query_real
        token_base, query_base = token_base + len(token_P), query_base + len(query_P)
        buckets.append(Bucket(len(members), max_tokens, max_queries, token_P, query_P, prefix_P))
    return JaggedLayout(offsets_B1, buckets, token_place_T, query_place_Q, query_offsets_B1)


class Portion(NamedTuple):
    """Some of a layout's queries, with the tokens that they ask: the `layout` of these alone, on the CPU."""

    queries: slice
    tokens: slice
    layout: JaggedLayout


def portions(lengths_B: Tensor, queries_B: Tensor, prefix_Q: Tensor, *, cost_Q: Tensor, budget: int) -> list[Portion]:
    """The queries (sequences in order, all on the CPU) in portions that cost about `budget` each, the last one less.

    A query that costs more than the budget has a portion to itself. Empty where there are no queries.

    >>> prefix_Q = torch.tensor([3, 1, 0])
    >>> two = portions(torch.tensor([3, 1]), torch.tensor([1, 2]), prefix_Q, cost_Q=torch.tensor([3, 1, 1]), budget=3)
    >>> [(portion.queries, portion.tokens) for portion in two]
    [(slice(0, 1, None), slice(0, 3, None)), (slice(1, 3, None), slice(3, 4, None))]
    """
    if len(prefix_Q) == 0:
        return []
    offsets_B1 = F.pad(lengths_B.cumsum(0), (1, 0)).tolist()
    sequence_Q = torch.repeat_interleave(torch.arange(len(lengths_B)), queries_B)
    _, sizes = torch.unique_consecutive((cost_Q.cumsum(0) - cost_Q) // budget, return_counts=True)
    found, end = [], 0
    for size in sizes.tolist():
        start, end = end, end + size
        first, last = int(sequence_Q[start]), int(sequence_Q[end - 1]) + 1
        layout = make_layout(
            lengths_B[first:last], query_sequence_Q=sequence_Q[start:end] - first, query_prefix_Q=prefix_Q[start:end]
        )
        found.append(Portion(slice(start, end), slice(offsets_B1[first], offsets_B1[last]), layout))
    return found


class Extension(NamedTuple):
    """Sequences that grow: each new token asks, as a query, the tokens before it.

    layout: the grown sequences, new tokens as their queries. position_N: int64, place of each new token, which is the
    number of tokens that it sees. order_T: int64, the grown sequences' tokens in old tokens followed by new ones.
    """

    layout: JaggedLayout
    position_N: Tensor
    order_T: Tensor

    def to(self, device: torch.device | str) -> "Extension":
        return Extension(self.layout.to(device), self.position_N.to(device), self.order_T.to(device))


def extension(old_B: Tensor, new_B: Tensor) -> Extension:
    """How sequences of `old_B` tokens grow by `new_B` each (int64, 0 allowed), on the CPU.

    >>> extension(torch.tensor([2, 1]), torch.tensor([1, 1])).order_T
    tensor([0, 1, 3, 2, 4])
    """
    sequence_B = torch.arange(len(old_B))
    of_new_N, of_old_T = torch.repeat_interleave(sequence_B, new_B), torch.repeat_interleave(sequence_B, old_B)
    position_N = torch.arange(len(of_new_N)) - (new_B.cumsum(0) - new_B - old_B)[of_new_N]
    order_T = torch.cat([of_old_T, of_new_N]).argsort(stable=True)
    layout = make_layout(old_B + new_B, query_sequence_Q=of_new_N, query_prefix_Q=position_N)
    return Extension(layout, position_N, order_T)


def _check_queries(lengths_B: Tensor, sequence_Q: Tensor, prefix_Q: Tensor) -> None:
    if len(sequence_Q) == 0:
        return
    if bool((sequence_Q.diff() < 0).any()) or int(sequence_Q[0]) < 0 or int(sequence_Q[-1]) >= len(lengths_B):
        raise ValueError(f"queries must name their sequences in ascending order, within 0…{len(lengths_B) - 1}")
    if bool((prefix_Q > lengths_B[sequence_Q]).any()) or bool((prefix_Q < 0).any()):
        raise ValueError("a query sees between 0 and all tokens of its sequence; some prefix is outside of that")


def _bucket_members(lengths_B: Tensor, queries_B: Tensor) -> list[Tensor]:
    """Sequences that have tokens or queries, longest first, cut where the next is too short for the bucket."""
    order = torch.argsort(lengths_B, descending=True, stable=True)
    order = order[(lengths_B[order] > 0) | (queries_B[order] > 0)]
    members, start = [], 0
    lengths = lengths_B[order].tolist()
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or lengths[end] < BUCKET_FILL * lengths[start]:
            members.append(order[start:end])
            start = end
    return members


def _padded_index(starts_b: Tensor, lengths_b: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Flat index of each place of a [b, width] padded batch, and the places that are real (both flattened)."""
    column = torch.arange(width)
    real = column < lengths_b[:, None]
    index = torch.where(real, starts_b[:, None] + column, torch.where(lengths_b > 0, starts_b, 0)[:, None])
    return index.flatten(), real.flatten().nonzero().squeeze(1)
