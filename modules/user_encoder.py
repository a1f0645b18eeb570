"""Causal user encoders over the tokens of each user (LUM section 4.1.2): GPT-style, Llama-style and HSTU.

All have one interface; they differ in their blocks:

    gpt     LayerNorm, GELU, learned positions                                (Radford et al. 2019)
    llama   RMSNorm, SwiGLU, rotary positions (RoPE), no biases               (arXiv 2302.13971)
    hstu    gated pointwise SiLU attention, learned positions, relative bias  (arXiv 2402.17152, in hstu.py)

Shape suffixes: T tokens, Q query tokens, X = T + Q, D width, H heads, K head width.

Two users with 3 and 2 tokens, and one query of the second user that sees both of the user's tokens::

    x_TD      0 1 2 | 3 4          y_QD          | q          query_prefix_Q  2

>>> from lumrec.modules.layout import make_layout
>>> encoder = UserEncoder(encoder="llama", dim=8, num_layers=1, num_heads=2, max_tokens=4)
>>> prefix_Q = torch.tensor([2])
>>> layout = make_layout(torch.tensor([3, 2]), query_sequence_Q=torch.tensor([1]), query_prefix_Q=prefix_Q)
>>> x_TD, y_QD = encoder(torch.randn(5, 8), torch.randn(1, 8), layout, query_prefix_Q=prefix_Q)
>>> x_TD.shape, y_QD.shape
(torch.Size([5, 8]), torch.Size([1, 8]))
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lumrec.modules.attention import causal_attention, query_attention
from lumrec.modules.hstu import HstuBlock
from lumrec.modules.kernels.biased_attention import BiasIndex
from lumrec.modules.layout import Extension, JaggedLayout
from lumrec.modules.relative_bias import RelativeBias, TokenTimes, bias_indices

ENCODERS = ("gpt", "llama", "hstu")
ROTARY_BASE = 10_000.0

# Keys and values [T, H, K] of the histories' tokens in each layer: all that later queries need of the histories.
KeyValueCache = list[tuple[Tensor, Tensor]]
# (queries, keys, values) of all rows, each [X, H, K] -> attention's output for the rows that the block returns.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class GptBlock(nn.Module):
    """One pre-norm transformer block on flat tokens: the histories' tokens, then the queries."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, dim // num_heads
        self.attention_norm: nn.Module = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention_output = nn.Linear(dim, dim)
        self.ffn_norm: nn.Module = nn.LayerNorm(dim)
        self.ffn_input = nn.Linear(dim, ffn_dim or 4 * dim)
        self.ffn_output = nn.Linear(ffn_dim or 4 * dim, dim)
        self.dropout = dropout

    def initialise(self, num_layers: int) -> None:
        """Draws the weights as GPT-2 does: normal (0.02), zero biases.

        The two matrices that add to the residual stream are divided by sqrt(2 * num_layers).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                is_output = name in ("attention_output.weight", "ffn_output.weight")
                nn.init.normal_(parameter, std=0.02 * ((2 * num_layers) ** -0.5 if is_output else 1.0))

    def forward(self, x_XD: Tensor, attend: Attend, rows: slice, rotary: Tensor | None) -> Tensor:
        """The output for `rows` of x, [rows, D]. rotary: float32 [X, 1, K], cosines then sines, or None."""
        return self.finish(x_XD[rows], attend(*self.project(x_XD, rotary)))

    def project(self, x_XD: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [X, H, K]."""
        shape = (3, self.num_heads, self.head_width)
        q, k, v = self.qkv(self.attention_norm(x_XD)).unflatten(1, shape).unbind(1)
        return (q, k, v) if rotary is None else (rotate(q, rotary), rotate(k, rotary), v)

    def finish(self, x_XD: Tensor, attended_XHK: Tensor) -> Tensor:
        """x plus the attention's output, projected, plus the FFN's output, [X, D]."""
        x = x_XD + self._drop(self.attention_output(attended_XHK.flatten(1)))
        return x + self._drop(self.ffn_output(self._hidden(self.ffn_norm(x))))

    def _hidden(self, x: Tensor) -> Tensor:
        return F.gelu(self.ffn_input(x), approximate="tanh")

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class LlamaBlock(GptBlock):
    """GptBlock with RMSNorm, SwiGLU and no biases. ffn_dim = 0: 8/3 of the width, rounded up to a multiple of 32."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        ffn_dim = ffn_dim or -(-8 * dim // 96) * 32
        super().__init__(dim, num_heads, ffn_dim, dropout)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_output = nn.Linear(dim, dim, bias=False)
        self.ffn_input = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.ffn_output = nn.Linear(ffn_dim, dim, bias=False)

    def _hidden(self, x: Tensor) -> Tensor:
        gate, up = self.ffn_input(x).chunk(2, dim=-1)
        return F.silu(gate) * up


def rotate(x_XHK: Tensor, rotary: Tensor) -> Tensor:
    """x with each pair of channels (i, i + K / 2) rotated by its angle (RoPE, arXiv 2104.09864), [X, H, K].

    rotary: float32 [X, 1, K], the cosines of the K / 2 angles, then their sines.
    """
    real, imaginary = x_XHK.chunk(2, dim=-1)
    cos, sin = rotary.to(x_XHK.dtype).chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)


BLOCKS: dict[str, type[GptBlock] | type[HstuBlock]] = {"gpt": GptBlock, "llama": LlamaBlock, "hstu": HstuBlock}


class UserEncoder(nn.Module):
    """A causal encoder of flat histories; positions restart at each user.

    encoder: "gpt", "llama" or "hstu". max_tokens: the number of positions; a query has the position after the tokens
    that it sees. ffn_dim: 0 = as in the encoder's paper; hstu has no FFN.
    time_bias: adds a relative bias of position and time to the scores of each layer. None: as in the encoder's paper,
    which is True only for hstu. hstu without it keeps the bias of position.
    Two options save memory or time, and change results only by rounding: checkpoint_activations computes each layer
    again in the backward pass, compile_blocks compiles everything but attention.

    Raises ValueError for an unknown encoder, and for widths that do not fit the number of heads or the encoder.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        max_tokens: int,
        encoder: str = "gpt",
        ffn_dim: int = 0,
        dropout: float = 0.0,
        time_bias: bool | None = None,
        checkpoint_activations: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__()
        if encoder not in ENCODERS:
            raise ValueError(f"the user encoder is {encoder!r}; expected one of {', '.join(ENCODERS)}")
        if dim % num_heads:
            raise ValueError(f"the width {dim} cannot be divided into {num_heads} heads; choose a divisor of it")
        if encoder == "llama" and dim // num_heads % 2:
            raise ValueError(
                f"rotary positions turn pairs of channels, but a head has {dim // num_heads}: make it even"
            )
        if encoder == "hstu" and ffn_dim:
            raise ValueError(f"an HSTU block has no FFN, but ffn_dim is {ffn_dim}; leave it at 0")
        self.max_tokens, self.dropout = max_tokens, dropout
        self.num_heads, self.head_width = num_heads, dim // num_heads
        self.checkpoint_activations = checkpoint_activations
        is_hstu = encoder == "hstu"
        self.time_bias = is_hstu if time_bias is None else time_bias
        self.position = None if encoder == "llama" else nn.Embedding(max_tokens, dim)
        blocks = [BLOCKS[encoder](dim, num_heads, ffn_dim, dropout) for _ in range(num_layers)]
        self.has_bias = is_hstu or self.time_bias
        self.blocks = nn.ModuleList(blocks)
        self.biases = nn.ModuleList(
            RelativeBias(max_tokens, time=self.time_bias) if self.has_bias else nn.Identity() for _ in blocks
        )
        self.norm = nn.RMSNorm(dim) if encoder == "llama" else nn.LayerNorm(dim)
        if self.position is not None:
            nn.init.normal_(self.position.weight, std=0.02)
        for block in blocks:
            block.initialise(num_layers)
            if compile_blocks:
                block.project = torch.compile(block.project, dynamic=True)  # type: ignore[assignment, method-assign]
                block.finish = torch.compile(block.finish, dynamic=True)  # type: ignore[assignment, method-assign]

    def forward(
        self,
        x_TD: Tensor,
        y_QD: Tensor,
        layout: JaggedLayout,
        *,
        query_prefix_Q: Tensor,
        times: TokenTimes | None = None,
        queries_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Outputs of the histories' tokens [T, D] (empty with `queries_only`) and of the queries [Q, D].

        x_TD: tokens of all users, concatenated. y_QD: query tokens. query_prefix_Q: int64, how many tokens each sees.
        times: of all tokens and queries; needed only with a bias of time. Raises ValueError if they are missing then.
        """
        num_tokens = len(x_TD)
        x_XD = torch.cat([x_TD, y_QD])
        position_X = torch.cat([_positions(layout, num_tokens), query_prefix_Q])
        x = self._layers(x_XD, position_X, num_tokens, layout, times, queries_only=queries_only)
        return (x[:0], x) if queries_only else (x[:num_tokens], x[num_tokens:])

    def keys_and_values(self, x_TD: Tensor, layout: JaggedLayout, *, times: TokenTimes | None = None) -> KeyValueCache:
        """The keys and values of these histories, which `ask` and `extend` read.

        layout: without queries. The last layer computes only its keys and values, since nothing else is read.
        """
        cache: KeyValueCache = []
        self._layers(x_TD, _positions(layout, len(x_TD)), len(x_TD), layout, times, keep=cache)
        return cache

    def extend(
        self, cache: KeyValueCache, x_TD: Tensor, extension: Extension, *, times: TokenTimes | None = None
    ) -> KeyValueCache:
        """The cache of histories after they grew by the tokens x_TD; equals `keys_and_values` of all their tokens.

        extension: of the cache's lengths (see layout.py). times: of all tokens and, as queries, of the new ones.
        Raises ValueError if a history grows beyond max_tokens. It then has to lose its oldest tokens, and since every
        later token was computed with them, the cache has to be computed again from the tokens that remain.
        """
        longest = max((bucket.max_tokens for bucket in extension.layout.buckets), default=0)
        if longest > self.max_tokens:
            raise ValueError(
                f"a history grows to {longest} tokens, but this user encoder has {self.max_tokens} positions "
                "(max_tokens): compute keys_and_values of its last tokens again"
            )
        grown: KeyValueCache = []
        layout, position_N, order_T = extension
        self._layers(x_TD, position_N, 0, layout, times, cache=cache, keep=grown, order_T=order_T)
        return grown

    def ask(
        self,
        cache: KeyValueCache,
        y_QD: Tensor,
        layout: JaggedLayout,
        *,
        query_prefix_Q: Tensor,
        times: TokenTimes | None = None,
    ) -> Tensor:
        """Outputs of the queries [Q, D], from the histories' cache; equal to those of `forward` with `queries_only`.

        layout: of the cached histories with these queries. times: of the cached tokens and of the queries.
        """
        return self._layers(y_QD, query_prefix_Q, 0, layout, times, queries_only=True, cache=cache)

    def placed(self, x_XD: Tensor, position_X: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens with their learned positions and None; or, of llama, the tokens and what rotates them."""
        if self.position is not None:
            return x_XD + self.position(position_X), None
        exponent = torch.arange(0, self.head_width, 2, device=x_XD.device, dtype=torch.float32) / self.head_width
        angle = position_X[:, None].float() * ROTARY_BASE**-exponent
        return x_XD, torch.cat([angle.cos(), angle.sin()], dim=-1)[:, None]

    def _layers(
        self,
        x_XD: Tensor,
        position_X: Tensor,
        num_tokens: int,
        layout: JaggedLayout,
        times: TokenTimes | None,
        *,
        queries_only: bool = False,
        cache: KeyValueCache | None = None,
        keep: KeyValueCache | None = None,
        order_T: Tensor | None = None,
    ) -> Tensor:
        if self.time_bias and times is None:
            raise ValueError("this user encoder has a bias of time (time_bias): it needs the times of its tokens")
        x_XD, rotary = self.placed(x_XD, position_X)
        x = F.dropout(x_XD, self.dropout, self.training)
        indices = None
        if self.has_bias:
            indices = bias_indices(layout, times if self.time_bias else None, tokens_too=cache is None)
        for number, (block, bias) in enumerate(zip(self.blocks, self.biases, strict=True)):
            last = number == len(self.blocks) - 1
            only = queries_only and last
            attend = partial(
                _attend,
                num_tokens=num_tokens,
                layout=layout,
                bias=bias if isinstance(bias, RelativeBias) else None,
                indices=indices,
                silu=isinstance(block, HstuBlock),
                # In the last layer only the histories' keys and values are read if only queries are wanted.
                queries_only=only or cache is not None,
                cached=None if cache is None else cache[number],
                order_T=order_T,
                keep=keep,
                stop=last and keep is not None,
            )
            rows = slice(0, 0) if last and keep is not None else slice(num_tokens if only else 0, None)
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, attend, rows, rotary, use_reentrant=False)
            else:
                x = block(x, attend, rows, rotary)
        return self.norm(x)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_tokens: int,
    layout: JaggedLayout,
    bias: RelativeBias | None,
    indices: list[tuple[BiasIndex, BiasIndex]] | None,
    silu: bool,
    queries_only: bool,
    cached: tuple[Tensor, Tensor] | None,
    order_T: Tensor | None,
    keep: KeyValueCache | None,
    stop: bool,
) -> Tensor:
    """Causal attention of the tokens, then attention of the queries to the tokens' (or the cached) keys and values.

    order_T: the queries are new tokens of the cached sequences. stop: compute only keys and values.
    """
    history, asked = slice(0, num_tokens), slice(num_tokens, None)
    k_THK, v_THK = (k[history], v[history]) if cached is None else cached
    if order_T is not None:
        k_THK, v_THK = torch.cat([k_THK, k])[order_T], torch.cat([v_THK, v])[order_T]
    if keep is not None:
        keep.append((k_THK, v_THK))
    if stop:
        return q[:0]
    parts = []
    if not queries_only:
        parts.append(causal_attention(q[history], k_THK, v_THK, layout, silu=silu, bias=bias, indices=indices))
    if num_tokens < len(q) or queries_only:
        parts.append(
            query_attention(q[asked], k[asked], v[asked], k_THK, v_THK, layout, silu=silu, bias=bias, indices=indices)
        )
    return torch.cat(parts)


def _positions(layout: JaggedLayout, num_tokens: int) -> Tensor:
    starts_T = torch.repeat_interleave(layout.offsets_B1[:-1], layout.offsets_B1.diff(), output_size=num_tokens)
    return torch.arange(num_tokens, device=starts_T.device) - starts_T
