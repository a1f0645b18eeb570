"""The dry run of a ranker's warm start: what each of its parameters would get, printed."""

from typing import TYPE_CHECKING

from lumrec.data.prepare import open_or_prepare
from lumrec.train.parallel import init_distributed, rank
from lumrec.train.rank import open_knowledge, sharded_ranker
from lumrec.warm_start.apply import warm_start
from lumrec.warm_start.plan import PlanError

if TYPE_CHECKING:
    from lumrec.config import Config


def run(config: "Config") -> dict[str, float | str]:
    """Prints the audit of what apps/rank.py would take with this config; nothing is written and no number is read.

    Raises FileNotFoundError for a missing input, and ValueError for a source that cannot be read and for rules that do
    not fit, after what fits has been printed.
    """
    device = init_distributed(threads=config.threads)
    source = config.rank.warm_start.open()
    data = open_or_prepare(config)
    dmp, _ = sharded_ranker(config, data, open_knowledge(config, data, config.rank.knowledge), device=device)
    try:
        audit = warm_start(dmp, source, config.rank.warm_start.rules, dry_run=True)
    except PlanError as error:
        if rank() == 0:
            print(error.audit.text(), flush=True)
        raise
    if rank() == 0:
        print(audit.text(), flush=True)
    return {}
