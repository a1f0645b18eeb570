"""Builds a two-tower model from its settings and the prepared data."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from lumrec.batches.tower_rows import TowerBuilder
from lumrec.data.common import Common
from lumrec.data.prepare import open_prepared
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig, features_by_role, table_widths
from lumrec.knowledge.store import Knowledge
from lumrec.models.lum import MOST_WIDTH, beside, data_tables
from lumrec.models.ranker import open_knowledge
from lumrec.models.ranker_config import check_depth
from lumrec.modules.retrievers.edb import TwoTower
from lumrec.run import limits
from lumrec.run.config_file import stored
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.folder import check_stage
from lumrec.run.limits import count, setting, share
from lumrec.run.unread import as_read, check_read
from lumrec.train.checkpoint import load_weights
from lumrec.train.checkpoint_meta import best_checkpoint
from lumrec.train.identity import Settings


@dataclass(frozen=True)
class TowersConfig:
    """The two towers (EDB), without how they are trained.

    knowledge: "none", or "direct": the LUM's answers enter the user tower, its item embeddings the item tower.
    knowledge_dim: width to which each is projected.
    knowledge_dropout: share of the training rows whose knowledge is withheld.
    conditions: condition features of the request, such as its search query, that the user tower reads. Each must be
        known before the item is chosen: an item's own genre would give the answer away.
    max_history: events before the row that are read.
    pooling: how the history becomes one vector.
    similarity: cosine (divided by temperature) or dot.
    temperature: divisor of the cosine similarities.
    dim: width of the vectors.
    hidden_dims: hidden layers of both towers.
    dropout: dropout of both towers.
    activation: activation of both towers.
    """

    knowledge: Literal["none", "direct"] = "none"
    knowledge_dim: int = count(32, least=1, most=MOST_WIDTH)
    knowledge_dropout: float = share(0.0)
    conditions: list[str] = field(default_factory=list)
    max_history: int = count(50, most=2**20)
    pooling: Literal["attention", "mean"] = "attention"
    similarity: Literal["cosine", "dot"] = "cosine"
    temperature: float = setting(0.05, least=1e-12, most=1e12)
    dim: int = count(64, least=1, most=MOST_WIDTH)
    hidden_dims: list[int] = count(lambda: [128], least=1, most=MOST_WIDTH)
    dropout: float = share(0.1)
    activation: Literal["relu", "prelu", "dice"] = "relu"

    def unread(self) -> dict[str, str]:
        """Fields that these towers do not read → the field whose value decides that."""
        unread = dict.fromkeys(("knowledge_dim", "knowledge_dropout"), "knowledge") if self.knowledge == "none" else {}
        return unread | ({"temperature": "similarity"} if self.similarity == "dot" else {})

    def check(self, at: str) -> None:
        """Raises UserError for settings that no tower can have (`at`: the section, with a dot)."""
        check_depth(f"{at}hidden_dims", self.hidden_dims)


def tower_features(config: TowersConfig, schema: SchemaConfig) -> list[str]:
    """Features of the user tower besides the history: the user's, the context's and the request's (`conditions`)."""
    declared = features_by_role(schema, "condition")
    unknown = sorted(set(config.conditions) - set(declared))
    if unknown:
        raise UserError(f"retrieve.conditions names {unknown}; the schema's condition features are {declared}")
    return [
        *features_by_role(schema, "user"),
        *features_by_role(schema, "context"),
        *(name for name in declared if name in config.conditions),
    ]


def tower_tables(config: TowersConfig, schema: SchemaConfig) -> dict[str, int]:
    """Width of each table of the two towers."""
    item, feedback = features_by_role(schema, "item"), features_by_role(schema, "feedback")
    return table_widths(schema, [*item, *feedback, *tower_features(config, schema)])


def build_towers(
    config: TowersConfig,
    data: PreparedData,
    *,
    knowledge: Knowledge | None = None,
) -> tuple[TwoTower, TowerBuilder]:
    """Towers with fresh weights for the features of the data's schema, and the builder that makes batches for them.

    Raises UserError for an unknown setting, and if knowledge is given without being configured, or the reverse.
    """
    limits.check(config, "retrieve")
    check_read(config, "retrieve")
    if (knowledge is None) != (config.knowledge == "none"):
        raise UserError(
            f"retrieve.knowledge is {config.knowledge!r} and knowledge was {'not ' * (knowledge is None)}given"
        )
    item, feedback = features_by_role(data.schema, "item"), features_by_role(data.schema, "feedback")
    row = tower_features(config, data.schema)
    towers = TwoTower(
        data_tables(data, [*item, *feedback, *row]),
        item_features=item,
        feedback_features=feedback,
        row_features=row,
        dim=config.dim,
        hidden_dims=config.hidden_dims,
        max_history=config.max_history,
        pooling=config.pooling,
        similarity=config.similarity,
        temperature=config.temperature,
        activation=config.activation,
        dropout=config.dropout,
        knowledge=None if knowledge is None else (knowledge.num_conditions, knowledge.dim, knowledge.num_folds),
        knowledge_dim=config.knowledge_dim,
        knowledge_dropout=config.knowledge_dropout,
    )
    builder = TowerBuilder(
        data,
        features=towers.features,
        row_features=row,
        max_history=config.max_history,
        knowledge=knowledge,
    )
    return towers, builder


class TrainedTowers(NamedTuple):
    """A finished run of step 3 for retrieval: its best checkpoint, and the settings it was trained with."""

    folder: Path
    checkpoint: Path
    common: Common
    config: TowersConfig


def open_towers_run(folder: Path) -> TrainedTowers:
    """The towers of a run folder, by its config.yaml; no weights are read.

    Raises MissingFileError where there is no finished run, UserError where it is no run of towers or its checkpoint is
    damaged.
    """
    check_stage(folder, "retrieve", "two towers")
    if not (folder / "result.json").exists():
        raise MissingFileError(
            f"there are no finished towers in {folder}; make them with: torchx run apps/retrieve.py --config <yours> "
            f"{shlex.quote(f'run={folder.name}')}"
        )
    path = folder / "config.yaml"
    common = beside(folder, stored(path, Common), "retrieve")
    config = as_read(stored(path, TowersConfig, "retrieve", partly=True))
    return TrainedTowers(folder, best_checkpoint(folder), common, config)


def plain_towers(trained: TrainedTowers) -> tuple[TwoTower, TowerBuilder]:
    """The trained towers in eval mode as a plain module on the CPU, and the builder of their batches.

    Raises MissingFileError where an input is gone, UserError where it is another one than they were trained with.
    """
    data = open_prepared(trained.common.prepared)
    model = Settings.of(trained.config, partly=True)
    fingerprint: dict[str, str | Settings] = {"data": data.fingerprint, "model": model}
    knowledge = None
    if trained.config.knowledge != "none":
        knowledge = open_knowledge(trained.common.knowledge, data)
        fingerprint["knowledge"] = knowledge.path.name
    towers, builder = build_towers(trained.config, data, knowledge=knowledge)
    load_weights(trained.checkpoint, towers, fingerprint=fingerprint)
    return towers.eval(), builder
