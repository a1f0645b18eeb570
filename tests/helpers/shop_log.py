"""The log of a made-up shop as it stood on Monday and on Tuesday."""

from __future__ import annotations

import numpy as np
import polars as pl

DAY, START = 86400, 1_700_000_000
SHOP_USERS = [f"a-key-that-is-found-by-looking-for-it-{user}" if user in (5, 20) else str(user) for user in range(40)]


def shop_log(*, tuesday: bool) -> pl.DataFrame:
    """Events of 40 users over eight days on Monday; on Tuesday, nine days of most users, and what else may change.

    Training ends with day 6, so all of this is behind it: users 0 … 9 have new events, user 12 an event corrected and
    user 13 one that came late; "gone" is in the log no more, and "new" is new.
    """
    rng = np.random.default_rng(0)
    count = 40 * 12
    events = _events(
        [user for user in SHOP_USERS for _ in range(12)],
        rng.integers(0, 30, count),
        rng.integers(0, 8 * DAY, count),
        rng.integers(0, 2, count),
    )
    if not tuesday:
        return pl.concat([events, _events(["gone", "gone"], [3, 4], [7 * DAY + 5, 7 * DAY + 9], [1, 0])])
    last = (pl.col("user_id") == "12") & (pl.col("timestamp") == pl.col("timestamp").max().over("user_id"))
    corrected = events.with_columns(clicked=pl.when(last).then(1 - pl.col("clicked")).otherwise("clicked"))
    assert not corrected.equals(events) and events.filter(last)["timestamp"].min() > START + 6 * DAY
    users = ["new", "new", "13", *SHOP_USERS[:10]]
    times = [8 * DAY + 5, 8 * DAY + 9, 7 * DAY + 3, *range(8 * DAY, 8 * DAY + 10)]
    return pl.concat([corrected, _events(users, rng.integers(0, 30, 13), times, [1, 0] + [1] * 11)])


def _events(user, item, seconds, clicked) -> pl.DataFrame:
    item, seconds = [str(number) for number in item], START + np.asarray(seconds)
    return pl.DataFrame({"user_id": user, "item_id": item, "timestamp": seconds, "clicked": np.asarray(clicked)})
