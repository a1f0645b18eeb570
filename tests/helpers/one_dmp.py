"""A LUM and a ranker that read the same sharded tables in one DMP: what test_one_dmp.py runs on several ranks.

Each step is of a weighted sum of both losses; with SGD, so that a table moves by the sum of what either asks for.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lumrec.batches.packs import PackLoader
from lumrec.data.prepared import PreparedData
from lumrec.data.splits import TRAIN
from lumrec.experiments.config import Config, load
from lumrec.features.statistics import Statistics
from lumrec.models.lum import build_lum, data_tables
from lumrec.models.ranker import build_ranker, build_rows
from lumrec.modules.large_user_model import Pack
from lumrec.modules.rankers.base import RankBatch
from lumrec.run.distributed import init_distributed, rank
from lumrec.stages import rank as ranking
from lumrec.stages.pretrain import make_step
from lumrec.train.optimizers import OptimizerConfig, build_optimizer
from lumrec.train.parallel import shard
from lumrec.warm_start.plan import shards_of

LR = 0.05
WEIGHTS = {"ranker": (0.0, 1.0), "lum": (1.0, 0.0), "both": (1.0, 1.0)}  # of the LUM's loss and the ranker's
WORDS = ["model.dropout=0", "rank.model=dlrm", "rank.dropout=0"]


class LumAndRanker(nn.Module):
    """One set of tables, two readers; gives the sum of both losses, each a mean."""

    def __init__(self, config: Config, data: PreparedData) -> None:
        super().__init__()
        tables = data_tables(data)
        self.lum, self.packs = build_lum(config.model, data, tables=tables)
        self.ranker = build_ranker(config.rank, data, num_statistics=0, tables=tables)
        self.lum_step = make_step(config.pretrain)

    def forward(self, pack: Pack, batch: RankBatch, weights: tuple[float, float]) -> Tensor:
        outputs = self.lum_step(self.lum, pack), ranking.step(self.ranker, batch)
        return sum(weight * output.loss_sum / output.count for weight, output in zip(weights, outputs, strict=True))


def make_model(words: list[str]) -> tuple[Config, PreparedData, LumAndRanker]:
    config = load(None, [*words, *WORDS])
    data = PreparedData.open(Path(config.runs_dir) / "tiny-prepare")
    torch.manual_seed(0)
    return config, data, LumAndRanker(config, data)


def batch_of(config: Config, data: PreparedData, model: LumAndRanker, of_rank: int) -> tuple[Pack, RankBatch]:
    loader = PackLoader(
        model.packs,
        users=np.ones(data.num_users, bool),
        max_events=config.model.max_events,
        packing=config.pretrain.packing,
        negatives=config.pretrain.negatives,
        rank=of_rank,
        world_size=2,
    )
    none = Statistics(np.zeros((data.num_rows, 0), np.float32), [])
    rows = build_rows(model.ranker, data, config.rank, none)
    return next(iter(loader)), rows.batch(np.flatnonzero(data.split == TRAIN)[of_rank * 64 : of_rank * 64 + 64])


def parts(model: nn.Module) -> dict[str, list[tuple[tuple[int, ...], Tensor]]]:
    """Name of each table's weight → (offsets, the part that lies here), one for each shard."""
    return {
        name: [((part.first_row, part.first_column), part.values.clone()) for part in shards_of(weight)]
        for name, weight in model.state_dict().items()
        if ".embedding_bags." in name
    }


def train(folder: str, words: list[str], sharding: str) -> None:
    """Leaves the tables' parts on this rank after each of WEIGHTS, and what shows that there is one set of tables."""
    init_distributed("cpu", threads=1)
    config, data, model = make_model(words)
    optimizer_config = OptimizerConfig(table_optimizer="sgd", table_lr=LR, dense_lr=0.0)
    dmp = shard(model, device="cpu", optimizer=optimizer_config, sharding=sharding)
    optimizer = build_optimizer(dmp, optimizer_config)
    batch = batch_of(config, data, model, rank())
    after: dict[str, Any] = {"start": parts(dmp)}
    for name, weights in WEIGHTS.items():
        optimizer.zero_grad()
        dmp(*batch, weights).backward()
        optimizer.step()
        after[name] = parts(dmp)
    same = dmp.module.lum.token_encoder.tables is dmp.module.ranker.tables
    torch.save({"after": after, "same": same}, Path(folder) / f"{sharding}-{rank()}.pt")
