"""Scaling of dense features: moments in parts equal moments at once; what is missing is the mean."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumrec.data.scaling import Moments, scaled, transformed

numbers = st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=30)


@given(numbers, st.integers(0, 30), st.data())
def test_moments_in_parts_are_those_at_once(values: list[float], cut: int, data: st.DataObject):
    values_N = np.array(values)
    weight_N = np.array(data.draw(st.lists(st.integers(0, 5), min_size=len(values), max_size=len(values))))
    parts = Moments()
    parts.add(values_N[:cut], weight_N[:cut])
    parts.add(values_N[cut:], weight_N[cut:])
    every = np.repeat(values_N, weight_N)
    every = every[np.isfinite(every)]
    assert parts.weight == len(every)
    if len(every):
        assert parts.mean == pytest.approx(every.mean(), rel=1e-9, abs=1e-6)
        assert parts.deviation == pytest.approx(every.std(), rel=1e-6, abs=1e-4)


def test_scales_by_hand():
    column = pl.Series("price", [1.0, 3.0, None, float("inf")])
    moments = Moments()
    moments.add(transformed(column, "standard"))
    assert moments.facts() == {"mean": 2.0, "deviation": 1.0}
    values, missing = scaled(column, "standard", moments)
    assert values.to_list() == [-1.0, 1.0, 0.0, 0.0]
    assert (values.dtype, missing) == (pl.Float32, 2)
    assert scaled(column, "none", Moments())[0].to_list() == [1.0, 3.0, 0.0, 0.0]
    assert transformed(pl.Series(["-1.5", "x", "0"]), "log").tolist()[::2] == [-np.log(2.5), 0.0]
    assert np.isnan(transformed(pl.Series(["-1.5", "x", "0"]), "log")[1])


def test_a_column_that_is_constant_in_training_says_nothing():
    moments = Moments()
    moments.add(np.full(10, 0.1))
    assert scaled(pl.Series([0.1, 5.0]), "standard", moments)[0].to_list() == [0.0, 0.0]
