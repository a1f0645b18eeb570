"""Settings of the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lumrec.run.errors import UserError
from lumrec.run.limits import count, setting


def _weight(default: float) -> Any:
    """A field for a weight of the logit, which is single precision."""
    return setting(default, least=-1e6, most=1e6)


@dataclass(frozen=True)
class SimulatorConfig:
    """Size of the simulated log and weight of each part of the click logit; the seed is the run's.

    events_per_user: mean of a long-tailed number (log-normal, at least 1). session_events: mean length of a session.
    days: length of the log; users come in its first two thirds. zipf: exponent of item popularity.
    late_items: share (0 … 1) of the items that are launched on a day of the log; they are never shown before.
    repeat_share: share (0 … 1) of impressions that show an item which the user saw before.
    drift: share (0 … 1) of a user's interests that is another by the end of the log.
    Weights in the logit: bias (constant), propensity (of the user), taste, focus, popularity, price, query, freshness
    (of an item at its launch; it fades over ten days), repeat (of an item that the user clicked before; minus half of
    it where the user only saw the item).
    """

    # The upper ends are what the numbers in the drafts and in the sort by user and item hold.
    num_users: int = count(2000, least=1, most=2**31)
    num_items: int = count(1000, least=1, most=2**24)
    events_per_user: int = count(100, least=1)
    num_scenarios: int = count(3, least=1, most=1000)
    num_categories: int = count(16, least=1, most=100_000)
    latent_dim: int = count(8, least=1, most=256)
    session_events: int = count(12, least=1)
    days: int = count(90, least=1, most=3650)
    zipf: float = setting(0.9, least=0, most=10)
    late_items: float = setting(0.2, least=0, most=1)
    repeat_share: float = setting(0.1, least=0, most=1)
    drift: float = setting(0.5, least=0, most=1)
    bias: float = _weight(-1.4)
    propensity: float = _weight(0.4)
    taste: float = _weight(1.0)
    focus: float = _weight(0.45)
    popularity: float = _weight(0.2)
    price: float = _weight(0.3)
    query: float = _weight(0.6)
    freshness: float = _weight(0.4)
    repeat: float = _weight(0.5)

    def check(self, at: str) -> None:
        """Raises UserError for more events than a user can have (`at`: the section, with a dot)."""
        most = 500 * self.days
        if self.events_per_user > most:
            raise UserError(
                f"{at}events_per_user: got {self.events_per_user}, expected at most {most:,} (500 a day, "
                f"{at}days={self.days})"
            )
