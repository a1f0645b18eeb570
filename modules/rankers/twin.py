"""TWIN: one target attention both searches a long history and sums the events found (Chang et al., 2302.02352).

Shape suffixes: see rankers/base.py and rankers/search.py; J cross features, N buckets, V = X width of values;
P = T + 1 places, with padding's.

Two rows, with histories of two and no events::

    history_T   0 1 | (none)        target_B   2 3

>>> from lumrec.modules.rankers.base import RankBatch, RankRow
>>> from lumrec.modules.tokens import make_tables
>>> tables = make_tables({"item": (9, 4), "user": (5, 4)}, {"item": "item", "user": "user"})
>>> roles = {"item_features": ["item"], "feedback_features": [], "row_features": ["user"]}
>>> ranker = Twin(tables, **roles, num_statistics=0, hidden_dims=[8])
>>> row = RankRow({"item": 4}, [{"item": 3}, {"item": 7}], {"user": 1}, ages=[60, 5])
>>> ranker(RankBatch.from_lists([row, row._replace(history=[], ages=[])], ranker, category="item")).shape
torch.Size([2])
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.modules.kernels.jagged import lookup
from lumrec.modules.rankers.base import Interest, Looked, RankBatch, Ranker
from lumrec.modules.rankers.search import (
    NUM_BUCKETS,
    head_logits,
    log_bucket,
    masked_softmax,
    padded,
    sum_by_bucket,
    top_search,
)


class Read(NamedTuple):
    """The inputs of search and sum.

    query_BX: of each row. key_UX, bias_UH: of each token (the bias of its feedback), then zeros for padding.
    age_NH, count_NH: the bias of each bucket, then zeros for padding. index_P: int64, the token at each place, U for
    padding. age_P, count_P: int64, the buckets of its time gap and of its category's count, NUM_BUCKETS for padding.
    """

    query_BX: Tensor
    key_UX: Tensor
    bias_UH: Tensor
    age_NH: Tensor
    count_NH: Tensor
    index_P: Tensor
    age_P: Tensor
    count_P: Tensor


class Twin(Ranker):
    """TWIN: events are searched by the same attention by which they are summed.

    An event's key comes from its inherent features (those of its item), and is computed once for all occurrences in a
    batch. Features that also depend on the user (cross features: feedback, time gap to the row, how many events of the
    same category the user had before) are each compressed into one number, which becomes a bias of each head::

        logit_h = q_h · k_h / sqrt(K) + sum_j beta_hj c_j            (eq. 4)

    num_searched: how many events are found at most: those with the largest attention over the whole history, summed
    over heads (the paper uses the logit of one head). num_heads, head_dim: of the attention. Values are projected from
    inherent and cross features.

    Differences from the paper: the cross features are those that every log has; keys are computed for each batch
    instead of cached, so that a search never reads old parameters.

    Raises ValueError if num_searched is less than 1.
    """

    reads = ("age_T", "category_count_T")

    def __init__(
        self, *args: Any, num_searched: int = 50, num_heads: int = 4, head_dim: int = 16, **kwargs: Any
    ) -> None:
        if num_searched < 1:
            raise ValueError(f"{num_searched} events searched; expected at least 1")
        self._num_searched, self._num_heads, self._head_dim = num_searched, num_heads, head_dim
        super().__init__(*args, **kwargs)

    def make_interest(self) -> int:
        heads, width = self._num_heads, self._num_heads * self._head_dim
        self.query = nn.Linear(self.item_dim, width, bias=False)
        self.key = nn.Linear(self.item_dim, width, bias=False)
        self.value = nn.Linear(self.token_dim, width, bias=False)
        self.compress = nn.ModuleList(nn.Linear(dim, 1, bias=False) for dim in self.feedback_dims)
        # A bucket's embedding times its weight is one number, so this number is the parameter.
        self.age_N = nn.Parameter(torch.randn(NUM_BUCKETS) * 0.1)
        self.count_N = nn.Parameter(torch.randn(NUM_BUCKETS) * 0.1)
        num_cross = len(self.feedback_dims) + 2
        self.beta_JH = nn.Parameter(torch.empty(num_cross, heads).uniform_(-(num_cross**-0.5), num_cross**-0.5))
        self.age_value_NV = nn.Parameter(torch.randn(NUM_BUCKETS, width) * 0.1)
        self.count_value_NV = nn.Parameter(torch.randn(NUM_BUCKETS, width) * 0.1)
        self.output = nn.Linear(width, width)
        return width

    def interest(self, looked: Looked, batch: RankBatch) -> Interest:
        """The attention's output, [B, H K]."""
        # Search and sum read the same inputs; the search has no gradient.
        read = self.project(looked, batch)
        place_BS = self.search(read, batch)
        weight_BHS = self.attention(read, place_BS).transpose(1, 2)
        value_UV = F.pad(self.value(looked.token_UD), (0, 0, 0, 1))
        # One product sums all of V for each head, and the diagonal takes the head's part: no weighted copy of values.
        sum_BHV = torch.bmm(weight_BHS, lookup(value_UV, read.index_P[place_BS]))
        sum_BHV = sum_BHV + sum_by_bucket(weight_BHS, read.age_P[place_BS]) @ self.age_value_NV
        sum_BHV = sum_BHV + sum_by_bucket(weight_BHS, read.count_P[place_BS]) @ self.count_value_NV
        own_BKH = sum_BHV.unflatten(2, (self._head_dim, self._num_heads)).diagonal(dim1=1, dim2=3)
        return Interest(self.output(own_BKH.flatten(1)))

    def project(self, looked: Looked, batch: RankBatch) -> Read:
        """The inputs of search and sum, computed once for all occurrences of a token in the batch."""
        assert batch.age_T is not None and batch.category_count_T is not None
        key_UX = F.pad(self.key(looked.token_UD[:, : self.item_dim]), (0, 0, 0, 1))
        bias_UH = looked.token_UD.new_zeros(len(looked.token_UD), self._num_heads)
        if self.feedback_dims:
            feedback = looked.token_UD[:, self.item_dim :].split(self.feedback_dims, dim=1)
            cross_UJ = torch.cat([compress(x) for compress, x in zip(self.compress, feedback, strict=True)], dim=1)
            bias_UH = cross_UJ @ self.beta_JH[2:]
        return Read(
            self.query(looked.target_BI),
            key_UX,
            F.pad(bias_UH, (0, 0, 0, 1)),
            F.pad(self.age_N[:, None] * self.beta_JH[0], (0, 0, 0, 1)),
            F.pad(self.count_N[:, None] * self.beta_JH[1], (0, 0, 0, 1)),
            padded(batch.history_T, batch.num_tokens),
            log_bucket(padded(batch.age_T, -1)),
            log_bucket(padded(batch.category_count_T, -1)),
        )

    def attention(self, read: Read, place_RL: Tensor, rows: Tensor | None = None) -> Tensor:
        """The weight of each head for the events at the places, [R, L, H]. rows: int64; None: all rows."""
        index_RL = read.index_P[place_RL]
        query_RX = read.query_BX if rows is None else read.query_BX[rows]
        logit_RLH = head_logits(query_RX, lookup(read.key_UX, index_RL), self._num_heads)
        logit_RLH = logit_RLH + lookup(read.bias_UH, index_RL)
        logit_RLH = logit_RLH + lookup(read.age_NH, read.age_P[place_RL])
        logit_RLH = logit_RLH + lookup(read.count_NH, read.count_P[place_RL])
        return masked_softmax(logit_RLH, place_RL < len(read.index_P) - 1)

    def search(self, read: Read, batch: RankBatch) -> Tensor:
        """Places of the events with the largest attention, int64 [B, S], padded with T."""
        return top_search(
            lambda rows, place_RL: self.attention(read, place_RL, rows).sum(dim=2),
            batch.offsets_B1,
            num_events=len(batch.history_T),
            event_bytes=read.key_UX.element_size() * read.key_UX.shape[1],
            num=self._num_searched,
        )
