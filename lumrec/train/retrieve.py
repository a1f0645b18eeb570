"""Step 3 for retrieval: a two-tower model on the log, without or with what the LUM knows (LUM sections 3 and 4.3)."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, List, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from lumrec import limits
from lumrec.data.negatives import NegativesConfig
from lumrec.data.prepare import open_or_prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.rows import training_rows
from lumrec.data.schema import features_by_role
from lumrec.data.tower_rows import TowerBuilder, TowerLoader
from lumrec.errors import UserError
from lumrec.evaluation.ann import AnnConfig, ann_metrics
from lumrec.evaluation.compare import Ranks, write_scores
from lumrec.evaluation.retrieval import (
    Targets,
    check_cut_offs,
    last_events,
    metric_sums,
    rank_targets,
    retrieval_names,
)
from lumrec.limits import count, setting, share
from lumrec.modules.losses import info_nce
from lumrec.modules.moments import average_moments
from lumrec.modules.retrievers.edb import TowerBatch, TwoTower
from lumrec.precheck import check_data
from lumrec.query.store import Knowledge
from lumrec.train.identity import Settings
from lumrec.train.length import fit_length, tell_length, too_short
from lumrec.train.loop import StepOutput, TrainConfig, check_select, fit
from lumrec.train.lum import MOST_WIDTH, data_tables
from lumrec.train.negatives import gather_candidates
from lumrec.train.optimizers import OptimizerConfig
from lumrec.train.parallel import init_distributed, rank, shard, world_size
from lumrec.train.rank import check_depth, open_knowledge
from lumrec.train.run import RunFolder

if TYPE_CHECKING:
    from lumrec.config import Config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetrieveConfig:
    """Step 3 for retrieval: the two-tower EDB.

    knowledge: "none", or "direct": the LUM's answers enter the user tower, its item embeddings the item tower.
    knowledge_dim: width to which each is projected. knowledge_dropout: share of rows that train without.
    positives: "label" (events with label 1) or "all"; the same events are the targets of the evaluation.
    conditions: condition features of the request, such as its search query, that the user tower reads. Each must be
        known before the item is chosen: an item's own genre would give the answer away.
    max_history: events before the row. batch_size: rows of one step on each rank.
    pooling (attention or mean), similarity (cosine or dot), temperature: see lumrec/modules/retrievers/edb.py.
    dim: width of the vectors. hidden_dims, dropout, activation: of both towers.
    negatives, label_smoothing: of InfoNCE, as in step 1. ks: cut-offs of HR@k (which is R@k: there is one target) and
        NDCG@k. max_users: a fixed sample for the evaluations while training; 0 = all. ann: the FAISS index.
    select: validation metric of the weights that are kept and tested.
    """

    knowledge: Literal["none", "direct"] = "none"
    knowledge_dim: int = count(32, least=1, most=MOST_WIDTH)
    knowledge_dropout: float = share(0.0)
    positives: Literal["label", "all"] = "label"
    conditions: List[str] = field(default_factory=list)
    max_history: int = count(50, most=2**20)
    batch_size: int = count(2048, least=1, most=2**24)
    pooling: Literal["attention", "mean"] = "attention"
    similarity: Literal["cosine", "dot"] = "cosine"
    temperature: float = setting(0.05, least=1e-12, most=1e12)
    dim: int = count(64, least=1, most=MOST_WIDTH)
    hidden_dims: List[int] = count(lambda: [128], least=1, most=MOST_WIDTH)
    dropout: float = share(0.1)
    activation: Literal["relu", "prelu", "dice"] = "relu"
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    label_smoothing: float = share(0.0)
    ks: List[int] = count(lambda: [10, 50], least=1)
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
        check_cut_offs(at, self.ks)
        check_select(at, self.select, retrieval_names(self.ks), patience=self.train.patience)
        check_depth(f"{at}hidden_dims", self.hidden_dims)


def tower_features(config: RetrieveConfig, data: PreparedData) -> list[str]:
    """Features of the user tower beside the history: the user's, the context's and the request's (`conditions`)."""
    declared = features_by_role(data.schema, "condition")
    unknown = sorted(set(config.conditions) - set(declared))
    if unknown:
        raise UserError(f"retrieve.conditions names {unknown}; the schema's condition features are {declared}")
    return [
        *features_by_role(data.schema, "user"),
        *features_by_role(data.schema, "context"),
        *(name for name in declared if name in config.conditions),
    ]


def build_towers(
    config: RetrieveConfig,
    data: PreparedData,
    *,
    knowledge: Knowledge | None = None,
    device: torch.device | str | None = None,
) -> tuple[TwoTower, TowerBuilder]:
    """Towers with fresh weights for the features of the data's schema, and the builder that makes batches for them.

    Raises UserError for an unknown setting, and for knowledge that the config does not want, or the reverse.
    """
    limits.check(config, "retrieve")
    if (knowledge is None) != (config.knowledge == "none"):
        raise UserError(
            f"retrieve.knowledge is {config.knowledge!r} and knowledge was {'not ' * (knowledge is None)}given"
        )
    item, feedback = features_by_role(data.schema, "item"), features_by_role(data.schema, "feedback")
    row = tower_features(config, data)
    towers = TwoTower(
        data_tables(data, [*item, *feedback, *row], device=device),
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
        item_features=item,
        feedback_features=feedback,
        row_features=row,
        max_history=config.max_history,
        knowledge=knowledge,
    )
    return towers, builder


def make_step(config: RetrieveConfig) -> Callable[[nn.Module, TowerBatch], StepOutput]:
    """The step function of the training loop: InfoNCE of the batch's rows, the loss of step 1."""
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
    """Events that are learned from and aimed at, bool [E]. Raises UserError for an unknown `positives`."""
    return data.label > 0.5 if config.positives == "label" else np.ones(data.num_events, dtype=bool)


@torch.no_grad()
def user_vectors(dmp: DistributedModelParallel, builder: TowerBuilder, rows: np.ndarray, *, batch_size: int) -> Tensor:
    """Vector of each row's user at that moment, o_NV (float32), on every rank; each computes its share. Collective.

    The model should be in eval mode.
    """
    first = np.zeros(1, np.int64)  # TorchRec cannot look up nothing at all, so a batch without histories reads one item
    steps = -(-len(rows) // (batch_size * world_size()))
    # Where rows do not suffice a rank has batches of none; sharded tables need every rank's call.
    mine = np.array_split(np.arange(len(rows)), steps * world_size())[rank() :: world_size()]
    parts = [dmp(builder.towers(rows[place_B], first).to(dmp.device))[0].float().cpu() for place_B in mine]
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
    """{"hr@10": …, "ndcg@10": …, "retrieval_users": …} of `part`, exact over the catalogue; vectors, targets and their
    ranks.

    The target is each user's last positive event of the part, the history what is before its moment, and items of the
    history are left out, as in lumrec/evaluation/retrieval.py. The same on every rank. Collective.
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
    """A raw value as a part of a metric's name, in quotes where it could be taken for more than a value."""
    return value if value.isprintable() and not set(value) & set(',=/"') else json.dumps(value)


def knowledge_metrics(knowledge: Knowledge, data: PreparedData, targets: Targets, ks: List[int]) -> dict[str, float]:
    """{"lum/feedback=like/hr@10": …, …}: retrieval by o · e of the stored answers themselves, for each condition.

    A user without an answer is a miss: all similarities are 0, and ties count against us. Collective.
    """
    answers = knowledge.for_rows(targets.row_B.numpy())
    result: dict[str, float] = {}
    for place, condition in enumerate(knowledge.conditions):
        name = ",".join(f"{feature}={_in_key(value)}" for feature, value in condition.items()) or "no condition"
        rank_B = torch.full((len(targets.row_B),), torch.iinfo(torch.int64).max)
        for fold in range(knowledge.num_folds):
            theirs = answers.fold_B == fold
            if bool(theirs.any()):
                e_ID = knowledge.items_e[fold].float()
                rank_B[theirs] = _ranks(answers.o_BND[theirs, place], e_ID, data, targets.take(theirs))
        result |= {f"lum/{name}/{metric}": value / len(rank_B) for metric, value in metric_sums(rank_B, ks).items()}
    return result


def run(config: "Config") -> dict[str, float | str]:
    """Trains the towers into `runs/<run>`, tests the weights that were best on validation, once; returns result.json.

    Keys: hr@k, ndcg@k, retrieval_users of the test part, exact over the catalogue; valid/… of the kept weights; ann/…
    of the FAISS index (see ann_metrics); lum/<condition>/… of the LUM's answers alone; rows_per_s, wall_s, best_step,
    …; and as text knowledge and knowledge_hazard. The test users' ranks are kept for
    lumrec/report/gains.py. Raises MissingFileError for a missing input, with the command that makes it.
    """
    settings, started = config.retrieve, time.perf_counter()
    device = init_distributed(threads=config.threads)
    data = open_or_prepare(config)
    check_data(config, data, "retrieve")
    inputs = {"data": data.fingerprint}
    knowledge = open_knowledge(config, data, settings.knowledge)
    if knowledge is not None:
        inputs["knowledge"] = knowledge.path.name
    run_folder = RunFolder.create(config, "retrieve", inputs=inputs)
    if run_folder.finished:
        return run_folder.result()
    torch.manual_seed(config.seed)
    towers, builder = build_towers(settings, data, knowledge=knowledge)
    rows = training_rows(data, knowledge)
    rows = rows[positive_events(settings, data)[rows]]
    train, batch_size = fit_length(settings.train, settings.batch_size, len(rows))
    tell_length("retrieve", train, batch_size, len(rows), (settings.train, settings.batch_size))
    dmp = shard(towers, optimizer=train.optimizer, device=device, sharding=train.sharding, fsdp=train.fsdp)
    loader = TowerLoader(
        builder,
        rows,
        negatives=settings.negatives,
        batch_size=batch_size,
        seed=config.seed,
        rank=rank(),
        world_size=world_size(),
    )
    # The run folder compares how it is trained; a checkpoint belongs to what is trained.
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
