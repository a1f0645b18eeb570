"""A production job as others have it: TorchRec's DLRM under DMP, trained a little and saved, without any lumrec.

    torchrun --nproc-per-node 2 production_dlrm.py FOLDER

FOLDER/rowwise_adagrad and FOLDER/adagrad get dcp/ (model and optimizer, torch.distributed.checkpoint), model.pt
(torch.save), batch.pt (a batch and the scores that production gives it) and item.csv, user.csv (raw id → row).
"""

import csv
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn import functional as F
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

ROWS, WIDTH, NUM_DENSE = {"item": 50, "user": 40}, 8, 5


def make_model() -> DLRM:
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=WIDTH, num_embeddings=rows, feature_names=[name])
        for name, rows in ROWS.items()
    ]
    return DLRM(EmbeddingBagCollection(tables=tables), NUM_DENSE, [16, WIDTH], [16, 1])


def make_batch(seed: int, size: int = 16) -> tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(size, NUM_DENSE, generator=generator)
    rows = [torch.randint(rows, (size,), generator=generator) for rows in ROWS.values()]
    kjt = KeyedJaggedTensor(list(ROWS), torch.cat(rows), lengths=torch.ones(2 * size, dtype=torch.int32))
    return dense, kjt, (rows[0] % 2 == rows[1] % 2).float()


def train(folder: Path, table_optimizer: str) -> None:
    torch.manual_seed(0)
    model = make_model()
    ebc = model.sparse_arch.embedding_bag_collection
    optimizer_class = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad}[table_optimizer]
    _apply_optimizer_in_backward(optimizer_class, ebc.parameters(), {"lr": 0.1, "eps": 1e-8})
    placed = {
        "item": column_wise(ranks=[0, 1]) if table_optimizer == "adagrad" else table_wise(rank=1),
        "user": table_wise(rank=0),
    }
    plan = construct_module_sharding_plan(ebc, placed, local_size=2, world_size=2, device_type="cpu")
    model = DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=ShardingPlan({"sparse_arch.embedding_bag_collection": plan}),
        sharders=[EmbeddingBagCollectionSharder()],
    )
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    adam = KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    optimizer = CombinedOptimizer([model.fused_optimizer, adam])
    for step in range(20):
        inputs, kjt, label = make_batch(2 * step + dist.get_rank())
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(inputs, kjt).squeeze(1), label).backward()
        optimizer.step()
    dcp.save(
        {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 20, "git": "1f3a"},
        checkpoint_id=folder / "dcp",
    )
    inputs, kjt, _ = make_batch(1000)
    model.eval()
    with torch.no_grad():
        scores = model(inputs, kjt).squeeze(1)
    if dist.get_rank() == 0:
        dcp_to_torch_save(folder / "dcp", folder / "model.pt")
        batch = {"dense": inputs, "values": kjt.values(), "lengths": kjt.lengths(), "scores": scores}
        torch.save(batch, folder / "batch.pt")
        for table, rows in ROWS.items():
            with open(folder / f"{table}.csv", "w", newline="") as file:
                csv.writer(file).writerows([("key", "row"), *((f"{table}-{row:03d}", row) for row in range(rows))])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for kind in ("rowwise_adagrad", "adagrad"):
        (Path(sys.argv[1]) / kind).mkdir(exist_ok=True)
        train(Path(sys.argv[1]) / kind, kind)
    dist.destroy_process_group()
