"""InfoNCE (LUM eq. 2) and its gradients in one pass over chunks of the logits, and its plain twin.

Shape suffixes: T positions, C candidate items (N of them negatives), D width.

Two positions and three candidates, of which the last counts as no negative::

    positions   o_0  o_1        candidates   e_0  e_1  e_2        positive_T  0 2

>>> o_TD, e_CD, positive_T = torch.eye(2), torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([0, 2])
>>> log_weight_C = torch.tensor([0.0, 0, -torch.inf])
>>> loss = InfoNCE.apply(o_TD, e_CD, positive_T, log_weight_C, torch.zeros(2))
>>> torch.allclose(loss, info_nce_plain(o_TD, e_CD, positive_T, log_weight_C))
True
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Logits (elements) held at once: the [T, C] matrix never exists as a whole, and a chunk fits the cache.
CHUNK = 1 << 18


class InfoNCE(torch.autograd.Function):
    """The loss of `info_nce` and both gradients, in one pass: each chunk's softmax becomes gradients at once."""

    @staticmethod
    def forward(
        ctx: Any, o_TD: Tensor, e_CD: Tensor, positive_T: Tensor, log_weight_C: Tensor, log_positive_weight_T: Tensor
    ) -> Tensor:
        # Under autocast the matrix products run in its precision, the rest in float32 (float64 where given).
        low = torch.get_autocast_dtype(o_TD.device.type) if torch.is_autocast_enabled(o_TD.device.type) else o_TD.dtype
        high = torch.promote_types(o_TD.dtype, torch.float32)
        # Only the N candidates that are negatives get logits: with sampled negatives most positives are not among them.
        # The positive is scored separately, and masked among the negatives if it is one.
        negative_N = (log_weight_C > -torch.inf).nonzero().squeeze(1)
        place_C = positive_T.new_full((len(e_CD),), -1)
        place_C[negative_N] = torch.arange(len(negative_N), device=o_TD.device)
        place_T1 = place_C[positive_T][:, None]
        is_negative_T1, place_T1 = place_T1 >= 0, place_T1.clamp(min=0)
        with torch.autocast(o_TD.device.type, enabled=False):
            e_positive_TD = F.embedding(positive_T, e_CD).to(high)
            right_T1 = (o_TD.to(high) * e_positive_TD).sum(1, keepdim=True) + log_positive_weight_T[:, None].to(high)
            o, e, log_weight_N = o_TD.to(low), e_CD[negative_N].to(low), log_weight_C[negative_N].to(high)
            loss, grad_right = right_T1.new_zeros(()), torch.zeros_like(right_T1)
            grad_o, grad_e = torch.zeros_like(o), torch.zeros_like(e, dtype=high)
            rows = max(1, CHUNK // max(1, len(e)))
            for start in range(0, len(o) if len(e) else 0, rows):
                chunk = slice(start, start + rows)
                right, place = right_T1[chunk], place_T1[chunk]
                logits = torch.mm(o[chunk], e.t()).to(high)
                logits += log_weight_N
                logits.scatter_(1, place, logits.gather(1, place).masked_fill_(is_negative_T1[chunk], -torch.inf))
                top = torch.maximum(logits.amax(1, keepdim=True), right)
                exponential, exponential_right = logits.sub_(top).exp_(), (right - top).exp_()
                total = exponential.sum(1, keepdim=True) + exponential_right
                loss += (total.log() + top - right).sum()
                grad_right[chunk] = exponential_right / total - 1
                softmax = exponential.div_(total).to(low)
                grad_o[chunk] = torch.mm(softmax, e)
                grad_e += torch.mm(softmax.t(), o[chunk])
            grad_o += grad_right * e_positive_TD
            grad_e = torch.zeros_like(e_CD, dtype=high).index_copy_(0, negative_N, grad_e)
            grad_e.index_add_(0, positive_T, grad_right * o_TD)
        ctx.save_for_backward(grad_o, grad_e)
        ctx.dtypes = (o_TD.dtype, e_CD.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_o, grad_e = ctx.saved_tensors
        return (grad_o * grad).to(ctx.dtypes[0]), (grad_e * grad).to(ctx.dtypes[1]), None, None, None


def info_nce_plain(
    o_TD: Tensor,
    e_CD: Tensor,
    positive_T: Tensor,
    log_weight_C: Tensor | None = None,
    *,
    log_positive_weight_T: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The same as `info_nce` of losses.py, with all logits at once and PyTorch's softmax: the reference in tests."""
    supervised = positive_T >= 0
    log_weight_C = e_CD.new_zeros(len(e_CD)) if log_weight_C is None else log_weight_C
    log_v_T = o_TD.new_zeros(len(o_TD)) if log_positive_weight_T is None else log_positive_weight_T
    o_TD, positive_T, log_v_T = o_TD[supervised], positive_T[supervised], log_v_T[supervised]
    is_positive = F.one_hot(positive_T, max(1, len(e_CD)))[:, : len(e_CD)].bool()
    log_weight_TC = torch.where(is_positive, log_v_T[:, None], log_weight_C).to(o_TD.dtype)
    logits = o_TD @ e_CD.t()
    loss = F.cross_entropy(logits + log_weight_TC, positive_T, reduction="sum")
    log_Z_T = (logits + log_weight_TC).logsumexp(1, keepdim=True)
    smooth = (log_weight_TC.softmax(1) * (log_Z_T - logits)).sum()
    return (1 - label_smoothing) * loss + label_smoothing * smooth
