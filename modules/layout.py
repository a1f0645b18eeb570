"""The layout of concatenated sequences of different lengths, and the buckets in which they are computed.

Shape suffixes: T tokens of all sequences, concatenated; B sequences, Q query tokens, P padded slots of a bucket.

Three sequences with 3, 1 and 2 tokens. Those of similar length share a padded bucket, longest first::

    flat      0 1 2 | 3 | 4 5          offsets_B1   0 3 4 6
    buckets   [0 1 2]   [4 5]   [3]

>>> layout = make_layout(torch.tensor([3, 1, 2]))
>>> layout.offsets_B1, [bucket.token_P.tolist() for bucket in layout.buckets]
(tensor([0, 3, 4, 6]), [[0, 1, 2], [4, 5], [3]])
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Batch = TypeVar("Batch")
# Each sequence of a bucket has at least this share of the length of the bucket's longest; the rest is padding.
BUCKET_FILL = 0.7


def moved(batch: Batch, device: torch.device | str) -> Batch:
    """The same batch (a dataclass) with every field that can be moved on `device`."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}  # type: ignore[arg-type]
    on_device = {name: value.to(device) for name, value in values.items() if hasattr(value, "to")}
    return dataclasses.replace(batch, **on_device)  # type: ignore[type-var]


@dataclass
class Bucket:
    """Sequences of similar length that are computed as one padded batch.

    token_P: int64 [sequences * max_tokens], the flat token in each slot; padding repeats the sequence's first token.
    query_P: int64 [sequences * max_queries], the flat query in each slot. prefix_P: how many tokens that query sees.
    """

    num_sequences: int
    max_tokens: int
    max_queries: int
    token_P: Tensor
    query_P: Tensor
    prefix_P: Tensor


@dataclass
class JaggedLayout:
    """Where the tokens and queries of B sequences are, and the buckets in which they are computed.

    offsets_B1: int64, sequence b has the tokens offsets[b]:offsets[b + 1]. query_offsets_B1: the same for queries.
    token_place_T, query_place_Q: int64, the slot of each token (query) in the concatenated buckets.
    """

    offsets_B1: Tensor
    buckets: list[Bucket]
    token_place_T: Tensor
    query_place_Q: Tensor
    query_offsets_B1: Tensor

    def to(self, device: torch.device | str) -> "JaggedLayout":
        """The same layout on `device`."""
        return dataclasses.replace(moved(self, device), buckets=[moved(bucket, device) for bucket in self.buckets])


def make_layout(
    lengths_B: Tensor, *, query_sequence_Q: Tensor | None = None, query_prefix_Q: Tensor | None = None
) -> JaggedLayout:
    """The layout of sequences with `lengths_B` tokens (int64, may be 0), on the CPU.

    query_sequence_Q: int64, the sequence that each query is about, ascending. query_prefix_Q: int64, how many tokens
    of it the query sees. Raises ValueError if queries are not in ascending order, name a sequence that does not exist,
    or see more tokens than it has.

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
    """Some of a layout's queries with the tokens of their sequences; `layout` holds only these, on the CPU."""

    queries: slice
    tokens: slice
    layout: JaggedLayout


def portions(lengths_B: Tensor, queries_B: Tensor, prefix_Q: Tensor, *, cost_Q: Tensor, budget: int) -> list[Portion]:
    """The queries in portions of about `budget` in cost each; empty without queries. All tensors are on the CPU.

    lengths_B, queries_B: int64, tokens and queries of each sequence. prefix_Q: int64, tokens that each query sees.
    cost_Q: the cost of each. A query that costs more than the budget gets its own portion.

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
    """Sequences that grow: each new token attends, as a query, to the tokens before it.

    layout: of the grown sequences, with the new tokens as queries. position_N: int64, the position of each new token in
    its sequence, which is the number of tokens that it sees. order_T: int64, the index of each of the grown sequences'
    tokens in torch.cat([old tokens, new tokens]).
    """

    layout: JaggedLayout
    position_N: Tensor
    order_T: Tensor

    def to(self, device: torch.device | str) -> "Extension":
        """The same extension on `device`."""
        return Extension(self.layout.to(device), self.position_N.to(device), self.order_T.to(device))


def extension(old_B: Tensor, new_B: Tensor) -> Extension:
    """The Extension of sequences with `old_B` tokens by `new_B` each (int64, may be 0), on the CPU.

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
        raise ValueError(f"query_sequence_Q must be ascending and within 0…{len(lengths_B) - 1}")
    if bool((prefix_Q > lengths_B[sequence_Q]).any()) or bool((prefix_Q < 0).any()):
        raise ValueError("query_prefix_Q must be between 0 and the number of tokens of the query's sequence")


def _bucket_members(lengths_B: Tensor, queries_B: Tensor) -> list[Tensor]:
    """The sequences of each bucket, longest first; a sequence that is too short for a bucket begins the next one."""
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
    """The flat index in each slot of a [b, width] padded batch, and the slots that are not padding; both flattened."""
    column = torch.arange(width)
    real = column < lengths_b[:, None]
    index = torch.where(real, starts_b[:, None] + column, torch.where(lengths_b > 0, starts_b, 0)[:, None])
    return index.flatten(), real.flatten().nonzero().squeeze(1)
