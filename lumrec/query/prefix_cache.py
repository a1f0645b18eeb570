"""Keeps attention keys and values of histories, so that only a user's new events are read (LUM section 4.2).

    advance   c1 i1 c2 i2 c3 i3           | a b      read once; keys and values are kept
    advance   ...................  c4 i4  | a b      only c4, i4 and the queries are computed

Shape suffixes: B users, R those of them that are read again, N conditions, D width.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from lumrec.batches.packs import Queries
from lumrec.batches.windows import Windows, behind
from lumrec.modules.large_user_model import History, LargeUserModel
from lumrec.query.conditions import Conditions
from lumrec.query.group_query import GroupQuery
from lumrec.run.errors import UserError

logger = logging.getLogger(__name__)


class KeptHistories:
    """Asks a group query about the same users repeatedly while their histories grow.

    query: the LUM and the conditions. user_B: int64, the users; one pass reads all of them. 2 · layers · tokens · width
    numbers are kept for each (`num_bytes`).

    A user with more events than the LUM sees (model.max_events - 1 before a query) cannot be kept: each new event
    removes the oldest, which all later ones depend on. The last events of such a user are read again each time.
    """

    def __init__(self, query: GroupQuery, user_B: Tensor) -> None:
        self.query, self.lum, self.user_B = query, plain_lum(query), user_B
        offsets = torch.from_numpy(query.data.user_offsets)
        self.first_B, self.last_B = offsets[user_B], offsets[user_B + 1]
        self.end_B = self.first_B.clone()
        self.history: History | None = None
        self.kept_K = torch.arange(len(user_B))  # the users in `history`: those that have fitted so far

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return self.history.num_bytes if self.history else 0

    @torch.no_grad()
    def advance(self, end_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Answers after the events before `end_B`, o_BND (float32), and which users were read again (bool [B]).

        end_B: int64, the row after each user's last event so far; None = the end of the log. Equal to asking with whole
        histories, up to rounding. Raises UserError where an end is before the previous one or outside the user's
        events.
        """
        query = self.query
        end_B = self.last_B if end_B is None else end_B
        if bool(((end_B < self.end_B) | (end_B > self.last_B)).any()):
            raise UserError(
                "an end is before the one that the history was read to, or after the user's last event; histories only "
                "grow, so start again with a new KeptHistories"
            )
        fits_B = end_B - self.first_B < query.max_events
        stays_K = fits_B[self.kept_K].nonzero().squeeze(1)
        if self.history is not None and len(stays_K) < len(self.kept_K):
            self.history = self.history.select(stays_K)
        self.kept_K = self.kept_K[stays_K]
        training = query.model.training
        query.model.eval()
        try:
            o_BND = torch.empty(len(end_B), query.asked.count, self.lum.output.out_features)
            if len(self.kept_K):
                o_BND[self.kept_K] = self._read_on(end_B[self.kept_K])
            anew_R = (~fits_B).nonzero().squeeze(1)
            if len(anew_R):
                logger.info(
                    "%d of %d users have more than %d events: their last ones are read again",
                    len(anew_R), len(end_B), query.max_events - 1,
                )  # fmt: skip
                length_R = torch.full_like(anew_R, query.max_events - 1)
                windows = Windows(end_B[anew_R] - length_R, length_R, self.user_B[anew_R])
                o_BND[anew_R] = query.answer(behind(windows))
        finally:
            query.model.train(training)
        self.end_B = end_B.clone()
        return o_BND, ~fits_B

    def _read_on(self, end_K: Tensor) -> Tensor:
        """Answers of the kept users after extending their histories to `end_K`."""
        kept, first_K = self.kept_K, self.first_B[self.kept_K]
        whole = Windows(first_K, end_K - first_K, self.user_B[kept])
        read_K = self.end_B[kept] - first_K
        self.history, o_KND = read_on(self.query, self.lum, self.history, whole, read_K, self.query.asked)
        return o_KND


@torch.no_grad()
def read_on(
    query: GroupQuery, lum: LargeUserModel, history: History | None, whole: Windows, read_K: Tensor, asked: Conditions
) -> tuple[History, Tensor]:
    """The histories of these windows, and the answers after them, o_KND (float32, on the CPU).

    history: of the first read_K (int64) events of each window; None = of none. The LUM should be in eval mode.
    """
    window_R = torch.arange(whole.count)
    bags = asked.bags(whole, window_R, whole.length_W, history_W=window_R)
    new = Windows(whole.start_W + read_K, whole.length_W - read_K, whole.user_W)
    window_Q = window_R.repeat_interleave(asked.count)
    last_K = (whole.start_W + whole.length_W - 1).clamp(min=0)
    time_K = torch.from_numpy(query.data.timestamp)[last_K]
    pack = query.builder.pack(new, queries=Queries(window_Q, new.length_W[window_Q], bags, time_K[window_Q]))
    history, o_QD = lum.read(pack.to(query.device), history)
    return history, o_QD.float().cpu().view(whole.count, asked.count, -1)


def plain_lum(query: GroupQuery) -> LargeUserModel:
    """The LUM that a group query asks, without DMP around it."""
    model = query.model.module if isinstance(query.model, DistributedModelParallel) else query.model
    assert isinstance(model, LargeUserModel)
    return model
