"""The moment of an event: the events of one user that were shown or recorded together.

::

    row          0   1   2   3   4
    time         9   9  12  12  15
    request      -   -   A   -   A        rows 2 and 4 are one page, of which one row was recorded later
    before       0   0   2   2   2        row 4 was shown with row 2, so it does not see row 3 either

A row sees what is strictly earlier than its moment: the rows of its user from the first one up to, but without, the
row `before`. Row 3 sees rows 0 and 1. A request only hides its own page: a row at 15 without a request sees rows 0
to 3.

Shape suffixes: E events, in order of user, time and original row.
"""

from __future__ import annotations

import numpy as np
import polars as pl

MUCH = 0.5  # share of rows without any history above which there is a warning


def first_of_moment(user_E: np.ndarray, time_E: np.ndarray, request_E: pl.Series | None = None) -> np.ndarray:
    """`before`, int64 [E]: the user's first row at the time of the row, or at the earliest time of its request.

    request_E: of any type that can be compared; null: the row was shown by itself.

    >>> request_E = pl.Series([None, None, "A", None, "A"])
    >>> first_of_moment(np.zeros(5), np.array([9, 9, 12, 12, 15]), request_E).tolist()
    [0, 0, 2, 2, 2]
    """
    is_new_E = np.ones(len(time_E), bool)
    is_new_E[1:] = (user_E[1:] != user_E[:-1]) | (time_E[1:] != time_E[:-1])
    first_E = np.maximum.accumulate(np.where(is_new_E, np.arange(len(time_E)), 0))
    if request_E is None:
        return first_E
    frame = pl.DataFrame({"first": first_E, "user": user_E, "request": request_E})
    of_request = pl.col("first").min().over("user", "request")
    together = pl.when(pl.col("request").is_null()).then(pl.col("first")).otherwise(of_request)
    return frame.select(together).to_series().to_numpy()


def inseparable(before_E: np.ndarray) -> np.ndarray:
    """For each row the first row (int64 [E]) of the run around it that a cut must not divide, as that divides a moment.

    >>> inseparable(np.array([0, 0, 2, 2, 2, 5])).tolist()
    [0, 0, 2, 2, 2, 5]
    >>> inseparable(np.array([0, 1, 2, 1])).tolist()  # rows 1 and 3 are one moment, and row 2 lies between them
    [0, 1, 1, 1]
    """
    reached_E = np.minimum.accumulate(before_E[::-1])[::-1]  # by this row or a later one
    index_E = np.arange(len(before_E))
    return np.maximum.accumulate(np.where(reached_E == index_E, index_E, 0))


def seen_line(share: float, *, has_clock: bool) -> str:
    """One line on what a row sees, if `share` of the rows have an earlier row in their moment."""
    if not has_clock:
        return "the log has no times: every row sees all rows of its user before it, in the order of the log"
    if not share:
        return "no two rows of a user have the same time: every row sees all rows of its user before it"
    return (
        f"{share:.1%} of the rows share their time or request with an earlier row of the same user: they do not see "
        "it, nor its feedback, as both were shown or recorded together"
    )


def seen_warnings(no_history_share: float) -> list[str]:
    """A warning if more than half of the rows have no history, else []."""
    if no_history_share <= MUCH:
        return []
    return [
        f"{no_history_share:.0%} of the rows have no earlier row of their user to read, as each user has few events or "
        "few different times. Where the times are dates or all equal and only the order of the rows is known, use "
        "data.log.timestamp=''; where data.request names a column, has it one value for each page?"
    ]
