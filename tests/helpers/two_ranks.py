"""What the tests of lumrec.train need two processes for: `torchrun --nproc-per-node 2 two_ranks.py FOLDER`."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from runs import create_run
from tiny_training import TinyConfig, TinyLoader, TinyModel, plain_step
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from lumrec.run.distributed import init_distributed, rank
from lumrec.train.config import TrainConfig
from lumrec.train.loop import StepOutput, fit
from lumrec.train.non_finite import NonFiniteError
from lumrec.train.optimizers import OptimizerConfig
from lumrec.train.parallel import shard
from lumrec.train.plan import plan_table

# Name → sharding, table optimizer, rows of rank 0 in a batch of 8.
RUNS = {
    "table_wise": ("table_wise", "rowwise_adagrad", lambda position: position),  # 0 … 7: uneven, and none at first
    "row_wise": ("row_wise", "rowwise_adagrad", lambda position: position),
    "column_wise": ("column_wise", "adagrad", lambda position: 8 - position),
    "data_parallel": ("data_parallel", "rowwise_adagrad", lambda position: position),
}


class Interrupted(Exception):
    pass


def train(
    folder: str, name: str, *, run: str = "", config: TrainConfig | None = None, step: Any = plain_step
) -> nn.Module:
    sharding, table_optimizer, share = RUNS[name]
    config = config or TrainConfig(
        epochs=2, log_every=1, checkpoint_every=3, optimizer=OptimizerConfig(table_optimizer=table_optimizer)
    )
    model = shard(TinyModel(), device="cpu", optimizer=config.optimizer, sharding=sharding)
    run_folder = create_run(TinyConfig(folder, run=run or name, pretrain=config), "pretrain")
    loader = TinyLoader(64, first_share=share)
    result = fit(model=model, loader=loader, step=step, config=config, run=run_folder)
    run_folder.finish(result)
    return model


def interrupted_and_resumed(folder: str) -> None:
    steps = 0

    def step(model: nn.Module, batch: Any) -> StepOutput:
        nonlocal steps
        steps += 1
        if steps == 11:
            raise Interrupted
        return plain_step(model, batch)

    try:
        train(folder, "table_wise", run="resumed", step=step)
    except Interrupted:
        train(folder, "table_wise", run="resumed")


def errors(folder: str) -> dict[str, str]:
    """What each of these raises on this rank."""
    messages = {}

    def catch(name: str, call: Any) -> None:
        try:
            call()
        except (ValueError, FloatingPointError) as error:
            messages[name] = f"{type(error).__name__}: {error}"

    catch("other config", lambda: train(folder, "row_wise", config=TrainConfig(epochs=7)))

    def bad_on_rank_1(model: nn.Module, batch: Any) -> StepOutput:
        output = plain_step(model, batch)
        return StepOutput(output.loss_sum * (float("nan") if rank() == 1 else 1.0), output.count)

    catch("not finite", lambda: train(folder, "row_wise", run="not-finite", step=bad_on_rank_1))

    class Uneven(TinyLoader):
        def __len__(self) -> int:
            return 5 + rank()

    model = shard(TinyModel(), device="cpu")
    run_folder = create_run(TinyConfig(folder, run="uneven"), "pretrain")
    catch("uneven", lambda: fit(model=model, loader=Uneven(), step=plain_step, config=TrainConfig(), run=run_folder))
    assert NonFiniteError.__name__ in messages["not finite"]
    return messages


def main(folder: str) -> None:
    init_distributed("cpu", threads=1)
    plans = {}
    for name in RUNS:
        model = train(folder, name)
        plans[name] = plan_table(model)
    interrupted_and_resumed(folder)
    config = EmbeddingBagConfig(name="t0", num_embeddings=1000, embedding_dim=8, feature_names=["f0"])
    drawn = EmbeddingBagCollection(tables=[config], device=torch.device("meta"))
    torch.manual_seed(3)  # equal on both ranks, as a stage does it
    model = shard(nn.ModuleDict({"ebc": drawn}), device="cpu", sharding="row_wise")
    table = model.state_dict()["ebc.embedding_bags.t0.weight"].local_shards()[0].tensor
    report = {"plans": plans, "errors": errors(folder), "first_row": table[0].tolist(), "rows": len(table)}
    (Path(folder) / f"report-{rank()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
