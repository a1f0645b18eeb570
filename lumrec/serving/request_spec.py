"""Requests and events, and the description of how requests become the batches that a ranker reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lumrec.data.log_columns import DERIVED_AFTER
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig, schema_from_dict
from lumrec.features.history import Layout
from lumrec.features.statistics import WINDOWS, StatisticsModel
from lumrec.run.errors import UserError
from lumrec.serving.raw_values import TIME_TEXTS

LONGEST_WINDOW = max(WINDOWS)


class Event(NamedTuple):
    """What a user did with an item that was shown.

    user, item: raw ids. time: seconds since 1970, UTC, with fractions; None = now; not read in a log without times,
    whose events are in the order of arrival. label: 0 or 1. features: raw values (a list for kind multi) by the name of
    a feature, or of the column that it reads. event_id: an event with an id counts once. request: equal for events that
    were shown together.
    """

    user: str
    item: str
    time: float | None = None
    label: float = 0.0
    features: Mapping[str, Any] = {}
    event_id: str = ""
    request: str = ""


class ScoreRequest(NamedTuple):
    """Candidates (raw item ids) to be scored for a user (raw id).

    context: feature or column → raw value, for the context, for conditions that are known before an item is shown, and
    for features of the user that differ from the state. per_item: the same for values that differ between candidates,
    one for each. time: seconds since 1970, UTC; None = now. In a log without times: the number of the user's events
    that are seen, None = all.
    """

    user: str
    items: Sequence[str]
    context: Mapping[str, Any] = {}
    time: float | None = None
    per_item: Mapping[str, Sequence[Any]] = {}


@dataclass(frozen=True)
class RequestSpec:
    """How requests become batches: plain values, also as JSON.

    schema: without features that the ranker leaves out. features, row_features, reads: of the ranker. max_history,
    category: see RowBuilder. has_clock, absolute_time: of the log. utc_offset_hours: local time of its users. derived:
    columns that lumrec derives from time and label. table_rows: see PreparedData.
    """

    schema: SchemaConfig
    features: list[str]
    row_features: list[str]
    reads: list[str]
    max_history: int
    category: str
    statistics: StatisticsModel
    has_clock: bool
    absolute_time: bool
    utc_offset_hours: float
    derived: list[str]
    table_rows: dict[str, int]

    @classmethod
    def of(
        cls,
        data: PreparedData,
        statistics: StatisticsModel,
        *,
        features: Sequence[str],
        row_features: Sequence[str],
        max_history: int,
        reads: Sequence[str] = (),
        category: str = "",
    ) -> RequestSpec:
        """The spec of a ranker that reads these features of a log. Raises UserError for data of an older lumrec."""
        manifest = data.manifest
        made = [*TIME_TEXTS, *DERIVED_AFTER]
        if "derived" not in manifest and any(feature.column in made for feature in data.schema.features.values()):
            raise UserError(
                f"{data.path} was prepared by an older lumrec, which did not say whether {', '.join(made)} are columns "
                "of the log or made by lumrec: prepare it again (apps/prepare.py with overwrite=true)"
            )
        return cls(
            schema=data.schema,
            features=list(features),
            row_features=list(row_features),
            reads=sorted(reads),
            max_history=max_history,
            category=category,
            statistics=statistics,
            has_clock=manifest["has_clock"],
            absolute_time=data.absolute_time,
            utc_offset_hours=manifest.get("utc_offset_hours", 0.0),
            derived=list(manifest.get("derived", [])),
            table_rows=data.table_rows,
        )

    @property
    def least_kept(self) -> int:
        """Number of a user's last events that a batch reads one by one."""
        return max(1, self.max_history, 0 if self.statistics.kind == "none" else LONGEST_WINDOW)

    def layout(self, *, keep: int) -> Layout:
        """The layout of users' states that keep `keep` events. Raises UserError if the ranker reads more."""
        if keep < self.least_kept:
            raise UserError(
                f"{keep} events of a user are to be kept, and this ranker reads {self.least_kept}: keep at least those"
            )
        return Layout.of(self.schema, keep=keep, has_clock=self.has_clock, category=self.category)

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RequestSpec:
        """The inverse of `to_json`."""
        schema, statistics = schema_from_dict(values["schema"]), StatisticsModel.from_json(values["statistics"])
        return cls(**(dict(values) | {"schema": schema, "statistics": statistics}))
