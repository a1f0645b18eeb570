"""From a raw log to files of usable rows in order of user and time; the whole log is never in memory.

raw log ── checks ──┬── usable rows ── catalogue: items, users ──┬── blocks of users, each sorted
                    └── quarantine                               └── quarantine (unknown item, duplicate)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from lumrec.data.forms import mixed_forms, shown
from lumrec.data.log_columns import (
    OPTIONAL,
    check_features,
    columns_to_keep,
    made_of_time,
    of_roles,
    of_time,
    with_derived_columns,
    with_wishes_of_items,
)
from lumrec.data.moments import first_of_moment
from lumrec.data.numbers import number_checks
from lumrec.data.schema import EVENT_ROLES, FeatureConfig, SchemaConfig
from lumrec.data.sources.raw_log import SHOWN_WITH, RawLog, first_reason
from lumrec.run.errors import UserError

BLOCK_ROWS = 2_000_000  # events of the users that are sorted together: bounds the memory
PORTION_ROWS = 250_000  # events that are written to the blocks at a time
# Temporary columns; no feature and no column of a log has a name with this prefix.
USER, ITEM, BLOCK, INDEX = "lumrec.user", "lumrec.item", "lumrec.block", "lumrec.index"
QUARANTINE = {"table": pl.String, "order": pl.Int64, "reason": pl.String, "raw": pl.String}


@dataclass
class Ingested:
    """The result of `ingest`.

    items, users: the catalogues in memory (item_id or user_id, feature columns, title); rows are addressed by their
        index, and users are in natural order.
    blocks: Parquet files, each of some users in ascending order: user, item (i32), timestamp (i64, seconds), rows_back
        (u32, how many rows before each its moment begins; lumrec/data/moments.py), order, label, the raw values of
        each feature by its name.
    quarantine: Parquet files of rows left out.
    num_read: events read. num_events: those in the blocks; num_with_earlier: those of them whose moment begins before
        them; num_without_history: those whose moment is their user's first; num_by_themselves: those without a value
        of data.request, where it is set.
    """

    items: pl.DataFrame
    users: pl.DataFrame
    blocks: list[Path] = field(default_factory=list)
    quarantine: list[Path] = field(default_factory=list)
    num_read: int = 0
    num_events: int = 0
    num_with_earlier: int = 0
    num_without_history: int = 0
    num_by_themselves: int = 0


def ingest(
    raw: RawLog, schema: SchemaConfig, *, max_list_length: int, drop_duplicates: bool, scratch: Path
) -> Ingested:
    """Checks and sorts a raw log; all files are written to `scratch`.

    Raises UserError where the log lacks a column that the schema names, a feature reads what is known only after the
    item was shown, or no event is left.
    """
    check_features(schema, raw)
    events = with_wishes_of_items(with_derived_columns(raw), raw, schema)
    columns = columns_to_keep(raw, schema, events.collect_schema())
    dense = [feature.column for feature in schema.features.values() if feature.kind == "dense"]
    own = raw.events.collect_schema().names()
    unusable = {name: check for name, check in raw.unusable.get("items", {}).items() if name not in own}  # for wishes
    unusable |= raw.unusable.get("events", {})
    landed, num_read, quarantine = _land(events, columns, max_list_length, scratch, dense=dense, unusable=unusable)
    _check_any(landed, raw, num_read, quarantine)
    items, bad_items = _catalogue(raw.items, "item", landed, of_roles(schema, ("item",)), raw.unusable.get("items", {}))
    users, bad_users = _catalogue(raw.users, "user", landed, of_roles(schema, ("user",)), raw.unusable.get("users", {}))
    for ids in (items["item_id"], users["user_id"]) if raw.exact is not None else ():
        _check_ids(ids, None, raw.exact or ())
    users = users.sort(*([pl.col("user_id").str.len_chars()] if users["user_id"].dtype == pl.String else []), "user_id")
    found = Ingested(items, users, num_read=num_read, quarantine=quarantine)
    for name, bad in (("bad-items", bad_items), ("bad-users", bad_users)):
        found.quarantine.append(_written(bad, scratch / f"{name}.parquet"))
    clock = {name: f.column for name, f in of_roles(schema, EVENT_ROLES).items() if f.column in made_of_time(raw)}
    unsorted = _blocks_of_users(pl.scan_parquet(landed), found, schema, columns, scratch, exact=raw.exact)
    landed.unlink()
    for path in unsorted:
        # Without times, equal rows differ by their order: an item that is met again is not a duplicate.
        block, again = sorted_block(_read_block(path), drop_duplicates=drop_duplicates and raw.has_clock)
        if SHOWN_WITH in block.columns:
            found.num_by_themselves += block[SHOWN_WITH].null_count()
        block = with_moments(block, raw, of_clock=clock)
        found.num_with_earlier += int((block["rows_back"] > 0).sum())
        found.num_without_history += _num_without_history(block)
        found.quarantine.append(_written(_quarantined(_with_keys(again, found)), path.with_suffix(".again.parquet")))
        found.blocks.append(_written(block, path.with_suffix(".sorted.parquet")))
        found.num_events += len(block)
        path.unlink()
    _check_any(found.blocks, raw, num_read, found.quarantine)
    left_out = count_reasons(found.quarantine)
    lost = sum(count for reason, count in left_out.items() if reason.startswith("events: "))
    assert found.num_events + lost == num_read, (found.num_events, left_out, num_read)
    return found


def _check_ids(ids: pl.Series, known: pl.Series | None, exact: Sequence[str]) -> None:
    """Raises UserError where two of the distinct ids, or one of them and one of `known`, are one id in two forms."""
    found = mixed_forms(ids, known) if ids.dtype == pl.String and ids.name not in exact else None
    if found:
        key = ids.name.removesuffix("_id")
        raise UserError(
            f"data.log.{key}: {shown(found[0])} and {shown(found[1])} are two forms of one id, and would be two "
            f"{key}s; write it in one form in all files; or, where they are two ids, name the column in data.log.exact"
        )


def _check_any(files: Path | list[Path], raw: RawLog, num_read: int, quarantine: list[Path]) -> None:
    """Raises UserError where no event is left, with the reasons."""
    if not files or not pl.scan_parquet(files).select(pl.len()).collect().item():
        left_out = count_reasons(quarantine)
        raise UserError(f"no usable event in {raw.note}: {num_read} read, left out: {left_out or 'none'}")


def _land(
    events: pl.LazyFrame,
    columns: list[str],
    max_list_length: int,
    scratch: Path,
    *,
    dense: Sequence[str],
    unusable: Mapping[str, tuple[pl.Expr, str]],
) -> tuple[Path, int, list[Path]]:
    """A file of the rows that pass the checks, the number of rows read, and the files of the other rows."""
    schema = events.collect_schema()
    lists = [name for name in columns if isinstance(schema[name], pl.List)]
    checks = [(_missing(name, schema), f"{name} is missing") for name in ("user_id", "item_id")]
    checks += [
        *(unusable[name] for name in columns if name in unusable),
        (pl.col("time_us").is_null(), "impossible time"),
        (~pl.col("label").is_in([0.0, 1.0]) | pl.col("label").is_null(), "label is missing"),
        *((pl.col(name).list.len() > max_list_length, f"{name}: a list of over {max_list_length}") for name in lists),
        *(check for name in columns if name in dense for check in number_checks(name, schema[name])),
    ]
    reason = first_reason(*checks)
    if "reason" in schema:
        reason = pl.coalesce("reason", reason)
    events = events.with_columns(reason.alias("reason"))
    landed, bad = scratch / "landed.parquet", scratch / "bad-events.parquet"
    raw_row = pl.col("raw") if "raw" in schema else pl.struct(columns).struct.json_encode()
    # Two passes: with two sinks in one pass there is no back pressure, and rows pile up in front of the slower sink.
    events.filter(pl.col("reason").is_null()).select(columns).sink_parquet(landed, compression="lz4", statistics=False)
    events.filter(pl.col("reason").is_not_null()).select(
        pl.lit("events").alias("table"), pl.col("order").cast(pl.Int64), "reason", raw_row.alias("raw")
    ).sink_parquet(bad)
    read = sum(pl.scan_parquet(path).select(pl.len()).collect().item() for path in (landed, bad))
    return landed, read, [bad]


def _missing(name: str, schema: pl.Schema) -> pl.Expr:
    return pl.col(name).is_null() | (pl.col(name) == "") if schema[name] == pl.String else pl.col(name).is_null()


def _catalogue(
    frame: pl.LazyFrame | None,
    entity: str,
    landed: Path,
    features: dict[str, FeatureConfig],
    unusable: Mapping[str, tuple[pl.Expr, str]],
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The usable items or users, in their order, and the quarantine; from the events where there is no file."""
    key = f"{entity}_id"
    columns = list(dict.fromkeys([key, *(feature.column for feature in features.values())]))
    if frame is None:
        # Two passes rather than a sort: the first event of each id, then its columns.
        events = pl.scan_parquet(landed)
        first = events.group_by(key).agg(pl.col("order").min()).select("order").collect(engine="streaming")
        of_first = events.join(first.lazy(), on="order", how="semi", maintain_order="left").select(*columns, "order")
        catalogue = of_first.collect(engine="streaming").sort("order").drop("order")
        return catalogue, pl.DataFrame(schema=QUARANTINE)
    if "reason" not in frame.collect_schema().names():
        frame = frame.with_columns(pl.lit(None, pl.String).alias("reason"))
    beside = [name for name in ("title", "order", "reason", "raw") if name in frame.collect_schema()]
    rows = frame.select(list(dict.fromkeys([*columns, *beside]))).collect(engine="streaming")
    checks = [
        (_missing(key, rows.schema), f"{key} is missing"),
        *(unusable[name] for name in columns if name in unusable),
    ]
    rows = rows.with_columns(pl.coalesce("reason", first_reason(*checks)).alias("reason"))
    again = pl.col("reason").is_null() & ~pl.struct(key, "reason").is_first_distinct()
    rows = rows.with_columns(pl.coalesce("reason", first_reason((again, f"{key} occurs again"))).alias("reason"))
    for name, feature in features.items():
        if feature.kind == "dense":
            _check_numbers(rows.filter(pl.col("reason").is_null()), name, feature.column, key)
    good = rows.filter(pl.col("reason").is_null()).drop("reason", "raw", "order", strict=False)
    bad = _quarantined(rows.filter(pl.col("reason").is_not_null()), f"{entity}s")
    assert len(good) + len(bad) == len(rows), (len(good), len(bad), len(rows))
    return good, bad


def _check_numbers(rows: pl.DataFrame, name: str, column: str, key: str) -> None:
    """Raises UserError for a number of a catalogue that no model can read, as leaving its row out loses events."""
    bad = rows.with_columns(first_reason(*number_checks(column, rows.schema[column])).alias("why"))
    bad = bad.filter(pl.col("why").is_not_null())
    if len(bad):
        row = f"row {bad['order'][0]}, " if "order" in bad.columns else ""
        raise UserError(
            f"schema.features.{name}: {bad['why'][0]} ({row}{key} {bad[key][0]!r}: {bad[column][0]!r}; "
            f"{len(bad):,} such rows); correct it, or leave it empty where there is no number"
        )


def _blocks_of_users(
    events: pl.LazyFrame,
    found: Ingested,
    schema: SchemaConfig,
    columns: list[str],
    scratch: Path,
    *,
    exact: Sequence[str] | None,
) -> list[Path]:
    """Files of about BLOCK_ROWS events, each of consecutive users, in that order; unknown items and users left out."""
    counts = _counts(events, "user_id")
    users = found.users.select("user_id", pl.int_range(pl.len(), dtype=pl.Int32).alias(USER))
    items = found.items.select("item_id", pl.int_range(pl.len(), dtype=pl.Int32).alias(ITEM))
    no_items = _counts(events, "item_id").join(items, on="item_id", how="anti")["item_id"]
    no_users = counts.join(users, on="user_id", how="anti")["user_id"]
    if exact is not None:
        _check_ids(no_items, items["item_id"], exact)
        _check_ids(no_users, users["user_id"], exact)
    no_item, no_user = (pl.col(ids.name).is_in(ids.implode()) for ids in (no_items, no_users))
    bad = scratch / "unknown.parquet"
    events.filter(no_item | no_user).select(
        pl.lit("events").alias("table"),
        "order",
        first_reason((no_item, "unknown item"), (no_user, "unknown user")).alias("reason"),
        pl.struct(columns).struct.json_encode().alias("raw"),
    ).sink_parquet(bad)
    found.quarantine.append(bad)
    before = pl.col("events").fill_null(0).cum_sum() - pl.col("events").fill_null(0)
    users = users.join(counts, on="user_id", how="left", maintain_order="left").select(
        "user_id", USER, (before // BLOCK_ROWS).cast(pl.Int32).alias(BLOCK)
    )
    kept = [pl.col(BLOCK), pl.col(USER).alias("user"), pl.col(ITEM).alias("item"), pl.col("time_us", "order", "label")]
    kept += [pl.col(name) for name in OPTIONAL if name in columns]
    features = [pl.col(feature.column).alias(name) for name, feature in of_roles(schema, EVENT_ROLES).items()]
    # maintain_order: without it, events that arrive before the size of the other side is known stay in memory too.
    for catalogue, key in ((items, "item_id"), (users, "user_id")):
        events = events.join(catalogue.lazy(), on=key, maintain_order="left")
    # Not a sink with pl.PartitionBy: that holds tens of MB for each open file.
    paths = set()
    for portion in events.select(*kept, *features).collect_batches(chunk_size=PORTION_ROWS, engine="streaming"):
        for (index,), rows in portion.partition_by(BLOCK, include_key=False, as_dict=True).items():
            path = scratch / f"block-{index:05d}.arrow"
            paths.add(path)
            with open(path, "ab") as file:
                rows.write_ipc_stream(file, compression="lz4")
    return sorted(paths)


def _read_block(path: Path) -> pl.DataFrame:
    """The rows of a file of consecutive Arrow streams."""
    frames: list[pl.DataFrame] = []
    with pa.OSFile(str(path)) as file:  # pl.read_ipc_stream reads beyond the end of a stream
        while file.tell() < file.size():
            frames.append(pl.DataFrame(pa.ipc.open_stream(file).read_all()))
    return pl.concat(frames)


def _counts(events: pl.LazyFrame, key: str) -> pl.DataFrame:
    """key, events: each id that occurs and how often."""
    return events.group_by(key).agg(pl.len().alias("events")).collect(engine="streaming")


def sorted_block(block: pl.DataFrame, *, drop_duplicates: bool) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events in order of user, time, original row; and the duplicates left out, all but the first of equal rows.

    `block` is consumed: it has no column afterwards.
    """
    order = block.select(pl.arg_sort_by("user", "time_us", "order")).to_series()
    # Column by column, each a portion at a time: DataFrame.sort needs three times the memory for lists.
    block = pl.DataFrame([_gathered(block.drop_in_place(name), order) for name in block.columns])
    # Two rows with the same order would be sorted at random.
    assert block["order"].n_unique() == len(block), "RawLog.events.order must be unique"
    is_again = pl.repeat(False, len(block), eager=True)
    if drop_duplicates:
        # Equal rows have the same user and time: only the few rows of such runs are compared in all columns.
        index = pl.int_range(pl.len()).alias(INDEX)
        same = (pl.col("user") == pl.col("user").shift()) & (pl.col("time_us") == pl.col("time_us").shift())
        alike = block.with_columns(index).filter(same | same.shift(-1))
        repeats = alike.filter(~pl.struct(pl.exclude("order", INDEX)).is_first_distinct())
        is_again = is_again.scatter(repeats[INDEX], True)
    again = block.filter(is_again).with_columns(pl.lit("duplicate row").alias("reason"))
    return block.filter(~is_again), again


def with_moments(block: pl.DataFrame, raw: RawLog, *, of_clock: dict[str, str]) -> pl.DataFrame:
    """A sorted block with `rows_back` and, in place of time_us and the request, `timestamp` in seconds.

    of_clock: feature → the column made of the time that it reads; a row gets the value of its moment. Without times
    every event is a separate moment, in the order of the log.
    """
    row_E = before_E = np.arange(len(block))
    if raw.has_clock:
        request_E = block[SHOWN_WITH] if SHOWN_WITH in block.columns else None
        before_E = first_of_moment(block["user"].to_numpy(), block["time_us"].to_numpy(), request_E)
    made = of_time(pl.col("time_us").gather(pl.lit(pl.Series(before_E))), raw.utc_offset_hours)
    block = block.with_columns(
        (pl.col("time_us") // 1_000_000).alias("timestamp"),
        pl.Series("rows_back", (row_E - before_E).astype(np.uint32)),
        *(made[column].alias(name) for name, column in of_clock.items() if SHOWN_WITH in block.columns),
    )
    return block.drop("time_us", SHOWN_WITH, strict=False)


def _num_without_history(block: pl.DataFrame) -> int:
    """Rows of a sorted block whose moment is their user's first."""
    user_E, row_E = block["user"].to_numpy(), np.arange(len(block))
    return int((row_E - block["rows_back"].to_numpy() == np.searchsorted(user_E, user_E)).sum())


def _gathered(column: pl.Series, order: pl.Series) -> pl.Series:
    column = column.rechunk()
    firsts = range(0, max(len(order), 1), PORTION_ROWS)
    return pl.concat([column.gather(order.slice(first, PORTION_ROWS)) for first in firsts], rechunk=True)


def _with_keys(rows: pl.DataFrame, found: Ingested) -> pl.DataFrame:
    """Rows of a block with `raw`: the row as text, with ids in place of indices."""
    keys = [found.users["user_id"].gather(rows["user"]), found.items["item_id"].gather(rows["item"])]
    read = pl.struct(*keys, pl.exclude("user", "item", "order", "reason")).struct.json_encode()
    return rows.with_columns(read.alias("raw"))


def _quarantined(rows: pl.DataFrame, table: str = "events") -> pl.DataFrame:
    columns = [
        pl.col(name) if name in rows.columns else pl.lit(None).alias(name) for name in ("order", "reason", "raw")
    ]
    return rows.select(pl.lit(table).alias("table"), *columns).cast(QUARANTINE).sort("order", maintain_order=True)  # type: ignore[arg-type]


def count_reasons(quarantine: Sequence[Path]) -> dict[str, int]:
    """ "table: reason" → rows left out, most frequent first."""
    counts = (
        pl.scan_parquet(list(quarantine))
        .group_by((pl.col("table") + ": " + pl.col("reason")).alias("reason"))
        .len()
        .sort(["len", "reason"], descending=[True, False])
        .collect(engine="streaming")
    )
    return dict(counts.iter_rows())


def _written(frame: pl.DataFrame, path: Path) -> Path:
    frame.write_parquet(path, compression="lz4", statistics=False)
    return path
