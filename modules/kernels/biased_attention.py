"""Causal attention with a bias of distance and time (HSTU, arXiv 2402.17152 section 3.2), some of the scores at a time.

Shape suffixes: T tokens, H heads, K head width, b sequences of a bucket, P its padded places, R rows (some of its
tokens or queries), M distances, N time buckets.

One sequence of three places and one head. Without any bias this is PyTorch's causal attention:

>>> q, k, v = torch.randn(3, 1, 1, 3, 4)
>>> out = BiasedAttention.apply(q, k, v, torch.zeros(3), None, BiasIndex(None, None), False)
>>> torch.allclose(out, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-6)
True
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Scores held at once: what stays in a core's cache; on CUDA what keeps the memory bounded.
CACHED_SCORES = 1 << 18
CUDA_SCORES = 1 << 26
# Rows of a long sequence that are computed together at the least, so that its keys are not read over and over.
LEAST_ROWS = 64


@dataclass
class BiasIndex:
    """Which entries of a RelativeBias each score of a bucket reads; the same for all layers, so it is made once.

    distance: int64 [b, R, P], of queries; None of tokens, whose distance is that of their places.
    time: int32 [b, R, P]; None without a bias of time.
    self_time: int32 [b, R], of each query and itself (its distance is 0).
    """

    distance: Tensor | None
    time: Tensor | None
    self_time: Tensor | None = None


class BiasedAttention(torch.autograd.Function):
    """Causal attention [b, H, P, K] with a relative bias, a portion at a time; the backward pass scores again.

    Softmax of scaled scores, or SiLU of plain ones over the number of distances. A portion is a few short sequences, or
    some rows of a long one, with the places up to its last row: what lies in the future of all is never computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        distance_M: Tensor,
        time_N: Tensor | None,
        index: BiasIndex,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, distance_M, *([] if time_N is None else [time_N]))
        ctx.index, ctx.silu = index, silu
        out = torch.empty_like(v)
        sequences, portions = _portions(q)
        with torch.autocast(q.device.type, enabled=False):
            for rows in portions:
                bias_RP = _distance_bias(distance_M, rows, silu)
                for part in sequences:
                    score = _scores(q, k, bias_RP, time_N, index, part, rows, silu)
                    weight = _weights(score, rows, silu).to(v.dtype)
                    out[part, :, rows] = weight @ v[part, :, : rows.stop]
        return out.div_(len(distance_M)) if silu else out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, distance_M, *rest = ctx.saved_tensors
        time_N, index, silu = (rest[0] if rest else None), ctx.index, ctx.silu
        sequences, portions = _portions(q)
        wide = torch.promote_types(q.dtype, distance_M.dtype)  # sums over the portions of a sequence
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        grad_distance = torch.zeros_like(distance_M)
        grad_time = None if time_N is None else torch.zeros_like(time_N)
        scale = 1.0 if silu else q.shape[-1] ** -0.5
        with torch.autocast(q.device.type, enabled=False):
            grad_out = grad_out / len(distance_M) if silu else grad_out
            for rows in portions:
                seen = slice(0, rows.stop)
                bias_RP = _distance_bias(distance_M, rows, silu)
                grad_RP = torch.zeros_like(bias_RP)
                for part in sequences:
                    score = _scores(q, k, bias_RP, time_N, index, part, rows, silu)
                    grad = grad_out[part, :, rows]
                    grad_weight = (grad @ v[part, :, seen].transpose(-1, -2)).to(score.dtype)
                    if silu:
                        # The hidden scores' gradient is 0 because that of their weights is.
                        grad_score = torch.ops.aten.silu_backward(grad_weight.tril_(rows.start), score)
                        weight = _weights(score, rows, silu)
                    else:
                        weight = _weights(score, rows, silu)
                        grad_score = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
                    grad_v[part, :, seen] += weight.to(v.dtype).transpose(-1, -2) @ grad
                    low = grad_score.to(q.dtype)
                    grad_q[part, :, rows] = (low @ k[part, :, seen]).mul_(scale)
                    grad_k[part, :, seen] += (low.transpose(-1, -2) @ q[part, :, rows]).mul_(scale)
                    grad_bias = grad_score.sum(1)
                    grad_RP += grad_bias.sum(0)
                    if grad_time is not None:
                        grad_time += _counted(index.time[part, rows, seen], grad_bias, len(grad_time))
                grad_distance[: rows.stop] += _by_distance(grad_RP)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_distance, grad_time, None, None


def _portions(q: Tensor) -> tuple[list[slice], list[slice]]:
    """A bucket's sequences, and their rows, in portions whose scores stay in the cache (on CUDA: in memory)."""
    budget = CUDA_SCORES if q.is_cuda else CACHED_SCORES
    num, heads, places, _ = q.shape
    size = max(1, budget // (heads * places * places))
    height = min(places, max(LEAST_ROWS, budget // (heads * places)))
    return (
        [slice(start, min(start + size, num)) for start in range(0, num, size)],
        [slice(start, min(start + height, places)) for start in range(0, places, height)],
    )


def _distance_bias(distance_M: Tensor, rows: slice, silu: bool) -> Tensor:
    """Bias of the distance of `rows` to each place up to the last of them; for softmax -inf in the future."""
    # Each row is the one before it, moved by a place: stretches of … 3 2 1 0, and behind it the future.
    future = distance_M.new_full((rows.stop - rows.start - 1,), 0.0 if silu else float("-inf"))
    stretch = torch.cat([distance_M[: rows.stop].flip(0), future])
    return stretch.unfold(0, rows.stop, 1).flip(0).contiguous()


def _by_distance(grad_RP: Tensor) -> Tensor:
    """Sum of the last R rows of a [P, P] matrix along each diagonal, from distance 0 to P - 1."""
    num_rows, num_places = grad_RP.shape
    width = num_places + num_rows - 1
    # Each row one place further to the left than the one before it: the diagonals become columns.
    sheared = grad_RP.new_zeros(num_rows, width)
    sheared.as_strided((num_rows, num_places), (width - 1, 1), num_rows - 1).copy_(grad_RP)
    return sheared.sum(0)[:num_places].flip(0)


def _scores(
    q: Tensor,
    k: Tensor,
    bias_RP: Tensor,
    time_N: Tensor | None,
    index: BiasIndex,
    part: slice,
    rows: slice,
    silu: bool,
) -> Tensor:
    """Scores of `rows` of the sequences `part` with their bias; float32, or float64 where given."""
    q, k = q[part, :, rows], k[part, :, : rows.stop]
    score = ((q if silu else q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).to(bias_RP.dtype)
    if time_N is None:
        return score.add_(bias_RP)
    assert index.time is not None
    return score.add_(_taken(time_N, index.time[part, rows, : rows.stop]).add_(bias_RP)[:, None])


def _weights(score: Tensor, rows: slice, silu: bool) -> Tensor:
    """Attention weights of the scores of `rows`; SiLU's are still to be divided by the longest length."""
    return F.silu(score).tril_(rows.start) if silu else score.softmax(-1)


def _taken(table_N: Tensor, index: Tensor) -> Tensor:
    """table[index]; on a CPU index_select is several times faster than indexing or an embedding of width one."""
    return table_N.index_select(0, index.flatten()).view(index.shape)


def _counted(index: Tensor, grad: Tensor, size: int) -> Tensor:
    """Sum of `grad` over the places that read each entry: the backward pass of taking them from a small table."""
    return torch.bincount(index.flatten(), weights=grad.flatten(), minlength=size).to(grad.dtype)


class Take(torch.autograd.Function):
    """table[index] with a backward pass that counts, many times faster than indexing's on a CPU."""

    @staticmethod
    def forward(ctx: Any, table_N: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(table_N)
        return _taken(table_N, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _counted(ctx.saved_tensors[0], grad.contiguous(), ctx.size), None
