"""Losses of step 1: InfoNCE at condition tokens (LUM equ. 2), and our counterfactual contrast.

Shape suffixes: T positions, C candidate items, D width, Q counterfactual queries.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Logits that exist at one time (elements): the [T, C] matrix is never held whole, and what is held stays in the cache.
CHUNK = 1 << 18


def info_nce(o_TD: Tensor, e_CD: Tensor, positive_T: Tensor, log_weight_C: Tensor | None = None) -> Tensor:
    """Sum over positions of -log(exp(s_+) / (exp(s_+) + Σ_{j ≠ +} w_j exp(s_j))), s = o·e (LUM equ. 2); a scalar.

    positive_T: int64, the candidate that is right at each position; -1 leaves the position out.
    log_weight_C: log w_j, how much each candidate counts as a negative; zero without it.

    Candidates are distinct items, so no negative is the positive itself. The weights say where they come from:

    - in-batch negatives: w_j = how often item j stands in the batch. This equals the loss over all T positions' items
      with those that are the positive masked out, at a fraction of its cost.
    - sampled negatives: w_j = how often j was drawn; mixed with in-batch: the sum of both.
    - logQ correction: w_j divided by its expectation, which makes Σ_j w_j exp(s_j) an unbiased estimate of the sum over
      the catalogue (Yi et al., RecSys 2019).
    - the whole catalogue: w_j = 1.

    >>> o, e = torch.eye(2), torch.eye(2)
    >>> round(float(info_nce(o, e, torch.tensor([0, -1]))), 4)
    0.3133
    """
    supervised = positive_T >= 0
    if not bool(supervised.all()):
        o_TD, positive_T = o_TD[supervised], positive_T[supervised]
    if log_weight_C is None:
        log_weight_C = e_CD.new_zeros(len(e_CD))
    return _InfoNCE.apply(o_TD, e_CD, positive_T, log_weight_C.float())


class _InfoNCE(torch.autograd.Function):
    """Loss and both gradients, chunk by chunk: the softmax is turned into gradients while it is at hand."""

    @staticmethod
    def forward(ctx: Any, o_TD: Tensor, e_CD: Tensor, positive_T: Tensor, log_weight_C: Tensor) -> Tensor:
        # Under autocast the two matrix products run in its precision, the softmax in float32 (float64 where given).
        low = torch.get_autocast_dtype(o_TD.device.type) if torch.is_autocast_enabled(o_TD.device.type) else o_TD.dtype
        high = torch.promote_types(o_TD.dtype, torch.float32)
        with torch.autocast(o_TD.device.type, enabled=False):
            o, e = o_TD.to(low), e_CD.to(low)
            loss = o_TD.new_zeros((), dtype=high)
            grad_o, grad_e = torch.empty_like(o), torch.zeros_like(e_CD, dtype=high)
            rows = max(1, CHUNK // max(1, len(e)))
            for start in range(0, len(o), rows):
                chunk = slice(start, start + rows)
                logits = torch.mm(o[chunk], e.t()).to(high)
                positive = positive_T[chunk, None]
                right = logits.gather(1, positive)
                logits += log_weight_C.to(high)
                logits.scatter_(1, positive, right)
                top = logits.amax(1, keepdim=True)
                exponential = logits.sub_(top).exp_()
                total = exponential.sum(1, keepdim=True)
                loss += (total.log() + top - right).sum()
                residual = exponential.div_(total).scatter_add_(1, positive, -torch.ones_like(right)).to(low)
                grad_o[chunk] = torch.mm(residual, e)
                grad_e += torch.mm(residual.t(), o[chunk])
        ctx.save_for_backward(grad_o, grad_e)
        ctx.dtypes = (o_TD.dtype, e_CD.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_o, grad_e = ctx.saved_tensors
        return (grad_o * grad).to(ctx.dtypes[0]), (grad_e * grad).to(ctx.dtypes[1]), None, None


def info_nce_plain(o_TD: Tensor, e_CD: Tensor, positive_T: Tensor, log_weight_C: Tensor | None = None) -> Tensor:
    """The same as `info_nce`, with all logits at once and PyTorch's own cross entropy: its twin in tests."""
    supervised = positive_T >= 0
    o_TD, positive_T = o_TD[supervised], positive_T[supervised]
    logits = o_TD @ e_CD.t()
    if log_weight_C is not None:
        is_positive = F.one_hot(positive_T, len(e_CD)).bool()
        logits = logits + torch.where(is_positive, 0.0, log_weight_C.to(logits.dtype))
    return F.cross_entropy(logits, positive_T, reduction="sum")


def counterfactual_contrast(o_true_QD: Tensor, o_other_QD: Tensor, e_QD: Tensor) -> Tensor:
    """Sum over events of softplus(-(o_true·e - o_other·e)); a scalar. OUR EXTENSION, not in the paper.

    The same history is asked once with the condition under which item e was met and once with another value of it; the
    item is told apart under the two answers. InfoNCE alone trains that difference weakly: it compares items under one
    condition, never conditions for one item.

    >>> e = torch.tensor([[1.0, 0.0]])
    >>> round(float(counterfactual_contrast(2 * e, e, e)), 4)
    0.3133
    """
    return F.softplus(-((o_true_QD - o_other_QD) * e_QD).sum(-1)).sum()
