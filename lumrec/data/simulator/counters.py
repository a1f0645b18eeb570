"""Counters for an online model: impressions and clicks that were known before the event.

    user        exact: every earlier event of the user
    user × item exact: every earlier event of the user on this item
    item        by day, as a nightly job counts: every event of any user on an earlier day (UTC) than the event's

Shapes: E events, U users, I items, D days.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lumrec.run.files import reserve

CHUNK_CELLS = 1 << 22  # cells of the day-by-day counts that are summed up at a time


class Runs(NamedTuple):
    """Events grouped by (user, item), in the order of time within each pair.

    event_E: the events in that order. first_E: for each index in it, the index where the pair begins.
    """

    event_E: np.ndarray
    first_E: np.ndarray

    def before(self, counted_E: np.ndarray) -> np.ndarray:
        """Sum of `counted_E` (ints, in the order of the runs) before each event in its run."""
        total_E = np.cumsum(counted_E, dtype=np.int64) - counted_E
        return total_E - total_E.take(self.first_E)

    def at_events(self, values_E: np.ndarray) -> np.ndarray:
        """Values in the order of the runs, reordered to that of the events."""
        result = np.empty_like(values_E)
        result[self.event_E] = values_E
        return result


def pair_runs(user_E: np.ndarray, item_E: np.ndarray, num_items: int) -> Runs:
    """The runs of events that are in order of time; user_E counts from 0 within the block."""
    bits = max(len(user_E) - 1, 1).bit_length()
    last_pair = (int(user_E.max(initial=0)) + 1) * num_items
    assert last_pair < 1 << (63 - bits), (last_pair, bits)  # user, item and event fit one number: one plain sort
    key_E = (user_E.astype(np.int64) * num_items + item_E) << bits
    key_E |= np.arange(len(user_E))
    key_E.sort()
    event_E, pair_E = key_E & ((1 << bits) - 1), key_E >> bits
    is_first_E = np.ones(len(user_E), bool)
    np.not_equal(pair_E[1:], pair_E[:-1], out=is_first_E[1:])
    return Runs(event_E, np.maximum.accumulate(np.where(is_first_E, np.arange(len(user_E)), 0)))


def user_counters(count_U: np.ndarray, click_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Impressions and clicks (u32) of the user before each event, for events in order of (user, time).

    Three events of one user and one of the next:

    >>> impressions_E, clicks_E = user_counters(np.array([3, 1]), np.array([True, False, True, False]))
    >>> impressions_E.tolist(), clicks_E.tolist()
    ([0, 1, 2, 0], [0, 1, 1, 0])
    """
    first_E = np.repeat(np.cumsum(count_U) - count_U, count_U)
    clicks_E = np.cumsum(click_E, dtype=np.int64) - click_E
    impressions_E = np.arange(len(click_E)) - first_E
    return impressions_E.astype(np.uint32), (clicks_E - clicks_E.take(first_E)).astype(np.uint32)


class ItemCounters:
    """Impressions and clicks of each item by day: add all blocks in any order, then sum up, then read.

    The counts are memory-mapped files (two times 4 bytes for each item and day), so memory does not grow with items and
    days. `add` may be called by several threads.
    """

    def __init__(self, num_items: int, num_days: int, folder: Path) -> None:
        self.shape_ID = (num_items, num_days)
        files = [folder / f"{name}.u32" for name in ("impressions", "clicks")]
        self.shown_ID, self.clicked_ID = (
            np.asarray(np.memmap(file, np.uint32, mode="w+", shape=self.shape_ID)) for file in files
        )
        for file in files:
            reserve(file)
        self._lock = threading.Lock()
        self._summed_up = False

    def add(self, item_E: np.ndarray, day_E: np.ndarray, click_E: np.ndarray) -> None:
        """Counts the events of one block."""
        assert not self._summed_up
        cell_E = self._cell(item_E, day_E)
        for counts_ID, cells in ((self.shown_ID, cell_E), (self.clicked_ID, cell_E[click_E])):
            cell_N, count_N = np.unique(cells, return_counts=True)
            with self._lock:
                counts_ID.reshape(-1)[cell_N] += count_N.astype(np.uint32)

    def sum_up(self) -> None:
        """Replaces the counts of each day by those of all days before it; call once, after the last block."""
        assert not self._summed_up
        self._summed_up = True
        step = max(1, CHUNK_CELLS // self.shape_ID[1])
        for counts_ID in (self.shown_ID, self.clicked_ID):
            for first in range(0, self.shape_ID[0], step):
                chunk_ID = counts_ID[first : first + step]
                chunk_ID[:] = np.cumsum(chunk_ID, axis=1, dtype=np.uint32) - chunk_ID

    def before(self, item_E: np.ndarray, day_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Impressions and clicks (u32) of each item on all days before the given one."""
        assert self._summed_up
        cell_E = self._cell(item_E, day_E)
        return self.shown_ID.reshape(-1).take(cell_E), self.clicked_ID.reshape(-1).take(cell_E)

    def _cell(self, item_E: np.ndarray, day_E: np.ndarray) -> np.ndarray:
        return item_E.astype(np.int64) * self.shape_ID[1] + day_E
