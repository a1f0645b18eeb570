"""What two gloo ranks really hold after two steps, beside what was planned: `two_ranks_plan.py OUT WORDS...`.

Each rank leaves {case: [planned, tables, dense]} in OUT/rank-<r>.json, all in bytes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from lumrec.batches.packs import PackBuilder, PackLoader
from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import Config, load
from lumrec.models.lum import build_lum
from lumrec.modules.large_user_model import Pack
from lumrec.run.distributed import init_distributed, rank, world_size
from lumrec.stages.plan import Training
from lumrec.stages.pretrain import make_step
from lumrec.train.footprint import TRAINED_BYTES
from lumrec.train.optimizers import build_optimizer
from lumrec.train.parallel import shard
from lumrec.train.plan import plan_json

# Encoder, FSDP, sharding, optimizer of the tables.
CASES = [
    ("gpt", "false", "data_parallel", "adagrad"),
    ("llama", "true", "row_wise", "rowwise_adagrad"),
    ("hstu", "true", "", "rowwise_adagrad"),
]


def parts(x: Any) -> Iterator[Tensor]:
    """The tensors that this rank holds of one that may be sharded."""
    if isinstance(x, ShardedTensor):
        yield from (part.tensor for part in x.local_shards())
    elif isinstance(x, Tensor):
        yield x.to_local() if isinstance(x, DTensor) else x


def held(dmp: torch.nn.Module, optimizer: Any) -> dict[str, int]:
    """Bytes of all storages of weights, gradients and optimizer state: of tables, and of dense parameters."""
    found = {"tables": {}, "dense": {}}
    named = [*dmp.state_dict().items(), *((name, p.grad) for name, p in dmp.named_parameters())]
    named += [(name, x) for name, state in optimizer.state_dict()["state"].items() for x in state.values()]
    for name, x in named:
        for part in parts(x):
            storage = part.untyped_storage()
            found["tables" if ".embedding_bags." in name else "dense"][storage.data_ptr()] = storage.nbytes()
    return {kind: sum(sizes.values()) for kind, sizes in found.items()}


def first_pack(config: Config, builder: PackBuilder) -> Pack:
    """This rank's first training pack of all users."""
    packs = PackLoader(
        builder,
        users=np.ones(builder.data.num_users, dtype=bool),
        max_events=config.model.max_events,
        packing=config.pretrain.packing,
        negatives=config.pretrain.negatives,
        contrast_feature=config.pretrain.contrast.feature,
        rank=rank(),
        world_size=world_size(),
    )
    return next(iter(packs))


def main(out: str, *words: str) -> None:
    init_distributed("cpu", threads=1)
    results = {}
    for encoder, fsdp, sharding, table_optimizer in CASES:
        config = load(
            None,
            [
                *words,
                f"model.encoder={encoder}",
                f"pretrain.train.fsdp={fsdp}",
                f"pretrain.train.sharding={sharding}",
                f"pretrain.train.optimizer.table_optimizer={table_optimizer}",
                *("plan.gpu=cpu", f"plan.gpus={world_size()}"),
            ],
        )
        training = Training(config, config.model, config.pretrain, config.plan)
        tables = training.place_tables(1e9)
        plan_file = Path(out) / f"{encoder}-{sharding}-{rank()}.json"
        plan_file.write_text(plan_json(tables.plan))
        data = PreparedData.open(config.prepared)
        torch.manual_seed(0)
        lum, builder = build_lum(config.model, data)
        train = config.pretrain.train
        dmp = shard(lum, device="cpu", optimizer=train.optimizer, sharding=str(plan_file), fsdp=train.fsdp)
        optimizer = build_optimizer(dmp, train.optimizer)
        pack = first_pack(config, builder)
        for _ in range(2):
            optimizer.zero_grad()
            make_step(config.pretrain)(dmp, pack).loss_sum.backward()
            optimizer.step()
        table_bytes = sum(training.table_memory(tables)[rank()])
        planned = {"tables": table_bytes, "dense": TRAINED_BYTES * training.held}
        results[f"{encoder} {sharding}"] = {"planned": planned, "held": held(dmp, optimizer)}
    (Path(out) / f"rank-{rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
