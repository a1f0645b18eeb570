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
    """Size of the simulated log, and the weight of each term of the click logit. The seed is that of the run.

    num_users: users.
    num_items: items.
    events_per_user: mean number of impressions of a user; the numbers are log-normal, and at least 1.
    num_scenarios: scenarios (places where items are shown).
    num_categories: categories of items.
    latent_dim: width of the hidden taste vectors of users and items.
    session_events: mean number of events of a session.
    days: length of the log; users arrive in its first two thirds.
    zipf: exponent of item popularity.
    late_items: share (0 … 1) of the items that are launched during the log; they are never shown before.
    repeat_share: share (0 … 1) of the impressions that show an item that the user saw before.
    drift: share (0 … 1) of a user's interests that has changed by the end of the log.
    bias: constant of the logit.
    propensity: weight of how readily the user clicks.
    taste: weight of how well the item fits the user's taste.
    focus: weight of the interest that the user follows in a session.
    popularity: weight of the item's popularity.
    price: weight of how the price suits the user.
    query: weight of how well the item fits the search query.
    freshness: weight of how new the item is; it fades over ten days from the launch.
    repeat: weight of a click that the user gave the item before; minus half of it where the user only saw the item.
    """

    # The upper limits keep the numbers in the drafts and in the sort by user and item within their types.
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
