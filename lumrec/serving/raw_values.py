"""Converts raw values of requests and events to the rows and numbers that models read.

They are read as prepare reads a log: texts by lumrec/data/forms.py, numbers by lumrec/data/scaling.py, columns made of
the time by lumrec/data/log_columns.py; tests compare them.

Shape suffixes: N values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import polars as pl
import torch
from torch import Tensor

from lumrec.data.columns import Column
from lumrec.data.log_columns import DERIVED_AFTER, TIMES_OF_DAY
from lumrec.data.scaling import MAX_SCALED
from lumrec.data.schema import FeatureConfig
from lumrec.data.sources.raw_log import FIRST_POSSIBLE_S, LAST_POSSIBLE_S
from lumrec.features.history import SECOND
from lumrec.features.statistics import Scale
from lumrec.run.errors import UserError


class KeyIndex(Protocol):
    """Looks up raw keys; lumrec/serving/keys.py implements it."""

    def rows(self, table: str, keys: Sequence[str]) -> np.ndarray:
        """Rows of the table, int64 [N], 0 where a key is unknown."""

    def items(self, keys: Sequence[str]) -> np.ndarray:
        """Indices of the items, int64 [N], -1 where a key is unknown."""


class _Missing:
    """A feature that a request or an event does not have."""


MISSING = _Missing()


class RawReader:
    """Reads raw values of features by the vocabularies of a log.

    derived: columns that lumrec derives from the time (utc_offset_hours: local time of the users) and from the label.
    """

    def __init__(self, keys: KeyIndex, *, derived: Sequence[str], utc_offset_hours: float) -> None:
        self.keys, self.derived, self.offset_us = keys, frozenset(derived), int(utc_offset_hours * 3600 * SECOND)

    def column(
        self, feature: FeatureConfig, raw: Sequence[Any], time_N: np.ndarray, label_N: np.ndarray | None = None
    ) -> tuple[Column, np.ndarray]:
        """The rows of raw values, and the index of each entry with a value that has no row, once for each such value.

        time_N: microseconds. label_N: of events. A missing value of a derived column is computed from these.
        """
        if feature.column in self.derived:
            made = self._made(feature.column, time_N, label_N)
            raw = [own if value is MISSING else value for value, own in zip(raw, made, strict=True)]
        if feature.kind != "multi":
            row_N = self.keys.rows(feature.table, [text(value) for value in raw]).astype(np.int64)
            return Column(torch.from_numpy(row_N)), np.flatnonzero(row_N == 0)
        lists = [_texts(feature, value) for value in raw]
        length_N = np.array([len(each) for each in lists], np.int64)
        row_V = self.keys.rows(feature.table, [value for each in lists for value in each]).astype(np.int64)
        of_entry = np.repeat(np.arange(len(raw)), length_N)
        return Column(torch.from_numpy(row_V), offsets_of(torch.from_numpy(length_N))), of_entry[row_V == 0]

    def _made(self, column: str, time_N: np.ndarray, label_N: np.ndarray | None) -> list[str]:
        if column in TIME_TEXTS:
            return TIME_TEXTS[column](time_N + self.offset_us)
        assert column in DERIVED_AFTER and label_N is not None
        return ["like" if label > 0 else "dislike" for label in label_N.tolist()]


def names_of(features: Mapping[str, FeatureConfig]) -> frozenset[str]:
    """The names by which values may be given: those of the features and of the columns that they read."""
    return frozenset(features) | {feature.column for feature in features.values()}


def check_names(values: Collection[str], names: frozenset[str], what: str) -> None:
    """Raises UserError for a name that is none of `names`."""
    if not names.issuperset(values):
        unknown = sorted(set(values) - names)
        raise UserError(f"there is no feature {unknown[0]!r}; the {what} are: {', '.join(sorted(names)) or 'none'}")


def given(values: Mapping[str, Any], name: str, feature: FeatureConfig) -> Any:
    """The value of a feature, given by its name or that of its column; MISSING where there is none."""
    return values.get(name, values.get(feature.column, MISSING))


def _texts(feature: FeatureConfig, value: Any) -> list[str]:
    """The texts of a list; missing values within it are left out, as in a log."""
    if value is MISSING or value is None:
        return []
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"column {feature.column!r} is of kind multi: got {value!r:.80}, expected a list")
    return [text(each) for each in value if each is not None]


def text(value: Any) -> str:
    """The text of a raw value as vocabularies have it (lumrec/data/forms.py); "" where it is missing.

    >>> [text(value) for value in (54, 54.0, 0.5, True, "a", None, float("nan"))]
    ['54', '54', '0.5', 'true', 'a', '', '']
    """
    if isinstance(value, str):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if value is MISSING or value is None or value != value:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2.0**53 else pl.Series([value]).cast(pl.String)[0]
    raise UserError(f"a value of a feature is {value!r:.80}; expected text, a number, true or false")


def scaled_number(value: Any, scale: Scale) -> float | None:
    """A dense feature as a ranker reads it (lumrec/data/scaling.py); None if it is missing, not a number, or too far
    from the training part's numbers for a model to read.
    """
    try:
        number = math.nan if value is MISSING or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if scale.scale == "log" and math.isfinite(number):
        number = math.copysign(math.log1p(abs(number)), number)
    if scale.scale != "none":
        number = (number - scale.mean) / (scale.deviation if scale.deviation > 1e-9 else math.inf)
    return number if abs(number) <= MAX_SCALED[scale.scale] else None


def microseconds(seconds: float) -> int:
    """The time in microseconds. Raises UserError for one that no log can have (such as milliseconds)."""
    try:
        if FIRST_POSSIBLE_S <= float(seconds) < LAST_POSSIBLE_S:
            return round(float(seconds) * SECOND)
    except (TypeError, ValueError):
        pass
    raise UserError(f"a time is {seconds!r:.80}; expected seconds since 1970, UTC, before the year 2100")


def hashed(key: str) -> int:
    """A 64-bit hash of a text; 0 for ""."""
    if not key:
        return 0
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _hours(time_N: np.ndarray) -> list[int]:
    return (time_N // (3600 * SECOND) % 24).tolist()


def _weekdays(time_N: np.ndarray) -> list[str]:
    return [str(day) for day in ((time_N // (86_400 * SECOND) + 3) % 7 + 1).tolist()]


# Columns derived from the time, as in `of_time` (lumrec/data/log_columns.py): local time in microseconds → texts.
TIME_TEXTS = {
    "hour": lambda time_N: [str(hour) for hour in _hours(time_N)],
    "weekday": _weekdays,
    "time_of_day": lambda time_N: [TIMES_OF_DAY[hour // 6] for hour in _hours(time_N)],
}


def offsets_of(lengths_N: Tensor) -> Tensor:
    """The offsets of lists of these lengths, with the total at the end."""
    return torch.nn.functional.pad(lengths_N.cumsum(0), (1, 0))
