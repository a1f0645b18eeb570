"""The log normalizer (log_z) of an answer over the catalogue; docs/concepts.md explains it."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest size (rows × items) of the similarities that are summed at once: this fits into a core's cache.
SUM_BUDGET = 1 << 19
ITEM_BLOCK = 1 << 16
# Sums over 2**16 items of exp(±SAFE_EXPONENT) are neither infinite nor denormal in float32.
SAFE_EXPONENT = 60.0


def log_normalizer(o_XD: Tensor, e_ID: Tensor) -> Tensor:
    """log Σ over all items of exp(o · e), exact, float32 [X]; memory does not grow with the catalogue.

    exp(o · e_i - log_normalizer) is the probability of item i among all items.

    >>> log_normalizer(torch.zeros(1, 2), torch.ones(4, 2)).exp()
    tensor([4.])
    """
    rows = max(1, SUM_BUDGET // min(len(e_ID), ITEM_BLOCK))
    # If no similarity can be large, as with a cosine, exp cannot overflow, and the maximum need not be subtracted.
    bound = float(o_XD.norm(dim=1).max() * e_ID.norm(dim=1).max()) if len(o_XD) else 0.0
    log_z_X = o_XD.new_full((len(o_XD),), float("-inf"))
    for block in e_ID.split(ITEM_BLOCK):
        similarity = (part @ block.T for part in o_XD.split(rows))
        if bound <= SAFE_EXPONENT:
            sums = [part.exp_().sum(1).log_() for part in similarity]
        else:
            sums = [part.logsumexp(1) for part in similarity]
        log_z_X = torch.logaddexp(log_z_X, torch.cat(sums))
    return log_z_X
