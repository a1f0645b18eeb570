"""A digest of each user's history as a LUM reads it: comparing two versions of a log shows whose history has changed.

Shape suffixes: E events, U users, I items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData
from lumrec.data.splits import mix

# One entry for each user of the data, in its order. key: the first half of the SHA-256 of the raw key. history: see
# `history_digests`. first_row, num_events: the user's event rows.
USER_INDEX = np.dtype([("key", "S16"), ("history", "<u8"), ("first_row", "<i8"), ("num_events", "<i8")])


def user_index(data: PreparedData, features: Sequence[str]) -> np.ndarray:
    """USER_INDEX [U] of prepared data for a LUM that reads `features`."""
    index = np.zeros(data.num_users, USER_INDEX)
    index["key"] = key_digests(data.user_keys())
    index["history"] = history_digests(data, features)
    index["first_row"] = data.user_offsets[:-1]
    index["num_events"] = np.diff(data.user_offsets)
    return index


def key_digests(keys: Sequence[str]) -> np.ndarray:
    """The first 16 bytes of each key's SHA-256, S16 [U]."""
    return np.array([hashlib.sha256(key.encode()).digest()[:16] for key in keys], "S16")


def history_digests(data: PreparedData, features: Sequence[str]) -> np.ndarray:
    """uint64 [U]: changes with the number, order, times and moments of a user's events, and with their `features`.

    It does not change with other users or with an item's index in the catalogue.
    """
    rows_back_E = np.arange(data.num_events) - data.before  # rows of one moment share an answer
    event_E = mix(mix(data.timestamp.astype(np.uint64)) ^ rows_back_E.astype(np.uint64))
    for number, name in enumerate(features):
        if name in data.item_columns:
            value_E = _entry_digests(data.item_columns[name])[data.item]
        else:
            value_E = _entry_digests(data.event_columns[name])
        event_E = mix(event_E ^ (value_E + np.uint64(number)))
    length_U = np.diff(data.user_offsets)
    index_E = np.arange(data.num_events) - np.repeat(data.user_offsets[:-1], length_U)
    return mix(_sums(mix(event_E + mix(index_E.astype(np.uint64))), data.user_offsets) ^ length_U.astype(np.uint64))


def _entry_digests(column: Column) -> np.ndarray:
    """uint64 digest of each entry of a column; it does not depend on the order within a list."""
    value = mix(column.values.numpy().astype(np.uint64))
    if column.offsets is None:
        return value
    offsets = column.offsets.numpy()
    return _sums(value, offsets) + mix(np.diff(offsets).astype(np.uint64))


def _sums(value: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of each range of `value`, modulo 2**64."""
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(value, dtype=np.uint64)])
    return running[offsets[1:]] - running[offsets[:-1]]
