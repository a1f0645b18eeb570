"""Causal attention over flat jagged tokens, and the group query's attention (LUM sections 4.1.2 and 4.2).

Shape suffixes: T tokens of all sequences behind each other, B sequences, Q query tokens, P padded places of a bucket,
H heads, K head width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

# A bucket holds sequences whose lengths are at least this share of its longest: the rest is padding that is computed.
BUCKET_FILL = 0.7
# Scores held at once by `query_attention` (elements), so that its memory is bounded whatever is asked.
SCORE_BUDGET = 1 << 26


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


def causal_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: JaggedLayout) -> Tensor:
    """Softmax attention of each token to itself and the tokens before it in its own sequence, [T, H, K].

    The padding of a bucket lies behind each sequence, where the causal mask hides it: no other mask is needed.
    """
    outputs = []
    for bucket in layout.buckets:
        if bucket.max_tokens == 0:
            continue
        shape = (bucket.num_sequences, bucket.max_tokens)
        q, k, v = (_pad(x, bucket.token_P, shape) for x in (q_THK, k_THK, v_THK))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if not outputs:
        return q_THK
    return _gather(torch.cat(outputs), layout.token_place_T)


def query_attention(
    q_QHK: Tensor, k_QHK: Tensor, v_QHK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: JaggedLayout
) -> Tensor:
    """Softmax attention of each query to the prefix that it sees and to itself, never to another query, [Q, H, K].

    The mask of LUM figure 4, for a history c1 i1 c2 and two queries at its end and one after its first event::

              c1 i1 c2 | a  b  c
        a      1  1  1 | 1  .  .        each query stands at its own moment; the prefix is computed once
        b      1  1  1 | .  1  .
        c      1  1  . | .  .  1
    """
    outputs = []
    for bucket in layout.buckets:
        if bucket.max_queries == 0:
            continue
        tokens, queries = (bucket.num_sequences, bucket.max_tokens), (bucket.num_sequences, bucket.max_queries)
        q, k_self, v_self = (_pad(x, bucket.query_P, queries) for x in (q_QHK, k_QHK, v_QHK))
        if bucket.max_tokens == 0:
            outputs.append(v_self.transpose(1, 2).flatten(0, 1))
            continue
        k, v = (_pad(x, bucket.token_P, tokens) for x in (k_THK, v_THK))
        prefix = bucket.prefix_P.view(queries)
        rows = max(1, SCORE_BUDGET // (q.shape[1] * bucket.max_queries * bucket.max_tokens))
        parts = [
            _prefix_and_self(*(x[i : i + rows] for x in (q, k_self, v_self, k, v, prefix)))
            for i in range(0, bucket.num_sequences, rows)
        ]
        outputs.append(torch.cat(parts).transpose(1, 2).flatten(0, 1))
    if not outputs:
        return q_QHK
    return _gather(torch.cat(outputs), layout.query_place_Q)


def _prefix_and_self(q: Tensor, k_self: Tensor, v_self: Tensor, k: Tensor, v: Tensor, prefix: Tensor) -> Tensor:
    scale = q.shape[-1] ** -0.5
    hidden = torch.arange(k.shape[2], device=k.device) >= prefix[:, None, :, None]
    score = (q @ k.transpose(2, 3) * scale).masked_fill(hidden, float("-inf"))
    score_self = (q * k_self).sum(-1, keepdim=True) * scale
    weight = torch.softmax(torch.cat([score, score_self], dim=-1), dim=-1)
    return weight[..., :-1] @ v + weight[..., -1:] * v_self


def _pad(x_THK: Tensor, index_P: Tensor, shape: tuple[int, int]) -> Tensor:
    """Flat tokens as a padded batch [sequences, H, places, K]."""
    padded = _gather(x_THK, index_P)
    return padded.view(*shape, *x_THK.shape[1:]).transpose(1, 2)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x; F.embedding's backward is several times faster than that of indexing on a CPU."""
    return F.embedding(index, x.flatten(1)).view(len(index), *x.shape[1:])


def causal_attention_plain(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: JaggedLayout) -> Tensor:
    """The same as `causal_attention`, one sequence at a time: the twin that tests hold it against."""
    outputs = [q_THK[:0]]
    for start, end in zip(layout.offsets_B1[:-1].tolist(), layout.offsets_B1[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (q_THK, k_THK, v_THK))
        score = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        outputs.append((score.masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)
