"""Negatives across ranks: the candidates of all ranks, with gradients, are scored at the positions of each.

Shape suffixes: T positions, M the most candidates of a rank, N candidates of all ranks as they come, C the same with
each item once, D width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lumrec.run.distributed import rank, world_size


def gather_candidates(
    e_CD: Tensor, item_C: Tensor, positive_T: Tensor, log_weight_C: Tensor, *, unique: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(e_CD, positive_T, log_weight_C) of this rank's positions among all ranks' candidates, each item once.

    item_C: int64, which items this rank's candidates are; the rest as in info_nce.

    Ranks may have different numbers of candidates, 0 among them; every rank calls this, and every rank calls backward.
    An item that several ranks hold counts with the sum of its weights; where `unique`, with their maximum. So it is no
    negative where it is the positive, whichever rank brought it. The gradient of an embedding is the sum of what all
    ranks' losses say of it, at the rank (the first, where several hold it) that it came from.
    """
    if world_size() == 1:
        return e_CD, positive_T, log_weight_C
    sizes = _gather(torch.tensor([len(e_CD)], device=e_CD.device)).tolist()
    most, padding = max(sizes), max(sizes) - len(e_CD)
    filled_N = torch.cat([torch.arange(r * most, r * most + size) for r, size in enumerate(sizes)]).to(e_CD.device)

    item_N = _gather(F.pad(item_C, (0, padding)))[filled_N]
    weight_N = _gather(F.pad(log_weight_C.exp(), (0, padding)))[filled_N]
    item_C, place_N = torch.unique(item_N, return_inverse=True)
    weight_C = weight_N.new_zeros(len(item_C)).scatter_reduce(0, place_N, weight_N, "amax" if unique else "sum")
    # Ranks agree on an item's embedding, so that one of them will do: the first.
    first_C = filled_N.new_full((len(item_C),), world_size() * most).scatter_reduce(0, place_N, filled_N, "amin")
    # Not in bfloat16, since gradients of all ranks are added up in it.
    high = torch.promote_types(e_CD.dtype, torch.float32)
    e_CD = F.embedding(first_C, _GatherRows.apply(F.pad(e_CD.to(high), (0, 0, 0, padding))))

    own_N = place_N[sum(sizes[: rank()]) :]
    positive_T = positive_T.clone()
    positive_T[positive_T >= 0] = own_N[positive_T[positive_T >= 0]]
    return e_CD, positive_T, weight_C.log()


def _gather(x_M: Tensor) -> Tensor:
    """[M, …] of each rank -> [ranks · M, …]; no gradient."""
    gathered = x_M.new_empty(world_size() * x_M.shape[0], *x_M.shape[1:])
    dist.all_gather_single(gathered, x_M.contiguous())
    return gathered


class _GatherRows(torch.autograd.Function):
    """[M, D] of each rank -> [ranks · M, D]; backward adds up what all ranks say of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor) -> Tensor:
        ctx.rows = len(x_MD)
        return _gather(x_MD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.new_empty(ctx.rows, grad.shape[1])
        dist.reduce_scatter_single(own, grad.contiguous())
        return own
