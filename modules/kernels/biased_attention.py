"""Causal attention with a bias of distance and time (HSTU, arXiv 2402.17152, section 3.2), in portions of the scores.

The plain twin is `causal_attention_plain` of attention.py.

Shape suffixes: H heads, K head width, b sequences of a bucket, P its padded slots, R rows (some of its tokens or
queries), M distances, N time buckets.

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

# Scores (elements) held at once: on a CPU they fit a core's cache, on CUDA they bound the memory.
CACHED_SCORES = 1 << 18
CUDA_SCORES = 1 << 26
# At least so many rows of a long sequence are computed together, so that its keys are not read too often.
LEAST_ROWS = 64


@dataclass
class BiasIndex:
    """The entries of a RelativeBias that each score of a bucket reads; made once, for all layers.

    distance: int64 [b, R, P], for queries; None for tokens, whose distance is the difference of their slots.
    time: int32 [b, R, P]; None without a bias of time.
    self_time: int32 [b, R], for the score of each query with itself (at distance 0).
    """

    distance: Tensor | None
    time: Tensor | None
    self_time: Tensor | None = None


class BiasedAttention(torch.autograd.Function):
    """Causal attention [b, H, P, K] with a relative bias, in portions; the backward pass computes the scores again.

    The weights are the softmax of scaled scores or, with `silu`, the SiLU of unscaled ones divided by the number of
    distances. A portion is a few short sequences, or some rows of a long one with the slots up to the last of these
    rows: slots that are in the future of all rows are never computed.
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
        wide = torch.promote_types(q.dtype, distance_M.dtype)  # these are summed over portions
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
                        # tril_ zeroes the gradient of future weights, and so that of their scores.
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
    """Slices of a bucket's sequences and of their rows: each pair has at most CACHED_SCORES (CUDA_SCORES) scores."""
    budget = CUDA_SCORES if q.is_cuda else CACHED_SCORES
    num, heads, places, _ = q.shape
    size = max(1, budget // (heads * places * places))
    height = min(places, max(LEAST_ROWS, budget // (heads * places)))
    return (
        [slice(start, min(start + size, num)) for start in range(0, num, size)],
        [slice(start, min(start + height, places)) for start in range(0, places, height)],
    )


def _distance_bias(distance_M: Tensor, rows: slice, silu: bool) -> Tensor:
    """The distance bias [R, P] of `rows` for each slot up to the last row; for softmax the future is -inf."""
    # Each row is the row before it, shifted by one slot: … 3 2 1 0, then the future.
    future = distance_M.new_full((rows.stop - rows.start - 1,), 0.0 if silu else float("-inf"))
    stretch = torch.cat([distance_M[: rows.stop].flip(0), future])
    return stretch.unfold(0, rows.stop, 1).flip(0).contiguous()


def _by_distance(grad_RP: Tensor) -> Tensor:
    """The sum over each diagonal of the last R rows of a [P, P] matrix, for the distances 0 to P - 1."""
    num_rows, num_places = grad_RP.shape
    width = num_places + num_rows - 1
    # Each row is shifted one slot further left than the row before it, so that diagonals become columns.
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
    """The scores of `rows` of the sequences `part` with their bias, in the dtype of the bias."""
    q, k = q[part, :, rows], k[part, :, : rows.stop]
    score = ((q if silu else q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).to(bias_RP.dtype)
    if time_N is None:
        return score.add_(bias_RP)
    assert index.time is not None
    return score.add_(_taken(time_N, index.time[part, rows, : rows.stop]).add_(bias_RP)[:, None])


def _weights(score: Tensor, rows: slice, silu: bool) -> Tensor:
    """The attention weights for the scores of `rows`; the caller divides those of SiLU by the longest length."""
    return F.silu(score).tril_(rows.start) if silu else score.softmax(-1)


def _taken(table_N: Tensor, index: Tensor) -> Tensor:
    """table[index]; on a CPU index_select is several times faster than indexing or an embedding of width 1."""
    return table_N.index_select(0, index.flatten()).view(index.shape)


def _counted(index: Tensor, grad: Tensor, size: int) -> Tensor:
    """The sum of `grad` over the reads of each entry, [size]: the gradient of a small table."""
    return torch.bincount(index.flatten(), weights=grad.flatten(), minlength=size).to(grad.dtype)


class Take(torch.autograd.Function):
    """table[index] with a backward pass by bincount, on a CPU many times faster than that of indexing."""

    @staticmethod
    def forward(ctx: Any, table_N: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(table_N)
        return _taken(table_N, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _counted(ctx.saved_tensors[0], grad.contiguous(), ctx.size), None
