"""Step 1: pre-training of a LUM by next-condition-item prediction (LUM section 4.1)."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lumrec.batches.negatives import NegativesConfig
from lumrec.batches.packs import PackingConfig, PackLoader
from lumrec.batches.windows import token_cost
from lumrec.data.common import Common
from lumrec.data.prepare import open_or_prepare, schema_to_read
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig
from lumrec.data.splits import PARTS, TRAIN, leave_out_later, parse_fold, user_fold
from lumrec.evaluation.retrieval import RetrievalConfig, evaluate_retrieval, retrieval_names
from lumrec.models.lum import (
    READ_BY_LUM,
    ModelConfig,
    build_lum,
    check_tables,
    condition_features,
    lum_fingerprint,
    lum_tables,
)
from lumrec.modules.attention import causal_backend
from lumrec.modules.large_user_model import LargeUserModel, Pack
from lumrec.modules.losses import counterfactual_contrast, info_nce
from lumrec.query.conditions import condition_columns
from lumrec.run.distributed import init_distributed
from lumrec.run.errors import UserError
from lumrec.run.folder import RunFolder
from lumrec.run.limits import check_names, setting, share
from lumrec.train.config import TrainConfig, check_select
from lumrec.train.gather_candidates import gather_candidates
from lumrec.train.length import fit_length, too_short
from lumrec.train.loop import StepOutput, fit
from lumrec.train.parallel import shard
from lumrec.warm_start.config import WarmStartConfig
from lumrec.warm_start.continual import TOKENS, earlier_run, find_earlier, growth_table, open_earlier, start_from

logger = logging.getLogger(__name__)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ContrastConfig:
    """Counterfactual contrast, our extension of the paper: each history is also asked with another condition.

    feature: condition feature whose other values are asked; "" = no contrast.
    weight: weight of the contrast in the loss.
    """

    feature: str = ""
    weight: float = setting(2.0, least=0, most=1e6)


@dataclass(frozen=True)
class PretrainConfig:
    """Step 1: pre-training of the LUM.

    time_share: share of the training events, from the earliest on and over all users, that the LUM learns from. Rankers
        that read its answers then train on the later events (knowledge split in time).
    label_smoothing: share of InfoNCE's target that is spread over all candidates, by their weights (see info_nce).
    precision: float32, or bfloat16 for the dense part under autocast (tables and loss stay float32).
    start_from: run name of an earlier LUM to continue from (docs/how-to/continual-training.md); "" = none.
    table_state: "keep" the optimizer state of that LUM's tables, or start with a "fresh" one.
    select: validation metric that chooses the weights to keep ("ndcg@10", "hr@10", …); "" keeps the last weights.
    """

    packing: PackingConfig = field(default_factory=PackingConfig)
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    time_share: float = setting(1.0, above=0, most=1)
    label_smoothing: float = share(0.0)
    precision: Literal["float32", "bfloat16"] = "float32"
    start_from: str = ""
    table_state: Literal["keep", "fresh"] = "keep"
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    select: str = "ndcg@10"
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=8))
    evaluate: RetrievalConfig = field(default_factory=RetrievalConfig)

    def check(self, at: str) -> None:
        """Raises UserError for settings that contradict one another (`at`: the section, with a dot)."""
        known = retrieval_names(self.evaluate.ks, oracle=self.evaluate.oracle)
        check_select(at, self.select, known, patience=self.train.patience)
        if self.start_from and self.warm_start.source:
            raise UserError(f"{at}start_from and {at}warm_start.source both fill the weights: give one of them")
        if self.warm_start.scores:
            raise UserError(f"{at}warm_start.scores compares a ranker's scores; a LUM has none: use check in its rules")


def training_users(data: PreparedData, fold: str) -> np.ndarray:
    """Users that this LUM may learn from (bool [U]): all, or all outside the fold that is held out."""
    parsed = parse_fold(fold)
    if parsed is None:
        return np.ones(data.num_users, dtype=bool)
    return user_fold(data.user_keys(), parsed[1]) != parsed[0]


def make_step(config: PretrainConfig) -> Callable[[nn.Module, Pack], StepOutput]:
    """The step function of the training loop: InfoNCE at condition tokens, plus the contrast if it is on."""
    dtype, negatives = PRECISIONS[config.precision], config.negatives

    def step(model: nn.Module, pack: Pack) -> StepOutput:
        device_type = pack.positive_T.device.type
        with torch.autocast(device_type, dtype=dtype, enabled=dtype is not torch.float32):
            o_TD, o_QD, e_CD = model(pack)
            candidates = e_CD, pack.positive_T, pack.log_weight_C
            if negatives.across_ranks:
                candidates = gather_candidates(
                    e_CD, pack.candidate_item_C, pack.positive_T, pack.log_weight_C, unique=negatives.unique
                )
            loss = nce = info_nce(
                o_TD,
                *candidates,
                log_positive_weight_T=pack.log_positive_weight_T if negatives.logq_positive else None,
                label_smoothing=config.label_smoothing,
            )
        metrics = {"info_nce": nce.detach()}
        if len(pack.contrast_event_Q) or config.contrast.feature:
            event_Q = pack.contrast_event_Q
            e_QD = e_CD[pack.positive_T[event_Q]]
            contrast = counterfactual_contrast(o_TD[event_Q].float(), o_QD.float(), e_QD.float())
            metrics["contrast"] = contrast.detach()
            loss = nce + config.contrast.weight * contrast
        return StepOutput(loss, pack.num_events, metrics, tokens=_tokens_read(pack))

    return step


def _tokens_read(pack: Pack) -> int:
    """Tokens that the encoder reads: one or two for each event of the pack (model.tokens), and one for each query."""
    return len(pack.layout.token_place_T) + pack.num_queries


def _log_encoder(model: LargeUserModel, config: PretrainConfig, device: torch.device) -> None:
    """Logs the size of the user encoder and the backend of its attention on this device (see `causal_backend`)."""
    if dist.get_rank() != 0:
        return
    encoder, precision = model.user_encoder, config.precision
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    backend = causal_backend(device.type, PRECISIONS[precision], has_bias=encoder.has_bias)
    logger.info("user encoder: %s parameters; attention: %s on %s, %s", f"{parameters:,}", backend, device, precision)


def _token_cost(model: LargeUserModel, config: PretrainConfig, *, num_items: int) -> float:
    """The cost of a token of this model without attention (see `token_cost`), for the candidates of one pack."""
    negatives, blocks = config.negatives, model.user_encoder.blocks
    candidates = negatives.sampled + (config.packing.events_per_pack if negatives.in_batch else 0)
    return token_cost(
        sum(parameter.numel() for parameter in blocks.parameters()),
        dim=model.output.in_features,
        num_layers=len(blocks),
        num_candidates=num_items if negatives.full else min(num_items, candidates),
    )


def check_inputs(common: Common, *, model: ModelConfig, pretrain: PretrainConfig) -> None:
    """Raises UserError where a file or run that the settings name is missing or invalid; reads no data."""
    pretrain.warm_start.check_inputs("pretrain.warm_start.", common.prepared, common.folder("pretrain"))
    if pretrain.start_from:
        earlier_run(common, pretrain.start_from)


def check_schema(common: Common, schema: SchemaConfig, *, model: ModelConfig, pretrain: PretrainConfig) -> None:
    """Raises UserError where the settings, a sharding plan or the rules of a warm start name what the schema or the LUM
    does not have, and where the LUM of `start_from` is another model than this one.
    """
    read, contrast = condition_features(model, schema), pretrain.contrast.feature
    check_names("pretrain.contrast.feature", [contrast] if contrast else [], read, READ_BY_LUM)
    if contrast and schema.features[contrast].kind == "multi":
        raise UserError(
            f"pretrain.contrast.feature {contrast!r} is multi-valued: a contrast needs one value for each event"
        )
    check_names("pretrain.evaluate.condition", list(pretrain.evaluate.condition), read, READ_BY_LUM)
    tables = lum_tables(model, schema)
    check_tables("pretrain", pretrain.train, tables, common.folder("pretrain"))
    pretrain.warm_start.check_names(tables, TOKENS, common.prepared)
    if pretrain.start_from:
        open_earlier(common, model, pretrain.start_from, schema)


def check_data(common: Common, data: PreparedData, *, model: ModelConfig, pretrain: PretrainConfig) -> None:
    """Raises UserError where the prepared data have nothing to train on, to select weights by, or to contrast."""
    settings, users = pretrain, training_users(data, common.fold)
    split = leave_out_later(data.split, data.timestamp, settings.time_share)
    if not ((split == TRAIN) & users[data.user]).any():
        raise UserError(
            f"{data.path}: there are no training events for this LUM{_of_fold(common.fold)}; choose another "
            "data.split, fold or pretrain.time_share"
        )
    if settings.select and not has_events(data, "valid", users):
        raise UserError(
            f"{data.path}: the validation part has no event{_of_fold(common.fold)}, but pretrain.select="
            f"{settings.select} chooses the weights by it; choose another data.split, or set pretrain.select= to keep "
            "the last weights"
        )
    features = condition_features(model, data.schema)
    condition_columns(data, features, [settings.evaluate.condition])
    if contrast := settings.contrast.feature:
        num_values = data.table_rows[data.schema.features[contrast].table] - 1
        if num_values < 2:
            raise UserError(
                f"pretrain.contrast.feature {contrast!r} has {num_values} value(s): a contrast needs two or more"
            )


def has_events(data: PreparedData, part: str, users: np.ndarray) -> bool:
    """Whether any of `users` (bool [U]) has an event in the part."""
    return bool(((data.split == PARTS.index(part)) & users[data.user]).any())


def _of_fold(fold: str) -> str:
    return f" of the users outside of fold {fold}" if fold else ""


def run(common: Common, model: ModelConfig, settings: PretrainConfig) -> dict[str, float | str]:
    """Pre-trains a LUM into `runs/<run>` and returns the contents of its result.json.

    With common.fold = "k/K" it leaves out the users of fold k, for cross-fitted knowledge (see docs/concepts.md).
    """
    recorded = common.settings(model=model, pretrain=settings)
    device = init_distributed(threads=common.threads)
    check_inputs(common, model=model, pretrain=settings)
    check_schema(common, schema_to_read(common), model=model, pretrain=settings)
    data = open_or_prepare(common)
    check_data(common, data, model=model, pretrain=settings)
    earlier = find_earlier(common, model, settings.start_from, data) if settings.start_from else None
    inputs = {"prepared": data.fingerprint} | ({"start_from": earlier.fingerprint} if earlier else {})
    production = None
    if settings.warm_start.source:
        production = settings.warm_start.open()
        inputs["warm_start"] = settings.warm_start.fingerprint(production)
    run_folder = RunFolder.create(common.folder("pretrain"), "pretrain", recorded, inputs=inputs)
    if run_folder.finished:
        run_folder.close()
        return run_folder.result()
    torch.manual_seed(common.seed)
    data.split = leave_out_later(data.split, data.timestamp, settings.time_share)
    lum, builder = build_lum(model, data)
    users = training_users(data, common.fold)
    num_events = int(data.training_counts(users).sum())
    packing = settings.packing
    train, size = fit_length("pretrain", settings.train, packing.events_per_pack, num_events, smallest=model.max_events)
    settings = dataclasses.replace(settings, packing=dataclasses.replace(packing, events_per_pack=size))
    _log_encoder(lum, settings, device)
    cost = _token_cost(lum, settings, num_items=data.num_items)
    dmp = shard(lum, optimizer=train.optimizer, device=device, sharding=train.sharding, fsdp=train.fsdp)
    result: dict[str, float | str] = {}
    if earlier is not None:  # also when resuming: if there is a checkpoint already, `fit` loads it over this
        audit = start_from(dmp, earlier, model, data.schema, table_state=settings.table_state)
        if dist.get_rank() == 0:
            logger.info("continues from %s, %s", earlier.run, growth_table(audit))
    if production is not None:
        result["warm_start"] = settings.warm_start.fill(dmp, production, data, run_folder.path).source
    loader = PackLoader(
        builder,
        users=users,
        max_events=model.max_events,
        packing=settings.packing,
        negatives=settings.negatives,
        contrast_feature=settings.contrast.feature,
        token_cost=cost,
        seed=common.seed,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )

    if short := too_short(train, len(loader)):
        result["note"] = short
        logger.warning("pretrain: %s", short)

    def evaluate(part: str) -> dict[str, float]:
        # Users that are held out from a fold's LUM must not choose its weights either.
        return evaluate_retrieval(
            dmp, builder, part=part, config=settings.evaluate, max_events=model.max_events, users=users
        )

    result |= fit(
        model=dmp,
        loader=loader,
        step=make_step(settings),
        config=train,
        run=run_folder,
        evaluate=(lambda: evaluate("valid")) if has_events(data, "valid", users) else None,
        select=settings.select,
        progress="pretrain",
        fingerprint=lum_fingerprint(model, data, fold=common.fold, time_share=settings.time_share),
        dtype=PRECISIONS[settings.precision],
    )
    if has_events(data, "test", users):
        result |= evaluate("test")
    else:
        result["note"] = "; ".join(filter(None, [str(result.get("note", "")), "the test part has no events"]))
    run_folder.finish(result)
    return result
