"""TWIN: one target attention, first to search a long history, then to sum what was found (Chang et al., 2302.02352).

Shape suffixes: see rankers/base.py and rankers/search.py; J cross features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.modules.rankers.base import Interest, Looked, RankBatch, Ranker
from lumrec.modules.rankers.search import NUM_BUCKETS, head_logits, log_bucket, masked_softmax, take, top_search


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
        tables = self.project(looked)
        place_BS = self.search(looked, batch, tables)
        weight_BSH = self.attention(looked, batch, tables, place_BS)
        value_UV = F.pad(self.value(looked.token_UD), (0, 0, 0, 1))
        age_BS, count_BS = self.buckets(batch, place_BS)
        value_BSV = F.embedding(take(batch.history_T, place_BS, batch.num_tokens), value_UV)
        value_BSV = value_BSV + F.embedding(age_BS, F.pad(self.age_value_NV, (0, 0, 0, 1)))
        value_BSV = value_BSV + F.embedding(count_BS, F.pad(self.count_value_NV, (0, 0, 0, 1)))
        value_BSKH = value_BSV.unflatten(2, (self._head_dim, self._num_heads))
        return Interest(self.output((weight_BSH[:, :, None] * value_BSKH).sum(dim=1).flatten(1)))

    def project(self, looked: Looked) -> tuple[Tensor, Tensor, Tensor]:
        """Query of each row, [B, X]; key of each token, [U + 1, X], and its feedback's bias, [U + 1, H]."""
        key_UX = F.pad(self.key(looked.token_UD[:, : self.item_dim]), (0, 0, 0, 1))
        bias_UH = looked.token_UD.new_zeros(len(looked.token_UD), self._num_heads)
        if self.feedback_dims:
            feedback = looked.token_UD[:, self.item_dim :].split(self.feedback_dims, dim=1)
            cross_UJ = torch.cat([compress(x) for compress, x in zip(self.compress, feedback, strict=True)], dim=1)
            bias_UH = cross_UJ @ self.beta_JH[2:]
        return self.query(looked.target_BI), key_UX, F.pad(bias_UH, (0, 0, 0, 1))

    def buckets(self, batch: RankBatch, place: Tensor) -> tuple[Tensor, Tensor]:
        """Buckets of the time gap and of the category's count at the places; NUM_BUCKETS for padding."""
        assert batch.age_T is not None and batch.category_count_T is not None
        return log_bucket(take(batch.age_T, place, -1)), log_bucket(take(batch.category_count_T, place, -1))

    def attention(
        self,
        looked: Looked,
        batch: RankBatch,
        tables: tuple[Tensor, Tensor, Tensor],
        place_RL: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Weight of each head on the events at the places, [R, L, H]: of all rows, or of `rows`."""
        query_BX, key_UX, bias_UH = tables
        index_RL = take(batch.history_T, place_RL, batch.num_tokens)
        age_RL, count_RL = self.buckets(batch, place_RL)
        query_RX = query_BX if rows is None else query_BX[rows]
        logit_RLH = head_logits(query_RX, F.embedding(index_RL, key_UX), self._num_heads)
        logit_RLH = logit_RLH + F.embedding(index_RL, bias_UH)
        logit_RLH = logit_RLH + F.embedding(age_RL, F.pad(self.age_N[:, None] * self.beta_JH[0], (0, 0, 0, 1)))
        logit_RLH = logit_RLH + F.embedding(count_RL, F.pad(self.count_N[:, None] * self.beta_JH[1], (0, 0, 0, 1)))
        return masked_softmax(logit_RLH, place_RL < len(batch.history_T))

    def search(self, looked: Looked, batch: RankBatch, tables: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Places in the batch's history with the largest share of the attention, [B, S], padded with T."""
        return top_search(
            lambda rows, place_RL: self.attention(looked, batch, tables, place_RL, rows).sum(dim=2),
            batch.offsets_B1,
            num_events=len(batch.history_T),
            event_bytes=looked.token_UD.element_size() * tables[1].shape[1],
            num=self._num_searched,
        )
