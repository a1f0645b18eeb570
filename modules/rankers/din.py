"""Deep Interest Network: the history weighted by its relevance to the target (Zhou et al., 1706.06978).

Shape suffixes: see rankers/base.py; H hidden units of the activation unit, L events of the longest history of a chunk.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.modules.rankers.base import Interest, Looked, RankBatch, Ranker, make_activation
from lumrec.modules.rankers.jagged import row_chunks, segment_softmax


class Din(Ranker):
    """DIN: interest = sum over the history of a(h, t) h, without softmax, so that its length says how strong it is.

    activation_dim: hidden units of the local activation unit (36 in the paper's figure 2). softmax: weights that sum to
    1 instead (what the paper advises against). activation: of the activation unit and of the over-arch.

    Where we differ from the paper: a token of the history has the feedback it got, which a target has not;
    regularisation by mini-batch is Ranker's `token_l2`; the activation unit sees h and t, their product and their
    difference (as the authors' code does), where the paper's text has an outer product.
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
        return Interest(torch.cat([interest_BD, interest_BD[:, : self.item_dim] * looked.target_BI], dim=1))


class LocalActivation(nn.Module):
    """DIN's activation unit and weighted sum over jagged histories: sum_l a(h_l, t) h_l.

    The unit's first layer reads [h; t; h*t; h-t], which is linear in h once the target is known::

        W_h h + W_t t + W_p (h*t) + W_d (h-t)  =  (W_h + W_d + W_p diag(t)) h  +  (W_t - W_d) t
                                                   token     product             target

    so that `token`, `product` and `target` hold all that four matrices could say, and the layer is one small matrix per
    row times the row's history. h*t is taken over item features alone: a target has no feedback to multiply.

    The path for ReLU and PReLU goes through the rows in chunks, sorted by length, that stay in cache, and computes
    again in the backward pass what it does not keep. `plain` is its twin; Dice (moments over all events) and softmax
    use it.
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
        """Weighted sum of each row's history, [B, D]; 0 for an empty one (meaning of the inputs: RankBatch)."""
        if self.softmax or not isinstance(self.activation, (nn.PReLU, nn.ReLU)):
            return self.plain(token_UD, target_BI, history_T, offsets_B1)
        slope = self.activation.weight if isinstance(self.activation, nn.PReLU) else token_UD.new_zeros(1)
        return _ChunkedActivation.apply(
            token_UD,
            target_BI,
            self.target(target_BI),
            self.token_HD,
            self.product_HI,
            self.output_H,
            self.bias,
            slope,
            history_T,
            offsets_B1,
        )

    def plain(self, token_UD: Tensor, target_BI: Tensor, history_T: Tensor, offsets_B1: Tensor) -> Tensor:
        """The same as `forward`, without chunks: what it is tested against."""
        row_T = torch.repeat_interleave(offsets_B1.diff(), output_size=len(history_T))
        hidden_TH = F.embedding(history_T, token_UD @ self.token_HD.t()) + F.embedding(row_T, self.target(target_BI))
        item_TI = F.embedding(history_T, token_UD[:, : self.item_dim])
        hidden_TH = hidden_TH + (item_TI * F.embedding(row_T, target_BI)) @ self.product_HI.t()
        weight_T = self.activation(hidden_TH) @ self.output_H + self.bias
        if self.softmax:
            weight_T = segment_softmax(weight_T, row_T, len(target_BI))
        return F.embedding_bag(
            history_T, token_UD, offsets_B1, mode="sum", per_sample_weights=weight_T, include_last_offset=True
        )


class _ChunkedActivation(torch.autograd.Function):
    """LocalActivation's weighted sum for a PReLU with one slope (0: ReLU), in chunks of rows of about equal length.

    Within a chunk the histories stand padded, [rows, L, D], so that a row's target reaches its events without a copy
    per event; sorting by length keeps the padding small. A padded place reads a token of zeros behind the last one: its
    product with anything is 0, in the sum and in every gradient, so that no mask is needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        token_UD: Tensor,
        target_BI: Tensor,
        bias_BH: Tensor,
        token_HD: Tensor,
        product_HI: Tensor,
        output_H: Tensor,
        bias: Tensor,
        slope: Tensor,
        history_T: Tensor,
        offsets_B1: Tensor,
    ) -> Tensor:
        padded_UD, with_padding = F.pad(token_UD, (0, 0, 0, 1)), F.pad(history_T, (0, 1), value=len(token_UD))
        sum_BD = token_UD.new_zeros(len(target_BI), token_UD.shape[1])
        event_bytes, chunks = token_UD.shape[1] * token_UD.element_size(), []
        for rows, place_RL in row_chunks(offsets_B1, num_events=len(history_T), event_bytes=event_bytes):
            index_RL = with_padding[place_RL]
            history_RLD = F.embedding(index_RL, padded_UD)
            matrix_RHD = _first_layer(target_BI[rows], token_HD, product_HI)
            hidden_RLH = torch.bmm(history_RLD, matrix_RHD.transpose(1, 2)).add_(bias_BH[rows][:, None])
            weight_RL = F.leaky_relu(hidden_RLH, negative_slope=float(slope)) @ output_H + bias
            sum_BD[rows] = torch.bmm(weight_RL[:, None], history_RLD).squeeze(1)
            chunks.append((rows, index_RL, hidden_RLH, weight_RL))
        ctx.chunks = chunks
        ctx.save_for_backward(padded_UD, target_BI, bias_BH, token_HD, product_HI, output_H, slope)
        return sum_BD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        padded_UD, target_BI, bias_BH, token_HD, product_HI, output_H, slope = ctx.saved_tensors
        negative_slope = float(slope)
        g_token_UD, g_target_BI, g_bias_BH = (torch.zeros_like(x) for x in (padded_UD, target_BI, bias_BH))
        g_token_HD, g_product_HI, g_output_H = (torch.zeros_like(x) for x in (token_HD, product_HI, output_H))
        g_bias, g_slope = torch.zeros_like(slope), torch.zeros_like(slope)
        for rows, index_RL, hidden_RLH, weight_RL in ctx.chunks:
            history_RLD, target_RI, grad_RD = F.embedding(index_RL, padded_UD), target_BI[rows], grad_BD[rows]
            # sum = weight · history, weight = leaky_relu(hidden) · output + bias
            g_weight_RL = torch.bmm(history_RLD, grad_RD[:, :, None]).squeeze(2)
            g_weight_N = g_weight_RL.flatten()
            g_bias += g_weight_N.sum()
            g_slope += g_weight_N @ (hidden_RLH.clamp(max=0).flatten(0, 1) @ output_H)
            g_output_H.addmv_(F.leaky_relu(hidden_RLH, negative_slope).flatten(0, 1).t(), g_weight_N)
            g_hidden_RLH = torch.ops.aten.leaky_relu_backward(
                g_weight_RL[:, :, None] * output_H, hidden_RLH, negative_slope, False
            )
            # hidden = history · matrix + bias, matrix = token + diag(target) · product
            g_bias_BH[rows] = g_hidden_RLH.sum(dim=1)
            g_matrix_RHD = torch.bmm(g_hidden_RLH.transpose(1, 2), history_RLD)
            g_token_HD += g_matrix_RHD.sum(dim=0)
            g_matrix_RHI = g_matrix_RHD[:, :, : target_RI.shape[1]]
            g_target_BI[rows] = (g_matrix_RHI * product_HI).sum(dim=1)
            g_product_HI += (g_matrix_RHI * target_RI[:, None]).sum(dim=0)
            # Both ways to the history in one product: through the hidden units, and as what is summed.
            matrix_RHD = torch.cat([_first_layer(target_RI, token_HD, product_HI), grad_RD[:, None]], dim=1)
            g_history_RLD = torch.bmm(torch.cat([g_hidden_RLH, weight_RL[:, :, None]], dim=2), matrix_RHD)
            g_token_UD.index_add_(0, index_RL.flatten(), g_history_RLD.flatten(0, 1))
        return (
            *(g_token_UD[:-1], g_target_BI, g_bias_BH, g_token_HD, g_product_HI, g_output_H, g_bias, g_slope),
            *(None, None),
        )


def _first_layer(target_RI: Tensor, token_HD: Tensor, product_HI: Tensor) -> Tensor:
    """The first matrix of each row, [R, H, D]: token + product · diag(target), the latter over item features."""
    matrix_RHD = token_HD.expand(len(target_RI), -1, -1).clone()
    matrix_RHD[:, :, : target_RI.shape[1]].addcmul_(target_RI[:, None], product_HI)
    return matrix_RHD
