"""The steps of the paper as Python functions: each takes the config, runs its stage, and gives back what it made.

    import lumrec

    config = lumrec.load_config("my.yaml", ["model.dim=64"])
    data = lumrec.prepare_data(config)
    lum, builder, trained = lumrec.fit_lum(config)
    knowledge = lumrec.build_knowledge(config)
    result = lumrec.fit_ranker(config)

They write the same run folders as the apps, and follow the same rules: a finished run of the same config is read, not
made again; an unfinished one goes on; one of another config is refused unless `overwrite=true`. Each raises UserError
for settings and inputs that cannot be used.
"""

from __future__ import annotations

from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel

from lumrec.batches.packs import PackBuilder
from lumrec.data.prepare import open_or_prepare
from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import Config
from lumrec.knowledge.store import Knowledge
from lumrec.models.lum import TrainedLum, load_lum
from lumrec.stages.registry import STAGES


def prepare_data(config: Config) -> PreparedData:
    """The prepared data of `runs/<name>-prepare`, made from the log where they are not there yet."""
    return open_or_prepare(config)


def fit_lum(config: Config) -> tuple[DistributedModelParallel, PackBuilder, TrainedLum]:
    """Step 1: the LUM that `config.model` and `config.pretrain` describe, trained; see `load_lum` for the three."""
    STAGES["pretrain"].run(config)
    return load_lum(config.folder("pretrain"), open_or_prepare(config))


def build_knowledge(config: Config) -> Knowledge:
    """Step 2: the LUM's answers to `config.query` for every row and user; `KnowledgeStore.open` reads the users'."""
    STAGES["query"].run(config)
    return Knowledge.open(config.folder("query"), open_or_prepare(config))


def fit_ranker(config: Config) -> dict[str, Any]:
    """Step 3: the metrics of the ranker that `config.rank` describes, trained; the same as in its result.json."""
    return STAGES["rank"].run(config)
