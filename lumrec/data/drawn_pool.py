"""Events whose items are drawn as negatives: of the same part of the log, near in time, about as popular.

So that the draw itself tells nothing, a drawn item is as popular, as new and as much of its time as the item of an
event of that part::

    part test, sorted by time   | slice 0             | slice 1            |      about SLICE events each
    within a slice by counts    | 0 0 0 1 2 5 5 9 9 9 | 0 0 1 1 3 7 7 9 9  |      0: not in the training part
                                          ▲ the event: drawn from as far around it as `reach` says

Shape suffixes: M events of a part in the pool, S slices, N draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from lumrec.data.splits import PARTS, mix

SLICE = 512  # events of a part that count as of one time
LARGEST = 4_000_000  # events of the pool; of a larger log every second, third, … is in it
LEAST_REACH = 16  # events to either side


class Slices(NamedTuple):
    """One part's events: start_S, its slices' first seconds; begin_S1, where each begins; item_M in the order of
    (slice, count); key_M = slice · width + count, ascending."""

    start_S: np.ndarray
    begin_S1: np.ndarray
    item_M: np.ndarray
    key_M: np.ndarray
    width: int

    def draw(
        self, time_N: np.ndarray, count_N: np.ndarray, at_N: np.ndarray, shift_N: np.ndarray, reach: float
    ) -> np.ndarray:
        """An item (int64 [N]) for events at `time_N` whose items occur `count_N` times in training.

        at_N, shift_N: random, 0 … 1: where among events of that time and count, and how far from there. reach: to
        either side, as a share of the slice; what reaches over its end is reflected, so that the draw from one item to
        another is as likely as the reverse.
        """
        slice_N = np.maximum(np.searchsorted(self.start_S, time_N, side="right") - 1, 0)
        key_N = slice_N * self.width + count_N
        low_N, high_N = (np.searchsorted(self.key_M, key_N, side=side) for side in ("left", "right"))
        begin_N, end_N = self.begin_S1[slice_N], self.begin_S1[slice_N + 1]
        size_N = end_N - begin_N
        reach_N = np.minimum(np.maximum((size_N * reach).astype(np.int64), LEAST_REACH), size_N)
        place_N = low_N + (at_N * (high_N - low_N)).astype(np.int64)
        place_N = np.minimum(place_N, end_N - 1) + np.floor((2 * shift_N - 1) * reach_N).astype(np.int64)
        place_N = np.where(place_N < begin_N, 2 * begin_N - 1 - place_N, place_N)
        place_N = np.where(place_N >= end_N, 2 * end_N - 1 - place_N, place_N)
        return self.item_M[np.clip(place_N, begin_N, end_N - 1)]


def make_pool(blocks: Sequence[Path], count_I: np.ndarray, *, absolute_time: bool) -> dict[int, Slices]:
    """The slices of each part that has events. blocks: with item, timestamp, order and split.

    Where times of different users cannot be compared, a part is one slice.
    """
    num_events = pl.scan_parquet(list(blocks)).select(pl.len()).collect(engine="streaming").item()
    every = np.uint64(-(-num_events // LARGEST)) if num_events else np.uint64(1)
    found = []
    for path in blocks:
        block = pl.read_parquet(path, columns=["item", "timestamp", "order", "split"])
        is_in_E = mix(block["order"].to_numpy().astype(np.uint64)) % every == 0
        found.append(block.filter(pl.Series(is_in_E)))
    events = pl.concat(found)
    pool = {}
    for part in range(len(PARTS)):
        of_part = events.filter(pl.col("split") == part).sort("timestamp", "order")
        if len(of_part):
            item_M, time_M = (of_part[name].to_numpy().astype(np.int64) for name in ("item", "timestamp"))
            pool[part] = _slices(item_M, time_M if absolute_time else np.zeros_like(time_M), count_I)
    return pool


def _slices(item_M: np.ndarray, time_M: np.ndarray, count_I: np.ndarray) -> Slices:
    num_slices = max(1, len(item_M) // SLICE)
    start_S = np.unique(time_M[np.arange(num_slices) * len(item_M) // num_slices])
    slice_M = np.searchsorted(start_S, time_M, side="right") - 1
    width = int(count_I.max(initial=0)) + 1
    key_M = slice_M * width + count_I[item_M]
    order_M = np.lexsort((item_M, key_M))
    begin_S1 = np.searchsorted(slice_M, np.arange(len(start_S) + 1))
    return Slices(start_S, begin_S1, item_M[order_M], key_M[order_M], width)
