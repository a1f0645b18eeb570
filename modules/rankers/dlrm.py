"""The online DLRM of the LUM paper: Embedding + MLP over user, context, target item and pooled history.

Shape suffixes: see rankers/base.py.
"""

import torch
from torch import Tensor

from lumrec.modules.rankers.base import Looked, RankBatch, Ranker, mean_history


class Dlrm(Ranker):
    """Embedding + MLP with the mean of the history and its interaction with the target.

    The history is pooled whatever the target is (DIN's base model, 1706.06978 section 4.2); beside it stand its
    product with the target, unit by unit, and their dot product (the interactions of DLRM, 1906.00091). An empty
    history is 0 in all of them.
    """

    def make_interest(self) -> int:
        return self.token_dim + self.item_dim + 1

    def interest(self, looked: Looked, batch: RankBatch) -> Tensor:
        """Mean history, its product with the target, their dot product: [B, D + I + 1]."""
        mean_BD = mean_history(looked.token_UD, batch)
        product_BI = mean_BD[:, : self.item_dim] * looked.target_BI
        return torch.cat([mean_BD, product_BI, product_BI.sum(dim=1, keepdim=True)], dim=1)
