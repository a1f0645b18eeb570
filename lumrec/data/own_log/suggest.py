"""A suggested schema for your log, from what its columns hold, and its YAML."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

import polars as pl

from lumrec.data.own_log.column_facts import ColumnFacts
from lumrec.data.own_log.guess import is_code, is_condition, is_known_after, is_time
from lumrec.data.schema import (
    DENSE_ROLES,
    RESERVED,
    FeatureConfig,
    Role,
    Scale,
    SchemaConfig,
    TableConfig,
    folded,
    is_taken_by_torch,
)
from lumrec.run.typed_yaml import dump, in_quotes

OWN_VALUE = 0.9  # distinct values per row from which a text says nothing about other rows
MANY = 100  # distinct whole numbers from which they are taken for quantities
LONGEST_NAME = 40  # letters of a feature's name
FEW_ITEMS = 10_000  # catalogues up to this size: all items are negatives
MANY_EVENTS = 1_000_000  # up to here three seeds of a ranker take minutes
CONSTANT = 0.99  # a column that stays the same in this share of the events of each item (user) is the item's (user's)
LONG_TAILED = re.compile(r"price|count|num|cost|pop|views|sales|amount|freq")
QUANTITY = re.compile(rf"{LONG_TAILED.pattern}|days|duration|width|height|age|len|size|score|year|time|ms$")
_STYLE: dict[str, Any] = {"width": 110, "default_flow_style": None}
TELLING = 0.9  # an AUC that nothing known before the item is shown reaches by itself


@dataclass(frozen=True)
class Suggestion:
    """One line of the suggested schema: a feature, or None for a column that is left out; and why.

    name: of the feature: the column's, changed where a feature cannot have it; set by `suggest`.
    """

    column: str
    feature: FeatureConfig | None
    why: str
    name: str = ""


def suggest(
    facts: Sequence[ColumnFacts],
    *,
    keys: Sequence[str],
    label: str,
    known_after: Sequence[str],
    made_of_time: Sequence[str],
    with_files: Sequence[str] = (),
) -> list[Suggestion]:
    """A feature for each useful column, and the columns that are better left out, each with the reason.

    keys: columns that are ids or times. label: the label's column, "" where every event is positive. known_after:
    columns known only after the item was shown, by the config, their names or their values. made_of_time: hour,
    weekday, as far as the times are that exact. with_files: roles (item, user) that have separate files, so that their
    features cannot be columns of the events.
    """
    own = {column.name for column in facts if column.table == "events"}
    wish, why = "feedback", 'made of the label: asked for as a wish, "one they will like"'
    if "feedback" in own and label:  # the log's own column hides the one that is made of the label
        wish, why = label, 'the label, asked for as a wish, as the log has its own column "feedback"'
    suggestions = [
        Suggestion("item_id", FeatureConfig("item"), "the item itself"),
        Suggestion(wish, FeatureConfig("condition", wish=True), why),
    ]
    for column in facts:
        if column.name in keys:
            continue
        if column.table == "items" and column.name == "title":
            suggestions.append(Suggestion("title", None, "shown to people, not learned from"))
        else:
            suggestions.append(_of_column(column, label, known_after, with_files))
    if "hour" in made_of_time:
        suggestions.append(
            Suggestion("hour", FeatureConfig("context"), "of the time: UTC, unless data.log.utc_offset_hours says else")
        )
    if "weekday" in made_of_time:
        suggestions.append(Suggestion("weekday", FeatureConfig("context"), "of the time"))
    seen: dict[str, Suggestion] = {}
    for suggestion in suggestions:  # a column of two tables is one feature: the first, so the item's before the user's
        seen.setdefault(suggestion.column, suggestion)
    taken: set[str] = set()
    return [replace(suggestion, name=_name(suggestion.column, taken)) for suggestion in seen.values()]


def _name(column: str, taken: set[str]) -> str:
    """A valid feature name made from a column's, different from all in `taken`, to which it is added."""
    base = re.sub(r"[^\w-]", "_", column)[:LONGEST_NAME].lstrip("-") or "column"
    base = f"{base}_of_log" if base in RESERVED or is_taken_by_torch(base) else base
    candidates = itertools.chain([base], (f"{base}_{count}" for count in itertools.count(2)))
    name = next(name for name in candidates if folded(name) not in taken)
    taken.add(folded(name))
    return name


def _of_column(column: ColumnFacts, label: str, known_after: Sequence[str], with_files: Sequence[str]) -> Suggestion:
    role, why = _role(column, label, known_after, with_files)
    if column.missing == 1.0 or column.distinct <= 1:
        return Suggestion(column.name, None, "the same in every row" if column.missing < 1.0 else "no value at all")
    kind = column.kind.inner if isinstance(column.kind, pl.List) else column.kind
    if not (kind.is_numeric() or kind in (pl.String, pl.Boolean, pl.Categorical, pl.Enum)):
        return Suggestion(column.name, None, f"of type {column.kind}, which is no feature as it is")
    if column.is_time or (column.table == "events" and is_time(column.name)):
        return Suggestion(column.name, None, "a time; test data has times that training has never seen")
    if column.is_list:
        return Suggestion(column.name, FeatureConfig(role, kind="multi"), f"{why}; several values")
    quantity = column.is_fraction or (column.distinct > MANY and not is_code(column.name))
    if column.is_number and quantity:
        if role == "condition":
            role, why = "context", f"{why}; a number, which rankers read"
        if role not in DENSE_ROLES:
            why = why.partition(":")[0]
            return Suggestion(column.name, None, f"{why}; role {role} takes no numbers: put it into buckets to use it")
        if not (column.is_fraction or QUANTITY.search(column.name.lower())):
            why += "; kind: id where these numbers are codes"
        scale: Scale = "log" if LONG_TAILED.search(column.name.lower()) else "standard"
        return Suggestion(column.name, FeatureConfig(role, kind="dense", scale=scale), why)
    rows = column.num_rows * (1 - column.missing)
    if column.distinct > OWN_VALUE * rows and column.distinct > 20:
        return Suggestion(column.name, None, "nearly every row has a different value")
    return Suggestion(column.name, FeatureConfig(role), why)


def _role(column: ColumnFacts, label: str, known_after: Sequence[str], with_files: Sequence[str]) -> tuple[Role, str]:
    if column.table != "events":
        return ("item", "of the items") if column.table == "items" else ("user", "of the users")
    if column.name == label:
        return "feedback", "the label is made of it: read only in histories"
    if column.name in known_after:
        return "feedback", "known only after the item was shown: read only in histories"
    owners: tuple[tuple[Role, float | None], ...] = (("item", column.of_item), ("user", column.of_user))
    for role, share in owners:
        if (share or 0.0) >= CONSTANT:
            move = f": move it to the {role}s to make it theirs" if role in with_files else ""
            return "context" if role in with_files else role, f"the same in all events of one {role}{move}"
    if is_condition(column.name):
        return "condition", "by its name; check that it is known before the item is shown"
    return "context", "known when the item is ranked? else remove it, or role: feedback"


def sounds_known_after(column: ColumnFacts) -> bool:
    """Whether a column of events has the name of something that is known only after the item was shown.

    A column that stays the same for an item (the duration of a video) describes the item, whatever its name.
    """
    of_item = (column.of_item or 0.0) >= CONSTANT
    return column.table == "events" and column.distinct > 1 and is_known_after(column.name) and not of_item


def tells_label(column: ColumnFacts) -> bool:
    """Whether a column of events by itself tells positive from negative events so well that it must come from later."""
    return column.table == "events" and (column.auc or 0.0) > TELLING and (column.of_item or 0.0) < CONSTANT


def as_schema(suggestions: Sequence[Suggestion]) -> SchemaConfig:
    """The schema of the suggested features; the table of the item ids is wider than the others."""
    features = {}
    for suggestion in suggestions:
        if suggestion.feature is not None:
            column = "" if suggestion.name == suggestion.column else suggestion.column
            features[suggestion.name] = FeatureConfig(**{**vars(suggestion.feature), "column": column})
    return SchemaConfig(tables={"item_id": TableConfig(32)}, features=features)


def as_yaml(data: Any, schema: SchemaConfig, notes: dict[str, str], left_out: dict[str, str]) -> str:
    """The sections `data` and `schema` of a config as YAML, without defaults, but with the source.

    notes: comment after a feature, by its name. left_out: columns without a feature, and why, as comments.
    """
    lines = [dump({"data": _differing(data, replace(type(data)(), source=""))}, **_STYLE).rstrip(), "schema:"]
    if schema.tables:
        tables = {name: {"width": table.width} for name, table in schema.tables.items()}
        lines += ["  tables:", *(f"    {line}" for line in _flow(tables))]
    features = {
        name: {"role": feature.role, **_differing(feature, FeatureConfig("item"))}
        for name, feature in schema.features.items()
    }
    lines.append("  features:")
    for line, name in zip(_flow(features), features):
        lines.append(f"    {line}" + (f"  # {notes[name]}" if name in notes else ""))
    for name, why in left_out.items():
        lines.append(f"    # {name if name.isprintable() else in_quotes(name)}: left out: {why}")
    return "\n".join(lines) + "\n"


def training_yaml(num_items: int, num_events: int, *, absolute_time: bool = True) -> str:
    """The sections of the stages for a log of this size, as text with comments.

    absolute_time: whether times of different users can be compared.

    Batches, epochs and warm-up suit a large log; for a small one, min_steps adapts them when a stage begins.
    """
    full = num_items <= FEW_ITEMS
    catalogue = f"the whole catalogue of {num_items:,}" if full else f"true is for less than {FEW_ITEMS:,} items"
    statistics = (
        "" if absolute_time else "\n  statistics: user  # the log has no times: what others did before is unknown"
    )
    seeds = "[0, 1, 2]" if num_events <= MANY_EVENTS else "[0]"
    return f"""
model: {{similarity: dot}}

pretrain:
  select: ""  # the last weights: the schedule ends at 0
  negatives: {{full: {str(full).lower()}}}  # {catalogue}; false: the items of the same pack
  train:
    epochs: 4
    min_steps: 300  # a small log gets smaller batches, then more epochs
    optimizer: {{table_lr: 0.1, dense_lr: 2.0e-3, weight_decay: 0.01, warmup_steps: 100, schedule: cosine}}

rank:
  tables: lum  # of the rankers with knowledge; the pipeline's base always has fresh ones{statistics}
  train:
    epochs: 2
    min_steps: 300
    optimizer: {{table_lr: 0.2, dense_lr: 4.0e-3, weight_decay: 0.01, warmup_steps: 50, schedule: linear}}

pipeline:
  rankers: [din]
  knowledge: [none, both]
  seeds: {seeds}  # what differs between seeds is chance
"""


def _flow(entries: dict[str, dict[str, Any]]) -> list[str]:
    """One line `name: {key: value}` for each entry."""
    lines = []
    for name, entry in entries.items():
        key = dump(name, width=10**9).removesuffix("\n").removesuffix("\n...")
        value = dump(entry, default_flow_style=True, width=10**9)
        lines.append(f"{key}: {value.rstrip()}")
    return lines


def _differing(value: Any, default: Any) -> dict[str, Any]:
    """The fields that differ from the default, also of nested sections."""
    found = {}
    for field in fields(value):
        mine, usual = getattr(value, field.name), getattr(default, field.name)
        if mine == usual:
            continue
        if is_dataclass(mine) and not isinstance(mine, type):  # an optional section is written whole
            mine = _differing(mine, usual) if is_dataclass(usual) else asdict(mine)
        found[field.name] = mine
    return found
