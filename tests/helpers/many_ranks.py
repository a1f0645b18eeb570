"""Trains one tiny LUM on the same global batches by 1, 2 and 4 gloo processes: `many_ranks.py FOLDER PREPARED`.

The processes are forked from this one, which has imported everything and run nothing: one import serves all seven.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
import torch.utils.tensorboard  # noqa: F401 (imported once, before the processes part)
from forks import free_port
from runs import create_run
from tiny_training import TinyConfig
from torch.distributed.tensor import DTensor

from lumrec.batches.packs import NegativesConfig, PackBuilder, PackingConfig, PackLoader
from lumrec.batches.windows import training_windows
from lumrec.data.prepared import PreparedData
from lumrec.models.lum import ModelConfig, build_lum
from lumrec.modules.large_user_model import LargeUserModel, Pack
from lumrec.run.distributed import init_distributed, rank, world_size
from lumrec.stages.pretrain import PretrainConfig, make_step
from lumrec.train.config import TrainConfig
from lumrec.train.loop import StepOutput, fit
from lumrec.train.optimizers import OptimizerConfig
from lumrec.train.parallel import shard
from lumrec.train.plan import SHARDING_TYPES

WORLD_SIZES = (1, 2, 4)
STEPS, WINDOWS_PER_STEP = 5, 15
MODEL = ModelConfig(dim=16, num_layers=2, num_heads=2, max_events=12, dropout=0.0)
# Elementwise Adagrad: what it remembers does not depend on how a table is cut. The gradient is clipped at every step.
OPTIMIZER = OptimizerConfig(table_optimizer="adagrad", clip_grad_norm=0.1)
# One table of the simulated log for each sharding; the others are the planner's.
PLAN = {
    "item_id": {"sharding": "row_wise"},
    "scenario": "data_parallel",
    "categories": {"sharding": "column_wise", "ranks": [1, 0]},
    "feedback": {"sharding": "table_wise", "ranks": [1]},
}


def make_lum(prepared: str) -> tuple[LargeUserModel, PackBuilder]:
    """The same weights in every process."""
    torch.manual_seed(0)
    return build_lum(MODEL, PreparedData.open(Path(prepared)))


class DealtPacks:
    """The same windows at each step, whatever the number of ranks; each rank packs its share, which may be none."""

    def __init__(self, builder: PackBuilder) -> None:
        users = np.ones(builder.data.num_users, dtype=bool)
        # The whole catalogue as negatives and no condition withheld: a pack depends on its windows alone.
        self.packs = PackLoader(
            builder,
            users=users,
            max_events=MODEL.max_events,
            packing=PackingConfig(condition_dropout=0.0),
            negatives=NegativesConfig(full=True),
        )
        generator = torch.Generator().manual_seed(1)
        self.windows = training_windows(builder.data, max_events=MODEL.max_events, users=users, generator=generator)
        assert self.windows.count > STEPS * WINDOWS_PER_STEP
        self.step = 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Pack]:
        while self.step < STEPS:
            first = self.step * WINDOWS_PER_STEP
            start, end = share(self.step, rank(), world_size())
            self.step += 1
            yield self.packs.training_pack(self.windows[first + start : first + end], torch.Generator())
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def share(step: int, rank: int, world_size: int) -> tuple[int, int]:
    """A rank's part of a step's windows: on two ranks as 0 to 1, 1 to 2, 2 to 0, …; one of four mostly has none."""
    if world_size == 1:
        return 0, WINDOWS_PER_STEP
    weights = np.array([(r + step) % (world_size + 1) for r in range(world_size)])
    ends = [0, *(weights.cumsum() * WINDOWS_PER_STEP // weights.sum()).tolist()]
    return ends[rank], ends[rank + 1]


class Interrupted(Exception):
    pass


def train(folder: str, prepared: str, run: str, *, stop_at: int = 0, **settings: Any) -> torch.nn.Module:
    config = TrainConfig(log_every=1, checkpoint_every=2, optimizer=OPTIMIZER, **settings)
    model, builder = make_lum(prepared)
    dmp = shard(model, device="cpu", optimizer=OPTIMIZER, sharding=config.sharding, fsdp=config.fsdp)
    lum_step, steps = make_step(PretrainConfig()), 0

    def step(model: torch.nn.Module, pack: Pack) -> StepOutput:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            raise Interrupted
        return lum_step(model, pack)

    run_folder = create_run(TinyConfig(folder, run=run, pretrain=config), "pretrain")
    run_folder.finish(fit(model=dmp, loader=DealtPacks(builder), step=step, config=config, run=run_folder))
    return dmp


def fsdp_report(model: torch.nn.Module) -> dict[str, int]:
    """How many parameters are sharded by FSDP, how many the encoder has, and their elements here and in all."""
    sharded = {name: p for name, p in model.module.named_parameters() if isinstance(p, DTensor)}
    return {
        "sharded": len(sharded),
        "encoder": sum(name.startswith("user_encoder.") for name, _ in model.module.named_parameters()),
        "held": sum(p.to_local().numel() for p in sharded.values()),
        "whole": sum(p.numel() for p in sharded.values()),
    }


def work(local_rank: int, world_size: int, port: int, folder: str, prepared: str) -> None:
    """What each process does."""
    os.environ |= {"RANK": str(local_rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    init_distributed("cpu", threads=1)
    for sharding in SHARDING_TYPES:
        train(folder, prepared, f"{sharding}-{world_size}", sharding=sharding)
    if world_size == 2:
        plan_file = str(Path(folder) / "plan.yaml")
        train(folder, prepared, "mixed-2", sharding=plan_file)
        train(folder, prepared, "mixed-again-2", sharding=str(Path(folder) / "mixed-2" / "plan.json"))
        report = fsdp_report(train(folder, prepared, "fsdp-2", fsdp=True))
        if local_rank == 0:
            (Path(folder) / "fsdp-2.json").write_text(json.dumps(report))
        try:
            train(folder, prepared, "fsdp-resumed-2", fsdp=True, stop_at=4)
        except Interrupted:
            train(folder, prepared, "fsdp-resumed-2", fsdp=True)
    torch.distributed.destroy_process_group()


def main(folder: str, prepared: str) -> None:
    (Path(folder) / "plan.yaml").write_text(json.dumps(PLAN))
    for size in WORLD_SIZES:
        torch.multiprocessing.start_processes(
            work, (size, free_port(), folder, prepared), nprocs=size, start_method="fork"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
