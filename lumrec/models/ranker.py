"""A ranker from its settings and the prepared data, and a trained one from its run folder."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from lumrec.batches.rows import RowBuilder, TokenNumbers, number_tokens
from lumrec.batches.served_rows import ServedKnowledge, ServedRows
from lumrec.data.common import Common
from lumrec.data.mapped import KEPT
from lumrec.data.prepare import open_prepared
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig, features_by_role, table_widths, without
from lumrec.data.served import ServedData
from lumrec.features.items import ItemHistory
from lumrec.features.statistics import Statistics, StatisticsModel, dense_inputs
from lumrec.knowledge.store import Knowledge
from lumrec.models.lum import beside, data_tables
from lumrec.models.ranker_config import RANKERS, RankerConfig
from lumrec.modules.knowledge import KnowledgeFusion
from lumrec.modules.rankers.base import Ranker
from lumrec.run import limits
from lumrec.run.config_file import stored
from lumrec.run.distributed import init_distributed
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.folder import check_stage
from lumrec.run.kept import NewArray, kept_arrays, source_of
from lumrec.run.unread import as_read, check_read
from lumrec.train.checkpoint import load_weights
from lumrec.train.checkpoint_meta import Fingerprint, best_checkpoint
from lumrec.train.identity import Settings
from lumrec.train.parallel import shard


def row_features(schema: SchemaConfig) -> list[str]:
    """Features of the row itself: the user's, the context's, and conditions that are known before the item is shown.

    A wish (such as the feedback that is hoped for) is what the row is about to be asked, and so is left out.
    """
    known = [name for name in features_by_role(schema, "condition") if not schema.features[name].wish]
    return [*features_by_role(schema, "user"), *features_by_role(schema, "context"), *known]


def ranker_tables(config: RankerConfig, schema: SchemaConfig) -> dict[str, int]:
    """Width of each table of a ranker."""
    return table_widths(schema, _features(without(schema, config.leave_out)))


def _features(schema: SchemaConfig) -> list[str]:
    return [*features_by_role(schema, "item"), *features_by_role(schema, "feedback"), *row_features(schema)]


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
    Raises UserError for an unknown model or knowledge mode, for a mode without knowledge or the reverse, and for
    settings that the model does not read.
    """
    limits.check(config, "rank")
    check_read(config, "rank")
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
    if tables is None:
        tables = data_tables(data, _features(data.schema), device=device)
    arguments: dict[str, Any] = {
        "item_features": features_by_role(data.schema, "item"),
        "feedback_features": features_by_role(data.schema, "feedback"),
        "row_features": row_features(data.schema),
        "num_statistics": num_statistics,
        "hidden_dims": config.hidden_dims,
        "activation": config.activation,
        "dropout": config.dropout,
        "knowledge": fusion,
        "token_l2": config.token_l2,
    }
    arguments |= {name: value for name, value in vars(config.own).items() if name != "category"}  # RowBuilder's
    return RANKERS[config.model](tables, **arguments)


def build_rows(
    ranker: Ranker,
    data: PreparedData,
    config: RankerConfig,
    statistics: Statistics,
    knowledge: Knowledge | None = None,
    tokens: TokenNumbers | None = None,
) -> RowBuilder:
    """The builder of batches for a ranker that `build_ranker` made."""
    return RowBuilder(
        data,
        features=ranker.features,
        row_features=ranker.row_features,
        max_history=config.max_history,
        statistics=statistics,
        knowledge=knowledge,
        reads=ranker.reads,
        category=config.category,
        tokens=tokens,
    )


def make_ranker(
    config: RankerConfig,
    data: PreparedData,
    knowledge: Knowledge | None = None,
    *,
    device: torch.device | str | None = None,
    keep: bool = False,
) -> tuple[Ranker, RowBuilder]:
    """A ranker with fresh weights, without the features that it leaves out, and the builder of its batches.

    keep: what is computed from the data is kept beside them, for all processes and later runs, and mapped; `data` must
    be as they were opened.
    """
    data = data.without(config.leave_out)
    if isinstance(data, ServedData):
        return _served_ranker(config, data, knowledge, device=device)
    statistics, tokens = _kept(data, config.statistics) if keep else (dense_inputs(data, kind=config.statistics), None)
    ranker = build_ranker(config, data, num_statistics=len(statistics.names), knowledge=knowledge, device=device)
    return ranker, build_rows(ranker, data, config, statistics, knowledge, tokens)


def _kept(data: PreparedData, kind: str) -> tuple[Statistics, TokenNumbers]:
    """The statistics and the numbers of tokens of opened data, kept in their folder."""

    def make(new: NewArray) -> Any:
        number_tokens(data, new)
        made = dense_inputs(data, kind=kind, new=new)
        assert made.model is not None
        return made.model.to_json()

    identity = {
        "data": data.fingerprint,
        "kind": kind,
        "features": {name: asdict(feature) for name, feature in data.schema.features.items()},
        "scales": data.manifest["scales"],
        "source": source_of(RowBuilder, ItemHistory, Statistics),
    }
    arrays, stored_model = kept_arrays(data.path / KEPT, "rows", identity, make)
    model = StatisticsModel.from_json(stored_model)
    tokens = TokenNumbers(arrays["token"], arrays["event_of_pair"])
    return Statistics(arrays["statistics"], model.names, model), tokens


def _served_ranker(
    config: RankerConfig, data: ServedData, knowledge: Knowledge | None, *, device: torch.device | str | None
) -> tuple[Ranker, RowBuilder]:
    """`make_ranker` on rows that were served. Raises UserError where they have other statistics than are asked for."""
    statistics = StatisticsModel.from_json(data.served["spec"]["statistics"])
    if statistics.kind != config.statistics:
        raise UserError(
            f"{data.path} was served with rank.statistics={statistics.kind}, and {config.statistics} is asked for"
        )
    ranker = build_ranker(config, data, num_statistics=len(statistics.names), knowledge=knowledge, device=device)
    rows = ServedRows(
        data,
        features=ranker.features,
        max_history=config.max_history,
        reads=ranker.reads,
        knowledge=knowledge,
    )
    return ranker, rows


def open_knowledge(path: Path, data: PreparedData) -> Knowledge:
    """The knowledge of the rows of some data: that published in `path`, or of served rows their own.

    Raises as `Knowledge.open`, and UserError for rows that were served without.
    """
    if not isinstance(data, ServedData):
        return Knowledge.open(path, data)
    if data.served["knowledge"] is None:
        raise UserError(f"{data.path} was served by a ranker without knowledge: train with rank.knowledge=none")
    return ServedKnowledge(data, data.served["knowledge"])


class TrainedRanker(NamedTuple):
    """A finished ranker run: its best checkpoint, and the settings it was trained with."""

    folder: Path
    checkpoint: Path
    common: Common
    config: RankerConfig


def open_ranker_run(folder: Path) -> TrainedRanker:
    """The ranker of a run folder, by its config.yaml; no weights are read.

    Raises MissingFileError where there is no finished run, UserError where it is no ranker's or its checkpoint is
    damaged.
    """
    check_stage(folder, "rank", "a ranker")
    if not (folder / "result.json").exists():
        raise MissingFileError(
            f"there is no finished ranker in {folder}; make it with: torchx run apps/rank.py --config <yours> "
            f"{shlex.quote(f'run={folder.name}')}"
        )
    path = folder / "config.yaml"
    common = beside(folder, stored(path, Common), "rank")
    config = as_read(stored(path, RankerConfig, "rank", partly=True))
    return TrainedRanker(folder, best_checkpoint(folder), common, config)


def load_ranker(
    folder: str | Path, data: PreparedData | None = None, *, device: torch.device | str | None = None
) -> tuple[DistributedModelParallel, RowBuilder, TrainedRanker]:
    """The trained ranker of a run folder in eval mode, the builder of its batches, and what it was trained with.

    It reads the prepared data and the LUM's knowledge that the run names, beside its folder; `data` are the same data
    where they were moved. `ranker(builder.batch(rows))` gives the logits of rows of the data, float32 [B]. device: None
    takes CUDA where torch has it. Collective. Raises MissingFileError where there is no finished run or an input is
    gone, UserError where the folder is none of a ranker or an input is another one than it was trained with.
    """
    trained = open_ranker_run(Path(folder))
    device = init_distributed(device)
    ranker, builder, fingerprint = _untrained(trained, data)
    dmp = shard(ranker, device=device)
    load_weights(trained.checkpoint, dmp, fingerprint=fingerprint)
    return dmp.eval(), builder, trained


def plain_ranker(trained: TrainedRanker, data: PreparedData | None = None) -> tuple[Ranker, RowBuilder]:
    """As `load_ranker`, the ranker as a plain module on the CPU, whose tables are whole."""
    ranker, builder, fingerprint = _untrained(trained, data)
    load_weights(trained.checkpoint, ranker, fingerprint=fingerprint)
    return ranker.eval(), builder


def _untrained(trained: TrainedRanker, data: PreparedData | None) -> tuple[Ranker, RowBuilder, Fingerprint]:
    """A ranker as it was before training, the builder of its batches, and the fingerprint of its checkpoint."""
    common, config = trained.common, trained.config
    if data is None:
        data = open_prepared(common.prepared)
    fingerprint: dict[str, str | Settings] = {"data": data.fingerprint, "model": Settings.of(config, partly=True)}
    knowledge = None
    if config.knowledge != "none":
        knowledge = open_knowledge(common.knowledge, data)
        fingerprint["knowledge"] = knowledge.path.name
    return *make_ranker(config, data, knowledge), fingerprint
