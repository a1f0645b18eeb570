"""Your own log: Parquet or CSV files, and a config that names their columns.

    events  user_id,item_id,timestamp,click,scene,tags        one row for each impression, click, purchase, …
    items   item_id,title,brand,price                         optional: one row for each item
    users   user_id,city                                      optional: one row for each user

Every column keeps its name. A column whose name RawLog uses for something else (`order`, say, where it holds the number
of a customer's order) becomes <name>_raw, which is logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import polars as pl

from lumrec.data.config import DataConfig
from lumrec.data.forms import text_of
from lumrec.data.log_columns import check_read_columns
from lumrec.data.own_log.calendar import of_calendar, out_of_calendar
from lumrec.data.own_log.config import LogConfig, as_list
from lumrec.data.own_log.folders import find_files
from lumrec.data.own_log.ids import id_check, id_type
from lumrec.data.own_log.tables import (
    FORMATS,
    RAW,
    REASON,
    ROW,
    UNDECODABLE,
    Columns,
    Table,
    decode,
    find_columns,
    open_table,
)
from lumrec.data.own_log.times import as_microseconds, choose_unit, time_checks
from lumrec.data.schema import FeatureConfig, SchemaConfig
from lumrec.data.sources.raw_log import (
    NO_CLOCK_S,
    SHOWN_WITH,
    LabelConfig,
    RawLog,
    check_label_values,
    first_reason,
    positive,
)
from lumrec.run.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

DEFAULT_SCHEMAS = {
    "log": SchemaConfig(
        features={
            "item_id": FeatureConfig("item"),
            "feedback": FeatureConfig("condition", wish=True),
            "hour": FeatureConfig("context"),
            "weekday": FeatureConfig("context"),
        }
    )
}
# Columns of RawLog; columns of the files that have these names and hold something else are renamed.
TAKEN = {
    "events": ("user_id", "item_id", "time_us", "order", "label", "reason", "raw", "probability"),
    "items": ("item_id", "order", "reason", "raw"),
    "users": ("user_id", "order", "reason", "raw"),
}


C = TypeVar("C", bound=Columns)


@dataclass(frozen=True)
class Tables(Generic[C]):
    """The files of a log: events, and items and users where they are given. Of type Columns: looked at, not read."""

    events: C
    items: C | None
    users: C | None

    def __iter__(self) -> Iterator[C]:
        return iter([table for table in (self.events, self.items, self.users) if table is not None])


def read(data: DataConfig, *, seed: int, scratch: Path, schema: SchemaConfig | None = None) -> RawLog:
    """The raw log of the files that `data.log` names, as a stream; CSV is written as Parquet to `scratch` first.

    schema: its features are looked for in the headers of all files, before any CSV file is converted.
    Raises DataSetMissing where a name leads to no file; UserError, which names the file and the column, for a file
    that is cut, empty or has no header, for a column that is missing, has different types or cannot be what the config
    says, and for settings that do not fit.
    """
    found = find_tables(data.log)
    label = check_columns(data, found)
    if schema is not None:
        check_read_columns(schema, without_rows(data, found, label))
    return raw_log(data, open_tables(found, data.log, scratch))


def find_tables(config: LogConfig) -> Tables[Columns]:
    """The columns of a log's files, of which only headers and footers are read. Raises as `read` does for the files."""
    config.check("data.log.")
    if not as_list(config.events):
        raise UserError(
            "data.log.events is not given; expected the files of the log, such as data.log.events=clicks.parquet, a "
            "folder of them, or a glob"
        )
    given = {name: as_list(getattr(config, name)) for name in ("events", "items", "users")}
    found = {name: find_columns(name, patterns, config) for name, patterns in given.items() if patterns}
    return Tables(found["events"], found.get("items"), found.get("users"))


def open_tables(found: Tables[Columns], config: LogConfig, scratch: Path) -> Tables[Table]:
    """The tables of a log. Raises as `read` does for what its files hold."""
    opened = {columns.name: open_table(columns, config, scratch) for columns in found}
    return Tables(opened["events"], opened.get("items"), opened.get("users"))


def damaged_file(config: LogConfig) -> Path | None:
    """The first Parquet file of a log that polars cannot read to its end; None where it can read all."""
    for name in ("events", "items", "users"):
        patterns = as_list(getattr(config, name))
        for file in find_files(patterns, f"data.log.{name}") if patterns else []:
            try:
                if FORMATS.get(file.suffix.lower()) == "Parquet":
                    pl.scan_parquet(file, glob=False).sink_ipc(os.devnull)
            except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
                return file
    return None


def check_columns(data: DataConfig, tables: Tables, *, guessing: bool = False) -> str:
    """The column that the label is made of, "" where every event is positive or it is to be guessed.

    Raises UserError where the files lack a column that the config names, or it is of a type that cannot be what it is
    named for. guessing: columns that the config leaves at their defaults may be missing.
    """
    config, default, label = data.log, LogConfig(), ""
    events, items, users = tables.events, tables.items, tables.users
    is_given = {name: getattr(config, name) != getattr(default, name) for name in ("user", "item", "timestamp")}
    for name in is_given:
        if getattr(config, name) and (is_given[name] or not guessing):
            events.require(getattr(config, name), f"data.log.{name}")
    if data.label.column or not guessing:
        label = label_column(data, events)
    if data.request:
        events.require(data.request, "data.request")
        _check_request(events, data, label)
    for name, table, in_table in (("item", items, config.item_in_items), ("user", users, config.user_in_users)):
        if table is not None and (in_table or not guessing):
            key = f"{name}_in_{table.name}" if in_table else name
            table.require(in_table or getattr(config, name), f"data.log.{key}")
    _check_names(config, tables)
    return label


def raw_log(data: DataConfig, tables: Tables[Table]) -> RawLog:
    """The raw log of opened tables. Raises as `read` does for what does not fit them."""
    config, label = data.log, check_columns(data, tables)
    events, items, users = tables.events, tables.items, tables.users
    item_in_items, user_in_users = config.item_in_items or config.item, config.user_in_users or config.user
    if label:
        check_label_values(events.frame.filter(pl.col(REASON).is_null()), label, events.schema[label], data.label)
    for table in tables:
        for name, new in new_names(table, config, label).items():
            if name != new:
                log.warning("%s: column %r is read as %r; lumrec uses its name itself", table.name, name, new)
    user_type = id_type([(events, config.user), *([(users, user_in_users)] if users is not None else [])])
    item_type = id_type([(events, config.item), *([(items, item_in_items)] if items is not None else [])])
    unit, times = "", "no times: rows are in the order of events"
    if config.timestamp:
        unit, read_as = choose_unit(events, config.timestamp, config.time_unit)
        times = f"{config.timestamp} read as {read_as}"
    return replace(
        without_rows(data, tables, label),
        events=_events(events, data, label, unit, user_type, item_type),
        items=_catalogue(items, "item_id", item_in_items, item_type, config) if items is not None else None,
        users=_catalogue(users, "user_id", user_in_users, user_type, config) if users is not None else None,
        files=[file.file for table in tables for file in table.files],
        note=f"your log: {', '.join(map(str, tables))}; {times}",
        unusable={table.name: _unusable(table, config, label if table is events else "") for table in tables},
        extra={"time_unit": unit, "rows": {table.name: table.num_rows for table in tables}},
    )


def without_rows(data: DataConfig, tables: Tables, label: str) -> RawLog:
    """The raw log of tables, but without a row, and ids as text; label: see `check_columns`."""
    config, names = data.log, new_names(tables.events, data.log, label)
    exact = {config.user: "user_id", config.item: "item_id"}
    known_after = {names.get(name, name) for name in (*as_list(config.known_after), label) if name} | {"label"}
    keys = {name: pl.lit(None, pl.String) for name in ("user_id", "item_id", "reason", "raw")}
    keys |= {"time_us": pl.lit(None, pl.Int64), "order": pl.lit(None, pl.Int64), "label": pl.lit(None, pl.Float32)}
    frames = {
        table.name: pl.LazyFrame(schema=table.schema).select(
            **{name: keys[name] for name in TAKEN[table.name] if name in keys},
            **_features(table, config, new_names(table, config, label if table is tables.events else "")),
        )
        for table in tables
    }
    return RawLog(
        events=frames["events"],
        items=frames.get("items"),
        users=frames.get("users"),
        files=[],
        note="",
        known_after=tuple(sorted(known_after)),
        utc_offset_hours=config.utc_offset_hours,
        absolute_time=bool(config.timestamp),
        has_clock=bool(config.timestamp),
        request=names.get(data.request, data.request),
        left_out={name: why for table in tables for name, why in table.left_out.items()},
        exact=tuple(exact.get(name) or names.get(name, name) for name in as_list(config.exact)),
    )


def label_column(data: DataConfig, events: Columns) -> str:
    """The column that the label is made of, "" where every event is positive. Raises UserError if it is missing."""
    config: LabelConfig = data.label
    if data.log.all_positive:
        if config.column:
            raise UserError(
                f"data.log.all_positive means that there is no label, but data.label.column is {config.column!r}; "
                "give one of the two"
            )
        return ""
    config.check("data.label.")
    if not config.column and "label" not in events.schema:
        raise UserError(
            f"data.label.column is not given, and the events have no column 'label'; they have: "
            f"{', '.join(events.schema)}. Where every event is positive (a log of purchases, say), set "
            "data.log.all_positive=true"
        )
    column = config.column or "label"
    events.require(column, "data.label.column")
    kind = events.schema[column]
    if not (kind.is_numeric() or kind in (pl.String, pl.Boolean, pl.Null)):
        raise UserError(
            f"data.label.column: column {column!r} of {events.origin[column]} is of type {kind}; expected numbers, "
            "text or true/false"
        )
    return column


def _events(
    table: Table, data: DataConfig, label: str, unit: str, user_type: pl.DataType, item_type: pl.DataType
) -> pl.LazyFrame:
    config, label_config = data.log, data.label
    keys_read = [name for name in (config.user, config.item, label, data.request) if name in table.undecodable]
    checks = [id_check(table, config.user), id_check(table, config.item)]
    checks += [_text_check(pl.col(name), table.undecodable[name]) for name in keys_read]
    time = pl.lit(NO_CLOCK_S * 1_000_000, pl.Int64)
    if config.timestamp:
        column, kind = pl.col(config.timestamp), table.schema[config.timestamp]
        checks += time_checks(column, config.timestamp, kind, unit)
        time = as_microseconds(column, kind, unit)
    made = pl.lit(1.0, pl.Float32)
    if label:
        made = positive(pl.col(label), table.schema[label], label_config)
        checks += _label_checks(label, table.schema[label], made, label_config)
    keys = {
        "user_id": pl.col(config.user).cast(user_type, strict=False),
        "item_id": pl.col(config.item).cast(item_type, strict=False),
        "time_us": time,
        "order": pl.col(ROW),
        "label": made,
        "reason": pl.coalesce(REASON, first_reason(*checks)),
        "raw": pl.col(RAW),
    }
    if data.request:
        keys[SHOWN_WITH] = _request(table, data.request)
    return table.frame.select(**keys, **_features(table, config, new_names(table, config, label)))


def _check_request(table: Columns, data: DataConfig, label: str) -> None:
    name, kind = data.request, table.schema[data.request]
    if kind.is_nested():
        raise UserError(f"data.request: column {name!r} of {table.origin[name]} is of type {kind}; expected one value")
    taken = {getattr(data.log, key): f"data.log.{key}" for key in ("user", "item", "timestamp")} | {label: "the label"}
    if name in taken:
        raise UserError(f"data.request: got {name!r}, which is {taken[name]}; expected a column that identifies pages")


def _request(table: Table, name: str) -> pl.Expr:
    """The request of each row, null where none is given."""
    column, kind = pl.col(name), table.schema[name]
    if kind == pl.String:
        return pl.when(column.str.strip_chars() != "").then(column)
    return column.fill_nan(None) if kind.is_float() else column


def _catalogue(table: Table, key: str, name: str, kind: pl.DataType, config: LogConfig) -> pl.LazyFrame:
    checks = [id_check(table, name)]
    checks += [_text_check(pl.col(name), table.undecodable[name])] if name in table.undecodable else []
    columns = {
        key: pl.col(name).cast(kind, strict=False),
        "order": pl.col(ROW),
        "reason": pl.coalesce(REASON, first_reason(*checks)),
        "raw": pl.col(RAW),
    }
    if table.name == "items" and config.title:
        columns["title"] = pl.col(config.title).cast(pl.String).str.replace_all(UNDECODABLE, "\ufffd", literal=True)
    frame = table.frame.select(**columns, **_features(table, config, new_names(table, config)))
    # a catalogue is held in memory; the raw text of its good rows need not be
    is_bad = [pl.col("reason").is_not_null(), *(bad for bad, _ in _unusable(table, config).values())]
    return frame.with_columns(pl.when(pl.any_horizontal(is_bad)).then("raw").alias("raw"))


def new_names(table: Columns, config: LogConfig, label: str = "") -> dict[str, str]:
    """Each column of the table → the name by which features find it; without keys whose names lumrec uses itself."""
    keys = {
        "events": (config.user, config.item, label),
        "items": (config.item_in_items or config.item, config.title),
        "users": (config.user_in_users or config.user,),
    }[table.name]
    taken = TAKEN[table.name] + (("title",) if table.name == "items" and config.title else ())
    names = {}
    for name in table.schema:
        if name not in taken:
            names[name] = name
        elif name not in keys:
            names[name] = f"{name}_raw"
            while names[name] in table.schema:
                names[name] += "_raw"
    return names


def _features(table: Columns, config: LogConfig, names: dict[str, str]) -> dict[str, pl.Expr]:
    """Every column of the table under its new name; lists become lists of text where their values can be text."""
    features = {}
    for name, new in names.items():
        column, kind = pl.col(name), table.schema[name]
        if isinstance(kind, (pl.List, pl.Array)):
            column = column.cast(pl.List(kind.inner))
            if kind.inner == pl.Binary:
                column = column.list.eval(decode(pl.element()))
            elif not (kind.inner.is_nested() or kind.inner == pl.Duration):  # type: ignore[union-attr]
                column = column.list.eval(text_of(of_calendar(pl.element(), kind.inner), kind.inner))  # type: ignore[arg-type]
        elif name in as_list(config.lists):
            parts = column.cast(pl.String).str.split(config.list_separator)
            column = parts.list.eval(pl.element().filter(pl.element() != ""))
        elif name in as_list(config.decimal_comma) and kind == pl.String:
            column = with_decimal_point(column)
        features[new] = column
    return features


def _unusable(table: Table, config: LogConfig, label: str = "") -> dict[str, tuple[pl.Expr, str]]:
    """New name of a column → when a value of it cannot be used, and why: see RawLog."""
    found = {}
    for name, new in new_names(table, config, label).items():
        kind, column = table.schema[name], pl.col(new)
        beyond = out_of_calendar(column, kind)
        if beyond is not None:
            found[new] = (beyond, f"{name} is no {'time' if kind == pl.Time else 'date of the years 1 to 9999'}")
        elif name in table.undecodable:
            is_list = isinstance(kind, (pl.List, pl.Array)) or name in as_list(config.lists)
            text = column.list.join("", ignore_nulls=True) if is_list else column
            found[new] = _text_check(text, table.undecodable[name])
    return found


def _text_check(text: pl.Expr, why: str) -> tuple[pl.Expr, str]:
    return text.str.contains(UNDECODABLE, literal=True), why


def _check_names(config: LogConfig, tables: Tables) -> None:
    """Raises UserError for a name in lists, known_after or title that no table has."""
    everywhere = list(dict.fromkeys(name for table in tables for name in table.schema))
    for key in ("lists", "decimal_comma", "exact"):
        for name in as_list(getattr(config, key)):
            if name not in everywhere:
                raise UserError(
                    f"data.log.{key}: no table has a column {name!r}{did_you_mean(name, everywhere, cutoff=0.5)}"
                )
    for name in as_list(config.known_after):
        tables.events.require(name, "data.log.known_after")
    if config.title:
        if tables.items is None:
            raise UserError(f"data.log.title is {config.title!r}, and there are no items; give data.log.items too")
        tables.items.require(config.title, "data.log.title")


def with_decimal_point(column: pl.Expr) -> pl.Expr:
    """Numbers such as "1,5" and "1.234,5" as "1.5" and "1234.5"; other text as it is."""
    text = column.str.strip_chars()
    is_number = text.str.contains(r"^[+-]?([0-9]+|[0-9]{1,3}(\.[0-9]{3})+)(,[0-9]*)?$")
    point = text.str.replace_all(".", "", literal=True).str.replace(",", ".", literal=True)
    return pl.when(is_number).then(point).otherwise(column)


def _label_checks(name: str, kind: pl.DataType, made: pl.Expr, config: LabelConfig) -> list[tuple[pl.Expr, str]]:
    column = pl.col(name)
    number = (
        column.cast(pl.Float64, strict=False) if kind.is_numeric() or kind == pl.String else pl.lit(None, pl.Float64)
    )
    wanted = "no number" if config.at_least is not None else "neither 0 nor 1, true nor false"
    return [
        (column.is_null(), f"{name} is missing"),
        *([] if config.values else [(~number.is_finite(), f"{name} is not finite")]),
        (made.is_null(), f"{name} is {wanted}"),
    ]
