"""The Large User Model: token encoder, causal user encoder, similarity (LUM section 4.1, figure 3a).

Shape suffixes: T events, B users, Q query conditions, C candidate items, D model width.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lumrec.modules.layout import JaggedLayout
from lumrec.modules.relative_bias import TokenTimes
from lumrec.modules.tokens import TokenEncoder
from lumrec.modules.user_encoder import UserEncoder

SIMILARITIES = ("cosine", "dot")
# Tokens that an event becomes, by the way of tokenisation.
TOKENS_PER_EVENT = {"interleaved": 2, "merged": 1}


@dataclass
class Pack:
    """Histories of B users behind each other (T events), with Q queries and C candidate items: one step's input.

    tokens: one KJT of all features with T + Q + C bags (see TokenEncoder).
    layout: where the tokens of each user lie, and which of them each query sees; one or two tokens an event.
    query_prefix_Q: int64, tokens that each query sees: one or two times the number of events before it.
    previous_T, previous_Q: int64, event before each event and query within its own history; -1 where there is none.
    time_T, time_Q: int64, seconds, when each event happened and when each query is asked.
    candidate_item_C: int64, catalogue item that each candidate is.
    positive_T: int64, candidate that each event's item is; -1 where it is not to be predicted. Empty in a pure query.
    log_weight_C: float32, log of the weight with which each candidate counts as a negative (see info_nce).
    log_positive_weight_T: float32, the same for each event's item where it is the right one; empty where it is 0.
    contrast_event_Q: int64, event whose item each query is told apart by (counterfactual contrast); empty otherwise.
    event_row_T: int64, row of each event in the prepared data.
    """

    tokens: KeyedJaggedTensor
    layout: JaggedLayout
    num_events: int
    num_queries: int
    num_candidates: int
    query_prefix_Q: Tensor
    previous_T: Tensor
    previous_Q: Tensor
    time_T: Tensor
    time_Q: Tensor
    candidate_item_C: Tensor
    positive_T: Tensor
    log_weight_C: Tensor
    log_positive_weight_T: Tensor
    contrast_event_Q: Tensor
    event_row_T: Tensor

    def to(self, device: torch.device | str) -> "Pack":
        """The same pack on `device`."""
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if not isinstance(value := getattr(self, field.name), int)
        }
        return dataclasses.replace(self, **moved)


class LumOutput(NamedTuple):
    """o_TD: outputs at the condition tokens (empty where `queries_only`). o_QD: answers. e_CD: candidate items.

    Similarity is the dot product of an o and an e, whatever its kind: the model has normalised and scaled them.
    """

    o_TD: Tensor
    o_QD: Tensor
    e_CD: Tensor


class LargeUserModel(nn.Module):
    """Token encoder and user encoder; tells how well an item fits a user under a condition.

    similarity: "cosine" (sim = cos / temperature) or "dot". Both sides come out scaled, so that a store of answers and
    items needs a dot product and nothing else.

    tokens: how an event becomes tokens; a query is one more condition at the end::

        interleaved   c1 i1 c2 i2 c3 i3 | c      the paper's: outputs are read at the condition tokens
        merged        c1 i1 i2 | i3              OUR OPTION: the condition is added to the item before it (to a learned
                         c2 c3 | c               start for the first), half the tokens. Without any condition feature
                                                 this is plain next-item prediction, as in SASRec and HSTU.
    """

    def __init__(
        self,
        token_encoder: TokenEncoder,
        user_encoder: UserEncoder,
        *,
        dim: int,
        similarity: str = "cosine",
        temperature: float = 0.05,
        tokens: str = "interleaved",
    ) -> None:
        super().__init__()
        if tokens not in TOKENS_PER_EVENT:
            raise ValueError(f"tokens is {tokens!r}; expected one of {sorted(TOKENS_PER_EVENT)}")
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity is {similarity!r}; expected one of {SIMILARITIES}")
        if not temperature > 0:
            raise ValueError(f"the temperature is {temperature}; expected a positive number")
        self.token_encoder = token_encoder
        self.user_encoder = user_encoder
        self.output = nn.Linear(dim, dim)
        self.similarity = similarity
        self.temperature = temperature
        self.tokens = tokens
        self.start_D = nn.Parameter(0.02 * torch.randn(dim)) if tokens == "merged" else None

    def forward(self, pack: Pack, *, queries_only: bool = False) -> LumOutput:
        """Outputs at condition tokens, answers to the pack's queries, and candidate item embeddings.

        A group query is a pack with queries: the history is computed once, each query attends to the part of it that it
        may see and to itself (LUM figure 4). `queries_only` spares what only training reads.
        """
        num_events = pack.num_events
        item_XD, condition_XD = self.token_encoder(pack.tokens, num_events=num_events, num_queries=pack.num_queries)
        x_TD, y_QD = self._tokenise(pack, item_XD[:num_events], condition_XD)
        x_TD, y_QD = self.user_encoder(
            x_TD,
            y_QD,
            pack.layout,
            query_prefix_Q=pack.query_prefix_Q,
            times=self._times(pack),
            queries_only=queries_only,
        )
        o_TD = x_TD[:: TOKENS_PER_EVENT[self.tokens]]
        return LumOutput(
            self._scaled(self.output(o_TD)), self._scaled(self.output(y_QD)), self._scaled(item_XD[num_events:])
        )

    def _tokenise(self, pack: Pack, item_TD: Tensor, condition_XD: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the histories, and one of each query."""
        condition_TD, condition_QD = condition_XD[: pack.num_events], condition_XD[pack.num_events :]
        if self.start_D is None:
            return torch.stack([condition_TD, item_TD], dim=1).flatten(0, 1), condition_QD
        # Row -1 of an event without one before it is the start.
        known = torch.cat([item_TD, self.start_D.to(item_TD.dtype)[None]])
        before_TD, before_QD = (
            F.embedding(torch.where(previous < 0, len(item_TD), previous), known)
            for previous in (pack.previous_T, pack.previous_Q)
        )
        return before_TD + condition_TD, before_QD + condition_QD

    def _times(self, pack: Pack) -> TokenTimes | None:
        if not self.user_encoder.time_bias:
            return None
        if self.start_D is None:
            time_T = pack.time_T.repeat_interleave(2)
            return TokenTimes(time_T, time_T, pack.time_Q, pack.time_Q)
        # A merged token is asked at its own moment, and tells of an item seen at the moment before.
        seen_T, seen_Q = (
            torch.where(previous < 0, time, F.pad(pack.time_T, (0, 1))[previous])
            for previous, time in ((pack.previous_T, pack.time_T), (pack.previous_Q, pack.time_Q))
        )
        return TokenTimes(pack.time_T, seen_T, pack.time_Q, seen_Q)

    def _scaled(self, x: Tensor) -> Tensor:
        if self.similarity == "dot":
            return x
        return F.normalize(x, dim=-1) * self.temperature**-0.5
