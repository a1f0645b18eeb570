"""A bias of relative position and time on attention scores; kernels/biased_attention.py computes attention with it.

It comes from HSTU (arXiv 2402.17152, section 3.2); every user encoder can have it.

Shape suffixes: T tokens, Q query tokens, b sequences of a bucket, P its padded slots, R rows (some of its tokens or
queries), M distances, N time buckets.

One sequence with 3 tokens, and a query that sees all of them: the distances from the query to each token::

    tokens   0 1 2 | q        distance   3 2 1  (0 to itself)

>>> from lumrec.modules.layout import make_layout
>>> layout = make_layout(torch.tensor([3]), query_sequence_Q=torch.tensor([0]), query_prefix_Q=torch.tensor([3]))
>>> of_tokens, of_queries = bias_indices(layout, None)[0]
>>> of_queries.distance
tensor([[[3, 2, 1]]])
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lumrec.modules.kernels.biased_attention import BiasIndex, Take
from lumrec.modules.layout import JaggedLayout

# The bucket of a time difference is ln(seconds) / 0.301, as in HSTU's published code; the last begins at 5 years.
TIME_BUCKETS = 64
TIME_BUCKET_WIDTH = 0.301


@dataclass
class TokenTimes:
    """The two times of each token and query, in seconds (int64), for a bias of time.

    asked: when the token's output is requested. seen: when the event that the token describes happened. The score of
    token i for token j has the time difference asked_i - seen_j. In the interleaved order c1 i1 c2 i2 … both times of
    both tokens are those of their event, because the time of a request is known when it is made.
    """

    asked_T: Tensor
    seen_T: Tensor
    asked_Q: Tensor
    seen_Q: Tensor


class RelativeBias(nn.Module):
    """A learned bias for each distance between two tokens and, with `time`, for each bucket of their time difference.

    Both are added to the scores of all heads (rab^{p,t} of HSTU, arXiv 2402.17152, section 3.2).
    """

    def __init__(self, max_tokens: int, *, time: bool) -> None:
        super().__init__()
        self.distance_M = nn.Parameter(0.02 * torch.randn(max_tokens))
        self.time_N = nn.Parameter(0.02 * torch.randn(TIME_BUCKETS)) if time else None


def time_bucket(seconds: Tensor) -> Tensor:
    """The bucket of each time difference, int32. seconds: int64; up to one second, or negative, is bucket 0.

    >>> time_bucket(torch.tensor([-5, 1, 60, 3600, 86400, 31_536_000]))
    tensor([ 0,  0, 13, 27, 37, 57], dtype=torch.int32)
    """
    bucket = seconds.clamp(min=1).float().log_().div_(TIME_BUCKET_WIDTH)
    return bucket.to(torch.int32).clamp_(max=TIME_BUCKETS - 1)


def bias_indices(
    layout: JaggedLayout, times: TokenTimes | None, *, tokens_too: bool = True
) -> list[tuple[BiasIndex, BiasIndex]]:
    """For each bucket of the layout, the entries of a RelativeBias that its tokens and its queries read.

    times: None without a bias of time. tokens_too: False if the tokens come from a cache and only queries attend.
    """
    indices = []
    for bucket in layout.buckets:
        tokens, queries = (bucket.num_sequences, bucket.max_tokens), (bucket.num_sequences, bucket.max_queries)
        place_P = torch.arange(bucket.max_tokens, device=layout.offsets_B1.device)
        prefix_bR = bucket.prefix_P.view(queries)
        of_tokens = BiasIndex(None, None)
        of_queries = BiasIndex((prefix_bR[..., None] - place_P).clamp_(min=0), None)
        if times is not None:
            seen_bP = times.seen_T[bucket.token_P].view(tokens)
            asked_bP = times.asked_T[bucket.token_P].view(tokens)
            asked_bR, seen_bR = (x[bucket.query_P].view(queries) for x in (times.asked_Q, times.seen_Q))
            if tokens_too:
                of_tokens.time = time_bucket(asked_bP[..., None] - seen_bP[:, None])
            of_queries.time = time_bucket(asked_bR[..., None] - seen_bP[:, None])
            of_queries.self_time = time_bucket(asked_bR - seen_bR)
        indices.append((of_tokens, of_queries))
    return indices


def query_bias(bias: RelativeBias | None, index: BiasIndex | None, part: slice) -> tuple[Tensor | None, Tensor | None]:
    """The bias of the queries' scores with their prefix [b, 1, R, P] and with themselves [b, 1, R, 1]; or None."""
    if bias is None:
        return None, None
    assert index is not None and index.distance is not None
    of_prefix = Take.apply(bias.distance_M, index.distance[part])
    of_self = bias.distance_M[0].expand(of_prefix.shape[:2])
    if bias.time_N is not None:
        assert index.time is not None and index.self_time is not None
        of_prefix = of_prefix + Take.apply(bias.time_N, index.time[part])
        of_self = of_self + Take.apply(bias.time_N, index.self_time[part])
    return of_prefix[:, None], of_self[:, None, :, None]
