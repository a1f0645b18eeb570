"""Deep Interest Network: events weighted by their relevance to the target (Zhou et al., 1706.06978).

Shape suffixes: see rankers/base.py; H hidden units of the activation unit.

Two rows, with histories of two and no events::

    history_T   0 1 | (none)        target_B   2 3

>>> from lumrec.modules.rankers.base import RankBatch, RankRow
>>> from lumrec.modules.tokens import make_tables
>>> tables = make_tables({"item": (9, 4), "user": (5, 4)}, {"item": "item", "user": "user"})
>>> roles = {"item_features": ["item"], "feedback_features": [], "row_features": ["user"]}
>>> ranker = Din(tables, **roles, num_statistics=0, hidden_dims=[8])
>>> row = RankRow({"item": 4}, [{"item": 3}, {"item": 7}], {"user": 1})
>>> ranker(RankBatch.from_lists([row, row._replace(history=[])], ranker)).shape
torch.Size([2])
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.modules.kernels.activation_unit import ActivationUnit
from lumrec.modules.kernels.jagged import row_of_event, segment_softmax
from lumrec.modules.rankers.base import Histories, Interest, Looked, RankBatch, Ranker, make_activation


class Din(Ranker):
    """DIN: interest = sum over the history of a(h, t) h, without softmax, so that its length shows its strength.

    activation_dim: hidden units of the local activation unit (36 in the paper's figure 2). softmax: normalise the
    weights, which the paper advises against. activation: of the activation unit and of the over-arch.

    Differences from the paper: a token of the history includes its feedback, which a target does not have; mini-batch
    aware regularisation is Ranker's `token_l2`; the activation unit reads h, t, their product and their difference, as
    in the authors' code, instead of the outer product in the paper's text.
    """

    def __init__(
        self, *args: Any, activation_dim: int = 36, softmax: bool = False, activation: str = "prelu", **kwargs: Any
    ) -> None:
        self._unit: dict[str, Any] = {"hidden_dim": activation_dim, "softmax": softmax, "activation": activation}
        super().__init__(*args, activation=activation, **kwargs)

    def make_interest(self) -> int:
        self.local_activation = LocalActivation(self.token_dim, self.item_dim, **self._unit)
        return self.token_dim + self.item_dim

    def interest(self, looked: Looked, batch: RankBatch) -> Interest:
        """The weighted sum of the history, and its product with the target: [B, D + I]."""
        interest_BD = self.local_activation(looked.token_UD, looked.target_BI, batch.history_T, batch.offsets_B1)
        return Interest(self._with_target(interest_BD, looked.target_BI))

    def shared_interest(self, looked: Looked, histories: Histories, dense_BF: Tensor) -> Tensor:
        """See Ranker; the rows of a group are computed as one matrix product."""
        return self._with_target(self.local_activation.shared(histories, histories.history_GL), looked.target_BI)

    def _with_target(self, interest_BD: Tensor, target_BI: Tensor) -> Tensor:
        return torch.cat([interest_BD, interest_BD[:, : self.item_dim] * target_BI], dim=1)


class LocalActivation(nn.Module):
    """DIN's activation unit and weighted sum over jagged histories: sum_l a(h_l, t) h_l.

    The unit's first layer reads [h; t; h*t; h-t], which is linear in h for a given target::

        W_h h + W_t t + W_p (h*t) + W_d (h-t)  =  (W_h + W_d + W_p diag(t)) h  +  (W_t - W_d) t
                                                   token     product             target

    so `token`, `product` and `target` are equivalent to the four matrices, and the layer is one small matrix per row
    times the row's history. h*t has only item features, since a target has no feedback.

    ReLU and PReLU use kernels/activation_unit.py. `plain` is its plain twin; Dice (whose moments are over all events)
    and softmax use it.
    """

    def __init__(
        self, token_dim: int, item_dim: int, *, hidden_dim: int = 36, activation: str = "prelu", softmax: bool = False
    ) -> None:
        super().__init__()
        self.item_dim, self.softmax = item_dim, softmax
        bound = (token_dim + 2 * item_dim) ** -0.5
        self.token_HD = nn.Parameter(torch.empty(hidden_dim, token_dim).uniform_(-bound, bound))
        self.product_HI = nn.Parameter(torch.empty(hidden_dim, item_dim).uniform_(-bound, bound))
        self.target = nn.Linear(item_dim, hidden_dim)
        self.activation = make_activation(activation, hidden_dim)
        self.output_H = nn.Parameter(torch.empty(hidden_dim).uniform_(-(hidden_dim**-0.5), hidden_dim**-0.5))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, token_UD: Tensor, target_BI: Tensor, history_T: Tensor, offsets_B1: Tensor) -> Tensor:
        """The weighted sum of each row's history, [B, D]; 0 for an empty one. Inputs: see RankBatch."""
        if self.softmax or not isinstance(self.activation, (nn.PReLU, nn.ReLU)):
            return self.plain(token_UD, target_BI, history_T, offsets_B1)
        slope = self.activation.weight if isinstance(self.activation, nn.PReLU) else token_UD.new_zeros(1)
        unit = self.target(target_BI), self.token_HD, self.product_HI, self.output_H, self.bias, slope
        return ActivationUnit.apply(token_UD, target_BI, *unit, history_T, offsets_B1)

    def plain(self, token_UD: Tensor, target_BI: Tensor, history_T: Tensor, offsets_B1: Tensor) -> Tensor:
        """The same as `forward`, without chunks: the reference in tests."""
        row_T = row_of_event(offsets_B1, len(history_T))
        hidden_TH = F.embedding(history_T, token_UD @ self.token_HD.t()) + F.embedding(row_T, self.target(target_BI))
        item_TI = F.embedding(history_T, token_UD[:, : self.item_dim])
        hidden_TH = hidden_TH + (item_TI * F.embedding(row_T, target_BI)) @ self.product_HI.t()
        weight_T = self.activation(hidden_TH) @ self.output_H + self.bias
        if self.softmax:
            weight_T = segment_softmax(weight_T, row_T, len(target_BI))
        return F.embedding_bag(
            history_T, token_UD, offsets_B1, mode="sum", per_sample_weights=weight_T, include_last_offset=True
        )

    def shared(self, histories: Histories, history_GL: Tensor) -> Tensor:
        """The same for rows that share histories, [B, D]: see Ranker.shared_interest. history_GL: int64, tokens."""
        history_GLD = F.embedding(history_GL, histories.token_ZD)
        target_GRI = F.embedding(histories.target_GR, histories.token_ZD[:, : self.item_dim])
        product_GRHI = target_GRI[:, :, None] * self.product_HI
        product_GRHD = F.pad(product_GRHI, (0, history_GLD.shape[2] - self.item_dim))
        matrix_GXD = (self.token_HD + product_GRHD).flatten(1, 2)
        hidden_GLX = torch.baddbmm(self.target(target_GRI).flatten(1)[:, None], history_GLD, matrix_GXD.transpose(1, 2))
        hidden_XH = hidden_GLX.view(-1, len(self.output_H))
        weight_GLR = (self.activation(hidden_XH) @ self.output_H).view(*hidden_GLX.shape[:2], -1) + self.bias
        if self.softmax:
            is_event_GL1 = (history_GL < histories.token_ZD.shape[0] - 1)[:, :, None]
            weight_GLR = weight_GLR.masked_fill(~is_event_GL1, -1e30).softmax(dim=1)
        return histories.of_rows(torch.bmm(weight_GLR.transpose(1, 2), history_GLD))
