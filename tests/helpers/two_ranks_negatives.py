"""What test_negatives_across_ranks.py needs `torchrun --nproc-per-node 2 two_ranks_negatives.py DATA OUT` for.

DATA is a prepared folder. Each rank leaves its results in OUT/rank-<r>.pt.
Shapes: T positions, C candidates, I items, D width.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lumrec.batches.negatives import NegativesConfig
from lumrec.batches.packs import PackBuilder, PackingConfig, PackLoader
from lumrec.batches.windows import training_windows
from lumrec.data.prepared import PreparedData
from lumrec.models.lum import ModelConfig, build_lum
from lumrec.modules.large_user_model import LargeUserModel, Pack
from lumrec.modules.losses import info_nce
from lumrec.run.distributed import init_distributed, rank, world_size
from lumrec.stages.pretrain import ContrastConfig, PretrainConfig, make_step
from lumrec.train.gather_candidates import gather_candidates
from lumrec.train.optimizers import OptimizerConfig
from lumrec.train.parallel import shard

NUM_ITEMS, WIDTH = 20, 6
# Candidates of rank 0 and 1, positions of rank 0 and 1.
SIZES = [((0, 0), (0, 0)), ((0, 5), (3, 4)), ((1, 0), (2, 0)), ((7, 7), (0, 9)), ((20, 3), (16, 5)), ((20, 20), (8, 8))]
PRETRAIN = PretrainConfig(
    packing=PackingConfig(events_per_pack=80, condition_dropout=0.0),
    negatives=NegativesConfig(sampled=0, across_ranks=True, logq_positive=True),
    contrast=ContrastConfig("feedback", weight=0.5),
    label_smoothing=0.1,
)


def draw(case: int, of_rank: int) -> dict[str, Tensor]:
    """One rank's items, positions and weights; a quarter of the positions are left out, some candidates weigh 0."""
    generator = torch.Generator().manual_seed(2 * case + of_rank)
    num_candidates, num_positions = (sizes[of_rank] for sizes in SIZES[case])
    log_weight_C = torch.randn(num_candidates, generator=generator, dtype=torch.float64)
    log_weight_C[2::4] = float("-inf")
    positive_T = torch.randint(-1, num_candidates, (num_positions,), generator=generator)
    positive_T[::4] = -1
    return {
        "x_TD": torch.randn(num_positions, WIDTH, generator=generator, dtype=torch.float64),
        "item_C": torch.randperm(NUM_ITEMS, generator=generator)[:num_candidates],
        "positive_T": positive_T,
        "log_weight_C": log_weight_C,
    }


def draw_parameters() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(99)
    shapes = (NUM_ITEMS, WIDTH), (WIDTH, WIDTH)
    table_ID, matrix_DD = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return table_ID.requires_grad_(), matrix_DD.requires_grad_()


def loss_and_gradients(case: int, *, unique: bool) -> list[Tensor]:
    """This rank's share of the loss and of the gradients, summed over ranks."""
    own = draw(case, rank())
    table_ID, matrix_DD = draw_parameters()
    candidates = gather_candidates(
        table_ID[own["item_C"]], own["item_C"], own["positive_T"], own["log_weight_C"], unique=unique
    )
    loss = info_nce(own["x_TD"] @ matrix_DD, *candidates)
    loss.backward()
    results = [loss.detach(), table_ID.grad, matrix_DD.grad]
    for tensor in results:
        dist.all_reduce(tensor)
    return results


def make_model(data: PreparedData) -> tuple[LargeUserModel, PackBuilder]:
    torch.manual_seed(0)
    conditions = ["feedback", "scenario"]
    return build_lum(ModelConfig(dim=16, num_layers=1, max_events=16, dropout=0.0, conditions=conditions), data)


def make_packs(builder: PackBuilder, place: int) -> list[Pack]:
    """The packs of rank 0 and 1 in a step; at place 1 that of rank 1 is empty."""
    everyone = np.ones(builder.data.num_users, dtype=bool)
    loader = PackLoader(
        builder,
        users=everyone,
        max_events=16,
        packing=PRETRAIN.packing,
        negatives=PRETRAIN.negatives,
        contrast_feature=PRETRAIN.contrast.feature,
        world_size=2,
    )
    windows = training_windows(builder.data, max_events=16, users=everyone, generator=torch.Generator().manual_seed(0))
    parts = [windows[:5], windows[5 : (8, 5)[place]]]
    num_events = sum(int(part.length_W.sum()) for part in parts)
    return [
        loader.training_pack(part, torch.Generator().manual_seed(seed), num_events=num_events)
        for seed, part in enumerate(parts)
    ]


def gradients_of_a_step(data: PreparedData, place: int) -> dict[str, Tensor]:
    """Gradients of a step on two ranks, scaled as the training loop does; a table's is read off its SGD update."""
    model, builder = make_model(data)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = OptimizerConfig(table_optimizer="sgd", table_lr=1.0)
    dmp = shard(model, device="cpu", optimizer=optimizer, sharding="table_wise")
    output = make_step(PRETRAIN)(dmp, make_packs(builder, place)[rank()])
    count = torch.tensor(float(output.count))
    dist.all_reduce(count)
    (output.loss_sum * (world_size() / count)).backward()
    gradients = {name: weight.grad for name, weight in dmp.named_parameters() if weight.grad is not None}
    for name, weight in dmp.state_dict().items():
        if hasattr(weight, "local_shards"):
            for part in weight.local_shards():
                gradients[name] = before[name] - part.tensor
    return gradients


def main(data: str, out: str) -> None:
    init_distributed("cpu", threads=1)
    prepared = PreparedData.open(data)
    results = {
        "cases": [[loss_and_gradients(case, unique=unique) for unique in (False, True)] for case in range(len(SIZES))],
        "steps": [gradients_of_a_step(prepared, place) for place in range(2)],
    }
    torch.save(results, Path(out) / f"rank-{rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
