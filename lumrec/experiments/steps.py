"""The steps of the paper as Python functions: each takes the config, runs its stage, and returns what it made.

    import lumrec

    config = lumrec.load_config("my.yaml", ["model.dim=64"])
    data = lumrec.prepare_data(config)
    lum, builder, trained = lumrec.fit_lum(config)
    knowledge = lumrec.build_knowledge(config)
    result = lumrec.fit_ranker(config)

They write the same run folders as the apps and follow the same rules: a finished run with the same config is reused, an
unfinished one continues, and one with another config is refused unless `overwrite=true`. Each raises UserError for
settings and inputs that cannot be used.
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
    """The prepared data of `runs/<name>-prepare`, made from the log if they do not exist yet."""
    return open_or_prepare(config)


def fit_lum(config: Config) -> tuple[DistributedModelParallel, PackBuilder, TrainedLum]:
    """Step 1: trains the LUM that `config.model` and `config.pretrain` describe; returns what `load_lum` returns."""
    STAGES["pretrain"].run(config)
    return load_lum(config.folder("pretrain"), open_or_prepare(config))


def build_knowledge(config: Config) -> Knowledge:
    """Step 2: stores the LUM's answers to `config.query` for every row and user, and opens those for the rows."""
    STAGES["query"].run(config)
    return Knowledge.open(config.folder("query"), open_or_prepare(config))


def fit_ranker(config: Config) -> dict[str, Any]:
    """Step 3: trains the ranker that `config.rank` describes; returns its metrics, as in its result.json."""
    return STAGES["rank"].run(config)
