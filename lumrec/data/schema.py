"""The meaning of a log's columns: features, their roles, and the embedding tables that they read.

features:                                      tables:
  item_id:    {role: item}                       item_id: {width: 32}
  genres:     {role: item, kind: multi}
  main_genre: {role: condition, table: genres}   # two features, one table
  feedback:   {role: condition, wish: true}      # asked for as a wish: "an item that this user will like"
  rating:     {role: feedback}                   # known only after the item was shown
  price:      {role: item, kind: dense}          # a number; no table
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch import nn

from lumrec.run.errors import UserError
from lumrec.run.limits import check_choice, count

Role = Literal["item", "condition", "feedback", "user", "context"]
Kind = Literal["id", "multi", "dense"]
Scale = Literal["log", "standard", "none"]
ROLES, KINDS, SCALES = get_args(Role), get_args(Kind), get_args(Scale)
# columns of the prepared folder that are not features
RESERVED = (
    *("user", "item", "timestamp", "order", "label", "split", "probability", "title", "item_key", "user_key"),
    *("time_us", "block", "rows_back"),
)
DENSE_ROLES = ("item", "user", "context")
EVENT_ROLES = ("condition", "feedback", "context")  # these features are columns of the events
MOST_NAME = 200  # bytes of a table's name, which names a file: file systems take 255, its ending among them
_MODULES = nn.ModuleDict()


@dataclass(frozen=True)
class TableConfig:
    """One embedding table. Its number of rows comes from the vocabulary (row 0 is "unknown").

    width: columns of the table.
    """

    width: int = count(16, least=4, most=16_384)

    def check(self, at: str) -> None:
        """Raises UserError for a width that FBGEMM's kernels cannot read (`at`: the section, with a dot)."""
        if self.width % 4:
            raise UserError(f"{at}width: got {self.width}, expected a multiple of 4")


@dataclass(frozen=True)
class FeatureConfig:
    """One feature: a column of the raw log, looked up in an embedding table.

    role: item | condition | feedback | user | context. Feedback is known only after the item was shown (a rating), so
        it is read in histories and never for a target.
    kind: id (one value) | multi (a list of values, possibly empty) | dense (a number, which rankers read directly).
    table: name of its embedding table; "" = the feature's name. A dense feature has no table.
    column: column of the raw log; "" = the feature's name.
    scale: for a dense feature, fitted on the training part: standard = mean 0, variance 1; log = the same of
        sign(x) log(1 + |x|); none = unchanged. A missing or non-finite number becomes 0, the mean where it is scaled.
    wish: a condition that is known only after the item was shown, and that is asked for as a wish.
    """

    role: Role
    kind: Kind = "id"
    table: str = ""
    column: str = ""
    wish: bool = False
    scale: Scale = "standard"


@dataclass(frozen=True)
class SchemaConfig:
    """Features by name, in the order of declaration, and their tables; tables not listed get the default width."""

    tables: dict[str, TableConfig] = field(default_factory=dict)
    features: dict[str, FeatureConfig] = field(default_factory=dict)

    def check(self, at: str) -> None:
        """Raises UserError for features and tables that do not fit each other."""
        if self.features:
            validate(self)


def validate(schema: SchemaConfig) -> SchemaConfig:
    """The schema with every default filled in (table and column names, tables that only features name).

    Raises UserError for an unknown role or kind, a name that cannot be one, a table that no feature reads, a wish that
    is no condition, a schema without an item feature.
    """
    features = {}
    for name in schema.features:
        check_name("schema.features", name, f"; the column keeps its name: column: {name!r}")
    for name in schema.tables:
        check_name("schema.tables", name)
    for name, feature in schema.features.items():
        if name in RESERVED:
            raise UserError(
                f"schema.features.{name}: this name is kept for a column of the prepared folder; choose another, with "
                f"column: {name}. Kept names: {', '.join(RESERVED)}"
            )
        check_choice(f"schema.features.{name}.role", feature.role, ROLES)
        check_choice(f"schema.features.{name}.kind", feature.kind, KINDS)
        if feature.wish and feature.role != "condition":
            raise UserError(f"schema.features.{name}: wish: true needs role: condition, got role: {feature.role}")
        if feature.kind == "dense":
            check_choice(f"schema.features.{name}.scale", feature.scale, SCALES)
            if feature.role not in DENSE_ROLES or feature.table:
                what = "reads no table" if feature.table else f"cannot have role: {feature.role}"
                raise UserError(
                    f"schema.features.{name}: a dense feature {what}; it is a number that rankers read beside the "
                    f"tables, of role {', '.join(DENSE_ROLES)}"
                )
            features[name] = replace(feature, column=feature.column or name)
        else:
            features[name] = replace(feature, table=feature.table or name, column=feature.column or name)
    if not any(feature.role == "item" and feature.table for feature in features.values()):
        raise UserError(
            "schema.features has no feature of role item with a table; declare at least item_id: {role: item}"
        )
    used = list(dict.fromkeys(feature.table for feature in features.values() if feature.table))
    check_tables(used)
    for table in schema.tables:
        if table not in used:
            raise UserError(f"schema.tables.{table}: no feature reads this table; tables in use: {', '.join(used)}")
    tables = {table: schema.tables.get(table, TableConfig()) for table in used}
    for name, config in tables.items():
        if config.width < 1:
            raise UserError(f"schema.tables.{name}.width: expected a positive number, got {config.width}")
    return SchemaConfig(tables=tables, features=features)


def check_name(key: str, name: str, hint: str = "") -> None:
    """Raises UserError for what cannot name a feature or a table: it becomes a key, a column, a file, a module."""
    if not re.fullmatch(r"\w[\w-]*", name) or len(name.encode()) > MOST_NAME:
        shown = repr(name if len(name) <= 80 else f"{name[:80]}…")
        raise UserError(
            f"{key}: got the name {shown}, expected letters, digits, _ and -, at most {MOST_NAME} bytes, and no - in "
            f"front{hint if len(name) <= 80 else ''}"
        )


def check_tables(names: Sequence[str]) -> None:
    """Raises UserError for names that tables cannot have, each or together."""
    twins: dict[str, str] = {}
    for name in names:
        check_name("the table of a feature", name)
        if is_taken_by_torch(name):
            raise UserError(
                f"a table cannot be called {name!r}, as modules of torch have something of this name: give its "
                f"features another one, such as table: {name}_table"
            )
        other = twins.setdefault(folded(name), name)
        if other != name:
            raise UserError(
                f"the tables {other!r} and {name!r} differ only in case, and the files of their vocabularies would be "
                f"one on macOS and Windows: give the features of one another name, such as table: {name}_2"
            )


def is_taken_by_torch(name: str) -> bool:
    """Whether no table can have this name, as nn.Module has an attribute of it (type, values, …)."""
    return hasattr(_MODULES, name)


def folded(name: str) -> str:
    """The name as file systems compare it that know no case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def features_by_role(schema: SchemaConfig, role: str, *, dense: bool = False) -> list[str]:
    """Names of the features of that role that read tables (`dense`: of those that are numbers), as declared."""
    check_choice("role", role, ROLES)
    return [
        name for name, feature in schema.features.items() if feature.role == role and (feature.kind == "dense") == dense
    ]


def without(schema: SchemaConfig, names: Sequence[str]) -> SchemaConfig:
    """The schema without some features; its tables stay."""
    return replace(schema, features={name: each for name, each in schema.features.items() if name not in names})


def table_widths(schema: SchemaConfig, features: Sequence[str]) -> dict[str, int]:
    """Width of each table that some features read, in their order."""
    tables = [schema.features[name].table for name in features if schema.features[name].table]
    return {table: schema.tables[table].width for table in tables}


def schema_from_dict(values: dict) -> SchemaConfig:
    """The schema that `dataclasses.asdict` (or the manifest of a prepared folder) describes."""
    return SchemaConfig(
        tables={name: TableConfig(**table) for name, table in values["tables"].items()},
        features={name: FeatureConfig(**feature) for name, feature in values["features"].items()},
    )
