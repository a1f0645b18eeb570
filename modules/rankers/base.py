"""What all rankers share: the table lookup of a batch, dense layers, and the input of a LUM's knowledge.

Every ranker is made and called in the same way. Here are three rows of two users, with histories of 2, 2 and 0 events::

    history_T   0 1 | 2 3 | (none)      target_B   4 5 6       tokens 0 … 6, then one bag for each row

>>> from lumrec.modules.rankers.dlrm import Dlrm
>>> from lumrec.modules.tokens import make_tables
>>> features = {"item": "item", "rating": "rating", "user": "user"}
>>> tables = make_tables({"item": (9, 4), "rating": (6, 2), "user": (5, 4)}, features)
>>> roles = {"item_features": ["item"], "feedback_features": ["rating"], "row_features": ["user"]}
>>> ranker = Dlrm(tables, **roles, num_statistics=0, hidden_dims=[8])
>>> history = [{"item": 3, "rating": 5}, {"item": 7, "rating": 2}]
>>> rows = [RankRow({"item": item}, history, {"user": 1}, label=1.0) for item in (4, 5)]
>>> batch = RankBatch.from_lists([*rows, RankRow({"item": 4}, [], {"user": 2})], ranker)
>>> batch.history_T.tolist(), batch.offsets_B1.tolist(), batch.target_B.tolist()
([0, 1, 2, 3], [0, 2, 4, 4], [4, 5, 6])
>>> ranker(batch).shape
torch.Size([3])

Shape suffixes: B rows, T history events of all rows, concatenated; U unique tokens, F statistics, D width of a token
(its item and feedback features), I width of its item features, R width of the row's user and context features, X any.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lumrec.modules.knowledge import KnowledgeBatch, KnowledgeFusion
from lumrec.modules.layout import moved
from lumrec.modules.tokens import Bags, check_keys, feature_order, feature_widths, kjt_from_lists

ACTIVATIONS = ("relu", "prelu", "dice")


class RankRow(NamedTuple):
    """One row to be ranked, for RankBatch.from_lists.

    target: the item's features, each a row of the feature's table or a list of rows. history: item and feedback
    features of each earlier event, oldest first. row: user and context features. ages: seconds from each event to the
    row; SIM and TWIN need them.
    """

    target: Bags
    history: Sequence[Bags] = ()
    row: Bags = {}
    statistics: Sequence[float] = ()
    label: float = 0.0
    ages: Sequence[float] = ()


@dataclass
class RankBatch:
    """B rows to be ranked: user, context and target item, with the user's history before the row.

    A token is an item with its feedback, or a target item without any. A token that occurs several times in the batch
    needs only one bag; history and target are indices of tokens::

        bag       0 … U-1                     U … U+B-1
        is        unique token                row
        features  item (+ feedback)           user, context

        history_T     7 0 3 | 3 | | 0 1       offsets_B1  0 3 4 4 6
        target_B      8       2  8  5

    tokens: KJT of all features, with U + B bags. target_B, history_T: int64. offsets_B1: int64.
    dense_BF: float32, statistics of the events before the row (F may be 0). label_B: float32, 0 or 1.
    row_B: int64, the index of each row in the prepared events. knowledge: a LUM's answers for the rows, or None.
    history_of_B: int64, ascending, where rows share histories, as the candidates of a request do: the history that each
    row reads. offsets_B1 and the fields of events then have one entry for each history, not for each row. None: each
    row has its own, in order.

    Only some rankers read these (Ranker.reads); otherwise they may be None. item_U: int64, the index of each token's
    item. category_U: int64, its category. age_T: float32, seconds from the event to the row. category_count_T: int64,
    how many events of the same category the user had before the event.
    """

    tokens: KeyedJaggedTensor
    num_tokens: int
    target_B: Tensor
    history_T: Tensor
    offsets_B1: Tensor
    dense_BF: Tensor
    label_B: Tensor
    row_B: Tensor
    knowledge: KnowledgeBatch | None = None
    item_U: Tensor | None = None
    category_U: Tensor | None = None
    age_T: Tensor | None = None
    category_count_T: Tensor | None = None
    history_of_B: Tensor | None = None

    @classmethod
    def from_lists(
        cls,
        rows: Sequence[RankRow],
        ranker: "Ranker",
        *,
        category: str = "",
        knowledge: KnowledgeBatch | None = None,
    ) -> "RankBatch":
        """A batch for `ranker` from plain lists, on the CPU: to try the ranker, or to use it with your data pipeline.

        category: the item feature whose first value is the category that SIM's hard search and TWIN read.
        Raises ValueError for features that the ranker does not have, for a missing category, and for a number of ages
        that differs from that of the events.
        """
        for i, row in enumerate(rows):
            if "age_T" in ranker.reads and len(row.ages) != len(row.history):
                raise ValueError(f"row {i} has {len(row.history)} earlier events and {len(row.ages)} ages")
        if not category and {"category_U", "category_count_T"} & set(ranker.reads):
            raise ValueError("this ranker reads the category of items: give `category`, an item feature")
        events = [event for row in rows for event in row.history]
        tokens = [*events, *(row.target for row in rows)]
        first = [[_first(token.get(name, ())) for token in tokens] for name in ranker.token_features]
        numbers: dict[tuple[int, ...], int] = {}
        item_of = [numbers.setdefault(key, len(numbers)) for key in zip(*first[: len(ranker.item_dims)], strict=True)]
        kinds = first[ranker.token_features.index(category)] if category else []
        offsets_B1 = torch.tensor([0, *(len(row.history) for row in rows)]).cumsum(0)
        spans = zip(offsets_B1.tolist(), offsets_B1[1:].tolist())
        counts = [kinds[begin:t].count(kinds[t]) for begin, end in spans if category for t in range(begin, end)]
        return cls(
            tokens=kjt_from_lists(ranker.features, [*tokens, *(row.row for row in rows)]),
            num_tokens=len(tokens),
            target_B=torch.arange(len(events), len(tokens)),
            history_T=torch.arange(len(events)),
            offsets_B1=offsets_B1,
            dense_BF=torch.tensor([list(row.statistics) for row in rows], dtype=torch.float32).view(len(rows), -1),
            label_B=torch.tensor([row.label for row in rows], dtype=torch.float32),
            row_B=torch.arange(len(rows)),
            knowledge=knowledge,
            item_U=torch.tensor(item_of, dtype=torch.int64),
            category_U=torch.tensor(kinds, dtype=torch.int64) if category else None,
            age_T=torch.tensor([age for row in rows for age in row.ages], dtype=torch.float32),
            category_count_T=torch.tensor(counts, dtype=torch.int64) if category else None,
        )

    def __len__(self) -> int:
        return len(self.target_B)

    def to(self, device: torch.device | str) -> "RankBatch":
        """The same batch on `device`."""
        return moved(self, device)

    def expanded(self) -> "RankBatch":
        """The same batch with a history for each row, also where rows share one.

        >>> none = torch.zeros(2, 0)
        >>> offsets_B1, target_B = torch.tensor([0, 2]), torch.tensor([2, 3])
        >>> of_one_user = RankBatch(None, 4, target_B, torch.tensor([0, 1]), offsets_B1, none, none, none)
        >>> plain = dataclasses.replace(of_one_user, history_of_B=torch.tensor([0, 0])).expanded()
        >>> plain.history_T.tolist(), plain.offsets_B1.tolist()
        ([0, 1, 0, 1], [0, 2, 4])
        """
        if self.history_of_B is None:
            return self
        length_B = self.offsets_B1.diff()[self.history_of_B]
        offsets_B1 = nn.functional.pad(length_B.cumsum(0), (1, 0))
        shift_B = self.offsets_B1[self.history_of_B] - offsets_B1[:-1]
        event_T = torch.arange(int(offsets_B1[-1]), device=shift_B.device) + shift_B.repeat_interleave(length_B)
        of_events = {name: getattr(self, name) for name in ("history_T", "age_T", "category_count_T")}
        taken: dict[str, Any] = {name: None if value is None else value[event_T] for name, value in of_events.items()}
        return dataclasses.replace(self, offsets_B1=offsets_B1, history_of_B=None, **taken)


class Histories(NamedTuple):
    """The histories of G groups of rows, padded, as an exported ranker reads them (see Ranker.shared_interest).

    A group's rows share one history: they are the candidates of a request. Two groups, with histories of 3 and 1 events
    and 2 and 1 rows, over 5 tokens; token 5 and row 3 are padding::

        history_GL   0 2 1        target_GR   3 4        place_B   0 1 2
                     2 5 5                    4 5

    token_ZD: the tokens, then zeros. history_GL, target_GR: int64, tokens. place_B: int64, where each row is in the
    flattened [G, R]. age_GL, count_GL, category_Z: see age_T, category_count_T and category_U of RankBatch; padding is
    -1. They are None for rankers that do not read them.
    """

    token_ZD: Tensor
    history_GL: Tensor
    target_GR: Tensor
    place_B: Tensor
    age_GL: Tensor | None = None
    count_GL: Tensor | None = None
    category_Z: Tensor | None = None

    @property
    def is_event_GL(self) -> Tensor:
        """Which places are events: bool, False for padding."""
        return self.history_GL < self.token_ZD.shape[0] - 1

    @property
    def group_B(self) -> Tensor:
        """The group of each row, int64."""
        return self.place_B // self.target_GR.shape[1]

    def of_targets(self, layer: nn.Module, item_dim: int) -> Tensor:
        """What `layer` makes of each target item, [G, R, X]."""
        # Flat: with three dimensions torch.export takes it that R is not 1.
        x_XI = nn.functional.embedding(self.target_GR.flatten(), self.token_ZD[:, :item_dim])
        return layer(x_XI).unflatten(0, self.target_GR.shape)

    def led_by_padding(self, num: int) -> "Histories":
        """The same with `num` places of padding before each history, so that a search always finds as many places."""
        history_GL = self.history_GL.new_full((self.history_GL.shape[0], num), self.token_ZD.shape[0] - 1)
        return self._replace(
            history_GL=torch.cat([history_GL, self.history_GL], dim=1),
            age_GL=None if self.age_GL is None else nn.functional.pad(self.age_GL, (num, 0), value=-1),
            count_GL=None if self.count_GL is None else nn.functional.pad(self.count_GL, (num, 0), value=-1),
        )

    def flat_places(self, place_GRS: Tensor) -> Tensor:
        """Places within a history as places in the flattened [G, L], int64 [B, S]."""
        return self.of_rows(place_GRS) + self.group_B[:, None] * self.history_GL.shape[1]

    def of_rows(self, x_GRX: Tensor) -> Tensor:
        """What belongs to each row, [B, X]."""
        # Not flattened: for a slice torch.export then takes it that R is not 1.
        return x_GRX[self.group_B, self.place_B % self.target_GR.shape[1]]


def _first(rows: int | Sequence[int]) -> int:
    """The first row, or -1 if there is none."""
    return rows if isinstance(rows, int) else next(iter(rows), -1)


class Looked(NamedTuple):
    """The embeddings of a batch: of tokens (the first I columns are item features), targets, and rows."""

    token_UD: Tensor
    target_BI: Tensor
    row_BR: Tensor


class Interest(NamedTuple):
    """interest_BX: features of the history for the target. loss: an auxiliary loss (scalar), or None."""

    interest_BX: Tensor
    loss: Tensor | None = None


class Ranker(nn.Module, ABC):
    """logit = MLP(user and context; target item; interest in the target; statistics; a LUM's knowledge).

    A subclass computes the interest from the history. `tables` are called like those of a LUM's token encoder, so that
    a LUM's checkpoint can initialise them. The knowledge is only an input of the over-arch, as constant features (LUM
    section 4.3); without it a ranker is the model of its paper.

    token_l2: the weight of DIN's mini-batch aware regularisation (1706.06978, section 5.2): L2 of the batch's tokens,
    each divided by how often it occurs, so that frequent tokens are regularised less. The paper divides by counts over
    the training data; those of the batch estimate them up to a factor, which the weight absorbs. The gradient reaches
    the tables through the optimizer that is fused into their backward pass.
    """

    reads: tuple[str, ...] = ()  # the optional fields of RankBatch that this ranker reads

    def __init__(
        self,
        tables: EmbeddingBagCollection,
        *,
        item_features: Sequence[str],
        feedback_features: Sequence[str],
        row_features: Sequence[str],
        num_statistics: int,
        hidden_dims: Sequence[int],
        activation: str = "prelu",
        dropout: float = 0.0,
        knowledge: KnowledgeFusion | None = None,
        token_l2: float = 0.0,
    ) -> None:
        super().__init__()
        self.tables, self.token_l2 = tables, token_l2
        self.features = feature_order(tables)
        self.token_features = [*item_features, *feedback_features]
        self.row_features = list(row_features)
        # Kept, since tables that were sharded no longer have their configs.
        self.table_of = {
            name: config.name for config in tables.embedding_bag_configs() for name in config.feature_names
        }
        self.width_of = width = feature_widths(tables)
        self.item_dims = [width[f] for f in item_features]
        self.row_dims = [width[f] for f in row_features]
        self.feedback_dims = [width[f] for f in feedback_features]
        self.item_dim = sum(self.item_dims)
        self.token_dim = sum(width[f] for f in self.token_features)
        self.knowledge = knowledge
        self.num_statistics = num_statistics
        self.interest_dim = self.make_interest()
        in_dim = sum(self.row_dims) + self.item_dim + self.interest_dim + num_statistics
        in_dim += knowledge.num_features if knowledge else 0
        self.over_arch = make_mlp(in_dim, hidden_dims, activation=activation, dropout=dropout)

    def input_columns(self) -> dict[str, int]:
        """Width of each input of the over-arch, in order: every feature by name, interest, statistics, knowledge."""
        columns = dict(zip(self.row_features, self.row_dims, strict=True))
        columns |= dict(zip(self.token_features, self.item_dims))  # only the item features: zip ends there
        columns |= {"interest": self.interest_dim, "statistics": self.num_statistics}
        return columns | ({"knowledge": self.knowledge.num_features} if self.knowledge else {})

    @abstractmethod
    def make_interest(self) -> int:
        """The width of `interest`; also creates the subclass's modules. Called once the widths of inputs are known."""

    @abstractmethod
    def interest(self, looked: Looked, batch: RankBatch) -> Interest:
        """Features of the history for the target, [B, X], and in training the ranker's auxiliary loss, if any."""

    @abstractmethod
    def shared_interest(self, looked: Looked, histories: Histories, dense_BF: Tensor) -> Tensor:
        """The features that `interest` has, [B, X], for rows that share histories: what torch.export is given.

        Only for serving: what all rows of a group need is computed once, and no size depends on a value.
        """

    def forward(self, batch: RankBatch, *, with_loss: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B], float32; with_loss: and a scalar to add to the mean cross-entropy of the rows in training.

        Raises ValueError for a batch with other features or statistics, or without a field that this ranker reads.
        """
        missing = [name for name in self.reads if getattr(batch, name) is None]
        if missing:
            raise ValueError(
                f"this ranker reads {', '.join(missing)} and the batch has none: give `reads` to RowBuilder"
            )
        batch = batch.expanded()
        looked = self.look_up(batch)
        interest_BX, own_loss = self.interest(looked, batch)
        logit_B = self.logit(looked, interest_BX, batch.dense_BF, batch.knowledge)
        if not with_loss:
            return logit_B
        loss = logit_B.new_zeros(()) if own_loss is None else own_loss
        if self.token_l2:
            loss = loss + self.token_l2 / 2 * token_penalty(looked.token_UD, batch)
        return logit_B, loss

    def logit(self, looked: Looked, interest_BX: Tensor, dense_BF: Tensor, knowledge: KnowledgeBatch | None) -> Tensor:
        """Logits [B] from all inputs of the over-arch. Raises ValueError where it reads knowledge and none is given."""
        x = [looked.row_BR, looked.target_BI, interest_BX, dense_BF]
        if self.knowledge is not None:
            if knowledge is None:
                raise ValueError(
                    "this ranker reads a LUM's knowledge and the batch has none: give it to the RowBuilder"
                )
            x.append(self.knowledge(*knowledge))
        return self.over_arch(torch.cat(x, dim=1)).squeeze(1)

    def look_up(self, batch: RankBatch) -> Looked:
        """The embeddings of all tokens and rows of the batch, from one call of the tables."""
        check_keys(batch.tokens, self.features)
        if batch.dense_BF.shape[1] != self.num_statistics:
            raise ValueError(f"the batch has {batch.dense_BF.shape[1]} statistics; expected {self.num_statistics}")
        embedded = self.tables(batch.tokens).to_dict()
        token_UD = torch.cat([embedded[f][: batch.num_tokens] for f in self.token_features], dim=1)
        if self.row_features:
            row_BR = torch.cat([embedded[f][batch.num_tokens :] for f in self.row_features], dim=1)
        else:
            row_BR = token_UD.new_zeros(batch.target_B.shape[0], 0)
        target_BI = nn.functional.embedding(batch.target_B, token_UD[:, : self.item_dim])
        return Looked(token_UD, target_BI, row_BR)


def token_penalty(token_UD: Tensor, batch: RankBatch) -> Tensor:
    """Sum over tokens of the squared length divided by how often the token occurs in the batch (DIN, eq. 6)."""
    occurring = torch.cat([batch.history_T, batch.target_B])
    count_U = torch.bincount(occurring, minlength=len(token_UD)).clamp(min=1)
    return (token_UD.square().sum(dim=1) / count_U).sum()


def mean_history(token_UD: Tensor, batch: RankBatch) -> Tensor:
    """Mean of the tokens of each row's history, [B, D]; 0 for an empty history."""
    return nn.functional.embedding_bag(
        batch.history_T, token_UD, batch.offsets_B1, mode="mean", include_last_offset=True
    )


def make_mlp(
    in_dim: int, hidden_dims: Sequence[int], *, activation: str, dropout: float, out_dim: int = 1
) -> nn.Sequential:
    """Linear layers, each but the last followed by an activation and dropout; the last has `out_dim` outputs."""
    layers: list[nn.Module] = []
    for hidden_dim in hidden_dims:
        layers += [nn.Linear(in_dim, hidden_dim), make_activation(activation, hidden_dim)]
        if dropout:
            layers.append(nn.Dropout(dropout))
        in_dim = hidden_dim
    return nn.Sequential(*layers, nn.Linear(in_dim, out_dim))


def make_activation(name: str, dim: int) -> nn.Module:
    """The activation "relu", "prelu" (one slope) or "dice". Raises ValueError for another name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation is {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return {"relu": nn.ReLU, "prelu": nn.PReLU}[name]() if name != "dice" else Dice(dim)


class Dice(nn.Module):
    """DIN's activation p x + (1 - p) alpha x (1706.06978, section 5.3), with a learned alpha for each unit.

    p is the sigmoid of x standardised over the batch, or with running moments in evaluation.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.standardise = nn.BatchNorm1d(dim, affine=False, eps=1e-8)
        self.alpha = nn.Parameter(torch.zeros(dim))

    def forward(self, x_XD: Tensor) -> Tensor:
        """The activated units [X, D]. A training batch with fewer than 2 entries uses the running moments."""
        if self.training and len(x_XD) < 2:
            moments = self.standardise
            assert moments.running_mean is not None and moments.running_var is not None
            z_XD = (x_XD - moments.running_mean) * torch.rsqrt(moments.running_var + moments.eps)
        else:
            z_XD = self.standardise(x_XD)
        p_XD = torch.sigmoid(z_XD)
        return x_XD * (p_XD + (1 - p_XD) * self.alpha)
