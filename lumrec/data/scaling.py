"""Dense features scaled to mean 0 and variance 1 over the training split.

    x ── log: sign(x) log(1 + |x|) ──┐
    x ── standard: x ────────────────┴── (x - mean) / deviation
    x ── none: x

A missing or non-finite number becomes 0: the training mean, where the feature is scaled. A number too far from those of
the training split for a model to read is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from lumrec.data.numbers import number
from lumrec.run.errors import UserError

MAX_SCALED = {"log": 1e6, "standard": 1e6, "none": 1e12}  # with larger ones, sums of products overflow in 32 bits


@dataclass
class Moments:
    """Weight, mean and sum of squared deviations of the numbers added so far."""

    weight: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values_N: np.ndarray, weight_N: np.ndarray | None = None) -> None:
        """Adds float64 values, NaN = missing, each `weight` times (Chan et al. 1983, numerically stable)."""
        known_N = np.isfinite(values_N)
        values_N = values_N[known_N]
        weight_N = np.ones(len(values_N)) if weight_N is None else weight_N[known_N].astype(np.float64)
        added = weight_N.sum()
        if added == 0:
            return
        mean = (weight_N @ values_N) / added
        squares = weight_N @ (values_N - mean) ** 2
        total, shift = self.weight + added, mean - self.mean
        self.squares += squares + shift**2 * self.weight * added / total
        self.mean += shift * added / total
        self.weight = total

    @property
    def deviation(self) -> float:
        """Standard deviation; 0 where nothing was added."""
        return float(np.sqrt(self.squares / self.weight)) if self.weight else 0.0

    def facts(self) -> dict[str, float]:
        """Mean and deviation, for the manifest."""
        return {"mean": self.mean, "deviation": self.deviation}


def transformed(column: pl.Series, scale: str) -> np.ndarray:
    """Numbers (or their text) as float64, NaN where missing or non-finite, after the logarithm where `scale` is log."""
    read = column.to_frame().select(number(pl.col(column.name), column.dtype)).to_series()
    values_N = read.fill_null(np.nan).to_numpy().copy()
    values_N[~np.isfinite(values_N)] = np.nan
    return np.sign(values_N) * np.log1p(np.abs(values_N)) if scale == "log" else values_N


def scaled(
    column: pl.Series, scale: str, moments: Moments, *, feature: str = "", rows: pl.Series | None = None
) -> tuple[pl.Series, int]:
    """The numbers as float32, scaled, and how many were missing; a column that is constant in training becomes 0.

    Raises UserError, which names the feature and the row (of `rows`), for a number too far from those of training.
    """
    values_N = transformed(column, scale)
    if scale != "none":
        values_N = (values_N - moments.mean) / (moments.deviation if moments.deviation > 1e-9 else np.inf)
    missing_N = np.isnan(values_N)
    values_N[missing_N] = 0.0
    far_N = np.flatnonzero(np.abs(values_N) > MAX_SCALED[scale])
    if len(far_N):
        index = int(far_N[0])
        row = index if rows is None else rows[index]
        lies = "" if scale == "none" else f" ({values_N[index]:.3g} deviations from the mean of the training split)"
        raise UserError(
            f"schema.features.{feature or column.name}: {column[index]!r} in row {row}{lies} is too far from the other "
            f"numbers for a model to read ({len(far_N):,} such rows); correct it, leave it empty, or use "
            f"{'scale: standard or log' if scale == 'none' else 'scale: log, or buckets as kind: id'}"
        )
    return pl.Series(column.name, values_N.astype(np.float32)), int(missing_N.sum())
