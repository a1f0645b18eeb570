"""Causal attention over flat jagged tokens, and the group query's attention (LUM sections 4.1.2 and 4.2).

There are two kinds of weights: softmax of scaled dot products, and HSTU's pointwise SiLU (arXiv 2402.17152, eq. 2).
Both can have a relative bias (of position, or of position and time) on the scores.

Shape suffixes: T tokens of all sequences, concatenated; Q query tokens, P padded slots of a bucket, H heads, K head
width.

Two sequences with 3 and 2 tokens, one head of width 4::

    q_THK, k_THK, v_THK    0 1 2 | 3 4        token 2 reads 0, 1 and 2; token 3 reads only itself

>>> from lumrec.modules.layout import make_layout
>>> x_THK, layout = torch.randn(5, 1, 4), make_layout(torch.tensor([3, 2]))
>>> out_THK = causal_attention(x_THK, x_THK, x_THK, layout)
>>> torch.allclose(out_THK, causal_attention_plain(x_THK, x_THK, x_THK, layout), atol=1e-6)
True
>>> torch.allclose(out_THK[3], x_THK[3])
True
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lumrec.modules.kernels.biased_attention import BiasedAttention, BiasIndex
from lumrec.modules.layout import JaggedLayout
from lumrec.modules.relative_bias import RelativeBias, TokenTimes, query_bias, time_bucket

# Scores (elements) that `query_attention` holds at once: bounds its memory for any number of queries.
SCORE_BUDGET = 1 << 26


def causal_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    layout: JaggedLayout,
    *,
    silu: bool = False,
    bias: RelativeBias | None = None,
    indices: list[tuple[BiasIndex, BiasIndex]] | None = None,
) -> Tensor:
    """Attention of each token to itself and to the earlier tokens of its sequence, [T, H, K], in the dtype of v.

    q, k, v: [T, H, K]. silu: SiLU weights, divided by the longest sequence that the bias covers, instead of softmax;
    needs a bias. indices: `bias_indices` of the layout, needed with a bias.

    The padding of a bucket follows each sequence, where the causal mask hides it, so no other mask is needed. On CUDA
    in half precision, softmax without a bias runs as one `varlen_attn` over all tokens (see `causal_backend`).
    """
    if causal_backend(q_THK.device.type, q_THK.dtype, has_bias=bias is not None) == "varlen":
        return _varlen_attention(q_THK, k_THK, v_THK, layout)
    outputs = []
    for i, bucket in enumerate(layout.buckets):
        if bucket.max_tokens == 0:
            continue
        shape = (bucket.num_sequences, bucket.max_tokens)
        q, k, v = (_pad(x, bucket.token_P, shape) for x in (q_THK, k_THK, v_THK))
        if bias is None:
            assert not silu, "pointwise attention comes with a bias"
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            assert indices is not None
            out = BiasedAttention.apply(q, k, v, bias.distance_M, bias.time_N, indices[i][0], silu)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if not outputs:
        return q_THK
    return _gather(torch.cat(outputs), layout.token_place_T)


def causal_backend(device_type: str, dtype: torch.dtype, *, has_bias: bool) -> str:
    """The implementation of causal attention for this device and dtype: "biased", "varlen" or "buckets".

    biased: with a relative bias (HSTU always has one), BiasedAttention computes the scores in portions. varlen: for
    half precision on CUDA, PyTorch's `varlen_attn`, one flash kernel over all flat tokens. buckets: otherwise,
    PyTorch's `scaled_dot_product_attention` over buckets of sequences of similar length.

    >>> causal_backend("cpu", torch.bfloat16, has_bias=False), causal_backend("cuda", torch.bfloat16, has_bias=False)
    ('buckets', 'varlen')
    """
    if has_bias:
        return "biased"
    return "varlen" if device_type == "cuda" and dtype in (torch.float16, torch.bfloat16) else "buckets"


def _varlen_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: JaggedLayout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # not in every build of torch that the CPU path runs with

    offsets = layout.offsets_B1.to(torch.int32)
    longest = max((bucket.max_tokens for bucket in layout.buckets), default=0)
    if longest == 0:
        return q_THK
    out = varlen_attn(q_THK, k_THK, v_THK, offsets, offsets, longest, longest, window_size=(-1, 0))
    assert isinstance(out, Tensor)  # it is a tuple only if more than the output is requested
    return out


def query_attention(
    q_QHK: Tensor,
    k_QHK: Tensor,
    v_QHK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    layout: JaggedLayout,
    *,
    silu: bool = False,
    bias: RelativeBias | None = None,
    indices: list[tuple[BiasIndex, BiasIndex]] | None = None,
) -> Tensor:
    """Attention of each query to the prefix that it sees and to itself, but to no other query, [Q, H, K].

    This is the mask of LUM figure 4, here for a history c1 i1 c2, two queries at its end and one after its first
    event. The prefix is computed once::

              c1 i1 c2 | a  b  c
        a      1  1  1 | 1  .  .
        b      1  1  1 | .  1  .
        c      1  1  . | .  .  1

    q, k, v of queries: [Q, H, K]. k_THK, v_THK: of the histories' tokens; they may come from a cache. silu, bias,
    indices: as in `causal_attention`.
    """
    outputs = []
    for i, bucket in enumerate(layout.buckets):
        if bucket.max_queries == 0:
            continue
        tokens, queries = (bucket.num_sequences, bucket.max_tokens), (bucket.num_sequences, bucket.max_queries)
        q, k_self, v_self = (_pad(x, bucket.query_P, queries) for x in (q_QHK, k_QHK, v_QHK))
        k, v = (_pad(x, bucket.token_P, tokens) for x in (k_THK, v_THK))
        prefix = bucket.prefix_P.view(queries)
        index = indices[i][1] if indices is not None else None
        rows = max(1, SCORE_BUDGET // (q.shape[1] * bucket.max_queries * max(1, bucket.max_tokens)))
        parts = []
        for start in range(0, bucket.num_sequences, rows):
            part = slice(start, start + rows)
            of_prefix, of_self = query_bias(bias, index, part)
            parts.append(
                _prefix_and_self(
                    q[part],
                    k_self[part],
                    v_self[part],
                    k[part],
                    v[part],
                    prefix[part],
                    of_prefix,
                    of_self,
                    silu_over=len(bias.distance_M) if silu and bias is not None else 0,
                )
            )
        outputs.append(torch.cat(parts).transpose(1, 2).flatten(0, 1))
    if not outputs:
        return q_QHK
    return _gather(torch.cat(outputs), layout.query_place_Q)


def _prefix_and_self(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Tensor,
    bias: Tensor | None,
    bias_self: Tensor | None,
    *,
    silu_over: int,
) -> Tensor:
    scale = 1.0 if silu_over else q.shape[-1] ** -0.5
    score, score_self = q @ k.transpose(2, 3) * scale, (q * k_self).sum(-1, keepdim=True) * scale
    if bias is not None and bias_self is not None:
        score, score_self = score + bias, score_self + bias_self
    hidden = torch.arange(k.shape[2], device=k.device) >= prefix[:, None, :, None]
    if silu_over:
        weight = F.silu(score).masked_fill(hidden, 0.0) / silu_over
        weight_self = F.silu(score_self) / silu_over
    else:
        both = torch.cat([score.masked_fill(hidden, float("-inf")), score_self], dim=-1).softmax(dim=-1)
        weight, weight_self = both[..., :-1], both[..., -1:]
    return weight.to(v.dtype) @ v + weight_self.to(v.dtype) * v_self


def _pad(x_THK: Tensor, index_P: Tensor, shape: tuple[int, int]) -> Tensor:
    """Flat tokens as a padded batch [sequences, H, slots, K]."""
    padded = _gather(x_THK, index_P)
    return padded.view(*shape, *x_THK.shape[1:]).transpose(1, 2)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index]; on a CPU the backward pass of F.embedding is several times faster than that of indexing."""
    return F.embedding(index, x.flatten(1)).view(len(index), *x.shape[1:])


def causal_attention_plain(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    layout: JaggedLayout,
    *,
    silu: bool = False,
    bias: RelativeBias | None = None,
    times: TokenTimes | None = None,
) -> Tensor:
    """The same as `causal_attention`, one sequence at a time in plain PyTorch: the reference in tests."""
    outputs = [q_THK[:0]]
    for start, end in zip(layout.offsets_B1[:-1].tolist(), layout.offsets_B1[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (q_THK, k_THK, v_THK))
        score = q @ k.transpose(1, 2) * (1.0 if silu else q.shape[-1] ** -0.5)
        if bias is not None:
            place = torch.arange(end - start, device=q.device)
            score = score + bias.distance_M[(place[:, None] - place).clamp(min=0)]
            if bias.time_N is not None:
                assert times is not None
                score = (
                    score + bias.time_N[time_bucket(times.asked_T[start:end, None] - times.seen_T[start:end]).long()]
                )
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        if silu:
            assert bias is not None
            weight = F.silu(score).masked_fill(future, 0.0) / len(bias.distance_M)
        else:
            weight = score.masked_fill(future, float("-inf")).softmax(-1)
        outputs.append((weight @ v).transpose(0, 1))
    return torch.cat(outputs)
