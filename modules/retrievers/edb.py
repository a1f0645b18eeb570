"""Embedding-based retrieval with two towers (EDB: Huang et al., 2006.11632), with or without a LUM's knowledge.

Shape suffixes: B users (rows), C candidate items, T history events of all rows, concatenated; U unique tokens, D width
of a token (its item and feedback features), I width of its item features, N conditions, W width of the LUM, K folds
(LUMs), F features for a tower, V width of the vectors, X any.

Two users with histories of 2 and 1 events, and three items of the catalogue as candidates::

    bag          0 … 2 items      3 4 rows
    history_T    0 2 | 1          offsets_B1   0 2 3          candidate_C   0 1 2

>>> from lumrec.modules.tokens import kjt_from_lists, make_tables
>>> tables = make_tables({"item": (4, 4), "age": (5, 2)}, {"item": "item", "age": "age"})
>>> roles = {"item_features": ["item"], "feedback_features": [], "row_features": ["age"]}
>>> towers = TwoTower(tables, **roles, dim=6, hidden_dims=[8], max_history=5)
>>> tokens = kjt_from_lists(towers.features, [{"item": 1}, {"item": 2}, {"item": 3}, {"age": 4}, {"age": 1}])
>>> items, none = torch.arange(3), torch.zeros(0)
>>> history = torch.tensor([0, 2, 1]), torch.tensor([0, 2, 3])
>>> o_BV, e_CV = towers(TowerBatch(tokens, 3, *history, items, items, none.long(), torch.zeros(3), none))
>>> (o_BV @ e_CV.T).shape
torch.Size([2, 3])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lumrec.modules.kernels.jagged import row_of_event, segment_softmax
from lumrec.modules.knowledge import MaskedStandardise, fold_weights, project_by_fold
from lumrec.modules.large_user_model import check_similarity, scaled
from lumrec.modules.layout import moved
from lumrec.modules.rankers.base import make_mlp
from lumrec.modules.tokens import check_keys, feature_order, feature_widths, table_of_features

POOLINGS = ("mean", "attention")


@dataclass
class TowerBatch:
    """B users, C candidate items, and the right candidate of each user; users or candidates may be missing.

    Tokens are looked up as for a ranker (RankBatch): history and candidates are indices of tokens, and the bags of the
    rows' features follow::

        bag       0 … U-1                     U … U+B-1
        is        unique token                row
        features  item (+ feedback)           user, context, conditions of the request

    candidate_C, history_T, offsets_B1: int64. candidate_item_C: int64, the catalogue index of each candidate.
    positive_B: int64, the index of each row's item in candidate_C. log_weight_C, log_positive_weight_B: see info_nce.
    o_BNW, present_BN, fold_B: a LUM's answers, as in KnowledgeBatch. e_CKW: the candidates as embedded by each of the K
    LUMs. All four are None without knowledge.
    """

    tokens: KeyedJaggedTensor
    num_tokens: int
    history_T: Tensor
    offsets_B1: Tensor
    candidate_C: Tensor
    candidate_item_C: Tensor
    positive_B: Tensor
    log_weight_C: Tensor
    log_positive_weight_B: Tensor
    o_BNW: Tensor | None = None
    present_BN: Tensor | None = None
    fold_B: Tensor | None = None
    e_CKW: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets_B1) - 1

    def to(self, device: torch.device | str) -> "TowerBatch":
        """The same batch on `device`."""
        return moved(self, device)


class TwoTower(nn.Module):
    """Vectors e_us = MLP(user, context, request; pooled history; o), e_i = MLP(item; e) (LUM sections 3 and 4.3)::

        user, context, request ──┐
        history ── pooling ──────┼── MLP ── o_BV ─┐
        LUM: o_BNW ── by fold ───┘                ├── o · e
        item features ───────────┬── MLP ── e_CV ─┘
        LUM: e_CKW ── all folds ─┘

    An item's vector depends only on the item, so the catalogue can be indexed. Both vectors are scaled: their dot
    product is the similarity, "cosine" (divided by `temperature`) or "dot".

    pooling: "mean", or "attention": softmax over the history of a(token) + b(distance from the row), both learned.
    max_history: the longest history, for b. hidden_dims: of both towers.
    knowledge: None, or (num_conditions, width of the LUM, num_folds). knowledge_dim: the width to which answers are
    projected. knowledge_dropout: the share of rows whose answers are withheld in training, as in KnowledgeFusion.

    Raises ValueError for an unknown similarity or pooling, and a temperature that is not positive.
    """

    def __init__(
        self,
        tables: EmbeddingBagCollection,
        *,
        item_features: Sequence[str],
        feedback_features: Sequence[str],
        row_features: Sequence[str],
        dim: int,
        hidden_dims: Sequence[int],
        max_history: int,
        pooling: str = "attention",
        similarity: str = "cosine",
        temperature: float = 0.05,
        activation: str = "relu",
        dropout: float = 0.0,
        knowledge: tuple[int, int, int] | None = None,
        knowledge_dim: int = 32,
        knowledge_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_similarity(similarity, temperature)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; expected one of {POOLINGS}")
        self.tables = tables
        self.features = feature_order(tables)
        self.token_features, self.row_features = [*item_features, *feedback_features], list(row_features)
        self.similarity, self.temperature, self.pooling = similarity, temperature, pooling
        self.item_features, self.table_of = list(item_features), table_of_features(tables)
        self.width_of = width = feature_widths(tables)
        self.item_dim = sum(width[f] for f in item_features)
        token_dim = sum(width[f] for f in self.token_features)
        if pooling == "attention":
            self.attention = nn.Linear(token_dim, 1, bias=False)
            self.distance_bias_L = nn.Parameter(torch.zeros(max(1, max_history)))
        user_dim, item_dim = sum(width[f] for f in row_features) + token_dim, self.item_dim
        self.has_knowledge = knowledge is not None
        if knowledge is not None:
            num_conditions, lum_dim, num_folds = knowledge
            self.answers = AnswerProjection(
                num_conditions, lum_dim, num_folds, knowledge_dim, dropout=knowledge_dropout
            )
            self.item_scale = MaskedStandardise(num_folds * lum_dim)
            self.item_projection = nn.Linear(num_folds * lum_dim, knowledge_dim)
            user_dim, item_dim = user_dim + self.answers.num_features, item_dim + knowledge_dim
        shape: dict[str, Any] = {"activation": activation, "dropout": dropout, "out_dim": dim}
        self.user_tower = make_mlp(user_dim, hidden_dims, **shape)
        self.item_tower = make_mlp(item_dim, hidden_dims, **shape)

    def forward(self, batch: TowerBatch) -> tuple[Tensor, Tensor]:
        """The vectors of users, o_BV, and of candidate items, e_CV, float32, from one call of the tables.

        Raises ValueError for a batch with other features, or without the knowledge that the towers read.
        """
        check_keys(batch.tokens, self.features)
        if self.has_knowledge and (batch.o_BNW is None or batch.e_CKW is None):
            raise ValueError("these towers read a LUM's knowledge and the batch has none: give it to the builder")
        embedded = self.tables(batch.tokens).to_dict()
        token_UD = torch.cat([embedded[f][: batch.num_tokens] for f in self.token_features], dim=1)
        row = [embedded[f][batch.num_tokens :] for f in self.row_features]
        item_CI = F.embedding(batch.candidate_C, token_UD[:, : self.item_dim])
        return (
            self.user_vectors([*row, self._pool(token_UD, batch)], batch.o_BNW, batch.present_BN, batch.fold_B),
            self.item_vectors(item_CI, batch.e_CKW),
        )

    def user_vectors(
        self, inputs: Sequence[Tensor], o_BNW: Tensor | None, present_BN: Tensor | None, fold_B: Tensor | None
    ) -> Tensor:
        """The vectors of users, [B, V]. inputs: their features and pooled histories, which are concatenated."""
        x = list(inputs)
        if self.has_knowledge:
            assert o_BNW is not None and present_BN is not None and fold_B is not None
            x.append(self.answers(o_BNW, present_BN, fold_B))
        return self._scaled(self.user_tower(torch.cat(x, dim=1)))

    def item_vectors(self, item_CI: Tensor, e_CKW: Tensor | None) -> Tensor:
        """The vectors of items, [C, V], from their features."""
        x = [item_CI]
        if self.has_knowledge:
            assert e_CKW is not None
            e_CX = e_CKW.detach().float().flatten(1)
            x.append(self.item_projection(self.item_scale(e_CX, torch.ones_like(e_CX, dtype=torch.bool))))
        return self._scaled(self.item_tower(torch.cat(x, dim=1)))

    def padded_pool(self, token_ZD: Tensor, history_BL: Tensor) -> Tensor:
        """Each row's history as one vector, [B, D], for torch.export: `forward` pools the same without padding.

        token_ZD: the tokens, then zeros. history_BL: int64, tokens, the last one for the padding after a history.
        """
        event_BLD, is_event_BL = F.embedding(history_BL, token_ZD), history_BL < token_ZD.shape[0] - 1
        length_B1 = is_event_BL.sum(dim=1, keepdim=True)
        if self.pooling == "mean":
            return event_BLD.sum(dim=1) / length_B1.clamp(min=1)
        distance_BL = length_B1 - 1 - torch.arange(history_BL.shape[1], device=history_BL.device)
        logit_BL = self.attention(token_ZD).squeeze(1)[history_BL] + self.distance_bias_L[distance_BL.clamp(min=0)]
        weight_BL = logit_BL.masked_fill(~is_event_BL, -1e30).softmax(dim=1)
        return torch.bmm(weight_BL[:, None], event_BLD).squeeze(1)

    def _pool(self, token_UD: Tensor, batch: TowerBatch) -> Tensor:
        """Each row's history as one vector, [B, D]; 0 for an empty history."""
        weight_T = None
        if self.pooling == "attention":
            row_T = row_of_event(batch.offsets_B1, len(batch.history_T))
            distance_T = batch.offsets_B1[1:][row_T] - 1 - torch.arange(len(row_T), device=row_T.device)
            logit_T = self.attention(token_UD).squeeze(1)[batch.history_T] + self.distance_bias_L[distance_T]
            weight_T = segment_softmax(logit_T, row_T, len(batch))
        return F.embedding_bag(
            batch.history_T,
            token_UD,
            batch.offsets_B1,
            mode="mean" if weight_T is None else "sum",
            per_sample_weights=weight_T,
            include_last_offset=True,
        )

    def _scaled(self, x_XV: Tensor) -> Tensor:
        return scaled(x_XV, self.similarity, self.temperature)


class AnswerProjection(nn.Module):
    """Features for a user tower from a LUM's answers to N conditions, as KnowledgeFusion's mode "direct" without e.

    Columns are standardised over the present answers and projected with one matrix for each of the K cross-fitted
    LUMs. An absent answer is 0 in every column, a row without answers gets zeros, and N columns mark present answers.
    """

    def __init__(
        self, num_conditions: int, knowledge_dim: int, num_folds: int, out_dim: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"the knowledge dropout is {dropout}; expected 0 or more and less than 1")
        self.dropout, self.num_features = dropout, num_conditions + out_dim
        in_dim = num_conditions * knowledge_dim
        self.scale = MaskedStandardise(in_dim)
        self.weight_KXF = fold_weights(num_folds, in_dim, out_dim)
        self.bias_KF = nn.Parameter(torch.zeros(num_folds, out_dim))

    def forward(self, o_BNW: Tensor, present_BN: Tensor, fold_B: Tensor) -> Tensor:
        """Features [B, N + F], float32. Inputs: see KnowledgeBatch."""
        if self.training and self.dropout:
            present_BN = present_BN & (torch.rand(len(present_BN), 1, device=present_BN.device) >= self.dropout)
        x_BX = self.scale(o_BNW.detach().float(), present_BN[:, :, None]).flatten(1)
        x_BF = project_by_fold(x_BX, self.weight_KXF, self.bias_KF, fold_B)
        return torch.cat([present_BN.float(), x_BF * present_BN.any(dim=1, keepdim=True)], dim=1)
