"""The losses of step 1: InfoNCE at condition tokens (LUM eq. 2), and our counterfactual contrast.

Shape suffixes: T positions, C candidate items (N of them negatives), D width, Q counterfactual queries.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lumrec.modules.kernels.info_nce import InfoNCE


def info_nce(
    o_TD: Tensor,
    e_CD: Tensor,
    positive_T: Tensor,
    log_weight_C: Tensor | None = None,
    *,
    log_positive_weight_T: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sum over positions of -log(v exp(s_+) / (v exp(s_+) + Σ_{j ≠ +} w_j exp(s_j))), s = o·e (LUM eq. 2); a scalar.

    o_TD, e_CD: float, outputs and candidate items. The loss is in the wider of their dtype and float32.
    positive_T: int64, the index of the right candidate at each position; -1 leaves the position out.
    log_weight_C: log w_j, how much each candidate counts as a negative; None: 0.
    log_positive_weight_T: log v, how much the positive counts at each position; None: 0.

    Candidates are distinct items, so no negative equals the positive. The weights depend on the kind of negatives:

    - in-batch: w_j = how often item j occurs in the batch. This equals the loss over the items of all T positions with
      copies of the positive masked out, at a fraction of its cost.
    - sampled: w_j = how often j was drawn; for sampled and in-batch together, the sum of both.
    - the batch's unique items, or the whole catalogue: w_j = 1.
    - with logQ correction: w_j divided by its expectation, so that Σ_j w_j exp(s_j) is an unbiased estimate of the sum
      over the catalogue. The positive is not sampled, so v = 1. The gradient is then, term by term, that of the
      corrected logQ correction (arXiv 2507.09331): with N = Σ_{j ≠ +} w_j exp(s_j) and p = exp(s_+) / (exp(s_+) + N),
      its loss is stop_gradient(1 - p) · (log N - s_+), and (1 - p) w_j exp(s_j) / N = w_j exp(s_j) / (exp(s_+) + N).
      The values differ: ours is the log loss.
    - with logQ as in Yi et al. (RecSys 2019): v divided by the same expectation, as if the positive had been drawn.

    label_smoothing = ε: (1 - ε) · loss + ε Σ_j u_j (log Z - s_j), where Z is the sum in the denominator above and u_j
    the share of candidate j's weight (w_j or v) in all weights. With equal weights this is PyTorch's label smoothing.

    Two positions and two candidates; the second position is left out::

        o_TD  [1 0] [0 1]      e_CD  [1 0] [0 1]      positive_T  0 -1

    >>> o, e = torch.eye(2), torch.eye(2)
    >>> round(float(info_nce(o, e, torch.tensor([0, -1]))), 4)
    0.3133
    """
    supervised = positive_T >= 0
    if not bool(supervised.all()):
        o_TD, positive_T = o_TD[supervised], positive_T[supervised]
        log_positive_weight_T = None if log_positive_weight_T is None else log_positive_weight_T[supervised]
    if log_weight_C is None:
        log_weight_C = e_CD.new_zeros(len(e_CD))
    if log_positive_weight_T is None:
        log_positive_weight_T = o_TD.new_zeros(len(o_TD))
    loss = InfoNCE.apply(o_TD, e_CD, positive_T, log_weight_C, log_positive_weight_T)
    if label_smoothing:
        loss = loss + label_smoothing * _smoothing(o_TD, e_CD, positive_T, log_weight_C, log_positive_weight_T)
    return loss


def _smoothing(
    o_TD: Tensor, e_CD: Tensor, positive_T: Tensor, log_weight_C: Tensor, log_positive_weight_T: Tensor
) -> Tensor:
    """Σ_t (log v + s_+ - Σ_j u_j s_j): what label smoothing adds to the loss. It computes no further logits."""
    high = torch.promote_types(o_TD.dtype, torch.float32)
    with torch.autocast(o_TD.device.type, enabled=False):
        o_TD, e_CD = o_TD.to(high), e_CD.to(high)
        w_C, v_T = log_weight_C.to(high).exp(), log_positive_weight_T.to(high).exp()
        s_T = (o_TD * F.embedding(positive_T, e_CD)).sum(1)
        surplus_T = v_T - w_C[positive_T]  # the positive counts v, not w
        return (v_T.log() + s_T - (o_TD @ (w_C @ e_CD) + surplus_T * s_T) / (w_C.sum() + surplus_T)).sum()


def counterfactual_contrast(o_true_QD: Tensor, o_other_QD: Tensor, e_QD: Tensor) -> Tensor:
    """Sum over events of softplus(-(o_true·e - o_other·e)); a scalar. OUR EXTENSION, not in the paper.

    o_true_QD: answers under the condition that item e really had. o_other_QD: answers of the same history under another
    value of that condition. The loss asks that the item fits the true condition better. InfoNCE trains this difference
    only weakly: it compares items under one condition, never conditions for one item.

    >>> e = torch.tensor([[1.0, 0.0]])
    >>> round(float(counterfactual_contrast(2 * e, e, e)), 4)
    0.3133
    """
    return F.softplus(-((o_true_QD - o_other_QD) * e_QD).sum(-1)).sum()
