"""The negatives of InfoNCE (LUM eq. 2) and their weights.

Shape suffixes: T events, C candidates, I catalogue items.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lumrec.run import limits
from lumrec.run.errors import UserError
from lumrec.run.limits import count, setting


@dataclass(frozen=True)
class NegativesConfig:
    """The negatives of InfoNCE (LUM eq. 2) and their weights.

    full: the whole catalogue (for small catalogues; the other settings then have no effect).
    in_batch: the items of the same pack, by how often they occur (the paper's). With logq it was the best of ten losses
        at equal time on ML-1M and Amazon Beauty (docs/lab-log/retrieval.md), hence the default.
    sampled: number of further draws, shared by all positions of a pack.
    sampling: how these are drawn: uniform; popularity (^popularity_power) in the training part; or mixed, that is
        popularity for popularity_share of the draws and uniform for the rest.
    popularity_power: exponent of the popularity.
    popularity_share: share of the draws of "mixed" that go by popularity.
    unique: each item counts once, however often it occurs in the pack or was drawn.
    logq: divide by an item's expected number of occurrences, so that the sum over negatives estimates the sum over the
        catalogue. The positive, which always occurs, is not divided: the gradient of arXiv 2507.09331.
    logq_positive: divide the positive too, as in the older form of logQ (Yi et al., RecSys 2019).
    across_ranks: use the candidates of all ranks at the positions of each rank; `sampled` are drawn on each rank.
    """

    full: bool = False
    in_batch: bool = True
    sampled: int = count(0, most=2**24)
    sampling: Literal["uniform", "popularity", "mixed"] = "uniform"
    popularity_power: float = setting(0.75, least=0, most=8)
    popularity_share: float = setting(0.5, least=0, most=1)
    unique: bool = False
    logq: bool = True
    logq_positive: bool = False
    across_ranks: bool = False

    def check(self, at: str) -> None:
        """Raises UserError for settings that leave no negatives, or contradict one another (`at`: the section)."""
        if not (self.full or self.in_batch or self.sampled > 0):
            raise UserError(f"InfoNCE has no negatives: set {at}full, {at}in_batch or {at}sampled")
        if self.sampling != "uniform" and not (self.full or self.sampled):
            raise UserError(f"{at}sampling={self.sampling} draws nothing: set {at}sampled, such as 1024")
        if self.full and self.across_ranks:
            raise UserError(
                f"{at}full and {at}across_ranks are both set: each rank has the whole catalogue already; set "
                f"{at}full=false for negatives of other ranks, or {at}across_ranks=false"
            )
        if self.logq_positive and not self.logq:
            raise UserError(f"{at}logq_positive is a form of {at}logq, which is off: set {at}logq=true")


class Candidates(NamedTuple):
    """item_C: int64, distinct catalogue items, ascending. positive_T: int64, index of each event's item among them.

    log_weight_C: float32, log of how much each candidate counts as a negative. log_positive_weight_T: float32, log of
    how much each event's item counts where it is the right one; empty where that is 1 throughout.
    """

    item_C: Tensor
    positive_T: Tensor
    log_weight_C: Tensor
    log_positive_weight_T: Tensor


class NegativeSampler:
    """Draws a pack's candidates: its items, once each, and the negatives, with their weights.

    item_counts_I: how often each item occurs in training.  num_ranks: ranks whose candidates are put together.
    """

    def __init__(self, config: NegativesConfig, item_counts_I: np.ndarray, *, num_ranks: int = 1) -> None:
        limits.check(config, "negatives")
        self.config = config
        self.num_draws = config.sampled * num_ranks  # for one step
        counts_I = torch.from_numpy(item_counts_I).double()
        self.popularity_I = counts_I / counts_I.sum()
        # Items without a training event are never negatives: they would only ever be pushed away.
        uniform_I, powered_I = (counts_I > 0).double(), self.popularity_I**config.popularity_power
        powered_I = powered_I * uniform_I  # 0^0 is 1
        share = {"uniform": 0.0, "popularity": 1.0, "mixed": config.popularity_share}[config.sampling]
        self.proposal_I = (1 - share) * uniform_I / uniform_I.sum() + share * powered_I / powered_I.sum()
        cumulative_I = self.proposal_I.cumsum(0)
        self.cumulative_I = cumulative_I / cumulative_I[-1]  # ends at 1, above every draw

    def draw(self, item_T: Tensor, generator: torch.Generator, *, num_events: int | None = None) -> Candidates:
        """The candidates for events with the items `item_T` (int64).

        num_events: events of all ranks whose candidates are combined in this step; by default those of `item_T`. An
        item's weights then add up over the ranks (with `unique`, they are equal).
        """
        num_items, num_own, config, none = len(self.proposal_I), len(item_T), self.config, torch.zeros(0)
        if config.full:
            return Candidates(torch.arange(num_items), item_T, torch.zeros(num_items), none)
        random = torch.rand(config.sampled, generator=generator, dtype=torch.float64)
        sampled = torch.searchsorted(self.cumulative_I, random, right=True)
        item_C, place = torch.unique(torch.cat([item_T, sampled]), return_inverse=True)
        positive_T = place[:num_own]
        # A target that is no negative is a candidate with weight 0: it only counts at its own position.
        count_C = torch.bincount(place if config.in_batch else place[num_own:], minlength=len(item_C)).double()
        if config.unique:
            count_C = (count_C > 0).double()
        if not config.logq:
            return Candidates(item_C, positive_T, count_C.log().float(), none)
        expected_C = self._expected(item_C, num_own if num_events is None else num_events)
        assert bool((expected_C > 0).all()), "an event's item is not among those that were counted"
        log_weight_C = (count_C / expected_C).log().float()
        log_positive_weight_T = -expected_C.log().float()[positive_T] if config.logq_positive else none
        return Candidates(item_C, positive_T, log_weight_C, log_positive_weight_T)

    def _expected(self, item_C: Tensor, num_events: int) -> Tensor:
        """Expected occurrences of each item in a step with `num_events` events; with `unique`, its probability."""
        num_in_batch = num_events if self.config.in_batch else 0
        proposal_C, popularity_C = self.proposal_I[item_C], self.popularity_I[item_C]
        if self.config.unique:
            log_absent_C = torch.special.xlog1py(self.num_draws, -proposal_C)
            return -torch.expm1(log_absent_C + torch.special.xlog1py(num_in_batch, -popularity_C))
        return self.num_draws * proposal_C + num_in_batch * popularity_C
