"""Causal transformer over the tokens of each user (LUM section 4.1.2), GPT-style.

Shape suffixes: T tokens, Q query tokens, X = T + Q, D width, H heads, K head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.modules.attention import JaggedLayout, causal_attention, query_attention


class Block(nn.Module):
    """One pre-norm transformer block on flat tokens: the history's tokens and, behind them, the queries."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention_output = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn_input = nn.Linear(dim, ffn_dim)
        self.ffn_output = nn.Linear(ffn_dim, dim)
        self.dropout = dropout

    def forward(self, x_XD: Tensor, num_tokens: int, layout: JaggedLayout, *, queries_only: bool) -> Tensor:
        """Output for all tokens, or, where `queries_only`, for the queries alone ([Q, D]).

        In the last block of a pure query nothing reads the history's outputs any more, only its keys and values.
        """
        head_width = x_XD.shape[1] // self.num_heads
        q, k, v = self.qkv(self.attention_norm(x_XD)).view(-1, 3, self.num_heads, head_width).unbind(1)
        history = slice(0, num_tokens)
        asked = slice(num_tokens, len(x_XD))
        parts = []
        if not queries_only:
            parts.append(causal_attention(q[history], k[history], v[history], layout))
        if num_tokens < len(x_XD) or queries_only:
            parts.append(query_attention(q[asked], k[asked], v[asked], k[history], v[history], layout))
        residual = x_XD[asked] if queries_only else x_XD
        x = residual + self._drop(self.attention_output(torch.cat(parts).flatten(1)))
        hidden = F.gelu(self.ffn_input(self.ffn_norm(x)), approximate="tanh")
        return x + self._drop(self.ffn_output(hidden))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class UserEncoder(nn.Module):
    """A causal transformer with learned positions that restart at each user.

    max_tokens: positions 0 … max_tokens - 1 exist. A query stands at the position behind the tokens that it sees.
    """

    def __init__(
        self, *, dim: int, num_layers: int, num_heads: int, max_tokens: int, ffn_dim: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the width {dim} cannot be divided into {num_heads} heads; choose a divisor of it")
        self.max_tokens = max_tokens
        self.position = nn.Embedding(max_tokens, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, ffn_dim or 4 * dim, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.dropout = dropout
        self._initialise(num_layers)

    def _initialise(self, num_layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                # GPT-2: the branches that add to the residual stream start smaller, the deeper the model.
                is_output = name.endswith(("attention_output.weight", "ffn_output.weight"))
                nn.init.normal_(parameter, std=0.02 * ((2 * num_layers) ** -0.5 if is_output else 1.0))

    def forward(
        self, x_TD: Tensor, y_QD: Tensor, layout: JaggedLayout, *, query_prefix_Q: Tensor, queries_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Outputs of the history's tokens [T, D] (empty where `queries_only`) and of the queries [Q, D].

        x_TD: tokens of all users behind each other. y_QD: query conditions; query_prefix_Q: tokens that each one sees.
        """
        num_tokens = len(x_TD)
        starts_T = torch.repeat_interleave(layout.offsets_B1[:-1], layout.offsets_B1.diff(), output_size=num_tokens)
        position_T = torch.arange(num_tokens, device=x_TD.device) - starts_T
        x = torch.cat([x_TD, y_QD]) + self.position(torch.cat([position_T, query_prefix_Q]))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            last = block is self.blocks[-1]
            x = block(x, num_tokens, layout, queries_only=queries_only and last)
        x = self.norm(x)
        return (x[:0], x) if queries_only else (x[:num_tokens], x[num_tokens:])
