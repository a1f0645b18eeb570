"""A ranker from its settings and the prepared data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from lumrec.batches.rows import RowBuilder
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import features_by_role
from lumrec.features.statistics import Statistics
from lumrec.knowledge.store import Knowledge
from lumrec.models.lum import MOST_WIDTH, data_tables
from lumrec.modules.knowledge import KnowledgeFusion
from lumrec.modules.rankers.base import Ranker
from lumrec.modules.rankers.dien import Dien
from lumrec.modules.rankers.din import Din
from lumrec.modules.rankers.dlrm import Dlrm
from lumrec.modules.rankers.sim import Sim
from lumrec.modules.rankers.twin import Twin
from lumrec.run import limits
from lumrec.run.errors import UserError
from lumrec.run.limits import count, setting, share

# Name → class, and the settings of RankerConfig that it takes beside those of all rankers.
MODELS: dict[str, tuple[type[Ranker], tuple[str, ...]]] = {
    "din": (Din, ("activation_dim", "softmax")),
    "dlrm": (Dlrm, ("cross_dim",)),
    "dien": (Dien, ("auxiliary_weight",)),
    "sim": (Sim, ("search", "num_searched", "num_heads", "head_dim", "num_recent", "auxiliary_weight")),
    "twin": (Twin, ("num_searched", "num_heads", "head_dim")),
}


MOST_LAYERS = 64


def check_depth(key: str, hidden_dims: Sequence[int]) -> None:
    """Raises UserError for more layers than any over-arch has."""
    if len(hidden_dims) > MOST_LAYERS:
        raise UserError(f"{key}: got {len(hidden_dims)} layers; expected at most {MOST_LAYERS}")


@dataclass(frozen=True)
class RankerConfig:
    """A ranker, without how it is trained.

    model: "din", "dlrm" (Embedding + MLP with pooled history), "dien", "sim" or "twin"; see lumrec/modules/rankers.
    knowledge: "none", "direct" (the LUM's answers as features), "matching" (their similarity to the target) or "both".
    knowledge_attention: the answers pooled by their match with the target join the features of any of these modes.
    knowledge_dim: width to which answers are projected. knowledge_dropout: share of rows that train without.
    statistics: "all", "user" (none that need other users' labels) or "none"; see lumrec/features/statistics.py. The
    schema's dense features are read beside them.
    leave_out: features of the schema that the ranker does not read.
    max_history: events before the row; SIM and TWIN are made for long histories, such as 1024.
    hidden_dims, dropout: of the over-arch. activation: "prelu", "relu" or "dice", there and in DIN's activation unit.
    token_l2: DIN's mini-batch aware regularisation, for any ranker; 0 = none.
    activation_dim, softmax: DIN's activation unit; see lumrec/modules/rankers/din.py.
    cross_dim: DLRM's cross features, dot products of its fields at this width; 0 = none.
    auxiliary_weight: of DIEN's auxiliary loss and of the task that trains SIM's soft search.
    search: SIM's, "soft" or "hard".
    category: the item feature that SIM's hard search compares and whose earlier events TWIN counts (its first value);
        "" = the first multi-valued item feature.
    num_searched, num_heads, head_dim: SIM's and TWIN's attention. num_recent: events of SIM's short-term interest.
    """

    model: Literal["din", "dlrm", "dien", "sim", "twin"] = "din"
    knowledge: Literal["none", "direct", "matching", "both"] = "none"
    knowledge_attention: bool = False
    knowledge_dim: int = count(32, least=1, most=MOST_WIDTH)
    knowledge_dropout: float = share(0.0)
    statistics: Literal["all", "user", "none"] = "all"
    leave_out: list[str] = field(default_factory=list)
    max_history: int = count(50, most=2**20)
    hidden_dims: list[int] = count(lambda: [200, 80], least=1, most=MOST_WIDTH)
    dropout: float = share(0.1)
    activation: Literal["relu", "prelu", "dice"] = "prelu"
    activation_dim: int = count(36, least=1, most=MOST_WIDTH)
    softmax: bool = False
    token_l2: float = setting(0.0, least=0, most=1e6)
    cross_dim: int = count(0, most=MOST_WIDTH)
    auxiliary_weight: float = setting(1.0, least=0, most=1e6)
    search: Literal["soft", "hard"] = "soft"
    category: str = ""
    num_searched: int = count(50, least=1, most=2**20)
    num_heads: int = count(4, least=1, most=1024)
    head_dim: int = count(16, least=1, most=1024)
    num_recent: int = count(16, most=2**20)

    def check(self, at: str) -> None:
        """Raises UserError for settings that contradict one another (`at`: the section, with a dot)."""
        if self.model == "sim" and self.search == "soft" and not self.auxiliary_weight:
            raise UserError(f"{at}auxiliary_weight: got 0, and without it SIM's soft search learns nothing; raise it")
        check_depth(f"{at}hidden_dims", self.hidden_dims)


def row_features(data: PreparedData) -> list[str]:
    """Features of the row itself: the user's, the context's, and conditions that are known before the item is shown.

    A wish (such as the feedback that is hoped for) is what the row is about to be asked, and so is left out.
    """
    known = [name for name in features_by_role(data.schema, "condition") if not data.schema.features[name].wish]
    return [*features_by_role(data.schema, "user"), *features_by_role(data.schema, "context"), *known]


def build_ranker(
    config: RankerConfig,
    data: PreparedData,
    *,
    num_statistics: int,
    knowledge: Knowledge | None = None,
    tables: EmbeddingBagCollection | None = None,
    device: torch.device | str | None = None,
) -> Ranker:
    """A ranker with fresh weights for the features of the data's schema.

    tables: those that it reads, with all its features and perhaps others (see `data_tables`); None makes its own.
    Raises UserError for an unknown model or knowledge mode, and for a mode without knowledge or the reverse.
    """
    limits.check(config, "rank")
    if (knowledge is None) != (config.knowledge == "none"):
        raise UserError(f"rank.knowledge is {config.knowledge!r} and knowledge was {'not ' * (knowledge is None)}given")
    fusion = knowledge and KnowledgeFusion(
        config.knowledge,
        knowledge.num_conditions,
        knowledge.dim,
        knowledge.num_folds,
        config.knowledge_dim,
        has_log_z=knowledge.log_z is not None,
        attention=config.knowledge_attention,
        dropout=config.knowledge_dropout,
    )
    item, feedback = features_by_role(data.schema, "item"), features_by_role(data.schema, "feedback")
    if tables is None:
        tables = data_tables(data, [*item, *feedback, *row_features(data)], device=device)
    arguments: dict[str, Any] = {
        "item_features": item,
        "feedback_features": feedback,
        "row_features": row_features(data),
        "num_statistics": num_statistics,
        "hidden_dims": config.hidden_dims,
        "activation": config.activation,
        "dropout": config.dropout,
        "knowledge": fusion,
        "token_l2": config.token_l2,
    }
    ranker, options = MODELS[config.model]
    arguments |= {name: getattr(config, name) for name in options}
    return ranker(tables, **arguments)


def build_rows(
    ranker: Ranker, data: PreparedData, config: RankerConfig, statistics: Statistics, knowledge: Knowledge | None = None
) -> RowBuilder:
    """The builder of batches for a ranker that `build_ranker` made."""
    return RowBuilder(
        data,
        features=ranker.features,
        item_features=features_by_role(data.schema, "item"),
        feedback_features=features_by_role(data.schema, "feedback"),
        row_features=ranker.row_features,
        max_history=config.max_history,
        statistics=statistics,
        knowledge=knowledge,
        reads=ranker.reads,
        category=config.category,
    )
