"""Step 3: a ranker on the log, without or with what the LUM knows (LUM section 4.3)."""

import dataclasses
import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from lumrec import limits
from lumrec.data.prepare import open_or_prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.rows import RowBuilder, RowLoader, evaluation_batches, training_rows
from lumrec.data.schema import features_by_role
from lumrec.data.splits import TEST, VALID
from lumrec.data.statistics import Statistics, dense_inputs
from lumrec.errors import UserError
from lumrec.evaluation.bootstrap import intervals
from lumrec.evaluation.compare import Scores, write_scores
from lumrec.evaluation.metrics import ranking_metrics
from lumrec.limits import count, setting, share
from lumrec.modules.knowledge import KnowledgeFusion
from lumrec.modules.moments import average_moments
from lumrec.modules.rankers.base import RankBatch, Ranker
from lumrec.modules.rankers.dien import Dien
from lumrec.modules.rankers.din import Din
from lumrec.modules.rankers.dlrm import Dlrm
from lumrec.modules.rankers.sim import Sim
from lumrec.modules.rankers.twin import Twin
from lumrec.precheck import check_data
from lumrec.query.store import Knowledge
from lumrec.train.checkpoint import load_weights
from lumrec.train.checkpoint_meta import Fingerprint
from lumrec.train.identity import Settings
from lumrec.train.length import fit_length, tell_length, too_short
from lumrec.train.loop import StepOutput, TrainConfig, check_select, fit
from lumrec.train.lum import MOST_WIDTH, TrainedLum, condition_features, data_tables, open_lum_run
from lumrec.train.optimizers import OptimizerConfig
from lumrec.train.parallel import init_distributed, rank, shard, world_size
from lumrec.train.run import RunFolder
from lumrec.warm_start.config import WarmStartConfig
from lumrec.warm_start.scores import read_expected

if TYPE_CHECKING:
    from lumrec.config import Config

logger = logging.getLogger(__name__)

# Name → class, and the settings of RankConfig that it takes beside those of all rankers.
MODELS: dict[str, tuple[type[Ranker], tuple[str, ...]]] = {
    "din": (Din, ("activation_dim", "softmax")),
    "dlrm": (Dlrm, ("cross_dim",)),
    "dien": (Dien, ("auxiliary_weight",)),
    "sim": (Sim, ("search", "num_searched", "num_heads", "head_dim", "num_recent", "auxiliary_weight")),
    "twin": (Twin, ("num_searched", "num_heads", "head_dim")),
}
MOST_LAYERS = 64
# What weights can be chosen by; "-" before a metric that is better when it is lower.
SELECTABLE = ("auc", "gauc", "-log_loss", "-ne", "-ece")


@dataclass(frozen=True)
class RankConfig:
    """Step 3.

    model: "din", "dlrm" (Embedding + MLP with pooled history), "dien", "sim" or "twin"; see lumrec/modules/rankers.
    knowledge: "none", "direct" (the LUM's answers as features), "matching" (their similarity to the target) or "both".
    knowledge_attention: the answers pooled by their match with the target join the features of any of these modes.
    knowledge_dim: width to which answers are projected. knowledge_dropout: share of rows that train without.
    tables: "fresh", or "lum": tables that the LUM (the first of inputs.lums) has too start with its weights.
    statistics: "all", "user" (none that need other users' labels) or "none"; see lumrec/data/statistics.py. The
    schema's dense features are read beside them.
    leave_out: features of the schema that the ranker does not read.
    time_window: shares of the training part by time, such as [0.75, 1]: the rows after the first and until the second
    train; [] = all of them.
    max_history: events before the row; SIM and TWIN are made for long histories, such as 1024.
    batch_size: rows of one step on each rank.
    hidden_dims, dropout: of the over-arch. activation: "prelu", "relu" or "dice", there and in DIN's activation unit.
    token_l2: DIN's mini-batch aware regularisation, for any ranker; 0 = none.
    activation_dim, softmax: DIN's activation unit; see lumrec/modules/rankers/din.py.
    cross_dim: DLRM's cross features, dot products of its fields at this width; 0 = none.
    auxiliary_weight: of DIEN's auxiliary loss and of the task that trains SIM's soft search.
    search: SIM's, "soft" or "hard"; category: the item feature that the hard search compares and whose earlier events
    TWIN counts (its first value; "" = the first multi-valued item feature).
    num_searched, num_heads, head_dim: SIM's and TWIN's attention. num_recent: events of SIM's short-term interest.
    select: validation metric of the weights that are kept and tested ("auc", "gauc", "-log_loss", …).
    test: evaluate the test part at the end; false while settings are being searched (lumrec/tune.py).
    warm_start: a production checkpoint to begin from; see docs/how-to/warm-start.md.
    """

    model: Literal["din", "dlrm", "dien", "sim", "twin"] = "din"
    knowledge: Literal["none", "direct", "matching", "both"] = "none"
    knowledge_attention: bool = False
    knowledge_dim: int = count(32, least=1, most=MOST_WIDTH)
    knowledge_dropout: float = share(0.0)
    tables: Literal["fresh", "lum"] = "fresh"
    statistics: Literal["all", "user", "none"] = "all"
    leave_out: List[str] = field(default_factory=list)
    time_window: List[float] = setting(list, least=0, most=1)
    max_history: int = count(50, most=2**20)
    batch_size: int = count(2048, least=1, most=2**24)
    hidden_dims: List[int] = count(lambda: [200, 80], least=1, most=MOST_WIDTH)
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
        check_select(at, self.select, SELECTABLE, patience=self.train.patience)
        if self.tables == "lum" and self.warm_start.source:
            raise UserError(f"{at}tables=lum and {at}warm_start.source both fill the tables: give one of them")
        if self.model == "sim" and self.search == "soft" and not self.auxiliary_weight:
            raise UserError(f"{at}auxiliary_weight: got 0, and without it SIM's soft search learns nothing; raise it")
        if self.time_window and not (len(self.time_window) == 2 and self.time_window[0] < self.time_window[1]):
            raise UserError(f"{at}time_window: got {list(self.time_window)}, expected two shares, such as [0.75, 1]")
        check_depth(f"{at}hidden_dims", self.hidden_dims)


def check_depth(key: str, hidden_dims: Sequence[int]) -> None:
    """Raises UserError for more layers than any over-arch has."""
    if len(hidden_dims) > MOST_LAYERS:
        raise UserError(f"{key}: got {len(hidden_dims)} layers; expected at most {MOST_LAYERS}")


def row_features(data: PreparedData) -> list[str]:
    """Features of the row itself: the user's, the context's, and conditions that are known before the item is shown.

    A wish (such as the feedback that is hoped for) is what the row is about to be asked, and so is left out.
    """
    known = [name for name in features_by_role(data.schema, "condition") if not data.schema.features[name].wish]
    return [*features_by_role(data.schema, "user"), *features_by_role(data.schema, "context"), *known]


def build_ranker(
    config: RankConfig,
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


def step(model: nn.Module, batch: RankBatch) -> StepOutput:
    """The step function of the training loop: binary cross-entropy of the batch's rows, and the ranker's own losses."""
    logit_B, own_loss = model(batch, with_loss=True)
    loss = F.binary_cross_entropy_with_logits(logit_B, batch.label_B, reduction="sum")
    return StepOutput(loss + len(batch) * own_loss, len(batch))


def score(dmp: DistributedModelParallel, builder: RowBuilder, rows: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Logit of each of the rows `rows` (float64 [N]), on every rank; each rank computes its share. Collective."""
    was_training = dmp.training
    dmp.eval()
    average_moments(dmp)
    logit_N = torch.zeros(len(rows), dtype=torch.float64)
    times_N = torch.zeros(len(rows), dtype=torch.float64)
    with torch.no_grad():
        batches = evaluation_batches(builder, rows, batch_size=batch_size, rank=rank(), world_size=world_size())
        for place_B, batch in batches:
            logit_N[place_B] = dmp(batch.to(dmp.device)).double().cpu()
            times_N[place_B] = 1.0
    if world_size() > 1:
        dist.all_reduce(logit_N)
        dist.all_reduce(times_N)
    dmp.train(was_training)
    return (logit_N / times_N).numpy()


def build_rows(
    ranker: Ranker, data: PreparedData, config: RankConfig, statistics: Statistics, knowledge: Knowledge | None = None
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


def lum_folder(config: "Config") -> Path:
    """Folder of the LUM whose tables are taken, the first of `inputs.lums`. Raises as `open_lum_run` does."""
    run = (config.inputs.lums or [f"{config.name}-pretrain"])[0]
    return _lum_of_tables(Path(config.runs_dir) / run, run).folder


def _lum_of_tables(folder: Path, run: str) -> TrainedLum:
    return open_lum_run(
        folder,
        missing=f"rank.tables=lum, but there is no finished LUM in {folder}; make it with: "
        f"torchx run apps/pretrain.py --config <your config> {shlex.quote(f'run={run}')}; or train with "
        "rank.tables=fresh",
    )


def load_lum_tables(folder: Path, data: PreparedData, dmp: DistributedModelParallel) -> list[str]:
    """Fills the tables that the LUM in `folder` has too with its weights; their names. The optimizer starts anew.

    Raises UserError where the LUM was trained on other data.
    """
    lum = _lum_of_tables(folder, folder.name)
    schema = data.schema
    read_by_lum = [*features_by_role(schema, "item"), *features_by_role(schema, "feedback")]
    read_by_lum += condition_features(lum.config.model, data.schema)
    ours = {name for name, _ in dmp.named_parameters()}
    mapping = {}
    for table in dict.fromkeys(schema.features[name].table for name in read_by_lum):
        weight = f"tables.embedding_bags.{table}.weight"
        if weight in ours:
            mapping[f"token_encoder.{weight}"] = weight
    load_weights(lum.checkpoint, dmp, mapping, fingerprint={"data": data.fingerprint})
    return [weight.split(".")[2] for weight in mapping.values()]


def run(config: "Config") -> dict[str, float | str]:
    """Trains a ranker into `runs/<run>`, tests the weights that were best on validation, once, and returns result.json.

    Keys, of the test part and not with rank.test=false: auc, gauc, log_loss, ne, calibration, ece, num_rows, num_users,
    num_users_skipped; auc_low, auc_high, … of the first three (95 % intervals over users). Always: valid/… of the kept
    weights; rows_per_s of training, wall_s, best_step, …; and as text model, knowledge, knowledge_hazard,
    tables_from_lum, warm_start (its source), and `note` and `undefined` where a part is empty or has one class only.
    The test rows' scores are kept for lumrec.evaluation.compare.
    Raises MissingFileError for a missing input, with the command that makes it.
    """
    settings, started = config.rank, time.perf_counter()
    device = init_distributed(threads=config.threads)
    data = open_or_prepare(config)
    check_data(config, data, "rank")
    inputs = {"data": data.fingerprint}
    lum = production = None
    knowledge = open_knowledge(config, data, settings.knowledge)
    if knowledge is not None:
        inputs["knowledge"] = knowledge.path.name
    if settings.tables == "lum":
        lum = lum_folder(config)
        inputs["lum"] = _lum_of_tables(lum, lum.name).fingerprint
    if settings.warm_start.source:
        production = settings.warm_start.open()
        inputs["warm_start"] = settings.warm_start.fingerprint(production)
    expected = read_expected(settings.warm_start.scores, data) if settings.warm_start.scores else None
    run_folder = RunFolder.create(config, "rank", inputs=inputs)
    if run_folder.finished:
        return run_folder.result()
    dmp, builder = sharded_ranker(config, data, knowledge, device=device)
    if "num_searched" in MODELS[settings.model][1] and settings.max_history <= settings.num_searched:
        logger.warning(
            "rank: %s searches %d events in histories of %d, which leaves nothing out; it is made for long ones: "
            "rank.max_history=1024, say",
            settings.model, settings.num_searched, settings.max_history,
        )  # fmt: skip
    result: dict[str, float | str] = {"model": settings.model, "knowledge": settings.knowledge}
    if knowledge is not None:
        result["knowledge_hazard"] = knowledge.hazard
    if lum is not None:
        result["tables_from_lum"] = ", ".join(load_lum_tables(lum, data, dmp))
    if production is not None:
        logits = partial(score, dmp, builder, batch_size=settings.batch_size)
        audit = settings.warm_start.fill(dmp, production, run_folder.path, expected=expected, score=logits)
        result["warm_start"] = audit.source
    # The run folder compares how it is trained; a checkpoint belongs to what is trained.
    model = Settings.of(settings, ignored=["train"])
    result |= _train(config, dmp, builder, run_folder, {**inputs, "model": model})
    if settings.test:
        result |= evaluate(dmp, builder, TEST, batch_size=settings.batch_size, keep_in=run_folder.path)
    result["wall_s"] = time.perf_counter() - started
    run_folder.finish(result)
    return result


def open_knowledge(config: "Config", data: PreparedData, kind: str) -> Knowledge | None:
    """The knowledge of `inputs.knowledge` that a setting such as `rank.knowledge` asks for; None for "none"."""
    if kind == "none":
        return None
    return Knowledge.open(Path(config.runs_dir) / (config.inputs.knowledge or f"{config.name}-query"), data)


def sharded_ranker(
    config: "Config", data: PreparedData, knowledge: Knowledge | None, *, device: torch.device
) -> tuple[DistributedModelParallel, RowBuilder]:
    """The ranker with fresh weights under DMP, and the builder of its batches. Collective."""
    settings, train = config.rank, config.rank.train
    data = data.without(settings.leave_out)
    statistics = dense_inputs(data, kind=settings.statistics)
    torch.manual_seed(config.seed)
    ranker = build_ranker(settings, data, num_statistics=len(statistics.names), knowledge=knowledge)
    builder = build_rows(ranker, data, settings, statistics, knowledge)
    dmp = shard(ranker, optimizer=train.optimizer, device=device, sharding=train.sharding, fsdp=train.fsdp)
    return dmp, builder


def evaluate(
    dmp: DistributedModelParallel, builder: RowBuilder, part: int, *, batch_size: int, keep_in: Path | None = None
) -> dict[str, float | str]:
    """`ranking_metrics` of the rows of a part (TRAIN, VALID or TEST), on every rank. Collective.

    keep_in: a run folder, where the scores are kept to be compared with another run's; intervals join the metrics.
    """
    data = builder.data
    rows = data.with_negatives(np.flatnonzero(data.split == part))
    logit_N = score(dmp, builder, rows, batch_size=batch_size)
    event_N, _, label_N = data.rows(rows)
    user_N = data.user[event_N]
    metrics = ranking_metrics(label_N, logit_N, user_N)
    if keep_in is not None:
        for name, interval in intervals(label_N, logit_N, user_N).items():
            metrics |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        if rank() == 0:
            write_scores(keep_in, Scores(rows, label_N.astype(np.int8), user_N.astype(np.int64), logit_N))
    return metrics


def _train(
    config: "Config",
    dmp: DistributedModelParallel,
    builder: RowBuilder,
    run_folder: RunFolder,
    fingerprint: Fingerprint,
) -> dict[str, float | str]:
    """Metrics of `fit`; leaves the best weights in `dmp`. A validation that cannot choose any is noted."""
    settings = config.rank
    select, notes = settings.select, []
    rows = builder.data.with_negatives(training_rows(builder.data, builder.knowledge, settings.time_window))
    train, batch_size = fit_length(settings.train, settings.batch_size, len(rows))
    tell_length("rank", train, batch_size, len(rows), (settings.train, settings.batch_size))
    loader = RowLoader(builder, rows, batch_size=batch_size, seed=config.seed, rank=rank(), world_size=world_size())
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
