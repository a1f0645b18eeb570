"""Fits the length of a training to the size of the log (min_steps), and warns of one that is too short."""

import dataclasses
import logging

from lumrec.run.distributed import rank
from lumrec.train.config import TrainConfig

logger = logging.getLogger(__name__)
SMALLEST_BATCH, MOST_EPOCHS = 32, 20  # what min_steps goes down and up to
WARM_UP = 0.1  # highest share of the steps that min_steps leaves to the warm-up
FEW_STEPS, FEW_WARM_UPS = 100, 3  # a training with fewer steps, or fewer than 3 warm-ups of them, is too short


def fit_length(
    name: str, config: TrainConfig, batch: int, num_rows: int, *, smallest: int = SMALLEST_BATCH
) -> tuple[TrainConfig, int]:
    """The config and batch size (in rows or events) with which `num_rows` give at least config.min_steps steps.

    While there are too few, the batch is halved, down to `smallest`; then epochs are added, up to 20 in all. The
    warm-up is then cut to a tenth of the steps. A run that has enough steps stays as configured. The batch of one
    process is fitted, so that a run may continue with another number of processes. Rank 0 logs changes for `name`.

    >>> train, batch = fit_length("rank", TrainConfig(epochs=2, min_steps=300), 2048, 8000)
    >>> batch, train.epochs
    (32, 2)
    """
    wanted = min(config.min_steps, config.max_steps or config.min_steps)
    fitted, epochs, before = batch, config.epochs, config.epochs * _steps(num_rows, batch)
    if num_rows < 1 or before >= wanted:
        return config, batch
    while fitted // 2 >= smallest and epochs * _steps(num_rows, fitted) < wanted:
        fitted //= 2
    while epochs < MOST_EPOCHS and epochs * _steps(num_rows, fitted) < wanted:
        epochs += 1
    steps, warm_up = epochs * _steps(num_rows, fitted), config.optimizer.warmup_steps
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=min(warm_up, int(WARM_UP * steps)))
    train = dataclasses.replace(config, epochs=epochs, optimizer=optimizer)
    if (train, fitted) != (config, batch) and rank() == 0:
        logger.info(
            "%s: %s rows would be %d steps, fewer than min_steps %d: batches of %d (not %d), %d epochs (not %d), a "
            "warm-up of %d steps (not %d)",
            name, f"{num_rows:,}", before, config.min_steps, fitted, batch, epochs, config.epochs,
            optimizer.warmup_steps, warm_up,
        )  # fmt: skip
    return train, fitted


def too_short(config: TrainConfig, steps_per_epoch: int) -> str:
    """A warning where a training has too few steps to learn anything; "" where it has enough."""
    steps, warm_up = config.epochs * steps_per_epoch, config.optimizer.warmup_steps
    if config.max_steps:
        steps = min(steps, config.max_steps)
    if steps >= FEW_STEPS and steps >= FEW_WARM_UPS * warm_up:
        return ""
    under = f" with a warm-up of {warm_up}" if steps < FEW_WARM_UPS * warm_up else ""
    mend = (
        f"min_steps: {config.min_steps} cannot make more of so small a log"
        if min(config.min_steps, config.max_steps or config.min_steps) > steps
        else "set min_steps: 300 beside epochs, which fits batches, epochs and warm-up to the log"
    )
    amount, verb = ("1 step", "is") if steps == 1 else (f"{steps} steps", "are")
    return f"{amount} of training{under} {verb} too few to learn from, so the figures mean little; {mend}"


def _steps(num_rows: int, batch: int) -> int:
    return -(-num_rows // batch)
