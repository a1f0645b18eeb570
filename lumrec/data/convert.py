"""A raw log turned into the files of a prepared folder; the order of work is the order of the functions below."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import polars as pl

from lumrec.data.schema import EVENT_ROLES, FeatureConfig, SchemaConfig
from lumrec.data.simulator import click_facts
from lumrec.data.sources.raw_log import RawLog, first_reason, impossible_time
from lumrec.data.splits import PARTS, TEST, TRAIN, SplitConfig, assign
from lumrec.data.vocabulary import build_vocabulary, count_values, encode

PART_ROWS = 4_000_000  # events per Parquet file


def convert(raw: RawLog, schema: SchemaConfig, split: SplitConfig, min_count: int, folder: Path) -> Dict[str, Any]:
    """Writes every file of the prepared folder but the manifest; gives back its counts, facts and quarantine.

    Raises ValueError where the log lacks a column that the schema names, or no event is left.
    """
    items, bad_items = check_catalogue(raw.items, "item_id")
    users, bad_users = check_catalogue(raw.users, "user_id")
    users = users.sort(pl.col("user_id").str.len_chars(), "user_id")  # the natural order of numbers
    for role, frame in (("item", items), ("user", users)):
        _check_columns(_of_roles(schema, (role,)), f"{role}s", frame.columns)
    events, bad_events, num_read = check_events(raw, _of_roles(schema, EVENT_ROLES), items, users)
    assert len(events) + len(bad_events) == num_read, (len(events), len(bad_events), num_read)
    offsets_U1 = np.searchsorted(events["user"].to_numpy(), np.arange(len(users) + 1, dtype=np.int32))
    split_E = assign(split, users["user_id"].to_list(), offsets_U1)
    events = events.with_columns(pl.Series("split", split_E, pl.Int8))

    vocabularies = count_vocabularies(schema, events, items, users, min_count)
    unknown: Dict[str, int] = {}
    for role, frame in (("item", items), ("user", users)):
        kept = frame.select(pl.col(f"{role}_id").alias(f"{role}_key"), *(["title"] if "title" in frame.columns else []))
        columns = encode_features(frame, _of_roles(schema, (role,)), vocabularies, unknown)
        write(kept.with_columns(columns), folder / f"{role}s.parquet")
    kept = events.select(pl.col("user", "item", "timestamp", "order", "label", "split"), pl.col("^probability$"))
    kept = kept.with_columns(encode_features(events, _of_roles(schema, EVENT_ROLES), vocabularies, unknown))
    for part, first in enumerate(range(0, len(kept), PART_ROWS)):
        write(kept[first : first + PART_ROWS], folder / "events" / f"part-{part:05d}.parquet")
    for table, vocabulary in vocabularies.items():
        write(vocabulary, folder / "vocabulary" / f"{table}.parquet")
    write(pl.concat([bad_events, bad_items, bad_users]), folder / "quarantine.parquet")
    return {
        "counts": {
            "events_read": num_read,
            "events": len(events),
            "events_quarantined": len(bad_events),
            "users": len(users),
            "users_without_events": int((np.diff(offsets_U1) == 0).sum()),
            "items": len(items),
            "items_with_events": events["item"].n_unique(),
            "items_in_training": events.filter(pl.col("split") == TRAIN)["item"].n_unique(),
            "catalogue_rows_quarantined": len(bad_items) + len(bad_users),
            **{f"{part}_events": int((split_E == code).sum()) for code, part in enumerate(PARTS)},
        },
        "facts": _facts(kept, len(items)),
        "table_rows": {table: len(vocabulary) + 1 for table, vocabulary in vocabularies.items()},
        "unknown_values": unknown,
        "quarantine": _reasons({"events": bad_events, "items": bad_items, "users": bad_users}),
    }


def check_catalogue(frame: pl.LazyFrame, key: str) -> Tuple[pl.DataFrame, pl.DataFrame]:
    """Rows that can be used, in their order, and the quarantine: missing keys, and all but the first row of a key."""
    if "reason" not in frame.collect_schema().names():
        frame = frame.with_columns(pl.lit(None, pl.String).alias("reason"))
    rows = frame.collect().with_columns(
        pl.coalesce("reason", first_reason((_missing(key), f"{key} is missing"))).alias("reason")
    )
    again = pl.col("reason").is_null() & (pl.int_range(pl.len()).over(key, "reason") > 0)
    rows = rows.with_columns(pl.coalesce("reason", first_reason((again, f"{key} occurs again"))).alias("reason"))
    good = rows.filter(pl.col("reason").is_null()).drop("reason", "raw", "order", strict=False)
    bad = _quarantine(rows.filter(pl.col("reason").is_not_null()), f"{key.removesuffix('_id')}s")
    assert len(good) + len(bad) == len(rows), (len(good), len(bad), len(rows))
    return good, bad


def check_events(
    raw: RawLog, features: Dict[str, FeatureConfig], items: pl.DataFrame, users: pl.DataFrame
) -> Tuple[pl.DataFrame, pl.DataFrame, int]:
    """Usable events sorted by (user, timestamp, order), the quarantine, and the number of events read.

    user, item: i32 indices into `users` and `items`.
    """
    events = raw.events
    names = events.collect_schema().names()
    _check_columns(features, "events", names)
    if "reason" not in names:
        events = events.with_columns(pl.lit(None, pl.String).alias("reason"))
    for name, frame in (("item", items), ("user", users)):
        index = frame.select(f"{name}_id", pl.int_range(pl.len(), dtype=pl.Int32).alias(name))
        events = events.join(index.lazy(), on=f"{name}_id", how="left")
    checks = [(_missing(name), f"{name} is missing") for name in ("user_id", "item_id")]
    checks += [(pl.col(name).is_null(), f"{name} is missing") for name in ("timestamp", "label")]
    checks += [
        (impossible_time(), "impossible time"),
        (pl.col("item").is_null(), "unknown item"),
        (pl.col("user").is_null(), "unknown user"),
    ]
    events = events.with_columns(pl.coalesce("reason", first_reason(*checks)).alias("reason"))
    columns = list(
        dict.fromkeys(
            ["user", "item", "timestamp", "order", "label", *[n for n in ("probability",) if n in names]]
            + [feature.column for feature in features.values()]
        )
    )
    good, bad, read = pl.collect_all(
        [
            events.filter(pl.col("reason").is_null()).select(columns).sort("user", "timestamp", "order"),
            events.filter(pl.col("reason").is_not_null()),
            raw.events.select(pl.len()),
        ],
        engine="streaming",
    )
    if len(good) == 0:
        raise ValueError(
            f"no usable event in {raw.note}: {read.item()} read, "
            f"left out: {_reasons({'events': _quarantine(bad, 'events')}) or 'none'}"
        )
    # stable order needs a total order: two rows of one number would be sorted by chance
    assert good["order"].n_unique() == len(good), "RawLog.events.order must be unique"
    return good, _quarantine(bad, "events"), read.item()


def count_vocabularies(
    schema: SchemaConfig, events: pl.DataFrame, items: pl.DataFrame, users: pl.DataFrame, min_count: int
) -> Dict[str, pl.DataFrame]:
    """One vocabulary for each table; a value of an item or user counts once for each training event of that one."""
    train = events.filter(pl.col("split") == TRAIN)
    weights = {
        "item": pl.Series("count", np.bincount(train["item"], minlength=len(items))),
        "user": pl.Series("count", np.bincount(train["user"], minlength=len(users))),
    }
    frames = {"item": items, "user": users}
    counts: Dict[str, List[pl.DataFrame]] = {table: [] for table in schema.tables}
    for feature in schema.features.values():
        frame = frames.get(feature.role, train)
        counts[feature.table].append(count_values(frame[feature.column], weights.get(feature.role)))
    return {table: build_vocabulary(parts, min_count) for table, parts in counts.items()}


def encode_features(
    frame: pl.DataFrame,
    features: Dict[str, FeatureConfig],
    vocabularies: Dict[str, pl.DataFrame],
    unknown: Dict[str, int],
) -> List[pl.Series]:
    """One column of vocabulary rows for each feature; `unknown` is given the number of values without a row."""
    columns = []
    for name, feature in features.items():
        rows, unknown[name] = encode(frame[feature.column], vocabularies[feature.table], feature.kind)
        columns.append(rows.alias(name))
    return columns


def write(frame: pl.DataFrame, path: Path) -> None:
    """Writes one Parquet file, the same bytes for the same frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path, compression="zstd")


def _facts(events: pl.DataFrame, num_items: int) -> Dict[str, Optional[float]]:
    """Share of positive labels in each part and, of a simulated log, the known AUCs; None where there is no number."""
    parts = [events.filter(pl.col("split") == code) for code in range(len(PARTS))]
    labels = [part["label"].to_numpy() for part in parts]
    facts = {f"{n}_positive_rate": float(y.mean()) if len(y) else float("nan") for n, y in zip(PARTS, labels)}
    if "probability" in events.columns:
        facts.update(click_facts(parts[TRAIN], parts[TEST], num_items))
    return {name: None if np.isnan(value) else value for name, value in facts.items()}


def _of_roles(schema: SchemaConfig, roles: Sequence[str]) -> Dict[str, FeatureConfig]:
    return {name: feature for name, feature in schema.features.items() if feature.role in roles}


def _check_columns(features: Dict[str, FeatureConfig], table: str, names: Sequence[str]) -> None:
    for name, feature in features.items():
        if feature.column not in names:
            raise ValueError(
                f"schema.features.{name}: the {table} of this source have no column {feature.column!r}; "
                f"they have: {', '.join(n for n in names if n not in ('raw', 'reason', 'order'))}"
            )


def _missing(name: str) -> pl.Expr:
    return pl.col(name).is_null() | (pl.col(name) == "")


def _quarantine(rows: pl.DataFrame, table: str) -> pl.DataFrame:
    raw = pl.col("raw") if "raw" in rows.columns else pl.lit(None, pl.String).alias("raw")
    order = pl.col("order").cast(pl.Int64) if "order" in rows.columns else pl.lit(None, pl.Int64).alias("order")
    return rows.select(pl.lit(table).alias("table"), order, "reason", raw).sort("order", maintain_order=True)


def _reasons(quarantine: Dict[str, pl.DataFrame]) -> Dict[str, int]:
    return {
        f"{table}: {reason}": count
        for table, rows in quarantine.items()
        for reason, count in rows.group_by("reason").len().sort("reason").iter_rows()
    }
