"""The pool of events whose items are drawn as negatives: of the same split, near in time, about as popular.

A drawn item is then as popular and as new as the items of events at that time, so that it cannot be recognised::

    test, sorted by time        | slice 0             | slice 1            |      about SLICE events each
    within a slice by counts    | 0 0 0 1 2 5 5 9 9 9 | 0 0 1 1 3 7 7 9 9  |      0: not in the training split
                                          ▲ the event: drawn from as far around it as `reach` says

Shape suffixes: M events of a split in the pool, S slices, N draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from lumrec.data.splits import PARTS, mix

SLICE = 512  # events of a split that are treated as one time
LARGEST = 4_000_000  # events of the pool; of a larger log it has every second, third, …
LEAST_REACH = 16  # events to either side


class Slices(NamedTuple):
    """The events of one split. start_S: first second of each slice. begin_S1: index where each begins. item_M: in the
    order of (slice, count). key_M: slice · width + count, ascending.
    """

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
        either side, as a share of the slice. Indices beyond its ends are reflected, so that drawing item b for item a
        is as likely as a for b.
        """
        slice_N = np.maximum(np.searchsorted(self.start_S, time_N, side="right") - 1, 0)
        key_N = slice_N * self.width + count_N
        low_N, high_N = (np.searchsorted(self.key_M, key_N, side=side) for side in ("left", "right"))
        begin_N, end_N = self.begin_S1[slice_N], self.begin_S1[slice_N + 1]
        size_N = end_N - begin_N
        reach_N = np.minimum(np.maximum((size_N * reach).astype(np.int64), LEAST_REACH), size_N)
        index_N = low_N + (at_N * (high_N - low_N)).astype(np.int64)
        index_N = np.minimum(index_N, end_N - 1) + np.floor((2 * shift_N - 1) * reach_N).astype(np.int64)
        index_N = np.where(index_N < begin_N, 2 * begin_N - 1 - index_N, index_N)
        index_N = np.where(index_N >= end_N, 2 * end_N - 1 - index_N, index_N)
        return self.item_M[np.clip(index_N, begin_N, end_N - 1)]


def make_pool(blocks: Sequence[Path], count_I: np.ndarray, *, absolute_time: bool) -> dict[int, Slices]:
    """The slices of each split that has events. blocks: with item, timestamp, order and split.

    Where times of different users cannot be compared, a split is one slice.
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
    for split in range(len(PARTS)):
        of_split = events.filter(pl.col("split") == split).sort("timestamp", "order")
        if len(of_split):
            item_M, time_M = (of_split[name].to_numpy().astype(np.int64) for name in ("item", "timestamp"))
            pool[split] = _slices(item_M, time_M if absolute_time else np.zeros_like(time_M), count_I)
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
