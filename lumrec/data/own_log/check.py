"""What preparing a log would do, without writing anything: `apps/prepare.py --check`.

    log       files, rows, which column is taken for what, and why
    columns   type, missing, distinct values, examples
    prepared  users, items, events, times, label, what would be quarantined      (by the code that `prepare` runs)
    warnings  what most often goes wrong
    config    `data:` and `schema:`, ready to be saved and used

Temporary files (CSV as Parquet, sorted blocks) are in a temporary folder (TMPDIR), which is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import polars as pl

from lumrec.data.common import Common
from lumrec.data.config import DataConfig
from lumrec.data.convert import drawer, split_blocks
from lumrec.data.drawn_rows import NegativeRowsConfig, check_features_of_the_moment, draw_lines, draw_warnings
from lumrec.data.forms import check_forms
from lumrec.data.ingest import Ingested, count_reasons, ingest
from lumrec.data.moments import seen_line, seen_warnings
from lumrec.data.numbers import number_facts, number_lines
from lumrec.data.open_log import read_source
from lumrec.data.own_log.column_facts import SAMPLE_ROWS, ColumnFacts, column_facts, whole_days
from lumrec.data.own_log.config import as_list
from lumrec.data.own_log.guess import guess_data
from lumrec.data.own_log.read import check_columns, find_tables, label_column, open_tables, raw_log
from lumrec.data.own_log.suggest import as_schema, as_yaml, sounds_known_after, suggest, tells_label, training_yaml
from lumrec.data.prepare import read_to_its_end
from lumrec.data.schema import SchemaConfig, validate
from lumrec.data.sources.raw_log import RawLog
from lumrec.data.split_notes import candidate_kinds, count_splits, fitting_split, split_line, split_warnings
from lumrec.data.splits import SplitConfig, cut_times
from lumrec.run.errors import UserError
from lumrec.run.files import locked
from lumrec.run.printable import say

CUT = "# " + "-" * 30 + " {} " + "-" * 30
QUANTILES = {
    "least": 0.0,
    "10 %": 0.1,
    "25 %": 0.25,
    "median": 0.5,
    "75 %": 0.75,
    "90 %": 0.9,
    "99 %": 0.99,
    "most": 1.0,
}
RARE, BUSY = 0.001, 0.05  # share of positive events, and of the events of one user, beyond which there is a warning
MANY_VALUES = 1_000_000
SCRATCH = "lumrec-check-"
LOCKED_AFTER_S = 60  # a younger folder may belong to a check that has not locked it yet


@dataclass
class Report:
    """The report on a log. lines: text for the terminal. warnings: what to look at. yaml: the suggested config."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    yaml: str = ""

    def section(self, title: str, lines: Sequence[str]) -> None:
        """Adds a section with a title, unless it has no lines."""
        if lines:
            self.lines += [title, *(f"  {line}" for line in lines), ""]

    def __str__(self) -> str:
        text = [*self.lines]
        if self.warnings:
            text += ["warnings", *(f"  ! {line}" for line in self.warnings), ""]
        if self.yaml:
            text += ["a config to begin with:", CUT.format("save from here as my-log.yaml"), self.yaml.rstrip()]
            text += [CUT.format("to here")]
        return "\n".join(text)


def run(common: Common) -> dict[str, Any]:
    """Prints the report on the log of the config, also before an error; under torchrun only on rank 0."""
    if int(os.environ.get("RANK", "0")) > 0:
        return {}
    report = Report()
    with _scratch() as scratch:
        try:
            check(common, scratch, report)
        finally:
            say(report)
    return {}


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A locked, empty temporary folder; removes those that killed checks of this user left behind."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):  # another check uses it, or has just removed it
            facts = left.lstat()
            if facts.st_uid != os.geteuid() or time.time() - facts.st_mtime < LOCKED_AFTER_S:
                continue
            with locked(left, folder=True):
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder, locked(Path(folder), folder=True):
        yield Path(folder)


def check(common: Common, scratch: Path, report: Report) -> None:
    """Fills `report` for the log that the config names; temporary files go to `scratch`.

    data.log.events with the default source means data.source=log. What the config leaves open about such a log is
    guessed. Raises what reading and preparing the log raise.
    """
    data = common.data
    if as_list(data.log.events) and data.source == DataConfig().source:
        data = replace(data, source="log")
    common = replace(common, data=data)
    for name in ("source", "ingest"):
        (scratch / name).mkdir()
    with read_to_its_end(data):
        if data.source == "log":
            _check_log(common, report, scratch)
            return
        raw, schema = read_source(data, common.schema, seed=common.seed, scratch=scratch / "source")
        report.section("log", [raw.note])
        report.section("columns", _column_lines(column_facts(raw)))
        found = _check_ingest(raw, schema, data, report, scratch / "ingest")
        _check_split(report, raw, data, found, choose=False)
        _check_negatives(report, raw, data, schema, found)
        report.yaml = as_yaml(data, schema, {}, {})


def _check_log(common: Common, report: Report, scratch: Path) -> None:
    """`check` for your own log."""
    columns = find_tables(common.data.log)
    check_columns(common.data, columns, guessing=True)
    tables = open_tables(columns, common.data.log, scratch / "source")
    report.section("files", [str(table) for table in tables])
    for table in tables:
        report.warnings += [
            f"{table.name}: column {name!r} is missing in some files ({file}, …), and empty there"
            for name, file in table.lacking.items()
        ]
    try:
        data, guesses = guess_data(common.data, tables)
    except UserError:
        for table in tables:
            types = ", ".join(f"{name} {'' if table.is_text else kind}".strip() for name, kind in table.schema.items())
            report.section(f"columns of the {table.name}", [types])
        raise
    label = label_column(data, tables.events)
    raw = raw_log(data, tables)
    facts = column_facts(raw)
    after = sorted({c.name for c in facts if sounds_known_after(c) or tells_label(c)} - {label, "label"})
    width = max(len(guess.what) for guess in guesses)
    lines = [f"{guess.what.ljust(width)}  {guess.value}  ({guess.why})" for guess in guesses]
    report.section("taken for", [*lines, raw.note.partition("; ")[2]])
    report.section("columns (as features find them)", _column_lines(facts))
    only_days = raw.has_clock and whole_days(raw)
    report.warnings += _column_warnings(facts, after, only_days, as_list(data.log.known_after))
    # data.log wants the names in the files
    in_files = [name if name in tables.events.schema else name.removesuffix("_raw") for name in after]
    known = list(dict.fromkeys([*as_list(data.log.known_after), *in_files]))
    data = replace(data, log=replace(data.log, known_after=known))
    raw = replace(raw, known_after=tuple(sorted({*raw.known_after, *known})))

    log, is_plain = data.log, not data.label.values and data.label.at_least is None
    keys = [log.user, log.item, log.timestamp, log.item_in_items, log.user_in_users, log.title, "label", data.request]
    suggestions = suggest(
        facts,
        keys=[*keys, *([label] if is_plain else [])],  # a plain label column holds only what the label is
        label=label,
        known_after=raw.known_after,
        made_of_time=[] if not raw.has_clock else ["weekday"] if only_days else ["hour", "weekday"],
        with_files=[role for role, frame in (("item", raw.items), ("user", raw.users)) if frame is not None],
    )
    own = bool(common.schema.features)
    shown = common.schema if own else as_schema(suggestions)
    schema = validate(shown)
    draws = log.all_positive and data.negatives is None and not own  # suggested, as rankers need negative rows
    data = replace(data, negatives=NegativeRowsConfig()) if draws else data
    found = _check_ingest(raw, schema, data, report, scratch / "ingest")
    try:
        _check_values(report, raw, schema, found)
    except UserError as error:
        if own:
            raise
        report.warnings.append(f"prepare would refuse the suggested config: {error}")
    data = replace(data, split=_check_split(report, raw, data, found, choose=common.data.split == SplitConfig()))
    try:
        _check_negatives(report, raw, data, schema, found)
    except UserError as error:
        if not draws:
            raise
        data, draws = replace(data, negatives=None), False
        report.warnings.append(
            f"every event is positive, and negative rows for rankers (data.negatives) cannot be drawn: {error}"
        )
    if draws:
        report.warnings.append(
            "every event is positive, so the suggested config has data.negatives: rows with label 0 are drawn beside "
            "the events, for rankers only. Where a column of the log says what is positive, set data.label instead"
        )
    if own:
        report.yaml = as_yaml(data, shown, {}, {})
        return
    notes = {s.name: s.why for s in suggestions if s.feature is not None}
    left_out = {s.column: s.why for s in suggestions if s.feature is None}
    report.yaml = as_yaml(data, shown, notes, left_out) + training_yaml(
        len(found.items), found.num_events, absolute_time=raw.absolute_time
    )


def _check_values(report: Report, raw: RawLog, schema: SchemaConfig, found: Ingested) -> None:
    """Reports what dense features hold. Raises UserError as `number_facts` and `check_forms` do."""
    catalogues = {"item": found.items, "user": found.users}
    facts = {name: vars(one) for name, one in number_facts(schema, found.blocks, catalogues).items()}
    report.section("dense features", number_lines(facts))
    if raw.exact is not None:
        check_forms(schema, found.blocks, catalogues, {}, raw.exact)


def _check_split(report: Report, raw: RawLog, data: DataConfig, found: Ingested, *, choose: bool) -> SplitConfig:
    """Reports the sizes of the splits and warns of small ones; the config's split, or (`choose`) one that fits."""
    split, absolute = data.split, raw.absolute_time
    kinds = candidate_kinds(all_positive=data.log.all_positive, absolute_time=absolute) if choose else [split.kind]
    splits = {kind: split if kind == split.kind else SplitConfig(kind) for kind in kinds}
    ids = found.users["user_id"].cast(pl.String)
    counts = {kind: count_splits(one, found.blocks, ids, absolute_time=absolute) for kind, one in splits.items()}
    best = fitting_split(counts) if choose else split.kind
    width = max(map(len, kinds))
    report.section(
        "data.split.kind",
        [f"{kind:{width}}  {split_line(counts[kind])}{'  ← suggested' * (choose and kind == best)}" for kind in kinds],
    )
    report.warnings += split_warnings(splits[best], counts[best], absolute_time=absolute)
    return splits[best]


def _check_negatives(report: Report, raw: RawLog, data: DataConfig, schema: SchemaConfig, found: Ingested) -> None:
    """Draws the rows of `data.negatives`, where that is given, and reports how well they can be recognised.

    Raises UserError as prepare does.
    """
    if data.negatives is None:
        return
    check_features_of_the_moment(schema, found.blocks)
    cuts = cut_times(data.split, found.blocks, absolute_time=raw.absolute_time)
    drawn = drawer(data.negatives, found, split_blocks(found, data.split, cuts)["item"], raw)
    for path in found.blocks:
        drawn.add(pl.read_parquet(path))
    report.section("data.negatives", [f"{drawn.num_rows:,} rows", *draw_lines(drawn.facts())])
    report.warnings += draw_warnings(data.negatives, drawn.facts())


def _check_ingest(raw: RawLog, schema: SchemaConfig, data: DataConfig, report: Report, scratch: Path) -> Ingested:
    """Does what `prepare` does up to the sorted events, and reports the result."""
    drop = data.duplicates == "drop"
    found = ingest(raw, schema, max_list_length=data.max_list_length, drop_duplicates=drop, scratch=scratch)
    events = pl.scan_parquet(found.blocks)
    totals = events.select(
        positive=pl.col("label").mean(), first=pl.col("timestamp").min(), last=pl.col("timestamp").max(),
        future=(pl.col("timestamp") > int(time.time())).sum(), items=pl.col("item").n_unique(),
    ).collect(engine="streaming").row(0, named=True)  # fmt: skip
    per_user = events.group_by("user").len().collect(engine="streaming")["len"]
    spread = ", ".join(f"{name} {int(per_user.quantile(q) or 0):,}" for name, q in QUANTILES.items())
    lines = [
        f"{found.num_events:,} of {found.num_read:,} events of {len(per_user):,} users on {totals['items']:,} items",
        *([_time_line(totals["first"], totals["last"], raw)] if raw.has_clock else []),
        f"per user  {spread} events",
        f"label     {totals['positive']:.2%} positive",
        seen_line(found.num_with_earlier / found.num_events, has_clock=raw.has_clock),
    ]
    if raw.request:
        lines.append(f"{found.num_by_themselves:,} events have no request: each was shown by itself")
    report.section("prepared, that would be", lines)
    report.warnings += seen_warnings(found.num_without_history / found.num_events)
    left_out = count_reasons(found.quarantine)
    report.section(
        "quarantined, with the reason", [f"{count:,} {reason}" for reason, count in left_out.items()] or ["none"]
    )
    report.warnings += _event_warnings(data, found, left_out, totals, per_user)
    return found


def _event_warnings(
    data: DataConfig, found: Ingested, left_out: dict[str, int], totals: dict[str, Any], per_user: pl.Series
) -> list[str]:
    warnings, positive = [], totals["positive"]
    singles, busiest = int((per_user < 2).sum()), int(per_user.sort(descending=True)[0])
    lost = 1 - found.num_events / found.num_read
    if lost > 0.01:
        most = max((r for r in left_out if r.startswith("events: ")), key=left_out.__getitem__)
        warnings.append(f"{lost:.1%} of the events would be quarantined, most: {most.removeprefix('events: ')}")
    if positive in (0.0, 1.0) and data.negatives is None:
        warnings.append(
            f"every event is {'positive' if positive else 'negative'}: rankers have nothing to tell apart, and AUC is "
            "undefined; a LUM can be trained (data.split.kind=leave_one_out tests what it retrieves)"
            + ("" if data.source != "log" else ". Is data.label right?")
        )
    elif not RARE < positive < 1 - RARE and data.negatives is None:
        warnings.append(
            f"{positive:.3%} of the events are positive; is data.label right? Few of one class make figures uncertain"
        )
    if singles > 0.5 * len(per_user):
        user = data.log.user if data.source == "log" else "user_id"
        warnings.append(
            f"{singles / len(per_user):.0%} of the users have fewer than 2 events: there is no history to learn from. "
            f"Is {user!r} the user, or a session?"
        )
    if busiest > BUSY * found.num_events and len(per_user) > 100:
        share = f"{busiest / found.num_events:.0%}"
        warnings.append(f"one user has {busiest:,} events, {share} of all: a robot, or an id that means nobody?")
    if totals["future"]:
        warnings.append(f"{totals['future']:,} events lie in the future; is data.log.time_unit right?")
    if found.num_events < 1000:
        warnings.append(f"{found.num_events:,} events are too few to learn from; fine for trying the commands")
    return warnings


def _column_warnings(
    facts: Sequence[ColumnFacts], after: Sequence[str], only_days: bool, given: Sequence[str]
) -> list[str]:
    """given: data.log.known_after. after: columns whose names sound like it."""
    warnings = []
    aucs = {column.name: column.auc for column in facts if tells_label(column)}
    if new := [name for name in after if name not in given and name.removesuffix("_raw") not in given]:
        shown = ", ".join(f"{name} (AUC {aucs[name]:.2f} by itself)" if name in aucs else name for name in new)
        warnings.append(
            f"by name or values, probably known only after the item was shown: {shown}. The suggested config names "
            "this in known_after, so that no model reads it for the item in question; remove what is known before"
        )
    if only_days:
        warnings.append(
            "all times are dates without a time of day: rankers see only the events of earlier days, as the order "
            "within a day is not known, and hour means nothing"
        )
    return warnings + [
        f"column {column.name!r} has about {column.distinct:,} values: a table with as many rows; "
        "data.min_count leaves out those that are rare"
        for column in facts
        if column.distinct > MANY_VALUES and not column.is_number
    ]


def _column_lines(facts: Sequence[ColumnFacts]) -> list[str]:
    if not facts:
        return []
    rows = [("table", "column", "type", "missing", "distinct", "such as")]
    for c in facts:
        distinct = f"{'~' if c.num_rows > SAMPLE_ROWS else ''}{c.distinct:,}"
        rows.append((c.table, c.name, _type(c), f"{c.missing:.1%}", distinct, _examples(c)))
    widths = [max(map(len, column)) for column in zip(*rows)][:5]
    return ["  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[5]]).rstrip() for row in rows]


def _type(column: ColumnFacts) -> str:
    if column.is_list:
        return "list"
    if column.kind.is_numeric() or (column.kind == pl.String and column.is_number):
        return "number" if column.kind.is_float() or column.is_fraction else "whole number"
    return "text" if column.kind == pl.String else str(column.kind)


def _examples(column: ColumnFacts) -> str:
    texts = [text if len(text) <= 24 else f"{text[:23]}…" for text in column.examples]
    return " | ".join(" ".join(text.split()) for text in texts)


def _time_line(first: int, last: int, raw: RawLog) -> str:
    if not raw.absolute_time:
        return (
            f"times     {first / 86_400:,.1f} days … {last / 86_400:,.1f} days (counted from each user's first event)"
        )
    days = [datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC") for seconds in (first, last)]
    return f"times     {' … '.join(days)}"
