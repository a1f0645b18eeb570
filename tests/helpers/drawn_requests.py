"""Drawn logs with features of every role and kind, and the requests and live events that their rows are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from lumrec.batches.rows import RowBuilder
from lumrec.data.convert import convert
from lumrec.data.drawn_rows import NegativeRowsConfig
from lumrec.data.manifest import write_manifest
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import FeatureConfig, SchemaConfig, features_by_role, validate
from lumrec.data.sources.raw_log import SHOWN_WITH, RawLog
from lumrec.data.splits import SplitConfig
from lumrec.features.items import Catalogue, ItemHistory
from lumrec.features.statistics import dense_inputs
from lumrec.models.ranker import row_features
from lumrec.modules.rankers.base import RankBatch
from lumrec.serving.requests import Event, RequestBuilder, RequestSpec, ScoreRequest

FEATURES = {
    "item_id": FeatureConfig("item"),
    "tags": FeatureConfig("item", kind="multi"),
    "shelf": FeatureConfig("item", table="tags"),
    "price": FeatureConfig("item", kind="dense", scale="log"),
    "user_id": FeatureConfig("user"),
    "hobbies": FeatureConfig("user", kind="multi"),
    "wealth": FeatureConfig("user", kind="dense"),
    "device": FeatureConfig("context"),
    "hour": FeatureConfig("context"),
    "weekday": FeatureConfig("context"),
    "words": FeatureConfig("context", kind="multi", table="tags"),
    "depth": FeatureConfig("context", kind="dense", scale="none"),
    "mood": FeatureConfig("condition"),
    "wish": FeatureConfig("condition", column="feedback", wish=True),
    "wished_shelf": FeatureConfig("condition", column="shelf", table="tags", wish=True),
    "clicked": FeatureConfig("feedback", column="feedback"),
    "reasons": FeatureConfig("feedback", kind="multi"),
}
NUM_ITEMS, NUM_USERS = 9, 5
GIVEN = ["device", "words", "depth", "mood", "reasons"]  # columns of events that a live event or request brings


class RichLog(NamedTuple):
    """data: prepared. frame: the raw events, by `order`. has_requests, has_clock: of the log."""

    data: PreparedData
    frame: pl.DataFrame
    has_requests: bool
    has_clock: bool


def rich_log(
    events: Sequence[tuple],
    kind: str,
    folder: Path,
    *,
    seed: int = 0,
    has_requests: bool = False,
    has_clock: bool = True,
    negatives: NegativeRowsConfig | None = None,
) -> RichLog:
    """events: (user, item, microseconds, request or None, label). All else is drawn by the seed."""
    random, num = np.random.default_rng(seed), len(events)
    columns = {"user_id": pl.Int64, "item_id": pl.Int64, "time_us": pl.Int64, SHOWN_WITH: pl.Int64, "label": pl.Float32}
    frame = pl.DataFrame(list(events), schema=columns, orient="row").with_columns(
        pl.int_range(num, dtype=pl.Int64).alias("order"),
        pl.lit(1.0).cast(pl.Float32).alias("label") if negatives else pl.col("label"),
        pl.col("time_us") if has_clock else pl.lit(946_684_800_000_000, pl.Int64).alias("time_us"),
        pl.Series("device", random.choice(["phone", "tv", "", None], num).tolist(), pl.String),
        pl.Series("words", [_texts(random, "w") for _ in range(num)], pl.List(pl.String)),
        pl.Series("depth", [_number(random) for _ in range(num)], pl.Float64),
        pl.Series("mood", random.integers(0, 3, num)),
        pl.Series("reasons", [_texts(random, "r") for _ in range(num)], pl.List(pl.String)),
    )
    if not has_requests:
        frame = frame.drop(SHOWN_WITH)
    items = pl.DataFrame({"item_id": np.arange(1, NUM_ITEMS + 1)}).with_columns(
        pl.Series("tags", [_texts(random, "t") for _ in range(NUM_ITEMS)], pl.List(pl.String)),
        pl.Series("shelf", random.choice(["t0", "t1", None], NUM_ITEMS).tolist(), pl.String),
        pl.Series("price", [_number(random) for _ in range(NUM_ITEMS)], pl.Float64),
    )
    users = pl.DataFrame({"user_id": np.arange(1, NUM_USERS + 1)}).with_columns(
        pl.Series("hobbies", [_texts(random, "h") for _ in range(NUM_USERS)], pl.List(pl.String)),
        pl.Series("wealth", [_number(random) for _ in range(NUM_USERS)], pl.Float64),
    )
    kept = {name: feature for name, feature in FEATURES.items() if has_clock or name not in ("hour", "weekday")}
    schema = validate(SchemaConfig(features=kept))
    raw = RawLog(
        frame.lazy(), items.lazy(), users.lazy(), [], "drawn",
        utc_offset_hours=5.5, has_clock=has_clock, absolute_time=has_clock,
    )  # fmt: skip
    content = convert(raw, schema, SplitConfig(kind), folder, min_count=2, negatives=negatives)
    write_manifest(folder, {"schema": asdict(schema), "split": {}, **content})
    return RichLog(PreparedData.open(folder), frame, has_requests, has_clock)


def _texts(random: np.random.Generator, letter: str) -> list[str]:
    return [f"{letter}{number}" for number in random.integers(0, 3, random.integers(0, 4))]


def _number(random: np.random.Generator) -> float | None:
    return None if random.random() < 0.2 else float(np.round(random.normal() * 3, 2))


class Vocabularies:
    """The keys of prepared data, in dictionaries."""

    def __init__(self, data: PreparedData) -> None:
        self._tables = {table: data.vocabulary(table) for table in data.table_rows}
        self._items = {key: index for index, key in enumerate(data.item_keys())}

    def rows(self, table: str, keys: Sequence[str]) -> np.ndarray:
        return np.array([self._tables[table].get(key, 0) for key in keys], np.int64)

    def items(self, keys: Sequence[str]) -> np.ndarray:
        return np.array([self._items.get(key, -1) for key in keys], np.int64)


def builders(
    data: PreparedData, kind: str, max_history: int, reads: Sequence[str]
) -> tuple[RowBuilder, RequestBuilder]:
    """Both builders of a ranker that reads all features."""
    statistics = dense_inputs(data, kind=kind)
    item, feedback = (features_by_role(data.schema, role) for role in ("item", "feedback"))
    of_row = row_features(data.schema)
    features = [*of_row, *feedback, *item]
    settings = {"features": features, "row_features": of_row, "max_history": max_history, "reads": reads}
    rows = RowBuilder(data, statistics=statistics, **settings)
    spec = RequestSpec.from_json(RequestSpec.of(data, statistics.model, **settings).to_json())
    items = ItemHistory.of(data) if kind == "all" else None
    return rows, RequestBuilder(spec, Vocabularies(data), Catalogue.of(data), items)


def live_events(log: RichLog, rows: np.ndarray) -> list[Event]:
    """Events of the prepared data (by row) as they are sent when they happen."""
    data, events = log.data, []
    users, items = data.user_keys(), data.item_keys()
    for row in rows.tolist():
        raw = log.frame.row(int(data.order[row]), named=True)
        events.append(
            Event(
                user=users[data.user[row]],
                item=items[data.item[row]],
                time=raw["time_us"] / 1e6,
                label=raw["label"],
                features={name: raw[name] for name in GIVEN if name != "depth"},
                request=str(raw.get(SHOWN_WITH) or ""),
            )
        )
    return events


def request_of(log: RichLog, event: int, rows: np.ndarray) -> ScoreRequest:
    """The request that rows of one event (itself, and drawn ones) are the candidates of."""
    data, per_item = log.data, {}
    raw = log.frame.row(int(data.order[event]), named=True)
    context = {name: raw[name] for name in ("device", "words", "depth", "mood")}
    for name in ("words", "depth", "mood") if event % 2 else ():
        per_item[name] = [context.pop(name)] * len(rows)
    moment = log.frame.row(int(data.order[data.before[event]]), named=True)["time_us"] / 1e6
    before = int(data.before[event] - data.user_offsets[data.user[event]])
    return ScoreRequest(
        user=data.user_keys()[data.user[event]],
        items=[data.item_keys()[item] for item in data.rows(rows).item],
        context=context,
        time=moment if log.has_clock else before,
        per_item=per_item,
    )


def rows_of_events(data: PreparedData) -> dict[int, np.ndarray]:
    """Event → its row, and those drawn beside it."""
    return {event: data.with_negatives(np.array([event])) for event in range(data.num_events)}


def said(batch: RankBatch) -> tuple[list, list[np.ndarray]]:
    """All that a batch says of its rows but labels and numbers of rows: whole numbers, row by row; and floats."""
    batch = batch.expanded()
    bags = [
        [part.tolist() for part in batch.tokens[name].values().split(batch.tokens[name].lengths().tolist())]
        for name in batch.tokens.keys()
    ]
    of_token = [*bags, *(x.tolist() for x in (batch.item_U, batch.category_U) if x is not None)]
    offsets, rows = batch.offsets_B1.tolist(), []
    counts = None if batch.category_count_T is None else batch.category_count_T.tolist()
    for b, target in enumerate(batch.target_B.tolist()):
        span = slice(offsets[b], offsets[b + 1])
        history = [[of[place] for of in of_token] for place in batch.history_T[span].tolist()]
        row = [bag[batch.num_tokens + b] for bag in bags]
        rows.append([history, [of[target] for of in of_token], row, counts and counts[span]])
    floats = [batch.dense_BF.numpy(), np.diff(offsets)]
    return rows, floats + ([] if batch.age_T is None else [batch.age_T.numpy()])
