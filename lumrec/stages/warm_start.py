"""The dry run of a warm start: prints what each parameter of a ranker or a LUM would get."""

from functools import partial
from typing import Any

from lumrec.data.common import Common
from lumrec.data.prepare import open_or_prepare, schema_to_read
from lumrec.evaluation.ranking import score
from lumrec.knowledge.manifest import read_manifest
from lumrec.knowledge.store import Knowledge
from lumrec.models.lum import ModelConfig, build_lum
from lumrec.run.distributed import init_distributed
from lumrec.run.distributed import rank as process_rank
from lumrec.run.errors import UserError
from lumrec.run.printable import say
from lumrec.stages import pretrain as pretrain_stage
from lumrec.stages import rank as rank_stage
from lumrec.stages.pretrain import PretrainConfig
from lumrec.stages.rank import RankConfig, sharded_ranker
from lumrec.train.parallel import shard
from lumrec.warm_start.audit import PlanError
from lumrec.warm_start.scores import read_expected


def run(common: Common, model: ModelConfig, pretrain: PretrainConfig, rank: RankConfig) -> dict[str, float | str]:
    """Prints the audit of pretrain.warm_start (for apps/pretrain.py) or rank.warm_start (for apps/rank.py).

    Nothing is written, and no weights are read. But with rank.warm_start.scores the weights are copied in memory, and
    everything is compared that the rules and `scores` ask to compare.

    Raises MissingFileError for a missing input, and UserError for a source that cannot be read, for two sources, and
    for scores that differ from production's. For rules that do not fit it raises after printing what does fit.
    """
    common.settings(model=model, pretrain=pretrain, rank=rank)
    device = init_distributed(threads=common.threads)
    of_lum = bool(pretrain.warm_start.source)
    if of_lum and rank.warm_start.source:
        raise UserError("pretrain.warm_start.source and rank.warm_start.source are both given: one at a time")
    settings = pretrain.warm_start if of_lum else rank.warm_start
    if not settings.source:
        raise UserError("give rank.warm_start.source, or pretrain.warm_start.source: a checkpoint to start from")
    stage: Any = pretrain_stage if of_lum else rank_stage
    sections = {"model": model, "pretrain": pretrain} if of_lum else {"rank": rank}
    stage.check_inputs(common, **sections)
    try:
        stage.check_schema(common, schema_to_read(common), **sections)
    except PlanError:
        if not common.prepared.exists():  # else the audit of what does fit comes first
            raise
    source = settings.open()
    if rank.knowledge != "none" and not of_lum:
        read_manifest(common.knowledge)  # raises, if there is none, before data are read
    data = open_or_prepare(common)
    if of_lum:
        train = pretrain.train
        dmp = shard(build_lum(model, data)[0], optimizer=train.optimizer, device=device, sharding=train.sharding)
    else:
        knowledge = Knowledge.open(common.knowledge, data) if rank.knowledge != "none" else None
        dmp, builder = sharded_ranker(rank, data, knowledge, seed=common.seed, device=device)
    try:
        if settings.scores:  # of a ranker: a LUM has none
            logits = partial(score, dmp, builder, batch_size=rank.batch_size)
            audit = settings.fill(dmp, source, data, expected=read_expected(settings.scores, data), score=logits)
        else:
            audit = settings.fill(dmp, source, data, dry_run=True)
    except PlanError as error:
        if process_rank() == 0:
            say(error.audit.text())
        raise
    if process_rank() == 0:
        say(audit.text())
    return {}
