"""The dry run of a warm start: what each parameter of a ranker, or of a LUM, would get, printed."""

from functools import partial
from typing import TYPE_CHECKING

from lumrec.data.prepare import open_or_prepare
from lumrec.errors import UserError
from lumrec.printable import say
from lumrec.train.lum import build_lum
from lumrec.train.parallel import init_distributed, rank, shard
from lumrec.train.rank import open_knowledge, score, sharded_ranker
from lumrec.warm_start.apply import warm_start
from lumrec.warm_start.plan import PlanError
from lumrec.warm_start.scores import read_expected

if TYPE_CHECKING:
    from lumrec.config import Config


def run(config: "Config") -> dict[str, float | str]:
    """Prints the audit of what the stage with a `warm_start` would take: apps/pretrain.py for pretrain.warm_start,
    apps/rank.py for rank.warm_start. Nothing is written and no number is read; but with rank.warm_start.scores the
    takeover is done, in memory, and what the rules and `scores` ask to compare is compared.

    Raises MissingFileError for a missing input, and UserError for a source that cannot be read, for one of both
    stages, and for rules that do not fit, after what fits has been printed; and for scores that are not production's.
    """
    device = init_distributed(threads=config.threads)
    of_lum = bool(config.pretrain.warm_start.source)
    if of_lum and config.rank.warm_start.source:
        raise UserError("pretrain.warm_start.source and rank.warm_start.source are both given: one at a time")
    settings = config.pretrain.warm_start if of_lum else config.rank.warm_start
    source = settings.open()
    data = open_or_prepare(config)
    if of_lum:
        train = config.pretrain.train
        dmp = shard(build_lum(config.model, data)[0], optimizer=train.optimizer, device=device, sharding=train.sharding)
    else:
        dmp, builder = sharded_ranker(config, data, open_knowledge(config, data, config.rank.knowledge), device=device)
    try:
        if settings.scores:  # of a ranker: a LUM has none
            logits = partial(score, dmp, builder, batch_size=config.rank.batch_size)
            audit = settings.fill(dmp, source, expected=read_expected(settings.scores, data), score=logits)
        else:
            audit = warm_start(dmp, source, settings.rules, dry_run=True)
    except PlanError as error:
        if rank() == 0:
            say(error.audit.text())
        raise
    if rank() == 0:
        say(audit.text())
    return {}
