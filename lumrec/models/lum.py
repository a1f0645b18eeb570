"""Builds a LUM from its config and the prepared data, and loads a trained one from its run folder."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from lumrec.batches.packs import PackBuilder
from lumrec.data.common import Common
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig, features_by_role, table_widths
from lumrec.modules.large_user_model import TOKENS_PER_EVENT, LargeUserModel
from lumrec.modules.tokens import TokenEncoder, make_tables
from lumrec.modules.user_encoder import UserEncoder
from lumrec.run.config_file import stored
from lumrec.run.distributed import init_distributed, world_size
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import check_outside
from lumrec.run.folder import check_stage
from lumrec.run.limits import check_names, count, setting, share
from lumrec.train.checkpoint import load_weights
from lumrec.train.checkpoint_meta import best_checkpoint, check_fingerprint, read_meta
from lumrec.train.config import TrainConfig
from lumrec.train.identity import Settings
from lumrec.train.parallel import shard
from lumrec.train.plan import read_plan

# Wider than any encoder there is; ten times the largest config (7B) is still far from what one machine can hold.
MOST_WIDTH = 16_384
MOST_PARAMETERS = 10**11
READ_BY_LUM = "condition features that the LUM reads"


@dataclass(frozen=True)
class ModelConfig:
    """The LUM.

    encoder: the user encoder: gpt, llama or hstu.
    dim: width of tokens and answers.
    num_layers: layers of the user encoder.
    num_heads: attention heads of each layer.
    ffn_dim: width of the feed-forward layers; 0 = as in the encoder's paper.
    time_bias: a relative bias of position and time in each layer; null = as in the encoder's paper (only hstu has one).
    tokens: interleaved (the paper's: condition, item, condition, item, …) or merged (one token for each event).
    checkpoint_activations: compute each layer again in the backward pass; takes less memory and more time.
    compile: use torch.compile for everything except attention.
    max_events: longest history that is read, in events.
    dropout: dropout in the user encoder.
    similarity: cosine (divided by temperature) or dot.
    temperature: divisor of the cosine similarities.
    conditions: condition features of the schema that the LUM reads; null = all of them, [] = none.
    """

    encoder: Literal["gpt", "llama", "hstu"] = "gpt"
    dim: int = count(64, least=1, most=MOST_WIDTH)
    num_layers: int = count(2, least=1, most=1024)
    num_heads: int = count(2, least=1, most=MOST_WIDTH)
    ffn_dim: int = count(0, most=16 * MOST_WIDTH)
    time_bias: bool | None = None
    tokens: Literal["interleaved", "merged"] = "interleaved"
    checkpoint_activations: bool = False
    compile: bool = False
    max_events: int = count(128, least=2, most=2**20)
    dropout: float = share(0.1)
    similarity: Literal["cosine", "dot"] = "cosine"
    temperature: float = setting(0.05, least=1e-12, most=1e12)
    conditions: list[str] | None = None

    def check(self, at: str) -> None:
        """Raises UserError for settings that no user encoder has together (`at`: the section, with a dot)."""
        head_width, rest = divmod(self.dim, self.num_heads)
        if rest:
            raise UserError(
                f"{at}num_heads: the width {at}dim={self.dim} cannot be divided into {self.num_heads} heads; choose a "
                "divisor of it"
            )
        if self.encoder == "llama" and head_width % 2:
            raise UserError(
                f"{at}num_heads: llama's rotary positions turn pairs of channels, but a head has {head_width} "
                f"({at}dim={self.dim} over {self.num_heads} heads); make it even"
            )
        if self.encoder == "hstu" and self.ffn_dim:
            raise UserError(f"{at}ffn_dim: got {self.ffn_dim}, and an hstu block has no FFN; leave it at 0")
        if self.similarity == "dot" and self.temperature != ModelConfig.temperature:
            raise UserError(
                f"{at}temperature={self.temperature} has no effect with {at}similarity=dot: remove the first or "
                "change the second"
            )
        parameters = self.num_layers * self.dim * (4 * self.dim + 2 * (self.ffn_dim or 4 * self.dim))
        parameters += TOKENS_PER_EVENT[self.tokens] * self.max_events * self.dim
        if parameters > MOST_PARAMETERS:
            raise UserError(
                f"{at}dim={self.dim}, {at}num_layers={self.num_layers}, {at}ffn_dim={self.ffn_dim} and "
                f"{at}max_events={self.max_events} make about {parameters:,} parameters; expected at most "
                f"{MOST_PARAMETERS:,}"
            )


def condition_features(config: ModelConfig, schema: SchemaConfig) -> list[str]:
    """The condition features that the model reads, in the schema's order. Raises UserError for one not declared."""
    declared = features_by_role(schema, "condition")
    if config.conditions is None:
        return declared
    unknown = sorted(set(config.conditions) - set(declared))
    if unknown:
        raise UserError(f"model.conditions names {unknown}; the schema's condition features are {declared}")
    return [name for name in declared if name in config.conditions]


def token_features(config: ModelConfig, schema: SchemaConfig) -> dict[str, list[str]]:
    """The features that each projection ("item", "condition") reads, in the order of its columns."""
    item = [*features_by_role(schema, "item"), *features_by_role(schema, "feedback")]
    return {"item": item, "condition": condition_features(config, schema)}


def lum_tables(config: ModelConfig, schema: SchemaConfig) -> dict[str, int]:
    """Width of each table of a LUM."""
    return table_widths(schema, [name for names in token_features(config, schema).values() for name in names])


def check_tables(section: str, train: TrainConfig, widths: Mapping[str, int], run: Path) -> None:
    """Raises UserError for tables that the training of a model names, or places, and that the model does not have, and
    for a plan in the folder of the run.

    section: pretrain, rank or retrieve. widths: of the model's tables. run: folder of this run.
    """
    given = list(train.optimizer.table_lrs)
    check_names(f"{section}.train.optimizer.table_lrs", given, list(widths), "tables that this model reads")
    if read_plan(train.sharding, widths, world_size=world_size(), whose="this model"):
        check_outside(train.sharding, f"{section}.train.sharding", run)


def data_tables(
    data: PreparedData, features: Sequence[str] | None = None, *, device: torch.device | str | None = None
) -> EmbeddingBagCollection:
    """Fresh tables that `features` of the data's schema read; all that have a table where it is None, for a LUM and
    rankers that share them."""
    schema = data.schema
    names = [name for name, feature in schema.features.items() if feature.table] if features is None else features
    sizes = {name: (rows, schema.tables[name].width) for name, rows in data.table_rows.items()}
    return make_tables(sizes, {name: schema.features[name].table for name in names}, device=device)


def make_lum(config: ModelConfig, schema: SchemaConfig, tables: EmbeddingBagCollection) -> LargeUserModel:
    """A LUM that reads these tables, with fresh weights on torch's current device."""
    features = token_features(config, schema)
    token_encoder = TokenEncoder(
        tables, item_features=features["item"], condition_features=features["condition"], dim=config.dim
    )
    # A query at serving comes after at most max_events - 1 events: training has seen that position.
    return LargeUserModel(
        token_encoder,
        build_user_encoder(config),
        dim=config.dim,
        similarity=config.similarity,
        temperature=config.temperature,
        tokens=config.tokens,
    )


def build_lum(
    config: ModelConfig,
    data: PreparedData,
    *,
    tables: EmbeddingBagCollection | None = None,
) -> tuple[LargeUserModel, PackBuilder]:
    """A LUM with fresh weights, and the builder that makes packs for it.

    tables: those that it reads, with all its features and perhaps others (see `data_tables`); None makes its own.
    """
    features = token_features(config, data.schema)
    model = make_lum(config, data.schema, tables or data_tables(data, sum(features.values(), [])))
    token_encoder = model.token_encoder
    builder = PackBuilder(
        data,
        features=token_encoder.features,
        condition_features=features["condition"],
        tokens=config.tokens,
    )
    return model, builder


def build_user_encoder(config: ModelConfig) -> UserEncoder:
    """The user encoder of a config, with fresh weights on torch's current device ("meta" counts its parameters)."""
    return UserEncoder(
        encoder=config.encoder,
        dim=config.dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        ffn_dim=config.ffn_dim,
        max_tokens=TOKENS_PER_EVENT[config.tokens] * config.max_events,
        dropout=config.dropout,
        time_bias=config.time_bias,
        checkpoint_activations=config.checkpoint_activations,
        compile_blocks=config.compile,
    )


def lum_fingerprint(
    config: ModelConfig, data: PreparedData, *, fold: str, time_share: float
) -> dict[str, str | Settings]:
    """What a checkpoint must agree with: the data, the vocabularies (separately), and the settings of its training."""
    recorded = {"data": data.fingerprint, "vocabulary": data.vocabulary_fingerprint}
    return {**recorded, **_trained_as(config, fold=fold, time_share=time_share)}


def _trained_as(config: ModelConfig, *, fold: str, time_share: float) -> dict[str, str | Settings]:
    """The model, and which events it has not seen: "k/K" of users, and those after a share of the training part."""
    model = Settings.of(config, ignored=("compile", "checkpoint_activations"))
    return {"model": model, "fold": fold, "time_share": repr(float(time_share))}


@dataclass(frozen=True)
class _TimeShare:
    """The one setting of a LUM's pre-training that its readers need."""

    time_share: float = 1.0


def beside(folder: Path, common: Common, stage: str) -> Common:
    """The settings of the run of `stage` in `folder`, with the folder of all runs where it is now."""
    runs_dir = folder.absolute().parents[len(Path(common.run_name(stage)).parts) - 1]
    return dataclasses.replace(common, runs_dir=str(runs_dir))


class TrainedLum(NamedTuple):
    """A finished LUM run: its best checkpoint, that checkpoint's meta.json, and the settings it was trained with.

    time_share: share of the training events, from the earliest on, that it was trained on.
    """

    folder: Path
    checkpoint: Path
    meta: dict[str, Any]
    common: Common
    model: ModelConfig
    time_share: float

    @property
    def prepared(self) -> Path:
        """The folder of the prepared data that it was trained on, beside its own."""
        return beside(self.folder, self.common, "pretrain").prepared

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of the checkpoint."""
        return (self.checkpoint / "COMPLETE").read_text(encoding="utf-8").strip()


def open_lum_run(folder: Path, *, missing: str = "") -> TrainedLum:
    """The LUM of a run folder, as its checkpoint and its config.yaml agree on it; no weights are read.

    Raises MissingFileError (`missing`: its message) where there is no finished run, UserError where it is no LUM's, and
    where the checkpoint is damaged, or was made with another model, fold or share of the training part than config.yaml
    says.
    """
    check_stage(folder, "pretrain", "a LUM")
    if not (folder / "result.json").exists():
        raise MissingFileError(
            missing
            or f"there is no finished LUM in {folder}; make it with: torchx run apps/pretrain.py --config <yours> "
            f"{shlex.quote(f'run={folder.name}')}"
        )
    path = folder / "config.yaml"
    common, model = stored(path, Common), stored(path, ModelConfig, "model")
    time_share = stored(path, _TimeShare, "pretrain", partly=True).time_share
    checkpoint = best_checkpoint(folder)
    meta = read_meta(checkpoint)
    check_fingerprint(
        checkpoint, meta, _trained_as(model, fold=common.fold, time_share=time_share), here=f"{path} says"
    )
    return TrainedLum(folder, checkpoint, meta, common, model, time_share)


def check_lum_fits(lum: TrainedLum, data: PreparedData) -> bool:
    """Whether a LUM was trained on exactly this data; False: on an older state of it, which fits too.

    Raises UserError for other data: its embeddings would be those of other values.
    """
    made_with = lum.meta["fingerprint"]
    if made_with.get("data") == data.fingerprint:
        return True
    if made_with.get("vocabulary") == data.vocabulary_fingerprint:
        return False
    raise UserError(
        f"the LUM {lum.folder.name} was trained on other data (fingerprint {made_with.get('data')}) than {data.path} "
        f"(fingerprint {data.fingerprint}): ask with the data that it was trained on, with a newer log that has the "
        "same schema, split rule and vocabularies (a time split at fixed data.split.times keeps them), or pre-train it "
        "again"
    )


def load_lum(
    folder: str | Path, data: PreparedData | None = None, *, device: torch.device | str | None = None
) -> tuple[DistributedModelParallel, PackBuilder, TrainedLum]:
    """The trained LUM of a run folder in eval mode, its pack builder, and what it was trained with. Collective.

    data: what it is asked about; None opens the prepared data that it was trained on. device: None takes CUDA where
    torch has it. Raises MissingFileError where the
    run has no finished checkpoint, UserError where it was trained on other data.
    """
    lum = open_lum_run(Path(folder))
    if data is None:
        data = PreparedData.open(lum.prepared)
    model, builder = build_lum(lum.model, data)
    dmp = shard(model, device=init_distributed(device))
    check_lum_fits(lum, data)
    load_weights(lum.checkpoint, dmp)
    return dmp.eval(), builder, lum
