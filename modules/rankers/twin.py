"""TWIN: one target attention, first to search a long history, then to sum what was found (Chang et al., 2302.02352).

Shape suffixes: see rankers/base.py and rankers/search.py; J cross features; P places, T + 1 with padding's.

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
    """What search and sum read. query_BX: of each row. key_UX, bias_UH: [U + 1, …], of each token, the bias by its
    feedback. age_NH, count_NH: [NUM_BUCKETS + 1, H], bias by each bucket. index_P, age_P, count_P: int64, the token at
    each place and the buckets of its time gap and of its category's count; at padding's place U and NUM_BUCKETS.
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
    """TWIN: the relevance by which events are searched is the very attention by which they are summed.

    An event's inherent features (its item's) make its key, which is computed once for all its occurrences in a batch.
    What depends on the user as well (cross features: feedback given, time gap to the row, how many events of its
    category the user had had by then) is compressed into one number for each and becomes a bias of each head::

        logit_h = q_h · k_h / sqrt(K) + sum_j beta_hj c_j            (equation 4)

    num_searched: events found at most, those with the largest share of the attention over the whole history, summed
    over heads (the paper speaks of one head's logit there). num_heads, head_dim: of the attention. The values are
    projected from inherent and cross features.

    Where we differ from the paper: the cross features are those that a log has anywhere; keys are computed for each
    batch, not kept in a cache that is refreshed, so that no search reads old parameters.
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
        # A bucket's embedding times its weight is a number, so that is what is learned.
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
        # The search reads what the sum reads, without its gradient.
        read = self.project(looked, batch)
        place_BS = self.search(read, batch)
        weight_BHS = self.attention(read, place_BS).transpose(1, 2)
        value_UV = F.pad(self.value(looked.token_UD), (0, 0, 0, 1))
        # Each head's sum over all of V, of which its own part is taken: one product, and no weighted value of an event.
        sum_BHV = torch.bmm(weight_BHS, lookup(value_UV, read.index_P[place_BS]))
        sum_BHV = sum_BHV + sum_by_bucket(weight_BHS, read.age_P[place_BS]) @ self.age_value_NV
        sum_BHV = sum_BHV + sum_by_bucket(weight_BHS, read.count_P[place_BS]) @ self.count_value_NV
        own_BKH = sum_BHV.unflatten(2, (self._head_dim, self._num_heads)).diagonal(dim1=1, dim2=3)
        return Interest(self.output(own_BKH.flatten(1)))

    def project(self, looked: Looked, batch: RankBatch) -> Read:
        """Once for all occurrences in the batch what search and sum read."""
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
        """Weight of each head on the events at the places, [R, L, H]: of all rows, or of `rows`."""
        index_RL = read.index_P[place_RL]
        query_RX = read.query_BX if rows is None else read.query_BX[rows]
        logit_RLH = head_logits(query_RX, lookup(read.key_UX, index_RL), self._num_heads)
        logit_RLH = logit_RLH + lookup(read.bias_UH, index_RL)
        logit_RLH = logit_RLH + lookup(read.age_NH, read.age_P[place_RL])
        logit_RLH = logit_RLH + lookup(read.count_NH, read.count_P[place_RL])
        return masked_softmax(logit_RLH, place_RL < len(read.index_P) - 1)

    def search(self, read: Read, batch: RankBatch) -> Tensor:
        """Places in the batch's history with the largest share of the attention, [B, S], padded with T."""
        return top_search(
            lambda rows, place_RL: self.attention(read, place_RL, rows).sum(dim=2),
            batch.offsets_B1,
            num_events=len(batch.history_T),
            event_bytes=read.key_UX.element_size() * read.key_UX.shape[1],
            num=self._num_searched,
        )
