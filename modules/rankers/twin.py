"""TWIN: one target attention both searches a long history and sums the events found (Chang et al., 2302.02352).

Shape suffixes: see rankers/base.py and rankers/search.py; J cross features, N buckets, V = X width of values;
P = T + 1 places, with padding's; Z = U + 1 tokens, with padding's.

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
from lumrec.modules.rankers.base import Histories, Interest, Looked, RankBatch, Ranker
from lumrec.modules.rankers.search import (
    NUM_BUCKETS,
    head_logits,
    log_bucket,
    masked_softmax,
    padded,
    shared_top_search,
    sum_by_bucket,
    top_search,
)


class Read(NamedTuple):
    """The inputs of search and sum.

    query_BX: of each row. key_ZX, value_ZV, bias_ZH: of each token (the bias of its feedback), then zeros for padding.
    age_NH, count_NH: the bias of each bucket, then zeros for padding. index_P: int64, the token at each place, U for
    padding. age_P, count_P: int64, the buckets of its time gap and of its category's count, NUM_BUCKETS for padding.
    """

    query_BX: Tensor
    key_ZX: Tensor
    value_ZV: Tensor
    bias_ZH: Tensor
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
        assert batch.age_T is not None and batch.category_count_T is not None
        history_P = padded(batch.history_T, batch.num_tokens)
        age_P, count_P = padded(batch.age_T, -1), padded(batch.category_count_T, -1)
        read = self.project(F.pad(looked.token_UD, (0, 0, 0, 1)), looked.target_BI, history_P, age_P, count_P)
        return Interest(self.attend(read, self.search(read, batch)))

    def shared_interest(self, looked: Looked, histories: Histories, dense_BF: Tensor) -> Tensor:
        """See Ranker; keys and biases of the search are computed once for a history."""
        histories = histories.led_by_padding(self._num_searched)
        assert histories.age_GL is not None and histories.count_GL is not None
        token_ZD, history_GL = histories.token_ZD, histories.history_GL
        age_P, count_P = histories.age_GL.flatten(), histories.count_GL.flatten()
        read = self.project(token_ZD, looked.target_BI, history_GL.flatten(), age_P, count_P)
        query_GRX = histories.of_targets(self.query, self.item_dim)
        query_GHRK = query_GRX.unflatten(2, (-1, self._num_heads)).permute(0, 3, 1, 2) * self._head_dim**-0.5
        key_GHKL = lookup(read.key_ZX, history_GL).unflatten(2, (-1, self._num_heads)).permute(0, 3, 2, 1)
        bias_GLH = _bias(read, read.index_P, read.age_P, read.count_P).view(*history_GL.shape, self._num_heads)
        logit_GHRL = query_GHRK @ key_GHKL + bias_GLH.permute(0, 2, 1)[:, :, None]
        is_event_GL = histories.is_event_GL
        score_GRL = logit_GHRL.masked_fill(~is_event_GL[:, None, None], -1e30).softmax(dim=3).sum(dim=1)
        place_GRS = shared_top_search(score_GRL, is_event_GL, self._num_searched)
        return self.attend(read, histories.flat_places(place_GRS))

    def attend(self, read: Read, place_BS: Tensor) -> Tensor:
        """The attention's output over the events at the places, [B, H K]."""
        weight_BHS = self.attention(read, place_BS).transpose(1, 2)
        # One product sums all of V for each head, and the diagonal takes the head's part: no weighted copy of values.
        sum_BHV = torch.bmm(weight_BHS, lookup(read.value_ZV, read.index_P[place_BS]))
        sum_BHV = sum_BHV + sum_by_bucket(weight_BHS, read.age_P[place_BS]) @ self.age_value_NV
        sum_BHV = sum_BHV + sum_by_bucket(weight_BHS, read.count_P[place_BS]) @ self.count_value_NV
        own_BKH = sum_BHV.unflatten(2, (self._head_dim, self._num_heads)).diagonal(dim1=1, dim2=3)
        return self.output(own_BKH.flatten(1))

    def project(self, token_ZD: Tensor, target_BI: Tensor, history_P: Tensor, age_P: Tensor, count_P: Tensor) -> Read:
        """The inputs of search and sum, computed once for all occurrences of a token in the batch.

        history_P: int64, the token at each place. age_P, count_P: of RankBatch. Padding has the last token, and -1.
        """
        bias_ZH = token_ZD.new_zeros(token_ZD.shape[0], self._num_heads)
        if self.feedback_dims:
            feedback = token_ZD[:, self.item_dim :].split(self.feedback_dims, dim=1)
            cross_ZJ = torch.cat([compress(x) for compress, x in zip(self.compress, feedback, strict=True)], dim=1)
            bias_ZH = cross_ZJ @ self.beta_JH[2:]
        return Read(
            self.query(target_BI),
            self.key(token_ZD[:, : self.item_dim]),
            self.value(token_ZD),
            bias_ZH,
            F.pad(self.age_N[:, None] * self.beta_JH[0], (0, 0, 0, 1)),
            F.pad(self.count_N[:, None] * self.beta_JH[1], (0, 0, 0, 1)),
            history_P,
            log_bucket(age_P),
            log_bucket(count_P),
        )

    def attention(self, read: Read, place_RL: Tensor, rows: Tensor | None = None) -> Tensor:
        """The weight of each head for the events at the places, [R, L, H]. rows: int64; None: all rows."""
        index_RL = read.index_P[place_RL]
        query_RX = read.query_BX if rows is None else read.query_BX[rows]
        logit_RLH = head_logits(query_RX, lookup(read.key_ZX, index_RL), self._num_heads)
        logit_RLH = logit_RLH + _bias(read, index_RL, read.age_P[place_RL], read.count_P[place_RL])
        return masked_softmax(logit_RLH, index_RL < read.key_ZX.shape[0] - 1)

    def search(self, read: Read, batch: RankBatch) -> Tensor:
        """Places of the events with the largest attention, int64 [B, S], padded with T."""
        return top_search(
            lambda rows, place_RL: self.attention(read, place_RL, rows).sum(dim=2),
            batch.offsets_B1,
            num_events=len(batch.history_T),
            event_bytes=read.key_ZX.element_size() * read.key_ZX.shape[1],
            num=self._num_searched,
        )


def _bias(read: Read, index: Tensor, age: Tensor, count: Tensor) -> Tensor:
    """The bias of each head for events with these tokens and buckets, [*index, H]."""
    return lookup(read.bias_ZH, index) + lookup(read.age_NH, age) + lookup(read.count_NH, count)
