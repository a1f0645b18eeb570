"""The item data that statistics read: how each item was liked before any given time, and its features.

Shape suffixes: I items, N rows asked about, S seconds that occur, P training events sorted by item and time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig, features_by_role
from lumrec.data.splits import TRAIN
from lumrec.run.errors import UserError

PRIOR_EVENTS = 5.0  # an unseen user, value or item counts as this many events at the expected rate
# Events after the training part: items (int64 [N]) to their number and the sum of their labels, float64 [N].
LiveCounts = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class ItemHistory(NamedTuple):
    """How often each item was shown and liked before a time, by the events of the training part.

    second_S: int64, sorted. key_P: int64, sorted, item · S + index of the second. label_P1: float64, sum of the labels
    of the entries before each. All may be memory-mapped.

    >>> items = ItemHistory(np.array([10, 20]), np.array([0, 1, 3]), np.array([0.0, 1.0, 1.0, 2.0]))
    >>> items.counts(np.array([0, 0, 1, 1]), np.array([11, 99, 20, 21]))  # strictly earlier
    (array([1., 2., 0., 1.]), array([1., 1., 0., 1.]))
    """

    second_S: np.ndarray
    key_P: np.ndarray
    label_P1: np.ndarray

    @classmethod
    def of(cls, data: PreparedData) -> ItemHistory:
        """The history of the items in the log's training part."""
        training = np.flatnonzero(data.split == TRAIN)
        # Seconds are numbered, so that a key cannot overflow.
        second_S, second_P = np.unique(data.timestamp[training], return_inverse=True)
        key_P = data.item[training] * len(second_S) + second_P
        order = np.argsort(key_P, kind="stable")
        return cls(second_S, key_P[order], running(data.label[training[order]]))

    def counts(self, item_N: np.ndarray, second_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the item's events in earlier seconds, and the sum of their labels, float64 [N]."""
        key_N = item_N * len(self.second_S)
        begin_N = searched(self.key_P, key_N)
        end_N = searched(self.key_P, key_N + searched(self.second_S, second_N))
        return (end_N - begin_N).astype(np.float64), self.label_P1[end_N] - self.label_P1[begin_N]

    def rates(
        self, item_N: np.ndarray, second_N: np.ndarray, base_rate: float, live: LiveCounts | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Smoothed like-rate of the items, and the number of events behind it, float64 [N].

        live: counts of events that came after the log was prepared; they are added whatever the second.
        """
        count_N, sum_N = self.counts(item_N, second_N)
        if live is not None:
            live_count_N, live_sum_N = live(item_N)
            count_N, sum_N = count_N + live_count_N, sum_N + live_sum_N
        return smoothed(sum_N, count_N, base_rate), count_N

    def save(self, folder: Path) -> None:
        """Writes one .npy file for each array into an existing folder."""
        for name, values in self._asdict().items():
            np.save(folder / f"{name}.npy", values)

    @classmethod
    def open(cls, folder: Path) -> ItemHistory:
        """The history that `save` wrote, memory-mapped."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls._fields))


class Catalogue(NamedTuple):
    """Features of the items, followed by those of the unknown item: I + 1 entries.

    columns: vocabulary rows (0, or none of a list, for the unknown item). dense: scaled float32 (0 for it).
    """

    columns: dict[str, Column]
    dense: dict[str, np.ndarray]

    @property
    def num_items(self) -> int:
        """I, which is also the index of the unknown item."""
        return num_entries(next(iter(self.columns.values()))) - 1

    @classmethod
    def of(cls, data: PreparedData) -> Catalogue:
        """The items of a log, with the features of its schema."""
        columns = {name: _with_unknown(data.item_columns[name]) for name in features_by_role(data.schema, "item")}
        dense = features_by_role(data.schema, "item", dense=True)
        return cls(columns, {name: np.append(data.dense[name], np.float32(0)) for name in dense})

    def save(self, folder: Path) -> None:
        """Writes .npy files into an existing folder."""
        for name, column in self.columns.items():
            np.save(folder / f"{name}.values.npy", column.values.numpy())
            if column.offsets is not None:
                np.save(folder / f"{name}.offsets.npy", column.offsets.numpy())
        for name, values in self.dense.items():
            np.save(folder / f"{name}.npy", values)

    @classmethod
    def open(cls, folder: Path, schema: SchemaConfig) -> Catalogue:
        """The item features of a schema, as `save` wrote them, memory-mapped."""
        columns = {}
        for name in features_by_role(schema, "item"):
            parts = ("values", "offsets") if schema.features[name].kind == "multi" else ("values",)
            # "c" maps like "r", and torch does not warn that the memory cannot be written to.
            columns[name] = Column(
                *(torch.from_numpy(np.load(folder / f"{name}.{part}.npy", mmap_mode="c")) for part in parts)
            )
        dense = features_by_role(schema, "item", dense=True)
        return cls(columns, {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in dense})


def _with_unknown(column: Column) -> Column:
    if column.offsets is None:
        return Column(torch.cat([column.values, torch.zeros(1, dtype=torch.int64)]))
    return Column(column.values, torch.cat([column.offsets, column.offsets[-1:]]))


def num_entries(column: Column) -> int:
    """Number of items, users or events that a column describes."""
    return len(column.values) if column.offsets is None else len(column.offsets) - 1


def entries(column: Column, item_X: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Index into `item_X` and value (int64) of each value that these items have, in order.

    None instead of the indices 0, 1, 2 … X - 1, where each item has one value.
    """
    values = column.values.numpy()
    if column.offsets is None:
        return None, values[item_X]
    offsets = column.offsets.numpy()
    begin_X = offsets[item_X]
    length_X = offsets[item_X + 1] - begin_X
    place_P = np.repeat(np.arange(len(item_X)), length_X)
    shift_X = begin_X - np.cumsum(length_X) + length_X
    return place_P, values[shift_X[place_P] + np.arange(len(place_P))]


def at(values_X: np.ndarray, place_P: np.ndarray | None) -> np.ndarray:
    """The numbers at the indices that `entries` gave."""
    return values_X if place_P is None else values_X[place_P]


def sum_of_rows(values_P: np.ndarray, place_P: np.ndarray | None, num_rows: int) -> np.ndarray:
    """Sum of the numbers of each row, by the indices that `entries` gave, float64."""
    return values_P.astype(np.float64) if place_P is None else np.bincount(place_P, values_P, num_rows)


def categories(columns: dict[str, Column], name: str = "") -> np.ndarray:
    """Category of each item, int64 [I]: the first value of an item feature, 0 ("unknown") where it has none.

    name: "" = the first multi-valued feature. Raises UserError where there is no such feature.
    """
    multi = [feature for feature, column in columns.items() if column.offsets is not None]
    if not (name or multi) or (name and name not in columns):
        raise UserError(
            f"the category is {name!r} (rank.<ranker>.category); expected an item feature (a multi-valued one is found "
            f"by itself): {', '.join(columns)}"
        )
    column = columns[name or multi[0]]
    if column.offsets is None:
        return column.values.numpy()
    first_I, end_I = column.offsets[:-1].numpy(), column.offsets[1:].numpy()
    with_padding = np.append(column.values.numpy(), 0)
    return with_padding[np.where(first_I < end_I, first_I, len(with_padding) - 1)]


def smoothed(sum_N: np.ndarray, count_N: np.ndarray, prior: float | np.ndarray) -> np.ndarray:
    """Mean of `count` numbers with the given sum and of PRIOR_EVENTS further ones, each equal to `prior`."""
    return (sum_N + PRIOR_EVENTS * prior) / (count_N + PRIOR_EVENTS)


def running(values_X: np.ndarray | Sequence[float]) -> np.ndarray:
    """Sum of the values before each one and, at the end, of all values: float64 [X + 1]."""
    total_X1 = np.zeros(len(values_X) + 1)
    np.cumsum(values_X, out=total_X1[1:], dtype=np.float64)
    return total_X1


def by_value(row_P: np.ndarray) -> np.ndarray:
    """The stable order of rows of a table (int64, below 2**31), by its two halves: numpy has a fast sort of 16 bits."""
    return np.lexsort([(row_P & 0xFFFF).astype(np.uint16), (row_P >> 16).astype(np.uint16)])


def searched(key_P: np.ndarray, wanted: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """np.searchsorted(key_P, wanted), several times as fast because the wanted keys are looked up in order.

    order: that of the wanted keys, or nearly, where it is known.
    """
    if order is None:
        order = np.argsort(wanted, kind="stable")
    place = np.empty(len(wanted), np.int64)
    place[order] = np.searchsorted(key_P, wanted[order])
    return place
