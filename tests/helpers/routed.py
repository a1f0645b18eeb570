"""What two ranks of test_routing.py do: save a table, and take it over by the same plan.

One has raw ids that TorchRec's managed collisions (ZCH) route, the other is in column shards.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

from lumrec.run.distributed import init_distributed, rank
from lumrec.train.parallel import shard
from lumrec.warm_start import warm_start
from lumrec.warm_start.plan import shards_of

RULES = {"source_prefix": "model.", "rules": [{"source": "", "match": "prefix"}]}
SLOTS = 40


def routed(seed: int) -> nn.Module:
    """A table of 40 rows for ids below 1000, of which it meets some in training."""
    torch.manual_seed(seed)
    config = EmbeddingBagConfig(name="item", embedding_dim=8, num_embeddings=SLOTS, feature_names=["item"])
    module = MCHManagedCollisionModule(
        zch_size=SLOTS,
        device=torch.device("cpu"),
        eviction_policy=DistanceLFU_EvictionPolicy(),
        eviction_interval=1,
        input_hash_size=1000,
        buckets=2,
    )
    model = nn.Module()
    model.mc = ManagedCollisionEmbeddingBagCollection(
        EmbeddingBagCollection(tables=[config]), ManagedCollisionCollection({"item": module}, [config])
    )
    return model


def on_two_ranks(model: nn.Module) -> DistributedModelParallel:
    tables = model.mc._embedding_module
    _apply_optimizer_in_backward(torch.optim.SGD, tables.parameters(), {"lr": 0.1})
    one = {"item": row_wise(compute_kernel="fused")}
    plan = construct_module_sharding_plan(tables, one, local_size=2, world_size=2, device_type="cpu")
    sharders = [ManagedCollisionEmbeddingBagCollectionSharder()]
    return DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan({"mc": plan}), sharders=sharders
    )


def answers(model: DistributedModelParallel, ids: Tensor) -> Tensor:
    kjt = KeyedJaggedTensor(["item"], ids, lengths=torch.ones(len(ids), dtype=torch.int64))
    return model.module.mc(kjt)[0].wait().values().detach()


def save_and_take_over(folder: str) -> None:
    init_distributed("cpu", threads=1)
    production, ids = on_two_ranks(routed(seed=1)), torch.randint(0, 1000, (30,))
    for _ in range(3):
        answers(production, ids)
    production.eval()
    expected = answers(production, ids)
    dcp.save({"model": production.state_dict()}, checkpoint_id=Path(folder) / "zch")
    ours = on_two_ranks(routed(seed=2))
    ours.eval()
    assert not torch.equal(answers(ours, ids), expected)
    audit = warm_start(ours, Path(folder) / "zch", RULES)
    torch.testing.assert_close(answers(ours, ids), expected)
    assert audit.fresh == audit.unused == []
    _column_shards(Path(folder))


def _column_shards(folder: Path) -> None:
    """Row-wise Adagrad of a column_wise table has a sum for each row and shard; they go on in the same plan."""

    def model() -> DistributedModelParallel:
        config = EmbeddingBagConfig(name="item", embedding_dim=256, num_embeddings=6, feature_names=["item"])
        return shard(
            nn.ModuleDict({"e": EmbeddingBagCollection(tables=[config])}), device="cpu", sharding="column_wise"
        )

    def sums(of: DistributedModelParallel) -> Tensor:
        (state,) = of.fused_optimizer.state_dict()["state"].values()
        (part,) = shards_of(state["item.momentum1"])
        return part.values

    production, ours = model(), model()
    sums(production).copy_(torch.rand(6, 1) + rank())
    saved = {"model": production.state_dict(), "optim": production.fused_optimizer.state_dict()}
    dcp.save(saved, checkpoint_id=folder / "columns")
    rules = RULES | {
        "optimizer_prefix": "optim.state.",
        "rules": [{"source": "", "match": "prefix", "optimizer": "keep"}],
    }
    audit = warm_start(ours, folder / "columns", rules)
    assert torch.equal(sums(ours), sums(production)) and audit.rows[0].optimizer == "kept"
    dist.barrier()
