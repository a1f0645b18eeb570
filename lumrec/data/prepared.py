"""Opens a prepared folder: flat arrays over events (mapped, not read), columns of vocabulary rows, vocabularies.

Shapes: E events (sorted by user, time, original order), U users, I items.

    user_offsets  [0, 3, 3, 5]      three users; the second has no event
    item          [7, 2, 7 | 4, 4]  index into items.parquet
    split         [0, 0, 2 | 0, 1]  train, valid, test

A ranker scores rows: row e < E is event e, and the rows after the events were drawn (data.negatives).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from lumrec.data.columns import Column
from lumrec.data.manifest import PreparedDataError, read_manifest
from lumrec.data.mapped import FOLDER, blocks, feature_file, mapped
from lumrec.data.schema import EVENT_ROLES, SchemaConfig, features_by_role, schema_from_dict, validate, without
from lumrec.data.splits import TRAIN
from lumrec.run.errors import UserError
from lumrec.run.files import sha256


class Rows(NamedTuple):
    """event: int64 [N], the event whose user, moment, context and history each row has. item: int64 [N], to be scored.
    label: float32 [N]."""

    event: np.ndarray
    item: np.ndarray
    label: np.ndarray


class PreparedData:
    """A prepared log (numpy arrays for events, torch columns for features); made by `open`.

    What has one entry for each event is mapped (lumrec/data/mapped.py): it takes no memory of the process.

    path, manifest, schema (defaults filled in), fingerprint (changes with any byte of the data).
    num_users, num_items, num_events. num_rows: events and drawn rows.
    user_offsets: i64 [U + 1], events of user u are user_offsets[u]:user_offsets[u + 1], maybe none.
    user, item, timestamp (seconds), order (row of the original log): i64 [E]. label: f32 [E]. split: i8 [E].
    before: i64 [E], first row of each event's moment (lumrec/data/moments.py): the event sees its user's rows up to
    there, without that one, and its own time is timestamp[before].
    probability: f32 [E], the true P(label = 1) of a simulated log, else None.
    event_columns, item_columns, user_columns: feature name to `Column`, indexed by event, item, user.
    dense: name of each dense feature to its scaled numbers, f32, indexed by item, user or event after its role.
    absolute_time: False where times of different users cannot be compared.
    table_rows: rows of each embedding table, row 0 ("unknown") included. item_counts: i64 [I], training events.
    negative_event, negative_item: i64, the event beside which each row was drawn, and its item.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        """Loads the folder that `manifest` describes; use `open`, which checks it first."""
        self.path = path
        self.manifest = manifest
        try:
            self.schema: SchemaConfig = validate(schema_from_dict(manifest["schema"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise PreparedDataError(f"{path}: its manifest holds no schema ({error!r}). Prepare it again.") from None
        self.fingerprint: str = manifest["fingerprint"]
        self.table_rows: dict[str, int] = dict(manifest["table_rows"])
        self._items, self._users = self._read("items.parquet"), self._read("users.parquet")
        self.num_items, self.num_users = len(self._items), len(self._users)
        for name in ("user", "item", "timestamp", "order", "before"):
            setattr(self, name, self._mapped(name, np.int64))
        self.user: np.ndarray
        self.item: np.ndarray
        self.timestamp: np.ndarray
        self.order: np.ndarray
        self.before: np.ndarray
        self.label, self.split = self._mapped("label", np.float32), self._mapped("split", np.int8)
        self.probability = self._mapped("probability", np.float32) if self._has("probability") else None
        self.num_events, drawn = len(self.user), self._has("negative-event")
        self.negative_event, self.negative_item = (
            self._mapped(name, np.int64) if drawn else np.zeros(0, np.int64)
            for name in ("negative-event", "negative-item")
        )
        self.num_rows = self.num_events + len(self.negative_event)
        self.user_offsets = np.searchsorted(self.user, np.arange(self.num_users + 1)).astype(np.int64)
        of_events = [name for role in EVENT_ROLES for name in features_by_role(self.schema, role)]
        self.event_columns = {name: self._mapped_column(name) for name in of_events}
        self.item_columns = self._columns(self._items, features_by_role(self.schema, "item"))
        self.user_columns = self._columns(self._users, features_by_role(self.schema, "user"))
        self.absolute_time: bool = manifest["absolute_time"]
        self.dense: dict[str, np.ndarray] = {
            name: _array(frame, name, np.float32)
            for role, frame in (("item", self._items), ("user", self._users))
            for name in features_by_role(self.schema, role, dense=True)
        }
        for name in features_by_role(self.schema, "context", dense=True):
            self.dense[name] = self._mapped(feature_file(self.schema.features, name), np.float32)
        self._check_indices()
        self.item_counts = self.training_counts()

    def _check_indices(self) -> None:
        """Raises PreparedDataError for an index that is outside the users, items, parts or tables."""
        lengths = {
            name: len(getattr(self, name)) for name in ("item", "timestamp", "order", "before", "label", "split")
        }
        for name, column in self.event_columns.items():
            values, offsets = column.values.numpy(), None if column.offsets is None else column.offsets.numpy()
            lengths[name] = len(values) if offsets is None else len(offsets) - 1
            if offsets is not None and (offsets[0] != 0 or offsets[-1] != len(values) or not _ascends(offsets)):
                raise PreparedDataError(f"{self.path}: {name} is damaged, its lists overlap. Prepare it again.")
        for name, length in lengths.items():
            if length != self.num_events:
                raise PreparedDataError(
                    f"{self.path}: {name} has {length:,} rows, expected {self.num_events:,}: it is damaged. Prepare it "
                    "again (apps/prepare.py with overwrite=true)."
                )
        limits = [("before", self.before, self.num_events)]
        limits += [("user", self.user, self.num_users), ("item", self.item, self.num_items), ("split", self.split, 3)]
        limits += [("negatives' event", self.negative_event, self.num_events)]
        limits += [("negatives' item", self.negative_item, self.num_items)]
        for columns in (self.event_columns, self.item_columns, self.user_columns):
            for name, column in columns.items():
                table = self.schema.features[name].table
                limits.append((name, column.values.numpy(), self.table_rows.get(table, 0)))
        for name, values, size in limits:
            if len(values) and not 0 <= values.min() <= values.max() < size:
                raise PreparedDataError(
                    f"{self.path}: {name} has {values.min()} to {values.max()}, expected numbers from 0, below {size}: "
                    "it is damaged. Prepare it again (apps/prepare.py with overwrite=true)."
                )
        if not _ascends(self.user):
            raise PreparedDataError(f"{self.path}: its events are not sorted by user: it is damaged. Prepare it again.")

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> PreparedData:
        """The prepared data of a folder.

        verify: compare every file with its checksum in the manifest (else only its presence and size). Raises
        MissingFileError where the folder is missing, PreparedDataError (a ValueError) where it is cut, damaged or of
        another format version.
        """
        folder = Path(path)
        manifest = read_manifest(folder, verify=verify)
        try:
            return cls(folder, manifest)
        except pl.exceptions.PolarsError as error:  # a column that is missing, or of another type
            raise PreparedDataError(f"{folder} is damaged: {error}. Prepare it again (apps/prepare.py).") from error

    def rows(self, row_N: np.ndarray) -> Rows:
        """What the rows `row_N` (int64) are: events, or drawn beside them."""
        place_N = np.flatnonzero(row_N >= self.num_events)
        number_N = row_N[place_N] - self.num_events
        event_N = row_N.copy()
        event_N[place_N] = self.negative_event[number_N]
        item_N, label_N = self.item[event_N], self.label[event_N]
        item_N[place_N], label_N[place_N] = self.negative_item[number_N], 0.0
        return Rows(event_N, item_N, label_N)

    def training_counts(self, users: np.ndarray | None = None) -> np.ndarray:
        """Number of training events of each item, int64 [I]. users: bool [U], only events of these."""
        count_I = np.zeros(self.num_items, np.int64)
        for part in blocks(self.num_events):
            is_counted = self.split[part] == TRAIN
            if users is not None:
                is_counted &= users[self.user[part]]
            count_I += np.bincount(self.item[part][is_counted], minlength=self.num_items)
        return count_I

    def without(self, names: Sequence[str]) -> PreparedData:
        """The same data without some features in the schema; nothing is copied. Raises UserError for unknown names."""
        if unknown := [name for name in names if name not in self.schema.features]:
            raise UserError(
                f"there is no feature {unknown[0]!r} to leave out; the schema has {', '.join(self.schema.features)}"
            )
        reduced = copy.copy(self)
        reduced.schema = without(self.schema, names)
        reduced.dense = {name: values for name, values in self.dense.items() if name not in names}
        return reduced

    def with_negatives(self, event_N: np.ndarray) -> np.ndarray:
        """The rows of some events (int64), followed by the rows that were drawn beside these events."""
        is_asked_E = np.zeros(self.num_events, bool)
        is_asked_E[event_N] = True
        return np.concatenate([event_N, self.num_events + np.flatnonzero(is_asked_E[self.negative_event])])

    def vocabulary(self, table: str) -> dict[str, int]:
        """Raw value to row (from 1) of one table. Raises UserError for a table that does not exist."""
        if table not in self.table_rows:
            raise UserError(f"no table {table!r}; there are: {', '.join(self.table_rows)}")
        name = f"vocabulary/{table}.parquet"
        if sha256(self.path / name) != self.manifest["files"][name]["sha256"]:  # the folder may have been replaced
            raise PreparedDataError(f"{self.path / name} has changed since the data were opened: open them again")
        frame = self._read(name)
        return dict(zip(frame["key"].to_list(), frame["row"].to_list()))

    @cached_property
    def vocabulary_fingerprint(self) -> str:
        """Changes with the schema, the split rule and the row of any value; not with events that add no value."""
        digest = hashlib.sha256(json.dumps([self.manifest["schema"], self.manifest["split"]], sort_keys=True).encode())
        for table in sorted(self.table_rows):
            digest.update(json.dumps([table, sorted(self.vocabulary(table).items(), key=itemgetter(1))]).encode())
        return digest.hexdigest()[:16]

    def item_keys(self) -> list[str]:
        """Raw id of each item [I]."""
        return self._items["item_key"].to_list()

    def item_titles(self) -> list[str]:
        """Title of each item [I]; its raw id where the source has no titles."""
        column = "title" if "title" in self._items.columns else "item_key"
        return self._items[column].fill_null(self._items["item_key"]).to_list()

    def user_keys(self) -> list[str]:
        """Raw id of each user [U]."""
        return self._users["user_key"].to_list()

    def _columns(self, frame: pl.DataFrame, names: Iterable[str]) -> dict[str, Column]:
        return {name: _column(frame[name]) for name in names}

    def _has(self, name: str) -> bool:
        return f"{FOLDER}/{name}.npy" in self.manifest["files"]

    def _mapped(self, name: str, dtype: type) -> np.ndarray:
        try:
            if not self._has(name):
                raise ValueError(f"the manifest lists no {FOLDER}/{name}.npy")
            array = mapped(self.path, name)
        except (ValueError, OSError) as error:
            raise PreparedDataError(
                f"{self.path}: cannot read {FOLDER}/{name}.npy ({error}). Prepare it again (apps/prepare.py)."
            ) from error
        if array.dtype != dtype or array.ndim != 1:
            raise PreparedDataError(
                f"{self.path}: {FOLDER}/{name}.npy holds {array.dtype} in {array.ndim} dimensions, expected "
                f"{np.dtype(dtype)} in one: it is damaged. Prepare it again (apps/prepare.py)."
            )
        return array

    def _mapped_column(self, feature: str) -> Column:
        name = feature_file(self.schema.features, feature)
        if self._has(name):
            return Column(torch.from_numpy(self._mapped(name, np.int64)))
        values, offsets = self._mapped(f"{name}.values", np.int64), self._mapped(f"{name}.offsets", np.int64)
        return Column(torch.from_numpy(values), torch.from_numpy(offsets))

    def _read(self, *names: str) -> pl.DataFrame:
        try:
            return pl.concat([pl.read_parquet(self.path / name) for name in names], rechunk=True)
        except pl.exceptions.PolarsError as error:
            raise PreparedDataError(
                f"{self.path}: cannot read {', '.join(names)} ({error}). Prepare it again (apps/prepare.py)."
            ) from error


def _ascends(array: np.ndarray) -> bool:
    return all((np.diff(array[part.start : part.stop + 1]) >= 0).all() for part in blocks(len(array)))


def _array(frame: pl.DataFrame, name: str, dtype: type) -> np.ndarray:
    series = frame[name]
    if not (series.dtype.is_numeric() or series.dtype == pl.Boolean or series.is_empty()) or series.null_count():
        raise pl.exceptions.SchemaError(f"column {name!r} is {series.dtype}, or has missing values; expected numbers")
    return series.to_numpy().astype(dtype)  # a copy: Arrow's memory is read-only, torch wants writable


def _column(series: pl.Series) -> Column:
    inner = series.dtype.inner if isinstance(series.dtype, pl.List) else series.dtype
    if not inner.is_integer() or series.null_count():
        raise pl.exceptions.SchemaError(
            f"column {series.name!r} is {series.dtype}, or has missing values; expected rows"
        )
    if not isinstance(series.dtype, pl.List):
        return Column(torch.from_numpy(series.to_numpy().astype(np.int64)))
    lengths = series.list.len().to_numpy()
    offsets = np.zeros(len(series) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values = series.filter(series.list.len() > 0).explode().to_numpy().astype(np.int64)
    return Column(torch.from_numpy(values), torch.from_numpy(offsets))
