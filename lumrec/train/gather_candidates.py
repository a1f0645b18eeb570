"""Negatives across ranks: each rank scores the candidates of all ranks, with gradients, at its own positions.

Shape suffixes: T positions, M highest number of candidates on a rank, N candidates of all ranks in the order of the
ranks, C the same with each item once, D width.
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

    item_C: int64, the items of this rank's candidates; the other arguments as in info_nce.

    Ranks may have different numbers of candidates, including 0; every rank must call this, and then backward. An item
    that several ranks have becomes one candidate with the sum of its weights (`unique`: their maximum). So it is never
    a negative where it is the positive, whichever rank it comes from. The gradient of an embedding is summed over all
    ranks' losses and returned to the first rank that has the item.
    """
    if world_size() == 1:
        return e_CD, positive_T, log_weight_C
    sizes = _gather(torch.tensor([len(e_CD)], device=e_CD.device)).tolist()
    most, padding = max(sizes), max(sizes) - len(e_CD)
    filled_N = torch.cat([torch.arange(r * most, r * most + size) for r, size in enumerate(sizes)]).to(e_CD.device)

    item_N = _gather(F.pad(item_C, (0, padding)))[filled_N]
    weight_N = _gather(F.pad(log_weight_C.exp(), (0, padding)))[filled_N]
    item_C, index_N = torch.unique(item_N, return_inverse=True)
    weight_C = weight_N.new_zeros(len(item_C)).scatter_reduce(0, index_N, weight_N, "amax" if unique else "sum")
    # An item has the same embedding on all ranks, so the first one is used.
    first_C = filled_N.new_full((len(item_C),), world_size() * most).scatter_reduce(0, index_N, filled_N, "amin")
    # At least float32, because the gradients of all ranks are summed in it.
    high = torch.promote_types(e_CD.dtype, torch.float32)
    e_CD = F.embedding(first_C, _GatherRows.apply(F.pad(e_CD.to(high), (0, 0, 0, padding))))

    own_N = index_N[sum(sizes[: rank()]) :]
    positive_T = positive_T.clone()
    positive_T[positive_T >= 0] = own_N[positive_T[positive_T >= 0]]
    return e_CD, positive_T, weight_C.log()


def _gather(x_M: Tensor) -> Tensor:
    """[M, …] of each rank -> [ranks · M, …]; no gradient."""
    gathered = x_M.new_empty(world_size() * x_M.shape[0], *x_M.shape[1:])
    dist.all_gather_single(gathered, x_M.contiguous())
    return gathered


class _GatherRows(torch.autograd.Function):
    """[M, D] of each rank -> [ranks · M, D]; backward sums all ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor) -> Tensor:
        ctx.rows = len(x_MD)
        return _gather(x_MD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.new_empty(ctx.rows, grad.shape[1])
        dist.reduce_scatter_single(own, grad.contiguous())
        return own
