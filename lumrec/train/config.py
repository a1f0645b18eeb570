"""The settings of the training loop."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lumrec.run.errors import UserError
from lumrec.run.limits import check_choice, count
from lumrec.train.optimizers import OptimizerConfig


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and how often to log, evaluate and save.

    epochs: passes over the training part, at most.
    max_steps: steps, at most; 0 = as many as the epochs have. When a run continues with another number of processes,
        its epochs have another number of steps; max_steps and the learning rate's schedule still count the steps of the
        first start.
    min_steps: where the epochs have fewer steps than this, the batch is made smaller, then epochs are added, and the
        warm-up is cut to a tenth of the steps (see lumrec.train.length); 0 = keep epochs and batches as configured.
    log_every: steps between two lines of metrics.jsonl.
    checkpoint_every: steps between two checkpoints; 0 = at the end of each epoch. The end of training saves one too.
    keep_checkpoints: number of the newest checkpoints that are kept, beside the best.
    eval_every: steps between two evaluations; 0 = at the end of each epoch. The end of training evaluates too.
    patience: stop after this many evaluations in a row without a better one; 0 = never.
    sharding: sharding of the tables: "" = the planner's choice, one type for all of them, or a plan file (see
        lumrec.train.plan).
    fsdp: shard the transformer blocks over the ranks (FSDP2) instead of replicating them.
    optimizer_state: what happens on resuming to state of the tables that does not fit the new sharding: "keep" refuses
        to resume, "drop" starts that state again.
    """

    epochs: int = count(1, least=1)
    max_steps: int = count(0)
    min_steps: int = count(0)
    log_every: int = count(50, least=1)
    checkpoint_every: int = count(0)
    keep_checkpoints: int = count(2, least=1)
    eval_every: int = count(0)
    patience: int = count(0)
    sharding: str = ""
    fsdp: bool = False
    optimizer_state: Literal["keep", "drop"] = "keep"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def check_select(at: str, select: str, known: Sequence[str], *, patience: int) -> None:
    """Raises UserError where a section's `select` is not in `known`, or is empty although patience needs a metric.

    known: the evaluation's metrics, with "-" before those that are minimised.
    """
    if select:
        check_choice(f"{at}select", select, (*known, ""))
    elif patience:
        raise UserError(f"{at}train.patience={patience} needs a metric to go by, and {at}select is empty")


def check_no_encoder(at: str, config: TrainConfig) -> None:
    """Raises UserError for settings that only a LUM's training reads (`at`: the section, with a dot)."""
    if config.fsdp:
        raise UserError(
            f"{at}train.fsdp=true shards the blocks of a user encoder, and only a LUM has one: leave it out"
        )
