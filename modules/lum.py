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

from lumrec.modules.attention import JaggedLayout
from lumrec.modules.tokens import TokenEncoder
from lumrec.modules.user_encoder import UserEncoder

SIMILARITIES = ("cosine", "dot")


@dataclass
class Pack:
    """Histories of B users behind each other (T events), with Q queries and C candidate items: one step's input.

    tokens: one KJT of all features with T + Q + C bags (see TokenEncoder).
    layout: where the 2T interleaved tokens c1 i1 c2 i2 … of each user lie, and which of them each query sees.
    query_prefix_Q: int64, tokens that each query sees: twice the number of events before it.
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
    """

    def __init__(
        self,
        token_encoder: TokenEncoder,
        user_encoder: UserEncoder,
        *,
        dim: int,
        similarity: str = "cosine",
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity is {similarity!r}; expected one of {SIMILARITIES}")
        if not temperature > 0:
            raise ValueError(f"the temperature is {temperature}; expected a positive number")
        self.token_encoder = token_encoder
        self.user_encoder = user_encoder
        self.output = nn.Linear(dim, dim)
        self.similarity = similarity
        self.temperature = temperature

    def forward(self, pack: Pack, *, queries_only: bool = False) -> LumOutput:
        """Outputs at condition tokens, answers to the pack's queries, and candidate item embeddings.

        A group query is a pack with queries: the history is computed once, each query attends to the part of it that it
        may see and to itself (LUM figure 4). `queries_only` spares what only training reads.
        """
        num_events = pack.num_events
        item_XD, condition_XD = self.token_encoder(pack.tokens, num_events=num_events, num_queries=pack.num_queries)
        # c1 i1 c2 i2 …: each event is its condition token and, behind it, its item token.
        x_TD = torch.stack([condition_XD[:num_events], item_XD[:num_events]], dim=1).flatten(0, 1)
        x_TD, y_QD = self.user_encoder(
            x_TD,
            condition_XD[num_events:],
            pack.layout,
            query_prefix_Q=pack.query_prefix_Q,
            queries_only=queries_only,
        )
        return LumOutput(
            self._scaled(self.output(x_TD[0::2])), self._scaled(self.output(y_QD)), self._scaled(item_XD[num_events:])
        )

    def _scaled(self, x: Tensor) -> Tensor:
        if self.similarity == "dot":
            return x
        return F.normalize(x, dim=-1) * self.temperature**-0.5
