"""Dense features: numbers brought to mean 0 and variance 1 by the moments of the training part.

    x ── log: sign(x) log(1 + |x|) ──┐
    x ── standard: x ────────────────┴── (x - mean) / deviation
    x ── none: x

A missing or non-finite number becomes 0: the training part's mean, where the feature is scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Tuple

import numpy as np
import polars as pl


@dataclass
class Moments:
    """Weight, mean and sum of squared deviations of the numbers added so far; they can be added in parts."""

    weight: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values_N: np.ndarray, weight_N: np.ndarray | None = None) -> None:
        """Takes in float64 values, NaN = missing, each `weight` times (Chan et al. 1983, so that nothing cancels)."""
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
        """Standard deviation, 0 where there is none."""
        return float(np.sqrt(self.squares / self.weight)) if self.weight else 0.0

    def facts(self) -> Dict[str, float]:
        """What the manifest holds."""
        return {"mean": self.mean, "deviation": self.deviation}


def transformed(column: pl.Series, scale: str) -> np.ndarray:
    """Numbers (or their text) as float64, NaN where missing or non-finite, after the logarithm where `scale` is log."""
    values_N = column.cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy().copy()
    values_N[~np.isfinite(values_N)] = np.nan
    return np.sign(values_N) * np.log1p(np.abs(values_N)) if scale == "log" else values_N


def scaled(column: pl.Series, scale: str, moments: Moments) -> Tuple[pl.Series, int]:
    """The numbers as float32, scaled, and how many were missing; a column that is constant in training becomes 0."""
    values_N = transformed(column, scale)
    if scale != "none":
        values_N = (values_N - moments.mean) / (moments.deviation if moments.deviation > 1e-9 else np.inf)
    missing_N = np.isnan(values_N)
    values_N[missing_N] = 0.0
    return pl.Series(column.name, values_N.astype(np.float32)), int(missing_N.sum())
