"""A run goes on with other ranks and another sharding: as if nothing had happened, or it says why it cannot."""

import json
from pathlib import Path

import pytest
import torch
from forks import ForkServer
from runs import create_run
from tiny_training import TinyConfig, TinyLoader, TinyModel, make_batch, plain_step
from torch import nn

from lumrec.run.distributed import init_distributed
from lumrec.train.checkpoint import best_checkpoint, complete_checkpoints, load_weights
from lumrec.train.config import TrainConfig
from lumrec.train.loop import StepOutput, fit
from lumrec.train.optimizers import OptimizerConfig
from lumrec.train.parallel import shard

THIS = "tests.train.test_resharding"


class Enough(Exception):
    exit_code = 75


def train(
    folder: str,
    *,
    sharding: str,
    table_optimizer: str = "rowwise_adagrad",
    stop_at: int = 0,
    optimizer_state: str = "keep",
    checkpoint_every: int = 5,
    fixed_batch: bool = True,
) -> None:
    """2 epochs of 8 steps, the same batches for any number of ranks; ends with `Enough` in step `stop_at`."""
    init_distributed("cpu", threads=1)
    config = TrainConfig(
        epochs=2,
        log_every=1,
        checkpoint_every=checkpoint_every,
        optimizer_state=optimizer_state,
        optimizer=OptimizerConfig(table_optimizer=table_optimizer, schedule="linear", warmup_steps=3),
    )
    model = shard(TinyModel(), device="cpu", optimizer=config.optimizer, sharding=sharding)
    run = create_run(TinyConfig(folder, run="run", pretrain=config), "pretrain")
    done = complete_checkpoints(run.path / "checkpoints")
    steps = int(done[-1].name.removeprefix("step-")) if done else 0

    def step(model: nn.Module, batch) -> StepOutput:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            raise Enough
        return plain_step(model, batch)

    loader = TinyLoader(64) if fixed_batch else RankedLoader(64)
    run.finish(fit(model=model, loader=loader, step=step, config=config, run=run))


class RankedLoader(TinyLoader):
    """Batches of 8 rows for each rank, as the stages' loaders have them: more ranks, fewer steps."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(num_rows)
        self.world_size = torch.distributed.get_world_size()

    def __len__(self) -> int:
        return self.num_rows // 8 // self.world_size

    def __iter__(self):
        while self.position < self.num_rows // 8:
            number = self.position + torch.distributed.get_rank()
            self.position += self.world_size
            yield make_batch(self.rows(self.epoch, number))
        self.epoch, self.position = self.epoch + 1, 0


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = TinyModel(seed=8)
    load_weights(best_checkpoint(folder / "run"), model)
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def whole(forks: ForkServer, tmp_path_factory) -> dict[str, Path]:
    """Uninterrupted runs of one process, by table optimizer."""
    folders = {}
    for table_optimizer in ("rowwise_adagrad", "adagrad"):
        folders[table_optimizer] = folder = tmp_path_factory.mktemp("whole")
        forks.run(f"{THIS}:train", folder=str(folder), sharding="table_wise", table_optimizer=table_optimizer)
    return folders


@pytest.mark.parametrize(
    ("table_optimizer", "parts"),
    [
        ("rowwise_adagrad", [(2, "row_wise"), (1, "table_wise"), (2, "table_wise")]),
        ("rowwise_adagrad", [(1, "table_wise"), (2, "data_parallel"), (2, "row_wise")]),
        ("adagrad", [(2, "column_wise"), (1, "data_parallel"), (2, "table_wise")]),
    ],
)
def test_other_ranks_and_shardings_go_on_with_the_optimizers_state(forks, whole, tmp_path, table_optimizer, parts):
    for (world_size, sharding), stop_at in zip(parts, (7, 13, 0)):
        run = forks.start(
            f"{THIS}:train",
            world_size=world_size,
            folder=str(tmp_path),
            sharding=sharding,
            table_optimizer=table_optimizer,
            stop_at=stop_at,
        )
        assert run.wait() == [Enough.exit_code if stop_at else 0] * world_size, run.text()
        assert sharding in (tmp_path / "run" / "plan.txt").read_text()
    expected = lines(whole[table_optimizer])
    assert [(row["step"], row["epoch"], row["learning_rate"]) for row in lines(tmp_path)] == [
        (row["step"], row["epoch"], row["learning_rate"]) for row in expected
    ]
    # Sums of squares that began anew would show: see the test of optimizer_state=drop.
    assert [row["loss"] for row in lines(tmp_path)] == pytest.approx([row["loss"] for row in expected], rel=2e-5)
    for name, weight in weights(whole[table_optimizer]).items():
        torch.testing.assert_close(weights(tmp_path)[name], weight, rtol=1e-3, atol=2e-5, msg=name)


def test_state_that_does_not_fit_is_refused_unless_it_may_be_dropped(forks, whole, tmp_path):
    arguments = {"folder": str(tmp_path), "sharding": "column_wise", "stop_at": 6}
    forks.start(f"{THIS}:train", world_size=2, **arguments).wait()
    arguments |= {"sharding": "table_wise", "stop_at": 0}
    refused = forks.start(f"{THIS}:train", **arguments)
    assert refused.wait() == [1]
    message = refused.text()
    assert "t0.weight.t0.momentum1 is [80] in the checkpoint (column_wise), [40] here (table_wise)" in message
    assert "train.optimizer_state=drop" in message
    assert len(lines(tmp_path)) == 5
    dropped = forks.run(f"{THIS}:train", world_size=2, optimizer_state="drop", **arguments)
    assert "optimizer state is reset (optimizer_state=drop)" in dropped.text()
    kept, anew = ([row["loss"] for row in lines(folder)] for folder in (whole["rowwise_adagrad"], tmp_path))
    # column_wise trains a little differently (up to 0.2% by here); sums that start again do so by more.
    assert anew[:5] == pytest.approx(kept[:5], rel=3e-3) and len(anew) == 16
    assert max(abs(a / b - 1) for a, b in zip(anew[5:], kept[5:])) > 5e-3


def test_an_epoch_of_another_number_of_steps_keeps_the_schedule_in_place(forks, tmp_path):
    parts = [(1, 5), (2, 7), (1, 0)]  # 4 steps of one rank, 2 of two, and one rank again: 4 + 2 * 2 + 8 = 16 batches
    for world_size, stop_at in parts:
        arguments = {"folder": str(tmp_path), "sharding": "table_wise", "stop_at": stop_at}
        arguments |= {"checkpoint_every": 1, "fixed_batch": False}
        run = forks.start(f"{THIS}:train", world_size=world_size, **arguments)
        assert run.wait() == [Enough.exit_code if stop_at else 0] * world_size, run.text()
        if world_size == 2:
            assert "continues with 2 process(es), not as many as before" in run.text()
            assert "step 6/10" in run.text()  # 12 of 16 batches are left, in 6 steps
    places = [*range(4), 4, 6, *range(8, 16)]  # where each step stands among the 16 of one rank
    factors = [(place + 1) / 3 if place < 3 else 1 - (place - 3) / 13 for place in places]
    assert [row["learning_rate"] for row in lines(tmp_path)] == pytest.approx([f * 1e-3 for f in factors])
    assert [row["epoch"] for row in lines(tmp_path)] == [0] * 5 + [1] + [1] * 7 + [2]
