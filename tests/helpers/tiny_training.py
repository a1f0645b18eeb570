"""A small but real training run (sharded tables, dropout, all random generators), shared by the tests of lumrec.train.

Shapes: B rows, D table width.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import create_run
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from lumrec.run.distributed import init_distributed, rank, world_size
from lumrec.train import checkpoint
from lumrec.train.config import TrainConfig
from lumrec.train.loop import StepOutput, fit
from lumrec.train.parallel import shard

ROWS = (40, 12)
WIDTH = 8
FEATURES = ("f0", "f1")


@dataclass
class TinyBatch:
    features: KeyedJaggedTensor
    label_B: Tensor

    def to(self, device: torch.device) -> "TinyBatch":
        return TinyBatch(self.features.to(device), self.label_B.to(device))


class TinyModel(nn.Module):
    def __init__(self, *, rows: tuple[int, ...] = ROWS, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.ebc = EmbeddingBagCollection(
                tables=[
                    EmbeddingBagConfig(name=f"t{i}", num_embeddings=n, embedding_dim=WIDTH, feature_names=[FEATURES[i]])
                    for i, n in enumerate(rows)
                ]
            )
            self.mlp = nn.Sequential(nn.Linear(len(rows) * WIDTH, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.mlp(self.ebc(features).values()).squeeze(1)


def make_batch(rows_B: Tensor, seed: int = 5) -> TinyBatch:
    """The rows of an endless table: two features (the second jagged, 0 to 2 ids) and a label that depends on both."""
    values, lengths = [], []
    labels = []
    for row in rows_B.tolist():
        random_row = random.Random(seed * 1_000_003 + row)
        first = random_row.randrange(ROWS[0])
        second = [random_row.randrange(ROWS[1]) for _ in range(random_row.randrange(3))]
        values.append(([first], second))
        labels.append(float((first + sum(second)) % 3 == 0))
    for i in range(2):
        lengths.extend(len(entry[i]) for entry in values)
    flat = [value for i in range(2) for entry in values for value in entry[i]]
    features = KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.tensor(flat, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        stride=len(rows_B),
    )
    return TinyBatch(features, torch.tensor(labels))


class TinyLoader:
    """Shuffled batches of 8 rows; of two ranks, rank 0 gets `first_share(batch number)` of them, rank 1 the rest."""

    def __init__(self, num_rows: int = 72, *, first_share: Any = lambda position: 4) -> None:
        self.num_rows, self.first_share = num_rows, first_share
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return self.num_rows // 8

    def rows(self, epoch: int, position: int) -> Tensor:
        order = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(epoch))
        return order[position * 8 : position * 8 + 8]

    def __iter__(self) -> Iterator[TinyBatch]:
        while self.position < len(self):
            rows_B = self.rows(self.epoch, self.position)
            if world_size() == 2:
                share = self.first_share(self.position)
                rows_B = rows_B[:share] if rank() == 0 else rows_B[share:]
            self.position += 1
            yield make_batch(rows_B)
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return local(model.state_dict())


def local(state: dict[str, Any]) -> dict[str, Tensor]:
    """Copies of what this rank holds of a state dict, of a table those rows that are here."""
    here = {}
    for name, value in state.items():
        parts = [shard.tensor for shard in value.local_shards()] if hasattr(value, "local_shards") else [value]
        if parts:
            here[name] = parts[0].clone()
    return here


def loss_sum(model: nn.Module, batch: TinyBatch) -> Tensor:
    logit_B = model(batch.features)
    return nn.functional.binary_cross_entropy_with_logits(logit_B, batch.label_B, reduction="sum")


def plain_step(model: nn.Module, batch: TinyBatch) -> StepOutput:
    loss = loss_sum(model, batch)
    return StepOutput(loss, len(batch.label_B), {"twice": 2 * loss.detach()})


def noisy_step(model: nn.Module, batch: TinyBatch) -> StepOutput:
    """Draws from every random generator, so that a state that is not restored shows in the loss."""
    return StepOutput(loss_sum(model, batch) * (1 + random.random() + np.random.rand()), len(batch.label_B))


@dataclass(frozen=True)
class TinyConfig:
    """As much of Common as a run needs, without Polars, whose threads no fork survives."""

    runs_dir: str
    run: str = ""
    name: str = "tiny"
    fold: str = ""
    overwrite: bool = False
    seed: int = 0
    threads: int = 1
    pretrain: TrainConfig = field(default_factory=TrainConfig)
    rank: TrainConfig = field(default_factory=TrainConfig)

    def folder(self, stage: str) -> Path:
        return Path(self.runs_dir) / (self.run or f"{self.name}-{stage}")

    def settings(self, **sections: Any) -> "TinyConfig":
        return self


def noisy_evaluation() -> dict[str, float]:
    torch.rand(3), np.random.rand(3), random.random()
    return {"chance": torch.rand(1).item()}


def train_noisily(
    runs_dir: str, *, epochs: int = 3, end_after_s: float = 0.0, signal_at: int = 0, number: int = 0
) -> None:
    """The run of the kill tests: dropout, epochs of 9 steps, a checkpoint every 4 steps, an evaluation every 5.

    end_after_s: seconds of processor time, however busy the machine is, after which the system ends it as it ends
    killed ones, by SIGPROF; 0 = never. signal_at: the step, counted from here, in which it sends itself the signal
    `number`. Says how much processor time it took to begin, and in all.
    """
    signal.setitimer(signal.ITIMER_PROF, end_after_s)
    steps = 0

    def step(model: nn.Module, batch: TinyBatch) -> StepOutput:
        nonlocal steps
        steps += 1
        if steps == 1:
            print(f"begins after {time.process_time()} s", flush=True)
        if steps == signal_at:
            os.kill(os.getpid(), number)
        return noisy_step(model, batch)

    train = TrainConfig(epochs=epochs, log_every=2, checkpoint_every=4, eval_every=5)
    config = TinyConfig(runs_dir=runs_dir, pretrain=train)
    device = init_distributed("cpu", threads=config.threads)
    torch.manual_seed(config.seed), np.random.seed(config.seed), random.seed(config.seed)
    model = shard(TinyModel(dropout=0.3), device=device, optimizer=config.pretrain.optimizer)
    folder = create_run(config, "pretrain")
    result = fit(
        model=model,
        loader=TinyLoader(),
        step=step,
        config=config.pretrain,
        run=folder,
        evaluate=noisy_evaluation,
        select="chance",
        fingerprint={"data": "tiny"},
    )
    folder.finish(result)
    print(f"ends after {time.process_time()} s", flush=True)


def train_until_killed_in_save(runs_dir: str, *, epochs: int, which: int) -> None:
    """The same, killed in its `which`-th checkpoint, when all but its COMPLETE is written."""
    write, complete = checkpoint.write_atomically, 0

    def write_or_die(path: Any, text: str) -> None:
        nonlocal complete
        complete += path.name == "COMPLETE"
        if complete == which:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, text)

    checkpoint.write_atomically = write_or_die
    train_noisily(runs_dir, epochs=epochs)


def train_slowly(runs_dir: str, *, step_s: float) -> None:
    """30 steps, each of them so long; says when the second begins."""
    config = TinyConfig(runs_dir=runs_dir, run="slow", pretrain=TrainConfig(max_steps=30, epochs=9))
    model = shard(TinyModel(), device=init_distributed("cpu", threads=1))
    run, steps = create_run(config, "pretrain"), 0

    def step(model: nn.Module, batch: TinyBatch) -> StepOutput:
        nonlocal steps
        steps += 1
        if steps == 2:
            print("the second step begins", flush=True)
        if steps > 1:
            time.sleep(step_s)
        return plain_step(model, batch)

    fit(model=model, loader=TinyLoader(), step=step, config=config.pretrain, run=run)
