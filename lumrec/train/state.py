"""What the training loop remembers from step to step, and its position in the learning rate's schedule."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lumrec.run.errors import UserError

_MOST = 2**53


@dataclass
class TrainState:
    """The loop's state; it is saved in every checkpoint, as JSON."""

    step: int = 0
    epoch: int = 0
    num_events: float = 0.0
    num_tokens: float = 0.0
    train_s: float = 0.0
    wall_s: float = 0.0
    wait_s: float = 0.0
    window: dict[str, float] = field(default_factory=dict)  # sums since the last log line
    loss: float = math.nan  # of the last log line
    best_step: int = 0
    best_value: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    evaluations_without_gain: int = 0
    stopped: bool = False
    # The learning rate's schedule counts steps as the run's first start did: step * rate + offset.
    steps_per_epoch: int = 0
    schedule_rate: float = 1.0
    schedule_offset: float = 0.0

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "TrainState":
        """The state that a checkpoint holds. Raises UserError for a name or a kind of value that no state has."""
        kinds = {entry.name: type(getattr(cls(), entry.name)) for entry in fields(cls)}
        for name, value in stored.items():
            kind = kinds.get(name)
            fits = type(value) in (float, int) if kind in (float, type(None)) else type(value) is kind
            if name == "best_value" and value is None:
                fits = True
            if kind is dict and fits:
                fits = all(type(entry) in (float, int) for entry in value.values())
            if not fits or (kind is int and not 0 <= value < _MOST):
                raise UserError(
                    f"the checkpoint's state has {name}={value!r:.60}, which this lumrec cannot continue from: it is "
                    "damaged, or was written by a newer version"
                )
        return cls(**stored)

    @property
    def schedule_step(self) -> float:
        return round(self.step * self.schedule_rate + self.schedule_offset, 6)

    def set_steps_per_epoch(self, num_steps: int) -> None:
        """Sets the number of steps of an epoch from here on; the position in the schedule does not change."""
        before, self.steps_per_epoch = self.steps_per_epoch or num_steps, num_steps
        if before != num_steps:
            position = self.schedule_step
            self.schedule_rate *= before / num_steps
            self.schedule_offset = position - self.step * self.schedule_rate
