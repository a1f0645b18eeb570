"""Search-based Interest Model: attention over the events that a search finds in a long history (Pi et al., 2006.05639).

Shape suffixes: see rankers/base.py and rankers/search.py; G width of a time gap; P = T + 1 places, with padding's;
Z = U + 1 tokens, with padding's.

Two rows, with histories of two and no events::

    history_T   0 1 | (none)        target_B   2 3

>>> from lumrec.modules.rankers.base import RankBatch, RankRow
>>> from lumrec.modules.tokens import make_tables
>>> tables = make_tables({"item": (9, 4), "user": (5, 4)}, {"item": "item", "user": "user"})
>>> roles = {"item_features": ["item"], "feedback_features": [], "row_features": ["user"]}
>>> ranker = Sim(tables, **roles, num_statistics=0, hidden_dims=[8])
>>> row = RankRow({"item": 4}, [{"item": 3}, {"item": 7}], {"user": 1}, ages=[60, 5])
>>> ranker(RankBatch.from_lists([row, row._replace(history=[], ages=[])], ranker)).shape
torch.Size([2])
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.modules.kernels.jagged import indexed_dot, latest, lookup
from lumrec.modules.rankers.base import Histories, Interest, Looked, RankBatch, Ranker
from lumrec.modules.rankers.din import LocalActivation
from lumrec.modules.rankers.search import (
    NUM_BUCKETS,
    hard_search,
    log_bucket,
    masked_softmax,
    padded,
    shared_hard_search,
    shared_top_search,
    top_search,
)

SEARCHES = ("hard", "soft")
GAP_DIM = 8


class Sim(Ranker):
    """SIM: a general search unit finds the events that are relevant to the target, and an exact unit attends to them.

    search: "hard" finds the latest events of the target's category, "soft" those with the highest inner product of
    projected embeddings. num_searched: the most events that a search finds. num_heads, head_dim: of the exact unit,
    whose keys and values are the events with their time gaps to the row (eq. 5). num_recent: how many of the latest
    events form the short-term interest. auxiliary_weight: of the auxiliary task (eq. 2), which trains the soft search.

    Differences from the paper: the short-term interest is DIN's, not DIEN's; the search is exact within the batch, not
    by an index; the auxiliary task reads a random window of num_searched events (the paper also samples). The
    projections of target and event are initialised equal for item features, so that the first searches find events
    that share features with the target: a random search finds little to learn from in a long history.

    Raises ValueError for an unknown search, and for numbers of events or a weight out of range.
    """

    def __init__(
        self,
        *args: Any,
        search: str = "soft",
        num_searched: int = 50,
        num_heads: int = 4,
        head_dim: int = 16,
        num_recent: int = 16,
        auxiliary_weight: float = 1.0,
        activation: str = "prelu",
        **kwargs: Any,
    ) -> None:
        if search not in SEARCHES:
            raise ValueError(f"the search is {search!r}; expected one of {', '.join(SEARCHES)}")
        if num_searched < 1 or num_recent < 0:
            raise ValueError(f"{num_searched} events searched and {num_recent} recent; expected at least 1 and 0")
        if search == "soft" and auxiliary_weight <= 0:
            raise ValueError(
                f"auxiliary_weight is {auxiliary_weight}; expected more than 0: otherwise a soft search learns nothing"
            )
        self._search, self._num_searched, self._num_recent = search, num_searched, num_recent
        self._num_heads, self._head_dim, self._auxiliary_weight = num_heads, head_dim, auxiliary_weight
        self._unit_activation = activation
        super().__init__(*args, activation=activation, **kwargs)
        self.reads = ("age_T", "category_U") if search == "hard" else ("age_T",)

    def make_interest(self) -> int:
        width = self._num_heads * self._head_dim
        self.recent = LocalActivation(self.token_dim, self.item_dim, activation=self._unit_activation)
        self.query = nn.Linear(self.item_dim, width, bias=False)
        self.key = nn.Linear(self.token_dim + GAP_DIM, width, bias=False)
        _begin_alike(self.query, self.key)
        self.gap_NG = nn.Parameter(torch.randn(NUM_BUCKETS, GAP_DIM) * GAP_DIM**-0.5)
        if self._search == "soft":
            self.search_query = nn.Linear(self.item_dim, self._head_dim, bias=False)
            self.search_key = nn.Linear(self.token_dim, self._head_dim, bias=False)
            _begin_alike(self.search_query, self.search_key)
            self.search_task = nn.Sequential(
                nn.Linear(self.token_dim + self.item_dim, width), nn.ReLU(), nn.Linear(width, 1)
            )
        return self.token_dim + self.item_dim + self._num_heads * (self.token_dim + GAP_DIM)

    def interest(self, looked: Looked, batch: RankBatch) -> Interest:
        """The short-term interest, its product with the target, the long-term interest: [B, D + I + H (D + G)]."""
        token_UD, target_BI = looked.token_UD, looked.target_BI
        recent_BD = self.recent(token_UD, target_BI, *latest(batch.history_T, batch.offsets_B1, self._num_recent))
        place_BS, index_P = self.search(looked, batch), padded(batch.history_T, batch.num_tokens)
        assert batch.age_T is not None
        token_ZD = F.pad(token_UD, (0, 0, 0, 1))
        long_BX = self.exact(token_ZD, target_BI, index_P[place_BS], padded(batch.age_T, -1)[place_BS])
        loss = None
        if self.training and self._search == "soft":
            loss = self._auxiliary_weight * self.search_loss(looked, batch)
        return Interest(self._with_target(recent_BD, target_BI, long_BX), loss)

    def shared_interest(self, looked: Looked, histories: Histories, dense_BF: Tensor) -> Tensor:
        """See Ranker; the keys of the search are computed once for a history."""
        num_events_G1 = histories.is_event_GL.sum(dim=1, keepdim=True)
        num = max(self._num_searched, self._num_recent)
        histories = histories.led_by_padding(num)
        recent_GL = histories.history_GL.gather(
            1, num_events_G1 + num - self._num_recent + torch.arange(self._num_recent, device=num_events_G1.device)
        )
        recent_BD = self.recent.shared(histories, recent_GL)
        place_BS = histories.flat_places(self.shared_search(histories))
        assert histories.age_GL is not None
        index_BS, age_BS = histories.history_GL.flatten()[place_BS], histories.age_GL.flatten()[place_BS]
        long_BX = self.exact(histories.token_ZD, looked.target_BI, index_BS, age_BS)
        return self._with_target(recent_BD, looked.target_BI, long_BX)

    def shared_search(self, histories: Histories) -> Tensor:
        """Places of the events that are relevant to each row's target, int64 [G, R, S]."""
        is_event_GL, token_ZD = histories.is_event_GL, histories.token_ZD
        if self._search == "hard":
            assert histories.category_Z is not None
            category_GL, category_GR = (
                histories.category_Z[histories.history_GL],
                histories.category_Z[histories.target_GR],
            )
            is_same_GRL = (category_GR[:, :, None] == category_GL[:, None]) & is_event_GL[:, None]
            return shared_hard_search(is_same_GRL, self._num_searched)
        key_GLK = F.embedding(histories.history_GL, self.search_key(token_ZD))
        query_GRK = histories.of_targets(self.search_query, self.item_dim)
        return shared_top_search(torch.bmm(query_GRK, key_GLK.transpose(1, 2)), is_event_GL, self._num_searched)

    def _with_target(self, recent_BD: Tensor, target_BI: Tensor, long_BX: Tensor) -> Tensor:
        return torch.cat([recent_BD, recent_BD[:, : self.item_dim] * target_BI, long_BX], dim=1)

    def search(self, looked: Looked, batch: RankBatch) -> Tensor:
        """Places of the events that are relevant to each row's target, int64 [B, S], padded with T."""
        if self._search == "hard":
            assert batch.category_U is not None
            return hard_search(batch.category_U, batch.target_B, batch.history_T, batch.offsets_B1, self._num_searched)
        with torch.no_grad():
            key_UK = F.pad(self.search_key(looked.token_UD), (0, 0, 0, 1))
            query_BK = self.search_query(looked.target_BI)
        index_P = padded(batch.history_T, batch.num_tokens)

        def score(rows: Tensor, place_RL: Tensor) -> Tensor:
            key_RLK = lookup(key_UK, index_P[place_RL])
            return torch.bmm(key_RLK, query_BK[rows, :, None]).squeeze(2)

        return top_search(
            score,
            batch.offsets_B1,
            num_events=len(batch.history_T),
            event_bytes=key_UK.shape[1] * key_UK.element_size(),
            num=self._num_searched,
        )

    def exact(self, token_ZD: Tensor, target_BI: Tensor, index_BS: Tensor, age_BS: Tensor) -> Tensor:
        """Each head's weighted sum of the events found, [B, H (D + G)] (eq. 5 and 6).

        token_ZD: the tokens, then zeros. index_BS: int64, the token of each event, the last one for padding. age_BS:
        seconds to the row, -1 for padding.
        """
        event_BSD = lookup(token_ZD, index_BS)
        gap_BSG = lookup(F.pad(self.gap_NG, (0, 0, 0, 1)), log_bucket(age_BS))
        # q · (W z) = (q W) · z: one matrix per row instead of one key per event.
        query_BKH = self.query(target_BI).unflatten(1, (-1, self._num_heads))
        key_KHX = self.key.weight.view(*query_BKH.shape[1:], -1) * self._head_dim**-0.5
        event_BDH, gap_BGH = torch.einsum("bkh,khx->bxh", query_BKH, key_KHX).split([self.token_dim, GAP_DIM], dim=1)
        logit_BSH = torch.bmm(event_BSD, event_BDH) + torch.bmm(gap_BSG, gap_BGH)
        weight_BHS = masked_softmax(logit_BSH, index_BS < token_ZD.shape[0] - 1).transpose(1, 2)
        return torch.cat([torch.bmm(weight_BHS, event_BSD), torch.bmm(weight_BHS, gap_BSG)], dim=2).flatten(1)

    def search_loss(self, looked: Looked, batch: RankBatch) -> Tensor:
        """The auxiliary task: mean cross-entropy of labels predicted from events weighted by search scores (eq. 2)."""
        length_B = batch.offsets_B1.diff()
        room_B = (length_B - self._num_searched).clamp(min=0)
        first_B1 = (torch.rand(len(batch), 1, device=room_B.device) * (room_B[:, None] + 1)).long()
        place_BS = first_B1 + torch.arange(self._num_searched, device=room_B.device)
        is_event_BS = place_BS < length_B[:, None]
        index_N = batch.history_T[(place_BS + batch.offsets_B1[:-1, None])[is_event_BS]]
        row_N = is_event_BS.nonzero()[:, 0]
        key_NK = lookup(self.search_key(looked.token_UD), index_N)
        score_N = indexed_dot(key_NK, self.search_query(looked.target_BI), row_N)
        sum_BD = F.embedding_bag(
            index_N,
            looked.token_UD,
            F.pad(is_event_BS.sum(dim=1).cumsum(0), (1, 0)),
            mode="sum",
            per_sample_weights=score_N,
            include_last_offset=True,
        )
        logit_B = self.search_task(torch.cat([sum_BD, looked.target_BI], dim=1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logit_B, batch.label_B)


@torch.no_grad()
def _begin_alike(query: nn.Linear, key: nn.Linear) -> None:
    """Gives both the same orthogonal projection of item features, and the key zeros for all others."""
    nn.init.orthogonal_(query.weight)
    key.weight.zero_()
    key.weight[:, : query.in_features] = query.weight
