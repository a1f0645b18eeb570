"""What the training loop remembers from step to step, and where in the learning rate's schedule it stands."""

import math
from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Goes into every checkpoint, as JSON."""

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
    # The schedule goes by steps as the run began to count them: step * rate + offset.
    steps_per_epoch: int = 0
    schedule_rate: float = 1.0
    schedule_offset: float = 0.0

    @property
    def schedule_step(self) -> float:
        return round(self.step * self.schedule_rate + self.schedule_offset, 6)

    def set_steps_per_epoch(self, number: int) -> None:
        """Epochs have `number` steps from here on; the schedule goes on where it is."""
        before, self.steps_per_epoch = self.steps_per_epoch or number, number
        if before != number:
            position = self.schedule_step
            self.schedule_rate *= before / number
            self.schedule_offset = position - self.step * self.schedule_rate
