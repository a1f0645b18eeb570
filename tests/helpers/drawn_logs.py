"""Logs drawn by Hypothesis, with many events of one time and requests whose rows were recorded at several times."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import torch
from hypothesis import strategies as st

from lumrec.data.columns import Column
from lumrec.data.convert import convert
from lumrec.data.manifest import write_manifest
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import FeatureConfig, SchemaConfig, validate
from lumrec.data.sources.raw_log import SHOWN_WITH, RawLog
from lumrec.data.splits import TRAIN, SplitConfig

SCHEMA = validate(
    SchemaConfig(
        features={
            "item_id": FeatureConfig("item"),
            "tags": FeatureConfig("item", kind="multi"),
            "wish": FeatureConfig("condition", column="feedback", wish=True),
            "clicked": FeatureConfig("feedback", column="feedback"),
        }
    )
)


def events_of(*, last_time: int, requests: bool = False) -> st.SearchStrategy[list[tuple]]:
    """Lists of (user, item, time, request or None, label); the earlier last_time, the more events share a time."""
    request = st.sampled_from([None, None, 1, 2]) if requests else st.none()
    event = st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(1, last_time), request, st.sampled_from([0, 1]))
    return st.lists(event, min_size=4, max_size=50, unique_by=lambda event: event[:3])


def prepared(events: list[tuple], kind: str, folder: Path) -> PreparedData:
    """The events, prepared in an empty folder; an item's tags follow from its number."""
    columns = {"user_id": pl.Int64, "item_id": pl.Int64, "time_us": pl.Int64, SHOWN_WITH: pl.Int64, "label": pl.Float32}
    frame = pl.DataFrame(events, schema=columns, orient="row").with_row_index("order")
    frame = frame.with_columns(
        pl.col("order").cast(pl.Int64),
        pl.col("time_us") * 1_000_000,
        pl.concat_list(pl.format("{}", pl.col("item_id") % 3), pl.format("even {}", pl.col("item_id") % 2)).alias(
            "tags"
        ),
    )
    content = convert(RawLog(frame.lazy(), None, None, [], "drawn"), SCHEMA, SplitConfig(kind), folder)
    write_manifest(folder, {"schema": asdict(SCHEMA), "split": {}, **content})
    return PreparedData.open(folder)


def not_earlier(data: PreparedData, row: int) -> np.ndarray:
    """Events that a row must not see (bool [E]): its user's from its moment on, others' from the moment's second on."""
    is_own = data.user == data.user[row]
    moment = data.timestamp[data.before[row]]
    return np.where(is_own, np.arange(data.num_events) >= data.before[row], data.timestamp >= moment)


def with_another_future(data: PreparedData, row: int, random: np.random.Generator) -> PreparedData:
    """The same log but for items, labels and feedback of what `row` must not see; its own item stays.

    Labels move within the training part and within the rest, so that the base rate, one constant for all rows, stays.
    """
    hidden, other = not_earlier(data, row), copy.copy(data)
    is_other = hidden & (np.arange(data.num_events) != row)
    other.item = np.where(is_other, random.integers(0, data.num_items, data.num_events), data.item)
    other.label = data.label.copy()
    for part in (hidden & (data.split == TRAIN), hidden & (data.split != TRAIN)):
        other.label[part] = random.permutation(other.label[part])
    given = data.event_columns["clicked"].values
    turned = torch.where(torch.from_numpy(hidden), data.table_rows["clicked"] - 1 - given, given)
    other.event_columns = {**data.event_columns, "clicked": Column(turned), "wish": Column(turned)}
    return other
