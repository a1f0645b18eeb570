"""The columns of a raw log: those derived for every source, and those that features may read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from lumrec.data.schema import EVENT_ROLES, FeatureConfig, SchemaConfig
from lumrec.data.sources.raw_log import SHOWN_WITH, RawLog, usable_rows
from lumrec.run.errors import UserError

# What `with_derived_columns` makes for every source, and which of it is known only after the item was shown.
TIMES_OF_DAY = ("night", "morning", "afternoon", "evening")
DERIVED_AFTER = ("feedback",)
OPTIONAL = ("probability", SHOWN_WITH)  # columns of events that only some sources have


def of_roles(schema: SchemaConfig, roles: Sequence[str]) -> dict[str, FeatureConfig]:
    """The features of these roles, also dense ones."""
    return {name: feature for name, feature in schema.features.items() if feature.role in roles}


def with_derived_columns(raw: RawLog) -> pl.LazyFrame:
    """The events with feedback (like, dislike), hour, weekday (1 = Monday) and time_of_day in the users' local time.

    A column with such a name that the log already has is left as it is.
    """
    feedback = pl.when(pl.col("label") > 0).then(pl.lit("like")).otherwise(pl.lit("dislike"))
    derived: dict[str, pl.Expr] = {"feedback": pl.when(pl.col("label").is_not_null()).then(feedback)}
    derived |= of_time(pl.col("time_us"), raw.utc_offset_hours)
    names = raw.events.collect_schema().names()
    return raw.events.with_columns(**{name: expr for name, expr in derived.items() if name not in names})


def with_wishes_of_items(events: pl.LazyFrame, raw: RawLog, schema: SchemaConfig) -> pl.LazyFrame:
    """The events with the columns of the items that wishes read: "an item of this category" is about the item."""
    names = events.collect_schema().names()
    wishes = {f.column for f in of_roles(schema, ("condition",)).values() if f.wish and f.column not in names}
    if raw.items is None or not (wishes := wishes & set(raw.items.collect_schema().names())):
        return events
    return events.join(usable_rows(raw.items).select("item_id", *sorted(wishes)), on="item_id", how="left")


def made_of_time(raw: RawLog) -> list[str]:
    """The columns that `with_derived_columns` makes from the time of this log's events."""
    names = raw.events.collect_schema().names()
    return [name for name in of_time(pl.col("time_us"), 0.0) if name not in names]


def derived_columns(raw: RawLog) -> list[str]:
    """The columns that `with_derived_columns` makes of this log's events, as the log has none of these names."""
    names = raw.events.collect_schema().names()
    return [name for name in (*DERIVED_AFTER, *of_time(pl.col("time_us"), 0.0)) if name not in names]


def of_time(time_us: pl.Expr, utc_offset_hours: float) -> dict[str, pl.Expr]:
    """Column → its value at that time (microseconds UTC), as text."""
    local = pl.from_epoch(time_us + int(utc_offset_hours * 3_600_000_000), time_unit="us").dt
    return {
        "hour": local.hour().cast(pl.String),
        "weekday": local.weekday().cast(pl.String),
        "time_of_day": pl.lit(pl.Series(TIMES_OF_DAY, dtype=pl.String)).gather(local.hour() // 6),
    }


def check_read_columns(schema: SchemaConfig, raw: RawLog) -> None:
    """Raises UserError for a feature that the log cannot give; reads no row."""
    check_features(schema, raw)
    events = with_wishes_of_items(with_derived_columns(raw), raw, schema)
    columns_to_keep(raw, schema, events.collect_schema())


def check_features(schema: SchemaConfig, raw: RawLog) -> None:
    """Raises UserError for a feature that reads what is known only after the item was shown, the request, or the time
    of a log without times.
    """
    after, of_clock = {*raw.known_after, *DERIVED_AFTER}, made_of_time(raw)
    for name, feature in schema.features.items():
        column = feature.column
        if feature.role != "feedback" and not feature.wish and column in after:
            wish = "wish: true where it is asked for as a wish, or " if feature.role == "condition" else ""
            raise UserError(
                f"schema.features.{name}: column {column!r} is known only after the item was shown, so it cannot "
                f"have role: {feature.role}. Declare it {wish}role: feedback, which is read only in histories"
            )
        if raw.request and column == raw.request:
            raise UserError(
                f"schema.features.{name}: column {column!r} is data.request, which only says which rows were "
                "shown together; leave the feature out, or give another column as data.request"
            )
        if not raw.has_clock and column in of_clock:
            raise UserError(
                f"schema.features.{name}: {column} is made of the time, and this log has no times "
                "(data.log.timestamp is ''); leave the feature out, or name the column of the times"
            )


def columns_to_keep(raw: RawLog, schema: SchemaConfig, events: pl.Schema) -> list[str]:
    """Columns of the events that are read: those of the features of events, and of items and users without a file.

    Raises UserError for a feature whose column is missing, or of a type that its kind cannot read.
    """
    tables = {"events": events}
    tables |= {name: of.collect_schema() for name, of in (("items", raw.items), ("users", raw.users)) if of is not None}
    wanted = []
    features = [of_roles(schema, roles) for roles in (EVENT_ROLES, ("item",), ("user",))]
    for name, feature in (pair for group in features for pair in group.items()):
        own = f"{feature.role}s"
        table = own if feature.role not in EVENT_ROLES and own in tables else "events"
        _check_column(name, feature, table, tables, raw.left_out)
        wanted += [feature.column] if table == "events" else []
    optional = [name for name in OPTIONAL if name in events]
    return list(dict.fromkeys(["user_id", "item_id", "time_us", "order", "label", *optional, *wanted]))


def _check_column(
    name: str, feature: FeatureConfig, table: str, tables: Mapping[str, pl.Schema], left_out: Mapping[str, str]
) -> None:
    """left_out: columns that cannot be read, and why."""
    column = feature.column
    if column not in tables[table]:
        if column in left_out:
            raise UserError(f"schema.features.{name}: {left_out[column]}")
        others = [other for other in tables if other != table and column in tables[other]]
        advice = {
            "items": "read it there with role: item, or ask for it as a wish with role: condition and wish: true",
            "users": "read it there with role: user",
            "events": f"read it there with role: condition, context or feedback, or add it to the file of the {table}",
        }
        has = ", ".join(n for n in tables[table] if n not in ("raw", "reason", "order"))
        raise UserError(
            f"schema.features.{name}: the {table} of this source have no column {column!r}; "
            + (f"the {others[0]} have it: {advice[others[0]]}" if others else f"they have: {has}")
        )
    kind = tables[table][column]
    is_list = isinstance(kind, pl.List)
    if (kind.inner if isinstance(kind, pl.List) else kind).base_type() in (pl.List, pl.Array, pl.Struct, pl.Map):
        raise UserError(
            f"schema.features.{name}: column {column!r} is of type {kind}; expected text, numbers, dates or lists of "
            "these"
        )
    if is_list != (feature.kind == "multi"):
        raise UserError(
            f"schema.features.{name}: column {column!r} holds {'lists' if is_list else 'single values'}, and kind is "
            f"{feature.kind}; {'expected kind: multi' if is_list else 'kind: multi needs lists'}"
        )
