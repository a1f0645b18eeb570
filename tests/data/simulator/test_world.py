"""The catalogue of the simulator, how items are drawn from it, and the words of queries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.data.simulator.config import SimulatorConfig
from lumrec.data.simulator.users import COMMON_WORDS, WORDS_PER_CATEGORY, query_words
from lumrec.data.simulator.world import _shelf, item_frame, make_world

DAYS = 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_draws_are_of_the_group_and_launched(data: st.DataObject):
    num_items, num_groups = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    of = st.lists(st.integers(0, num_groups - 1), min_size=num_items, max_size=num_items)
    group_N = np.array(data.draw(of))
    launch_I = np.array(data.draw(st.lists(st.integers(-2, DAYS - 1), min_size=num_items, max_size=num_items)))
    weight_I = np.array(data.draw(st.lists(st.floats(1e-6, 1e6), min_size=num_items, max_size=num_items)))
    shelf = _shelf(group_N, np.arange(num_items), weight_I, launch_I, DAYS, num_groups)
    points = np.array([0.0, 0.25, 0.5, 0.999, np.nextafter(1.0, 0.0)])
    for group in range(num_groups):
        for day in range(DAYS):
            drawn = shelf.draw(np.full(5, group), np.full(5, day), points)
            there = np.flatnonzero((group_N == group) & (launch_I <= day))
            if len(there):
                assert set(drawn) <= set(there)
                assert drawn[0] in there
            else:
                assert (drawn == -1).all()


def test_draws_are_by_weight_among_what_is_launched():
    weight_I, launch_I = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 2, -5, 0])
    shelf = _shelf(np.array([0, 0, 0, 1]), np.arange(4), weight_I, launch_I, DAYS, 2)
    point_M = (np.arange(1200) + 0.5) / 1200
    for day, expected in ((1, [300, 0, 900, 0]), (2, [200, 400, 600, 0])):
        drawn = shelf.draw(np.zeros(1200, np.int64), np.full(1200, day), point_M)
        assert np.bincount(drawn, minlength=4).tolist() == expected


def test_something_is_there_from_the_start():
    for seed in range(5):
        world = make_world(SimulatorConfig(num_items=3, late_items=1.0), np.random.default_rng(seed))
        assert (world.items.launch_I < 0).sum() == 1
        assert world.items.launch_I.max() < 90


def test_categories_are_different_and_main_first():
    world = make_world(SimulatorConfig(num_items=500, num_categories=4), np.random.default_rng(0))
    category_I3 = world.items.category_I3
    assert (category_I3[:, 0] >= 0).all()
    for categories, listed in zip(category_I3, item_frame(world.items, 4)["categories"], strict=True):
        known = [category for category in categories if category >= 0]
        assert len(set(known)) == len(known)
        assert categories.tolist() == known + [-1] * (3 - len(known))
        assert listed.to_list() == [f"category-{category}" for category in known]
    assert np.bincount((category_I3 >= 0).sum(1)).tolist()[1:] == pytest.approx([270, 170, 60], abs=60)


def test_words_of_every_query():
    num_categories = 3
    number = num_categories * WORDS_PER_CATEGORY * 3 * (COMMON_WORDS + 1)
    queries = np.arange(-1, number, dtype=np.int32)
    words, lengths = query_words(queries)
    assert lengths[0] == 0
    lists = [tuple(part) for part in np.split(words, np.cumsum(lengths)[:-1])]
    assert len(set(lists)) == number + 1  # no two alike
    for query, part in zip(queries[1:], lists[1:], strict=True):
        own = [word for word in part if word >= 0]
        category = query // (number // num_categories)
        assert 1 <= len(own) <= 3
        assert {word // WORDS_PER_CATEGORY for word in own} == {category}
        assert part[len(own) :] in [(), *((-common,) for common in range(1, COMMON_WORDS + 1))]
