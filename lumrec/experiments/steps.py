"""The steps of the paper as Python functions: each takes the config, runs its stage, and returns what it made.

On a simulated log of 20 users, with two training steps each (`load_config("my.yaml", [...])` reads a file)::

>>> import numpy, tempfile, lumrec
>>> runs = tempfile.TemporaryDirectory()
>>> tiny = ["data.source=simulator", "data.simulator.num_users=20", "data.simulator.events_per_user=20", "model.dim=16"]
>>> tiny += ["pretrain.train.max_steps=2", "rank.train.max_steps=2", "rank.knowledge=both", f"runs_dir={runs.name}"]
>>> config = lumrec.load_config(None, tiny)
>>> data = lumrec.prepare_data(config)  # doctest: +ELLIPSIS
no prepared data at ...: preparing it now...
>>> lum, builder, trained = lumrec.fit_lum(config)
>>> knowledge = lumrec.build_knowledge(config)
>>> knowledge.for_rows(numpy.array([0, 5])).o_BND.shape  # two events, the answers under two conditions
torch.Size([2, 2, 16])
>>> 0 <= lumrec.fit_ranker(config)["auc"] <= 1
True
>>> ranker, rows, run = lumrec.load_ranker(config.folder("rank"))
>>> ranker(rows.batch(numpy.array([0, 5]))).shape
torch.Size([2])
>>> store = lumrec.KnowledgeStore.open(config.folder("query"))
>>> store.get([*data.user_keys()[:1], "nobody"]).present_BN.tolist()
[[True, True], [False, False]]
>>> runs.cleanup()

The functions write the same run folders as the apps and follow the same rules: a finished run with the same config is
reused, an unfinished one continues, and one with another config is refused unless `overwrite=true`. Each raises
UserError for settings and inputs that cannot be used.
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
