"""The world of the simulated users: the catalogue, when each item is launched, and draws of items by popularity.

Shapes: I items, C categories, K latent width, D days of the log, G groups of a shelf, N indices on it, M draws.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from lumrec.data.simulator.config import SimulatorConfig

START_S = 1_704_067_200  # 2024-01-01 UTC, when the log begins
DAY_S = 86_400
NUM_PRICES = 5
MEDIAN_PRICE, PRICE_SPREAD = 20.0, 0.8
OLD_DAYS = 180.0  # mean age, at the start of the log, of items launched before it


class Items(NamedTuple):
    """The catalogue.

    category_I3: the item's one to three categories, main one first, then -1. price_I: in money; level_I: its rank among
    log-normal prices as a number from 0 to NUM_PRICES - 1; bucket_I: its fifth. popularity_I: standardised log of the
    weight with which the item is drawn. launch_I: day of the launch, negative before the log begins. latent_IK: unit.
    """

    category_I3: np.ndarray
    price_I: np.ndarray
    level_I: np.ndarray
    bucket_I: np.ndarray
    popularity_I: np.ndarray
    launch_I: np.ndarray
    latent_IK: np.ndarray


class Shelf(NamedTuple):
    """Items in groups and, within a group, in order of launch, so that the items launched by a day are one range.

    item_N: the items. before_N1: weight of all items before each. start_G: first index of a group. end_GD: index after
    the last item of the group that is launched by the day.

        group 0 |a b c . .|  group 1 |d e . .|      . = launched later; draws are from [start, end) by weight
    """

    item_N: np.ndarray
    before_N1: np.ndarray
    start_G: np.ndarray
    end_GD: np.ndarray

    def draw(self, group_M: np.ndarray, day_M: np.ndarray, point_M: np.ndarray) -> np.ndarray:
        """The item (int32) at the share `point_M` in [0, 1) of the group's weight; -1 where none is launched."""
        start_M = self.start_G.take(group_M)
        end_M = self.end_GD.reshape(-1).take(group_M * self.end_GD.shape[1] + day_M)
        low_M, high_M = self.before_N1.take(start_M), self.before_N1.take(end_M)
        index_M = np.searchsorted(self.before_N1, low_M + point_M * (high_M - low_M), side="right") - 1
        # rounding must not lead to a neighbour of another group, or one that is not launched yet
        item_M = self.item_N.take(np.clip(index_M, start_M, np.maximum(end_M - 1, start_M)), mode="clip")
        return np.where(end_M > start_M, item_M, np.int32(-1))


class World(NamedTuple):
    """Items, latent centres of the categories (unit), running shares of the categories, and both ways to draw items."""

    items: Items
    centre_CK: np.ndarray
    running_C: np.ndarray
    all_items: Shelf
    by_category: Shelf


def make_world(config: SimulatorConfig, rng: np.random.Generator) -> World:
    """The world of a config; it does not depend on the number of users."""
    num_items, num_categories, width = config.num_items, config.num_categories, config.latent_dim
    centre_CK = _unit(rng.standard_normal((num_categories, width), dtype=np.float32))
    share_C = 1.0 / np.arange(1, num_categories + 1) ** 0.5
    running_C = np.cumsum(share_C) / share_C.sum()
    category_I3 = _categories(num_items, running_C, rng)
    latent_IK = np.zeros((num_items, width), np.float32)
    for category_I in category_I3.T:
        latent_IK += np.where(category_I[:, None] >= 0, centre_CK[category_I], 0)
    latent_IK += 0.8 / np.sqrt(width) * rng.standard_normal((num_items, width), dtype=np.float32)
    weight_I = 1.0 / (rng.permutation(num_items) + 1.0) ** config.zipf
    log_weight_I = np.log(weight_I)
    price_I = np.round(MEDIAN_PRICE * np.exp(PRICE_SPREAD * rng.standard_normal(num_items)), 2)
    rank_I = (np.argsort(np.argsort(price_I, kind="stable"), kind="stable") + 0.5) / num_items
    items = Items(
        category_I3=category_I3,
        price_I=price_I,
        level_I=((NUM_PRICES - 1) * rank_I).astype(np.float32),
        bucket_I=(NUM_PRICES * rank_I).astype(np.int8),
        popularity_I=((log_weight_I - log_weight_I.mean()) / max(log_weight_I.std(), 1e-9)).astype(np.float32),
        launch_I=_launches(config, weight_I, rng),
        latent_IK=_unit(latent_IK),
    )
    item_N, index_N = np.nonzero(category_I3 >= 0)
    return World(
        items=items,
        centre_CK=centre_CK,
        running_C=running_C,
        all_items=_shelf(np.zeros(num_items, np.int64), np.arange(num_items), weight_I, items.launch_I, config.days),
        by_category=_shelf(category_I3[item_N, index_N], item_N, weight_I, items.launch_I, config.days, num_categories),
    )


def category_names(num_categories: int) -> list[str]:
    """Names of the categories."""
    return [f"category-{category}" for category in range(num_categories)]


def item_frame(items: Items, num_categories: int) -> pl.DataFrame:
    """item_id, categories (main one first), price_bucket, price, and launched_us (microseconds UTC) of every item."""
    known_I3 = items.category_I3 >= 0
    names = pl.Series(category_names(num_categories)).gather(items.category_I3[known_I3])
    offsets = np.concatenate([[0], np.cumsum(known_I3.sum(1))])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), names.to_arrow())
    return pl.DataFrame(
        {
            "item_id": np.arange(len(items.price_I), dtype=np.int64),
            "categories": pl.Series(lists),
            "price_bucket": items.bucket_I,
            "price": items.price_I,
            "launched_us": (START_S + items.launch_I.astype(np.int64) * DAY_S) * 1_000_000,
        }
    )


def _unit(x_NK: np.ndarray) -> np.ndarray:
    return x_NK / np.maximum(np.linalg.norm(x_NK, axis=-1, keepdims=True), 1e-9)


def _categories(num_items: int, running_C: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One to three different categories of each item [I, 3], -1 behind the last."""
    count_I = np.searchsorted(np.cumsum([0.5, 0.35]), rng.random(num_items), side="right") + 1
    category_I3 = draw_share(running_C, rng.random((num_items, 3)))
    category_I3[np.arange(3) >= count_I[:, None]] = -1
    for index in (1, 2):
        again_I = (category_I3[:, :index] == category_I3[:, index, None]).any(1)
        category_I3[again_I, index] = -1
    # closes a gap in the middle
    return np.take_along_axis(category_I3, np.argsort(category_I3 < 0, axis=1, kind="stable"), axis=1)


def draw_share(running_C: np.ndarray, point: np.ndarray) -> np.ndarray:
    """The category (int32) at each point in [0, 1) of the running shares."""
    return np.minimum(np.searchsorted(running_C, point, side="right"), len(running_C) - 1).astype(np.int32)


def _launches(config: SimulatorConfig, weight_I: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Day of each launch (int32): a share `late_items` after the first day of the log, the others before it."""
    num_items = len(weight_I)
    old_I = -1 - (rng.standard_exponential(num_items) * OLD_DAYS).astype(np.int32)
    late_I = 1 + (rng.random(num_items) * (config.days - 1)).astype(np.int32)
    is_late_I = (rng.random(num_items) < config.late_items) & (config.days > 1)
    is_late_I[np.argmax(weight_I)] = False  # one item must exist on the first day
    return np.where(is_late_I, late_I, old_I).astype(np.int32)


def _shelf(
    group_N: np.ndarray, item_N: np.ndarray, weight_I: np.ndarray, launch_I: np.ndarray, days: int, num_groups: int = 1
) -> Shelf:
    day_N = np.maximum(launch_I[item_N], 0)
    order = np.lexsort((item_N, day_N, group_N))
    count_GD = np.bincount(group_N * days + day_N, minlength=num_groups * days).reshape(num_groups, days)
    size_G = count_GD.sum(1)
    start_G = np.cumsum(size_G) - size_G
    return Shelf(
        item_N=item_N[order].astype(np.int32),
        before_N1=np.concatenate([[0.0], np.cumsum(weight_I[item_N[order]])]),
        start_G=start_G,
        end_GD=start_G[:, None] + np.cumsum(count_GD, axis=1),
    )
