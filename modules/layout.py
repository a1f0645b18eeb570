"""Where sequences of different lengths lie behind each other, and the buckets in which they are computed.

Shape suffixes: T tokens of all sequences behind each other, B sequences, Q query tokens, P padded places of a bucket.
"""

from dataclasses import dataclass, replace

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

    offsets_B1: int64, sequence b has the tokens offsets[b]:offsets[b + 1].
    token_place_T, query_place_Q: int64, place of each token (query) in the concatenated buckets.
    """

    offsets_B1: Tensor
    buckets: list[Bucket]
    token_place_T: Tensor
    query_place_Q: Tensor

    def to(self, device: torch.device | str) -> "JaggedLayout":
        """The same layout with its indices on `device`."""

        def moved(x: Tensor) -> Tensor:
            return x.to(device)

        buckets = [
            replace(b, token_P=moved(b.token_P), query_P=moved(b.query_P), prefix_P=moved(b.prefix_P))
            for b in self.buckets
        ]
        return JaggedLayout(moved(self.offsets_B1), buckets, moved(self.token_place_T), moved(self.query_place_Q))


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
    return JaggedLayout(offsets_B1, buckets, token_place_T, query_place_Q)


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
