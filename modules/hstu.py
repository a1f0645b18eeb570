"""HSTU's block: gated pointwise SiLU attention ("Actions Speak Louder than Words", arXiv 2402.17152, eq. 1 to 3).

Shape suffixes: X tokens and queries, D width, H heads, K head width.

>>> block = HstuBlock(dim=8, num_heads=2, ffn_dim=0, dropout=0.0)
>>> import torch
>>> x_XD = torch.randn(5, 8)
>>> gate_XD, q, k, v = block.project(x_XD)
>>> tuple(q.shape), tuple(block.finish(x_XD, gate_XD, v).shape)
((5, 2, 4), (5, 8))
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class HstuBlock(nn.Module):
    """One block on flat tokens; `attend` computes the attention with its relative bias, as for all blocks::

        U, V, Q, K = SiLU(Linear(Norm(x)))    A = SiLU(Q K^T + bias) / n    y = x + Linear(Dropout(Norm(A V) * U))

    n is the greatest length that a sequence can have. ffn_dim has to be 0: the block has no FFN.
    """

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        assert ffn_dim == 0
        self.num_heads, self.head_width = num_heads, dim // num_heads
        self.input_norm = nn.LayerNorm(dim)
        self.uvqk = nn.Linear(dim, 4 * dim)
        self.attended_norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, dim)
        self.dropout = dropout

    def initialise(self, num_layers: int) -> None:
        """Draws the weights as HSTU's published code does: normal (0.02) into the block, Xavier out of it, zero biases.

        They do not depend on num_layers.
        """
        nn.init.normal_(self.uvqk.weight, std=0.02)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.uvqk.bias)
        nn.init.zeros_(self.output.bias)

    def forward(
        self,
        x_XD: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        rows: slice,
        rotary: Tensor | None,
    ) -> Tensor:
        """The output for `rows` of x, [rows, D]. rotary: None, since HSTU's positions are learned."""
        assert rotary is None
        u_XD, q, k, v = self.project(x_XD)
        return self.finish(x_XD[rows], u_XD[rows], attend(q, k, v))

    def project(self, x_XD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gate [X, D], queries, keys and values [X, H, K]."""
        u_XD, v, q, k = F.silu(self.uvqk(self.input_norm(x_XD))).chunk(4, dim=1)
        q, k, v = (x.unflatten(1, (self.num_heads, self.head_width)) for x in (q, k, v))
        return u_XD, q, k, v

    def finish(self, x_XD: Tensor, u_XD: Tensor, attended_XHK: Tensor) -> Tensor:
        """x plus the attention's output times the gate u, projected, [X, D]."""
        gated = self.attended_norm(attended_XHK.flatten(1)) * u_XD
        return x_XD + self.output(F.dropout(gated, self.dropout, self.training))
