"""Step 3 for retrieval: trains two towers on the log, without or with the LUM's knowledge (LUM sections 3 and 4.3)."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from lumrec.batches.negatives import NegativesConfig
from lumrec.batches.rows import training_rows
from lumrec.batches.tower_rows import TowerBuilder, TowerLoader
from lumrec.data.common import Common
from lumrec.data.prepare import open_or_prepare, schema_to_read
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig, features_by_role
from lumrec.evaluation.ann import AnnConfig, ann_metrics
from lumrec.evaluation.retrieval import (
    Targets,
    check_cut_offs,
    last_events,
    metric_sums,
    rank_targets,
    retrieval_names,
)
from lumrec.knowledge.manifest import read_manifest
from lumrec.knowledge.store import Knowledge
from lumrec.metrics.compare import Ranks, write_scores
from lumrec.models.lum import check_tables
from lumrec.models.towers import TowersConfig, build_towers, tower_tables
from lumrec.modules.losses import info_nce
from lumrec.modules.moments import average_moments
from lumrec.modules.retrievers.edb import TowerBatch
from lumrec.run.distributed import init_distributed, rank, world_size
from lumrec.run.folder import RunFolder
from lumrec.run.limits import check_names, count, share
from lumrec.run.unread import check_read
from lumrec.train.config import TrainConfig, check_no_encoder, check_select
from lumrec.train.gather_candidates import gather_candidates
from lumrec.train.identity import Settings
from lumrec.train.length import fit_length, too_short
from lumrec.train.loop import StepOutput, fit
from lumrec.train.optimizers import OptimizerConfig
from lumrec.train.parallel import shard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetrieveConfig(TowersConfig):
    """Step 3 for retrieval: the towers (see TowersConfig) and how they are trained.

    positives: "label" (events with label 1) or "all"; the same events are the targets of the evaluation.
    batch_size: rows of one step on each rank.
    label_smoothing: share of InfoNCE's target that is spread over all candidates, as in step 1.
    ks: cut-offs of HR@k (which is R@k, as there is one target) and NDCG@k.
    max_users: a fixed sample of the users for the evaluations while training; 0 = all.
    select: validation metric that chooses the weights to keep and test.
    """

    positives: Literal["label", "all"] = "label"
    batch_size: int = count(2048, least=1, most=2**24)
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    label_smoothing: float = share(0.0)
    ks: list[int] = count(lambda: [10, 50], least=1)
    max_users: int = count(0)
    ann: AnnConfig = field(default_factory=AnnConfig)
    select: str = "ndcg@10"
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            epochs=5,
            optimizer=OptimizerConfig(
                table_lr=0.1, dense_lr=2e-3, weight_decay=0.01, warmup_steps=50, schedule="linear"
            ),
        )
    )

    def check(self, at: str) -> None:
        """Raises UserError for settings that contradict one another (`at`: the section, with a dot)."""
        super().check(at)
        check_cut_offs(at, self.ks)
        check_select(at, self.select, retrieval_names(self.ks), patience=self.train.patience)
        check_no_encoder(at, self.train)


def make_step(config: RetrieveConfig) -> Callable[[nn.Module, TowerBatch], StepOutput]:
    """The step function of the training loop: InfoNCE of the batch's rows, as in step 1."""
    negatives = config.negatives

    def step(model: nn.Module, batch: TowerBatch) -> StepOutput:
        o_BV, e_CV = model(batch)
        candidates = e_CV, batch.positive_B, batch.log_weight_C
        if negatives.across_ranks:
            candidates = gather_candidates(
                e_CV, batch.candidate_item_C, batch.positive_B, batch.log_weight_C, unique=negatives.unique
            )
        loss = info_nce(
            o_BV,
            *candidates,
            log_positive_weight_T=batch.log_positive_weight_B if negatives.logq_positive else None,
            label_smoothing=config.label_smoothing,
        )
        return StepOutput(loss, len(batch))

    return step


def positive_events(config: RetrieveConfig, data: PreparedData) -> np.ndarray:
    """Events that are trained on and that may be targets, bool [E]."""
    return data.label > 0.5 if config.positives == "label" else np.ones(data.num_events, dtype=bool)


@torch.no_grad()
def user_vectors(dmp: DistributedModelParallel, builder: TowerBuilder, rows: np.ndarray, *, batch_size: int) -> Tensor:
    """Vector of each row's user at that moment, o_NV (float32), on every rank; each computes its share. Collective.

    The model should be in eval mode.
    """
    first = np.zeros(1, np.int64)  # TorchRec cannot look up nothing, so a batch without histories reads one item
    steps = -(-len(rows) // (batch_size * world_size()))
    # If there are too few rows, some ranks get empty batches: with sharded tables every rank must call the model.
    mine = np.array_split(np.arange(len(rows)), steps * world_size())[rank() :: world_size()]
    parts = [dmp(builder.towers(rows[index_B], first).to(dmp.device))[0].float().cpu() for index_B in mine]
    o_NV = torch.zeros(len(rows), parts[0].shape[1])
    o_NV[np.concatenate(mine)] = torch.cat(parts)
    if world_size() > 1:
        dist.all_reduce(o_NV)
    return o_NV


@torch.no_grad()
def item_vectors(dmp: DistributedModelParallel, builder: TowerBuilder) -> Tensor:
    """Vector of every catalogue item, e_IV (float32), on every rank. Collective; the model should be in eval mode."""
    return torch.cat([dmp(batch.to(dmp.device))[1].float().cpu() for batch in builder.catalogue()])


def retrieval_metrics(
    dmp: DistributedModelParallel, builder: TowerBuilder, part: str, config: RetrieveConfig, *, max_users: int = 0
) -> tuple[dict[str, float], tuple[Tensor, Tensor, Targets, Tensor]]:
    """({"hr@10": …, "ndcg@10": …, "retrieval_users": …}, (o_BV, e_IV, targets, rank_B)) of `part`. Collective.

    Exact over the catalogue and the same on every rank. The target is each user's last positive event of the part; the
    history ends before its moment, and the history's items are not candidates, as in lumrec/evaluation/retrieval.py.
    Raises UserError where no user has such an event.
    """
    among = positive_events(config, builder.data)
    targets = last_events(builder.data, part, among=among, max_users=max_users, strictly_earlier=True)
    training = dmp.training
    dmp.eval()
    average_moments(dmp)
    try:
        o_BV = user_vectors(dmp, builder, targets.row_B.numpy(), batch_size=config.batch_size)
        e_IV = item_vectors(dmp, builder)
    finally:
        dmp.train(training)
    rank_B = _ranks(o_BV, e_IV, builder.data, targets)
    means = {name: value / len(rank_B) for name, value in metric_sums(rank_B, config.ks).items()}
    return means | {"retrieval_users": float(len(rank_B))}, (o_BV, e_IV, targets, rank_B)


def _ranks(o_BV: Tensor, e_IV: Tensor, data: PreparedData, targets: Targets) -> Tensor:
    """Rank of each target among the catalogue, rank_B (int64), on every rank; each computes its share. Collective."""
    mine = slice(rank(), None, world_size())
    rank_B = torch.zeros(len(targets.row_B), dtype=torch.int64)
    rank_B[mine] = rank_targets(o_BV[mine], e_IV, data, targets.take(mine))
    if world_size() > 1:
        dist.all_reduce(rank_B)
    return rank_B


def _in_key(value: str) -> str:
    """A raw value as a part of a metric's name, quoted if it has characters that separate the parts of a name."""
    return value if value.isprintable() and not set(value) & set(',=/"') else json.dumps(value)


def knowledge_metrics(knowledge: Knowledge, data: PreparedData, targets: Targets, ks: list[int]) -> dict[str, float]:
    """{"lum/feedback=like/hr@10": …, …}: retrieval by o · e of the stored answers, for each condition.

    A user without an answer counts as a miss. Collective.
    """
    answers = knowledge.for_rows(targets.row_B.numpy())
    result: dict[str, float] = {}
    for n, condition in enumerate(knowledge.conditions):
        name = ",".join(f"{feature}={_in_key(value)}" for feature, value in condition.items()) or "no condition"
        rank_B = torch.full((len(targets.row_B),), torch.iinfo(torch.int64).max)
        for fold in range(knowledge.num_folds):
            theirs = answers.fold_B == fold
            if bool(theirs.any()):
                e_ID = knowledge.items_e[fold].float()
                rank_B[theirs] = _ranks(answers.o_BND[theirs, n], e_ID, data, targets.take(theirs))
        result |= {f"lum/{name}/{metric}": value / len(rank_B) for metric, value in metric_sums(rank_B, ks).items()}
    return result


def check_inputs(common: Common, *, retrieve: RetrieveConfig) -> None:
    """Raises UserError for settings that these towers do not read."""
    check_read(retrieve, "retrieve")


def check_schema(common: Common, schema: SchemaConfig, *, retrieve: RetrieveConfig) -> None:
    """Raises UserError where the settings, or a sharding plan, name what the schema or the towers do not have."""
    conditions = features_by_role(schema, "condition")
    check_names("retrieve.conditions", list(retrieve.conditions), conditions, "condition features")
    check_tables("retrieve", retrieve.train, tower_tables(retrieve, schema), common.folder("retrieve"))


def check_data(common: Common, data: PreparedData, *, retrieve: RetrieveConfig) -> None:
    """Raises UserError where a split has no event that could be a target."""
    for part in ("valid", "test"):
        last_events(data, part, among=positive_events(retrieve, data), max_users=1)


def run(common: Common, settings: RetrieveConfig) -> dict[str, float | str]:
    """Trains the towers into `runs/<run>`, tests the weights that were best on validation, and returns result.json.

    Keys: hr@k, ndcg@k, retrieval_users of the test part, exact over the catalogue; valid/… of the selected weights;
    ann/… of the FAISS index (see ann_metrics); lum/<condition>/… of the LUM's answers without towers; rows_per_s,
    wall_s, best_step, …; and as text knowledge and knowledge_hazard. The test users' ranks are saved for
    lumrec/experiments/report_gains.py. Raises MissingFileError for a missing input, with the command that makes it.
    """
    started = time.perf_counter()
    recorded = common.settings(retrieve=settings)
    device = init_distributed(threads=common.threads)
    check_inputs(common, retrieve=settings)
    check_schema(common, schema_to_read(common), retrieve=settings)
    if settings.knowledge != "none":
        read_manifest(common.knowledge)  # raises, if there is none, before data are read
    data = open_or_prepare(common)
    check_data(common, data, retrieve=settings)
    inputs = {"data": data.fingerprint}
    knowledge = Knowledge.open(common.knowledge, data) if settings.knowledge != "none" else None
    if knowledge is not None:
        inputs["knowledge"] = knowledge.path.name
    run_folder = RunFolder.create(common.folder("retrieve"), "retrieve", recorded, inputs=inputs)
    if run_folder.finished:
        return run_folder.result()
    torch.manual_seed(common.seed)
    towers, builder = build_towers(settings, data, knowledge=knowledge)
    rows = training_rows(data, knowledge)
    rows = rows[positive_events(settings, data)[rows]]
    train, batch_size = fit_length("retrieve", settings.train, settings.batch_size, len(rows))
    dmp = shard(towers, optimizer=train.optimizer, device=device, sharding=train.sharding, fsdp=train.fsdp)
    loader = TowerLoader(
        builder,
        rows,
        negatives=settings.negatives,
        batch_size=batch_size,
        seed=common.seed,
        rank=rank(),
        world_size=world_size(),
    )
    # The run folder compares the settings of training; a checkpoint only depends on those of the model.
    model = Settings.of(settings, ignored=["train", "ann"])
    result: dict[str, float | str] = {"knowledge": settings.knowledge}
    if knowledge is not None:
        result["knowledge_hazard"] = knowledge.hazard
    if short := too_short(train, len(loader)):
        result["note"] = short
        logger.warning("retrieve: %s", short)
    metrics = fit(
        model=dmp,
        loader=loader,
        step=make_step(settings),
        config=train,
        run=run_folder,
        evaluate=lambda: retrieval_metrics(dmp, builder, "valid", settings, max_users=settings.max_users)[0],
        select=settings.select,
        progress=f"retrieve {settings.knowledge}",
        fingerprint={**inputs, "model": model},
    )
    result |= {"rows_per_s" if name == "events_per_s" else name: value for name, value in metrics.items()}
    exact, (o_BV, e_IV, targets, rank_B) = retrieval_metrics(dmp, builder, "test", settings)
    result |= exact
    if rank() == 0:
        row_B = targets.row_B.numpy()
        write_scores(run_folder.path, Ranks(row_B, data.user[row_B].astype(np.int64), rank_B.numpy()))
    if settings.ann.index:
        result |= ann_metrics(o_BV, e_IV, data, targets, config=settings.ann, ks=settings.ks)
    if knowledge is not None:
        result |= knowledge_metrics(knowledge, data, targets, settings.ks)
    result["wall_s"] = time.perf_counter() - started
    run_folder.finish(result)
    return result
