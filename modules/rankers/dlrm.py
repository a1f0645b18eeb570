"""The online DLRM of the LUM paper: Embedding + MLP over user, context, target item and pooled history.

Shape suffixes: see rankers/base.py; P pairs of fields, N fields, C their width.

Two rows, with histories of two and no events::

    history_T   0 1 | (none)        target_B   2 3

>>> from lumrec.modules.rankers.base import RankBatch, RankRow
>>> from lumrec.modules.tokens import make_tables
>>> tables = make_tables({"item": (9, 4), "user": (5, 4)}, {"item": "item", "user": "user"})
>>> roles = {"item_features": ["item"], "feedback_features": [], "row_features": ["user"]}
>>> ranker = Dlrm(tables, **roles, num_statistics=0, hidden_dims=[8])
>>> row = RankRow({"item": 4}, [{"item": 3}, {"item": 7}], {"user": 1})
>>> ranker(RankBatch.from_lists([row, row._replace(history=[])], ranker)).shape
torch.Size([2])
"""

import torch
from torch import Tensor, nn

from lumrec.modules.rankers.base import Histories, Interest, Looked, RankBatch, Ranker, mean_history


class Dlrm(Ranker):
    """Embedding + MLP with the mean of the history and its interaction with the target.

    The pooling of the history does not depend on the target (DIN's base model, 1706.06978, section 4.2). The interest
    is the mean, its elementwise product with the target, and their dot product (the interactions of DLRM, 1906.00091);
    all are 0 for an empty history.

    cross_dim: adds the dot products of every two fields, as in DLRM, where each field is projected to this width (in
    DLRM all tables have one width, and no projection is needed). Fields are the features of the row, those of the
    target item, the mean history, and the statistics through a linear layer (in DLRM an MLP). 0: no cross features.
    """

    pairs_P: Tensor

    def __init__(self, *args: object, cross_dim: int = 0, **kwargs: object) -> None:
        self._cross_dim = cross_dim
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def make_interest(self) -> int:
        width = self.token_dim + self.item_dim + 1
        if not self._cross_dim:
            return width
        dims = [*self.row_dims, *self.item_dims, self.token_dim]
        dims += [self.num_statistics] if self.num_statistics else []
        self.field_projections = nn.ModuleList(nn.Linear(dim, self._cross_dim) for dim in dims)
        pairs_2P = torch.triu_indices(len(dims), len(dims), offset=1)
        self.register_buffer("pairs_P", pairs_2P[0] * len(dims) + pairs_2P[1], persistent=False)
        return width + pairs_2P.shape[1]

    def interest(self, looked: Looked, batch: RankBatch) -> Interest:
        """The mean history, its product with the target, their dot product, cross features: [B, D + I + 1 + P]."""
        return Interest(self._with_target(looked, mean_history(looked.token_UD, batch), batch.dense_BF))

    def shared_interest(self, looked: Looked, histories: Histories, dense_BF: Tensor) -> Tensor:
        """See Ranker; each history is pooled once."""
        sum_GD = nn.functional.embedding(histories.history_GL, histories.token_ZD).sum(dim=1)
        mean_GD = sum_GD / histories.is_event_GL.sum(dim=1, keepdim=True).clamp(min=1)
        return self._with_target(looked, mean_GD.index_select(0, histories.group_B), dense_BF)

    def _with_target(self, looked: Looked, mean_BD: Tensor, dense_BF: Tensor) -> Tensor:
        product_BI = mean_BD[:, : self.item_dim] * looked.target_BI
        x = [mean_BD, product_BI, product_BI.sum(dim=1, keepdim=True)]
        if self._cross_dim:
            x.append(self.cross_features(looked, mean_BD, dense_BF))
        return torch.cat(x, dim=1)

    def cross_features(self, looked: Looked, mean_BD: Tensor, dense_BF: Tensor) -> Tensor:
        """The dot product of every two fields, [B, P]."""
        fields = [*looked.row_BR.split(self.row_dims, dim=1), *looked.target_BI.split(self.item_dims, dim=1), mean_BD]
        if self.num_statistics:
            fields.append(dense_BF)
        x_BNC = torch.stack([project(x) for project, x in zip(self.field_projections, fields, strict=True)], dim=1)
        return torch.bmm(x_BNC, x_BNC.transpose(1, 2)).flatten(1)[:, self.pairs_P]
