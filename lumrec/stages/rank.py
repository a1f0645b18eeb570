"""Step 3: trains a ranker on the log, without or with the LUM's knowledge (LUM section 4.3)."""

import dataclasses
import logging
import shlex
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torchrec.distributed.model_parallel import DistributedModelParallel

from lumrec.batches.rows import RowBuilder, RowLoader, training_rows
from lumrec.data.common import Common
from lumrec.data.prepare import open_or_prepare, schema_to_read
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig, features_by_role
from lumrec.data.splits import TEST, VALID
from lumrec.evaluation.ranking import evaluate, score
from lumrec.features.statistics import check_kind
from lumrec.knowledge.manifest import read_manifest
from lumrec.knowledge.store import Knowledge
from lumrec.models.lum import TrainedLum, check_tables, condition_features, open_lum_run
from lumrec.models.ranker import make_ranker, open_knowledge, ranker_tables
from lumrec.models.ranker_config import RankerConfig
from lumrec.modules.rankers.base import RankBatch
from lumrec.run.distributed import init_distributed, rank, world_size
from lumrec.run.errors import UserError
from lumrec.run.folder import RunFolder
from lumrec.run.limits import check_names, count, setting
from lumrec.run.unread import check_read
from lumrec.train.checkpoint import load_weights
from lumrec.train.checkpoint_meta import Fingerprint
from lumrec.train.config import TrainConfig, check_no_encoder, check_select
from lumrec.train.identity import Settings
from lumrec.train.length import fit_length, too_short
from lumrec.train.loop import StepOutput, fit
from lumrec.train.optimizers import OptimizerConfig
from lumrec.train.parallel import shard
from lumrec.warm_start.config import WarmStartConfig
from lumrec.warm_start.scores import read_expected

logger = logging.getLogger(__name__)

# Metrics that weights can be selected by, with "-" before those that are better when lower.
SELECTABLE = ("auc", "gauc", "-log_loss", "-ne", "-ece")


@dataclass(frozen=True)
class RankConfig(RankerConfig):
    """Step 3: a ranker (see RankerConfig) and how it is trained.

    tables: "fresh", or "lum": tables that the LUM (the first of inputs.lums) also has start with its weights.
    time_window: train only on the rows between these two shares of the training part by time, such as [0.75, 1]; [] =
        all of them.
    batch_size: rows of one step on each rank.
    select: validation metric that chooses the weights to keep and test ("auc", "gauc", "-log_loss", …).
    test: evaluate the test part at the end; false while settings are being tuned (lumrec/experiments/tune.py).
    """

    tables: Literal["fresh", "lum"] = "fresh"
    time_window: list[float] = setting(list, least=0, most=1)
    batch_size: int = count(2048, least=1, most=2**24)
    select: str = "auc"
    test: bool = True
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            epochs=3,
            optimizer=OptimizerConfig(
                table_lr=0.2, dense_lr=4e-3, weight_decay=0.01, warmup_steps=50, schedule="linear"
            ),
        )
    )

    def check(self, at: str) -> None:
        """Raises UserError for settings that contradict one another (`at`: the section, with a dot)."""
        super().check(at)
        check_select(at, self.select, SELECTABLE, patience=self.train.patience)
        check_no_encoder(at, self.train)
        if self.tables == "lum" and self.warm_start.source:
            raise UserError(f"{at}tables=lum and {at}warm_start.source both fill the tables: give one of them")
        if self.time_window and not (len(self.time_window) == 2 and self.time_window[0] < self.time_window[1]):
            raise UserError(f"{at}time_window: got {list(self.time_window)}, expected two shares, such as [0.75, 1]")


def step(model: nn.Module, batch: RankBatch) -> StepOutput:
    """The step function of the training loop: binary cross-entropy of the rows, plus the ranker's auxiliary loss."""
    logit_B, own_loss = model(batch, with_loss=True)
    loss = F.binary_cross_entropy_with_logits(logit_B, batch.label_B, reduction="sum")
    return StepOutput(loss + len(batch) * own_loss, len(batch))


def check_inputs(common: Common, *, rank: RankConfig) -> None:
    """Raises UserError for missing or invalid files and for settings that the chosen ranker does not read."""
    check_read(rank, "rank")
    rank.warm_start.check_inputs("rank.warm_start.", common.prepared, common.folder("rank"))


def check_schema(common: Common, schema: SchemaConfig, *, rank: RankConfig) -> None:
    """Raises UserError where the settings, a sharding plan or the rules of a warm start name what the schema or the
    ranker does not have.
    """
    check_names("rank.leave_out", list(rank.leave_out), list(schema.features), "features of the schema")
    declared = features_by_role(schema, "item")
    items = [name for name in declared if name not in rank.leave_out]
    if not items:
        raise UserError(f"rank.leave_out leaves no item feature for the ranker to read; keep one of {declared}")
    category = [rank.category] if rank.category else []
    check_names(f"rank.{rank.model}.category", category, items, "item features that the ranker reads")
    if rank.takes_a_category and not category and not any(schema.features[name].kind == "multi" for name in items):
        raise UserError(
            f"rank.{rank.model}.category: got '', which is the first multi-valued item feature, and there is none; "
            f"expected one of {', '.join(map(repr, items))}"
        )
    tables = ranker_tables(rank, schema)
    check_tables("rank", rank.train, tables, common.folder("rank"))
    rank.warm_start.check_names(tables, "", common.prepared)


def check_data(common: Common, data: PreparedData, *, rank: RankConfig) -> None:
    """Raises UserError for statistics that these prepared data cannot have."""
    check_kind(data, rank.statistics)


def lum_of_tables(common: Common) -> TrainedLum:
    """The LUM whose tables the ranker takes: the first of `inputs.lums`. Raises like `open_lum_run`."""
    run = common.lums[0]
    return open_lum_run(
        common.runs / run,
        missing=f"rank.tables=lum, but there is no finished LUM in {common.runs / run}; make it with: "
        f"torchx run apps/pretrain.py --config <your config> {shlex.quote(f'run={run}')}; or train with "
        "rank.tables=fresh",
    )


def load_lum_tables(folder: Path, data: PreparedData, dmp: DistributedModelParallel) -> list[str]:
    """Fills the tables that the LUM in `folder` also has with its weights; returns their names. Optimizer state
    restarts.

    Raises UserError where the LUM was trained on other data.
    """
    lum = open_lum_run(folder)
    schema = data.schema
    read_by_lum = [*features_by_role(schema, "item"), *features_by_role(schema, "feedback")]
    read_by_lum += condition_features(lum.model, data.schema)
    ours = {name for name, _ in dmp.named_parameters()}
    mapping = {}
    for table in dict.fromkeys(schema.features[name].table for name in read_by_lum):
        weight = f"tables.embedding_bags.{table}.weight"
        if weight in ours:
            mapping[f"token_encoder.{weight}"] = weight
    load_weights(lum.checkpoint, dmp, mapping, fingerprint={"data": data.fingerprint})
    return [weight.split(".")[2] for weight in mapping.values()]


def run(common: Common, settings: RankConfig) -> dict[str, float | str]:
    """Trains a ranker into `runs/<run>`, tests the weights that were best on validation, and returns result.json.

    Keys of the test part (not with rank.test=false): auc, gauc, log_loss, ne, calibration, ece, num_rows, num_users,
    num_users_skipped; and auc_low, auc_high, … for the first three (95 % intervals over users). Other keys: valid/… of
    the selected weights; rows_per_s of training, wall_s, best_step, …; and as text model, knowledge, knowledge_hazard,
    tables_from_lum, warm_start (its source), and `note` and `undefined` where a part is empty or has only one class.
    The test rows' scores are saved for lumrec.metrics.compare.
    Raises MissingFileError for a missing input, with the command that makes it.
    """
    started = time.perf_counter()
    recorded = common.settings(rank=settings)
    device = init_distributed(threads=common.threads)
    check_inputs(common, rank=settings)
    check_schema(common, schema_to_read(common), rank=settings)
    lum = lum_of_tables(common) if settings.tables == "lum" else None
    if settings.knowledge != "none" and common.data.source != "served":  # served rows hold their own
        read_manifest(common.knowledge)  # raises, if there is none, before data are read
    data = open_or_prepare(common, served=True)
    inputs = {"data": data.fingerprint}
    production = None
    knowledge = open_knowledge(common.knowledge, data) if settings.knowledge != "none" else None
    if knowledge is not None:
        inputs["knowledge"] = knowledge.path.name
    if lum is not None:
        inputs["lum"] = lum.fingerprint
    if settings.warm_start.source:
        production = settings.warm_start.open()
        inputs["warm_start"] = settings.warm_start.fingerprint(production)
    expected = read_expected(settings.warm_start.scores, data) if settings.warm_start.scores else None
    run_folder = RunFolder.create(common.folder("rank"), "rank", recorded, inputs=inputs)
    if run_folder.finished:
        return run_folder.result()
    dmp, builder = sharded_ranker(settings, data, knowledge, seed=common.seed, device=device)
    num_searched = getattr(settings.own, "num_searched", None)
    if num_searched is not None and settings.max_history <= num_searched:
        logger.warning(
            "rank: %s selects %d events from histories of %d, so it leaves none out; it is made for long histories, "
            "such as rank.max_history=1024",
            settings.model, num_searched, settings.max_history,
        )  # fmt: skip
    result: dict[str, float | str] = {"model": settings.model, "knowledge": settings.knowledge}
    if knowledge is not None:
        result["knowledge_hazard"] = knowledge.hazard
    if lum is not None:
        result["tables_from_lum"] = ", ".join(load_lum_tables(lum.folder, data, dmp))
    if production is not None:
        logits = partial(score, dmp, builder, batch_size=settings.batch_size)
        audit = settings.warm_start.fill(dmp, production, data, run_folder.path, expected=expected, score=logits)
        result["warm_start"] = audit.source
    # The run folder compares the settings of training; a checkpoint only depends on those of the model.
    model = Settings.of(settings, ignored=["train"])
    result |= _train(settings, dmp, builder, run_folder, common.seed, {**inputs, "model": model})
    if settings.test:
        result |= evaluate(dmp, builder, TEST, batch_size=settings.batch_size, keep_in=run_folder.path)
    result["wall_s"] = time.perf_counter() - started
    run_folder.finish(result)
    return result


def sharded_ranker(
    settings: RankConfig, data: PreparedData, knowledge: Knowledge | None, *, seed: int, device: torch.device
) -> tuple[DistributedModelParallel, RowBuilder]:
    """The ranker with fresh weights under DMP, and the builder of its batches. Collective."""
    train = settings.train
    torch.manual_seed(seed)
    ranker, builder = make_ranker(settings, data, knowledge, keep=True)
    dmp = shard(ranker, optimizer=train.optimizer, device=device, sharding=train.sharding, fsdp=train.fsdp)
    return dmp, builder


def _train(
    settings: RankConfig,
    dmp: DistributedModelParallel,
    builder: RowBuilder,
    run_folder: RunFolder,
    seed: int,
    fingerprint: Fingerprint,
) -> dict[str, float | str]:
    """Metrics of `fit`, with a note if the validation part cannot select weights; leaves the best weights in `dmp`."""
    select, notes = settings.select, []
    rows = builder.data.with_negatives(training_rows(builder.data, builder.knowledge, settings.time_window))
    train, batch_size = fit_length("rank", settings.train, settings.batch_size, len(rows))
    loader = RowLoader(builder, rows, batch_size=batch_size, seed=seed, rank=rank(), world_size=world_size())
    if short := too_short(train, len(loader)):
        notes.append(short)

    def validate() -> dict[str, float]:
        metrics = evaluate(dmp, builder, VALID, batch_size=settings.batch_size)
        return {name: value for name, value in metrics.items() if not isinstance(value, str)}

    has_validation = bool((builder.data.split == VALID).any())
    if not has_validation:
        notes.append("the validation part has no rows: the last weights are kept and tested")
        train, select = dataclasses.replace(train, patience=0), ""
    metrics = fit(
        model=dmp,
        loader=loader,
        step=step,
        config=train,
        run=run_folder,
        evaluate=validate if has_validation else None,
        select=select,
        progress=f"rank {settings.model} {settings.knowledge}",
        fingerprint=fingerprint,
    )
    result: dict[str, float | str] = {}
    result |= {"rows_per_s" if name == "events_per_s" else name: value for name, value in metrics.items()}
    if select and f"valid/{select.removeprefix('-')}" not in result:
        notes.append(f"{select} is nan over the validation part: the last weights are kept and tested")
    if notes:
        result["note"] = "; ".join(notes)
        logger.warning("rank: %s", result["note"])
    return result
