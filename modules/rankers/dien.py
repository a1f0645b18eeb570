"""Deep Interest Evolution Network: the evolution of the interest in the target (Zhou et al., 1809.03672).

Shape suffixes: see rankers/base.py and kernels/recurrence.py.

Two rows, with histories of two and no events::

    history_T   0 1 | (none)        target_B   2 3

>>> from lumrec.modules.rankers.base import RankBatch, RankRow
>>> from lumrec.modules.tokens import make_tables
>>> tables = make_tables({"item": (9, 4), "user": (5, 4)}, {"item": "item", "user": "user"})
>>> roles = {"item_features": ["item"], "feedback_features": [], "row_features": ["user"]}
>>> ranker = Dien(tables, **roles, num_statistics=0, hidden_dims=[8])
>>> row = RankRow({"item": 4}, [{"item": 3}, {"item": 7}], {"user": 1})
>>> ranker(RankBatch.from_lists([row, row._replace(history=[])], ranker)).shape
torch.Size([2])
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.modules.kernels.jagged import indexed_dot, row_of_event, segment_softmax
from lumrec.modules.kernels.recurrence import recurrence, scanned_recurrence
from lumrec.modules.rankers.base import Histories, Interest, Looked, RankBatch, Ranker


class Dien(Ranker):
    """DIEN: a GRU extracts interests from the history, attention weighs them by the target, an AUGRU follows them.

    auxiliary_weight: of the auxiliary loss (section 4.2), which trains the state after an event to distinguish the next
    item from a sampled one; 0: none. States have the width of an item, as in the paper, for the dot product with items.

    Differences from the paper: histories hold items shown, with their feedback, not only clicks, so the next item is
    the next one shown; negatives are other items from the batch's histories; the loss is a mean over pairs, as in the
    authors' code, not a sum over a history; the interest also has the product of the last state with the target.
    """

    reads = ("item_U",)

    def __init__(self, *args: Any, auxiliary_weight: float = 1.0, **kwargs: Any) -> None:
        self._auxiliary_weight = auxiliary_weight
        super().__init__(*args, **kwargs)

    def make_interest(self) -> int:
        width = self.item_dim
        self.extractor_input, self.evolution_input = nn.Linear(self.token_dim, 3 * width), nn.Linear(width, 3 * width)
        bound = width**-0.5
        self.extractor_weight_GH = nn.Parameter(torch.empty(3 * width, width).uniform_(-bound, bound))
        self.evolution_weight_GH = nn.Parameter(torch.empty(3 * width, width).uniform_(-bound, bound))
        self.attention = nn.Linear(width, width, bias=False)
        return 2 * width

    def interest(self, looked: Looked, batch: RankBatch) -> Interest:
        """The AUGRU's state after the last event (0 without events) and its product with the target: [B, 2I]."""
        history_T, offsets_B1 = batch.history_T, batch.offsets_B1
        state_TH = recurrence(self.extractor_input(looked.token_UD), history_T, self.extractor_weight_GH, offsets_B1)
        row_T = row_of_event(offsets_B1, len(history_T))
        logit_T = indexed_dot(state_TH, self.attention(looked.target_BI), row_T)
        evolved_TH = recurrence(
            self.evolution_input(state_TH),
            torch.arange(len(history_T), device=history_T.device),
            self.evolution_weight_GH,
            offsets_B1,
            segment_softmax(logit_T, row_T, len(batch)),
        )
        last_B = torch.where(offsets_B1.diff() > 0, offsets_B1[1:] - 1, len(history_T))
        last_BH = F.embedding(last_B, F.pad(evolved_TH, (0, 0, 0, 1)))
        loss = None
        if self.training and self._auxiliary_weight:
            loss = self._auxiliary_weight * self.auxiliary_loss(state_TH, looked.token_UD, batch)
        return Interest(self._with_target(last_BH, looked.target_BI), loss)

    def shared_interest(self, looked: Looked, histories: Histories, dense_BF: Tensor) -> Tensor:
        """See Ranker; interests are extracted once for a history."""
        token_ZD, is_event_GL = histories.token_ZD, histories.is_event_GL
        # One group and one row more than there are, so that there are two: see scanned_recurrence.
        gate_GLX = F.pad(F.embedding(histories.history_GL, self.extractor_input(token_ZD)), (0, 0, 0, 0, 0, 1))
        group_G, one_GL = torch.arange(gate_GLX.shape[0], device=gate_GLX.device), gate_GLX.new_ones(gate_GLX.shape[:2])
        state_GLH = scanned_recurrence(gate_GLX, self.extractor_weight_GH, group_G, one_GL)
        query_GRH = histories.of_targets(self.attention, self.item_dim)
        logit_GRL = torch.bmm(query_GRH, state_GLH[:-1].transpose(1, 2))
        # Padding comes last and has no weight: it leaves the state as it is.
        is_event_G1L = is_event_GL[:, None]
        attention_GRL = logit_GRL.masked_fill(~is_event_G1L, -1e30).softmax(dim=2) * is_event_G1L
        group_B, attention_BL = F.pad(histories.group_B, (0, 1)), F.pad(histories.of_rows(attention_GRL), (0, 0, 0, 1))
        evolved_BLH = scanned_recurrence(
            self.evolution_input(state_GLH), self.evolution_weight_GH, group_B, attention_BL
        )
        return self._with_target(evolved_BLH[:-1, -1], looked.target_BI)

    def _with_target(self, last_BH: Tensor, target_BI: Tensor) -> Tensor:
        return torch.cat([last_BH, last_BH * target_BI], dim=1)

    def auxiliary_loss(self, state_TH: Tensor, token_UD: Tensor, batch: RankBatch) -> Tensor:
        """Mean over pairs of -log σ(h_t · e_{t+1}) - log(1 - σ(h_t · e_negative)) (eq. 2); 0 without pairs."""
        assert batch.item_U is not None
        history_T = batch.history_T
        has_next_T = torch.ones_like(history_T, dtype=torch.bool)
        has_next_T[batch.offsets_B1[1:][batch.offsets_B1.diff() > 0] - 1] = False
        next_T = history_T.roll(-1)
        negative_T = history_T[torch.randint(max(1, len(history_T)), history_T.shape, device=history_T.device)]
        item_UI = token_UD[:, : self.item_dim]
        is_other_T = batch.item_U[negative_T] != batch.item_U[next_T]
        positive_loss_T = F.softplus(-indexed_dot(state_TH, item_UI, next_T))
        negative_loss_T = F.softplus(indexed_dot(state_TH, item_UI, negative_T)) * is_other_T
        return ((positive_loss_T + negative_loss_T) * has_next_T).sum() / has_next_T.sum().clamp(min=1)
