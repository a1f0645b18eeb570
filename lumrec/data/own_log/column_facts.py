"""What the columns of a raw log hold, counted as a stream: types, missing and distinct values, what stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import polars as pl

from lumrec.data.own_log.calendar import of_calendar
from lumrec.data.own_log.times import looks_like_time
from lumrec.data.sources.raw_log import RawLog
from lumrec.metrics.ranking import auc

SAMPLE_ROWS = 20_000  # from the top of a table, for facts that need examples
SHARE_ROWS = 1_000_000  # about as many events decide what stays the same for an item or a user
FEW_VALUES, FEW_ROWS = 50, 200  # values up to which each has its share of positives; rows from which an AUC is taken
ONE_VALUE = 0.9  # share of rows with one value, from which it says nothing that a column stays the same for an item
OWN_COLUMNS = ("user_id", "item_id", "time_us", "order", "label", "reason", "raw", "probability")


@dataclass(frozen=True)
class ColumnFacts:
    """Facts about one column of events, items or users.

    missing: share of the rows. distinct: number of values; in a table of more than SAMPLE_ROWS rows about that number
    (of a list: in the sample). is_number, is_fraction: nearly all values of the sample are numbers, some with a
    fraction. is_time: they are times. of_item, of_user: for events, the share of the events of items (users) with
    several events for which the column stays the same; None where there are no such items, and where nearly all rows
    have one value. auc: for events, how well the column by itself tells positive from negative rows of the sample
    (0.5 … 1); None where it has too many values, or too few rows have one.
    """

    table: str
    name: str
    kind: pl.DataType
    num_rows: int
    missing: float
    distinct: int
    examples: tuple[str, ...]
    is_number: bool
    is_fraction: bool
    is_time: bool
    of_item: float | None = None
    of_user: float | None = None
    auc: float | None = None

    @property
    def is_list(self) -> bool:
        return isinstance(self.kind, pl.List)


def column_facts(raw: RawLog) -> list[ColumnFacts]:
    """Facts about every column that features may read; reads each table once, the events three times."""
    facts: list[ColumnFacts] = []
    for table, frame in (("events", raw.events), ("items", raw.items), ("users", raw.users)):
        if frame is None:
            continue
        schema = frame.collect_schema()
        names = [name for name in schema.names() if name not in OWN_COLUMNS]
        frame = frame.with_columns(of_calendar(pl.col(name), schema[name]) for name in names)
        good = frame.filter(pl.col("reason").is_null()) if "reason" in schema else frame
        labels = ["label"] if table == "events" else []
        rows = good.select(*names, *labels).head(SAMPLE_ROWS).collect(engine="streaming")
        plain = [name for name in names if not schema[name].is_nested()]
        counts = good.select(
            pl.len().alias("rows"),
            *(pl.col(name).null_count().alias(f"missing {name}") for name in names),
            *(pl.col(name).approx_n_unique().alias(f"distinct {name}") for name in plain),
        ).collect(engine="streaming").row(0, named=True)  # fmt: skip
        constant = _constant_shares(good, plain, counts["rows"]) if table == "events" else {}
        for name in names:
            fact = _facts_of(table, name, schema[name], rows[name], counts, constant)
            facts.append(replace(fact, auc=_auc_alone(rows[name], rows["label"])) if labels else fact)
    return facts


def _auc_alone(values: pl.Series, label: pl.Series) -> float | None:
    """ColumnFacts.auc: of few values by their shares of positive rows, of numbers by their size."""
    if values.dtype.is_nested() or values.dtype == pl.Object:
        return None
    frame = pl.DataFrame({"value": values, "label": label}).drop_nulls()
    if frame["value"].n_unique() <= FEW_VALUES:
        frame = frame.with_columns(score=pl.col("label").mean().over("value"))
    else:
        score = pl.col("value").str.strip_chars() if values.dtype == pl.String else pl.col("value")
        is_number = values.dtype.is_numeric() or values.dtype == pl.String
        number = score.cast(pl.Float64, strict=False) if is_number else pl.lit(None, pl.Float64)
        frame = frame.with_columns(score=pl.when(number.is_finite()).then(number)).drop_nulls()
    if len(frame) < FEW_ROWS:
        return None
    found = auc(frame["label"].to_numpy(), frame["score"].to_numpy())
    return max(found, 1 - found) if found == found else None


def _facts_of(
    table: str,
    name: str,
    kind: pl.DataType,
    rows: pl.Series,
    counts: dict[str, int],
    constant: dict[tuple[str, str], float],
) -> ColumnFacts:
    values = rows.drop_nulls()
    number = pl.Series([], dtype=pl.Float64)
    if isinstance(kind, pl.List):
        values = values.explode(empty_as_null=True).drop_nulls()
    elif kind.is_numeric() or kind == pl.String:
        number = (values.str.strip_chars() if kind == pl.String else values).cast(pl.Float64, strict=False).drop_nulls()
    distinct = counts.get(f"distinct {name}")
    if distinct is None or counts["rows"] <= SAMPLE_ROWS:  # the sample is all there is, or all that can be counted
        distinct = 0 if kind == pl.Object else values.n_unique()
    top = rows.value_counts(sort=True)["count"][0] / len(rows) if len(rows) and not kind.is_nested() else 0.0
    examples = values.unique(maintain_order=True).head(3)
    return ColumnFacts(
        table=table,
        name=name,
        kind=kind,
        num_rows=counts["rows"],
        missing=counts[f"missing {name}"] / counts["rows"] if counts["rows"] else 1.0,
        distinct=distinct,
        examples=tuple(str(value) for value in examples.to_list()),
        is_number=len(values) > 0 and len(number) >= 0.99 * len(values),
        is_fraction=bool((number != number.floor()).any()),
        is_time=looks_like_time(values),
        of_item=constant.get(("item_id", name)) if top < ONE_VALUE else None,
        of_user=constant.get(("user_id", name)) if top < ONE_VALUE else None,
    )


def _constant_shares(events: pl.LazyFrame, names: Sequence[str], num_rows: int) -> dict[tuple[str, str], float]:
    """(key, column) → ColumnFacts.of_item, of_user; for a large log, of some of the items and users."""
    shares: dict[tuple[str, str], float] = {}
    for key in ("item_id", "user_id") if names else ():
        same = [(pl.col(name).hash().min() == pl.col(name).hash().max()).alias(name) for name in names]
        some = events.filter(pl.col(key).hash() % (num_rows // SHARE_ROWS + 1) == 0)
        size = pl.col("lumrec.len")
        entities = some.group_by(key).agg(pl.len().alias("lumrec.len"), *same).filter(size > 1)
        row = entities.select((size.filter(pl.col(name)).sum() / size.sum()).alias(name) for name in names)
        found = row.collect(engine="streaming").row(0, named=True)
        # NaN where no entity has two events
        shares |= {(key, name): share for name, share in found.items() if share is not None and share == share}
    return shares


def whole_days(raw: RawLog) -> bool:
    """Whether no event has a time of day."""
    day_us = 86_400_000_000
    of_day = pl.col("time_us").drop_nulls() % day_us
    return not raw.events.select((of_day != 0).any()).collect(engine="streaming").item()
