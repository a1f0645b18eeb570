"""Deep Interest Evolution Network: how the interest in the target came about (Zhou et al., 1809.03672).

Shape suffixes: see rankers/base.py and rankers/recurrence.py; P pairs of an event and the next one of its row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.modules.rankers.base import Interest, Looked, RankBatch, Ranker
from lumrec.modules.rankers.jagged import row_of_event, segment_softmax
from lumrec.modules.rankers.recurrence import recurrence


class Dien(Ranker):
    """DIEN: a GRU extracts interests from the history, attention weighs them by the target, an AUGRU follows them.

    auxiliary_weight: of the auxiliary loss (section 4.2), by which the state behind an event tells the next item from a
    sampled one; 0: none. States have the width of an item, as in the paper, so that their product is defined.

    Where we differ from the paper: histories hold what was shown with the feedback that it got, not clicks alone, so
    the next item is the next one shown; negatives are items of the batch's histories (as frequent as they are shown)
    other than the next one; the loss is a mean over pairs, not a sum over a history (as in the authors' code); beside
    the last state stands its product with the target.
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
        """The AUGRU's state behind the last event (0 without any) and its product with the target: [B, 2I]."""
        history_T, offsets_B1 = batch.history_T, batch.offsets_B1
        state_TH = recurrence(self.extractor_input(looked.token_UD), history_T, self.extractor_weight_GH, offsets_B1)
        row_T = row_of_event(offsets_B1, len(history_T))
        logit_T = (state_TH * F.embedding(row_T, self.attention(looked.target_BI))).sum(dim=1)
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
        return Interest(torch.cat([last_BH, last_BH * looked.target_BI], dim=1), loss)

    def auxiliary_loss(self, state_TH: Tensor, token_UD: Tensor, batch: RankBatch) -> Tensor:
        """Mean over pairs of -log σ(h_t · e_{t+1}) - log(1 - σ(h_t · e_negative)) (equation 2); 0 without pairs."""
        assert batch.item_U is not None
        history_T = batch.history_T
        has_next_T = torch.ones_like(history_T, dtype=torch.bool)
        has_next_T[batch.offsets_B1[1:][batch.offsets_B1.diff() > 0] - 1] = False
        place_P = has_next_T.nonzero().squeeze(1)
        next_P = history_T[place_P + 1]
        drawn_P = torch.randint(max(1, len(history_T)), place_P.shape, device=history_T.device)
        negative_P = history_T[drawn_P]
        item_UI, state_PH = token_UD[:, : self.item_dim], state_TH[place_P]
        positive_loss_P = F.softplus(-(state_PH * F.embedding(next_P, item_UI)).sum(dim=1))
        negative_loss_P = F.softplus((state_PH * F.embedding(negative_P, item_UI)).sum(dim=1))
        is_other_P = batch.item_U[negative_P] != batch.item_U[next_P]
        return (positive_loss_P + negative_loss_P * is_other_P).sum() / max(1, len(place_P))
