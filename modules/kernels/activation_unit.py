"""DIN's local activation unit and weighted sum (1706.06978 section 4.3) over jagged histories, for ReLU and PReLU.

The plain twin is LocalActivation.plain of rankers/din.py.

Shape suffixes: see rankers/base.py; H hidden units, R rows of a chunk, L events of the longest history of a chunk.

Three rows with histories of 2, 0 and 1 of 4 tokens::

    history_T   3 0 |  | 3        offsets_B1  0 2 2 3

>>> tokens, history, offsets = torch.randn(4, 5), torch.tensor([3, 0, 3]), torch.tensor([0, 2, 2, 3])
>>> unit = torch.randn(3, 5), torch.randn(3, 6), torch.randn(6, 5), torch.randn(6, 5), torch.randn(6)
>>> ActivationUnit.apply(tokens, *unit, torch.zeros(1), torch.full((1,), 0.25), history, offsets)[1]
tensor([0., 0., 0., 0., 0.])
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lumrec.modules.kernels.jagged import row_chunks


class ActivationUnit(torch.autograd.Function):
    """The weighted sum of each row's history, [B, D], 0 for an empty one: sum over events of weight · token, where::

        weight = output · prelu((token_HD + product_HI · diag(target)) token + bias_BH) + bias

    bias_BH: what the target adds to the hidden units. bias, slope: [1]; the slope is that of PReLU, 0 for ReLU. The
    other inputs: see RankBatch.

    Rows of similar length are computed in chunks that fit the cache; the backward pass computes again what is not kept.
    Within a chunk the histories are padded, [R, L, D], so that a row's target is not copied for each of its events.
    Padding reads a token of zeros after the last one: it adds 0 to the sum and to every gradient, so no mask is needed.
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
            # The history's two gradients in one product: through the hidden units, and from the weighted sum.
            matrix_RHD = torch.cat([_first_layer(target_RI, token_HD, product_HI), grad_RD[:, None]], dim=1)
            g_history_RLD = torch.bmm(torch.cat([g_hidden_RLH, weight_RL[:, :, None]], dim=2), matrix_RHD)
            g_token_UD.index_add_(0, index_RL.flatten(), g_history_RLD.flatten(0, 1))
        return (
            *(g_token_UD[:-1], g_target_BI, g_bias_BH, g_token_HD, g_product_HI, g_output_H, g_bias, g_slope),
            *(None, None),
        )


def _first_layer(target_RI: Tensor, token_HD: Tensor, product_HI: Tensor) -> Tensor:
    """The first matrix of each row, [R, H, D]: token + product · diag(target), the second only for item features."""
    matrix_RHD = token_HD.expand(len(target_RI), -1, -1).clone()
    matrix_RHD[:, :, : target_RI.shape[1]].addcmul_(target_RI[:, None], product_HI)
    return matrix_RHD
