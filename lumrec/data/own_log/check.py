"""What preparing a log would do, told without writing anything: `apps/prepare.py --check`.

    log       files, rows, which column is taken for what, and why
    columns   type, missing, distinct values, examples
    prepared  users, items, events, times, label, what would be quarantined      (by the intake of `prepare` itself)
    warnings  what most often goes wrong
    config    `data:` and `schema:` that can be saved and used as they are

What is only needed on the way (CSV as Parquet, sorted blocks) lies in a temporary folder (TMPDIR) and is removed.
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
from lumrec.data.convert import drawer, part_blocks
from lumrec.data.drawn_rows import draw_lines, draw_warnings
from lumrec.data.forms import check_forms
from lumrec.data.ingest import Intake, count_reasons, take_in
from lumrec.data.moments import seen_line, seen_warnings
from lumrec.data.numbers import number_facts, number_lines
from lumrec.data.open_log import read_source
from lumrec.data.own_log.column_facts import ColumnFacts, column_facts, whole_days
from lumrec.data.own_log.config import as_list
from lumrec.data.own_log.guess import Guess, guess_data
from lumrec.data.own_log.read import label_column, open_tables, raw_log
from lumrec.data.own_log.suggest import Suggestion, as_schema, as_yaml, sounds_known_after, suggest, training_yaml
from lumrec.data.prepare import read_to_its_end
from lumrec.data.schema import SchemaConfig, validate
from lumrec.data.sources.raw_log import RawLog
from lumrec.data.split_notes import candidate_kinds, count_parts, fitting_split, part_line, split_warnings
from lumrec.data.splits import SplitConfig, cut_times
from lumrec.run.errors import UserError
from lumrec.run.files import locked
from lumrec.run.printable import say

CUT = "# " + "-" * 30 + " {} " + "-" * 30
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
RARE, BUSY = 0.001, 0.05  # share of positive events, and of the events of one user, that deserve a word
MANY_VALUES = 1_000_000
SCRATCH = "lumrec-check-"
LOCKED_AFTER_S = 60  # a younger folder may belong to a check that has not locked it yet


@dataclass
class Report:
    """What is told about a log. lines: text for the terminal. warnings: what to look at. yaml: the suggested config."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    yaml: str = ""

    def section(self, title: str, lines: Sequence[str]) -> None:
        """Adds a part with a title; nothing where there are no lines."""
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
    """Prints the report on the log of `config` (under torchrun on rank 0 alone), and what was found before an error."""
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
    """An empty temporary folder, locked while in use; what killed checks of this user left beside it is removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):  # another check is quicker, or uses it
            facts = left.lstat()
            if facts.st_uid != os.geteuid() or time.time() - facts.st_mtime < LOCKED_AFTER_S:
                continue
            with locked(left, folder=True):
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder, locked(Path(folder), folder=True):
        yield Path(folder)


def check(common: Common, scratch: Path, report: Report) -> None:
    """Adds to `report` what there is to tell about the log that `config` names; temporary files go to `scratch`.

    data.log.events without another source than the default means data.source=log. What the config leaves open about
    such a log is guessed. Raises what reading and preparing the log raise.
    """
    data = common.data
    if as_list(data.log.events) and data.source == DataConfig().source:
        data = replace(data, source="log")
    common = replace(common, data=data)
    for name in ("source", "intake"):
        (scratch / name).mkdir()
    with read_to_its_end(data):
        if data.source == "log":
            _check_log(common, report, scratch)
            return
        raw, schema = read_source(data, common.schema, seed=common.seed, scratch=scratch / "source")
        report.section("log", [raw.note])
        report.section("columns", _column_lines(column_facts(raw)))
        found = _check_intake(raw, schema, data, report, scratch / "intake")
        _check_split(report, raw, data, found, choose=False)
        report.yaml = as_yaml(data, schema, {}, {})


def _check_log(common: Common, report: Report, scratch: Path) -> None:
    tables = open_tables(common.data.log, scratch / "source")
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
    is_plain = not data.label.values and data.label.at_least is None  # the column says no more than the label does
    facts = column_facts(raw)
    after = sorted({c.name for c in facts if sounds_known_after(c)} - {label, "label"})
    report.section("taken for", [*_guess_lines(guesses), raw.note.partition("; ")[2]])
    report.section("columns (as features find them)", _column_lines(facts))
    known = _known_after(data, after, tables.events.schema.names())
    data = replace(data, log=replace(data.log, known_after=known))
    raw = replace(raw, known_after=tuple(sorted({*raw.known_after, *known})))
    log = data.log
    keys = [log.user, log.item, log.timestamp, log.item_in_items, log.user_in_users, log.title, "label", data.request]
    only_days = raw.has_clock and whole_days(raw)
    suggestions = suggest(
        facts,
        keys=[*keys, *([label] if is_plain else [])],
        label=label,
        known_after=raw.known_after,
        made_of_time=[] if not raw.has_clock else ["weekday"] if only_days else ["hour", "weekday"],
        with_files=[role for role, frame in (("item", raw.items), ("user", raw.users)) if frame is not None],
    )
    own = bool(common.schema.features)
    schema = validate(common.schema if own else as_schema(suggestions))
    _warn_of_columns(report, facts, after, only_days, common.data)
    found = _check_intake(raw, schema, data, report, scratch / "intake")
    try:
        _check_values(report, raw, schema, found)
    except UserError as error:
        if own:
            raise
        report.warnings.append(f"prepare would refuse the suggested config: {error}")
    data = replace(data, split=_check_split(report, raw, data, found, choose=common.data.split == SplitConfig()))
    notes, left_out = _notes(suggestions) if not own else ({}, {})
    shown = common.schema if own else as_schema(suggestions)
    report.yaml = as_yaml(data, shown, notes, left_out)
    if not own:
        report.yaml += training_yaml(len(found.items), found.num_events)


def _known_after(data: DataConfig, suspected: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The config's, and those whose names sound so; `data.log` wants the names in the files."""
    in_files = [name if name in columns else name.removesuffix("_raw") for name in suspected]
    return list(dict.fromkeys([*as_list(data.log.known_after), *in_files]))


def _notes(suggestions: Sequence[Suggestion]) -> tuple[dict[str, str], dict[str, str]]:
    notes = {s.name: s.why for s in suggestions if s.feature is not None}
    return notes, {s.column: s.why for s in suggestions if s.feature is None}


def _check_values(report: Report, raw: RawLog, schema: SchemaConfig, intake: Intake) -> None:
    """Tells what dense features hold. Raises UserError as `number_facts` and `check_forms` do."""
    catalogues = {"item": intake.items, "user": intake.users}
    facts = {name: vars(one) for name, one in number_facts(schema, intake.blocks, catalogues).items()}
    report.section("dense features", number_lines(facts))
    if raw.exact is not None:
        check_forms(schema, intake.blocks, catalogues, {}, raw.exact)


def _check_split(report: Report, raw: RawLog, data: DataConfig, intake: Intake, *, choose: bool) -> SplitConfig:
    """Tells how large the parts would be and warns of small ones; the config's split, or (`choose`) one that fits."""
    split, absolute = data.split, raw.absolute_time
    kinds = candidate_kinds(all_positive=data.log.all_positive, absolute_time=absolute) if choose else [split.kind]
    splits = {kind: split if kind == split.kind else SplitConfig(kind) for kind in kinds}
    ids = intake.users["user_id"].cast(pl.String)
    counts = {kind: count_parts(one, intake.blocks, ids, absolute_time=absolute) for kind, one in splits.items()}
    best = fitting_split(counts) if choose else split.kind
    width = max(map(len, kinds))
    report.section(
        "data.split.kind",
        [f"{kind:{width}}  {part_line(counts[kind])}{'  ← suggested' * (choose and kind == best)}" for kind in kinds],
    )
    report.warnings += split_warnings(splits[best], counts[best], absolute_time=absolute)
    if data.negatives is not None:
        cuts = cut_times(splits[best], intake.blocks, absolute_time=absolute)
        drawn = drawer(data.negatives, intake, part_blocks(intake, splits[best], cuts)["item"], raw)
        for path in intake.blocks:
            drawn.add(pl.read_parquet(path))
        report.section("data.negatives", [f"{drawn.num_rows:,} rows", *draw_lines(drawn.facts())])
        report.warnings += draw_warnings(data.negatives, drawn.facts())
    return splits[best]


def _check_intake(raw: RawLog, schema: SchemaConfig, data: DataConfig, report: Report, scratch: Path) -> Intake:
    """Does what `prepare` does up to the sorted events, and tells what comes out."""
    intake = take_in(
        raw,
        schema,
        max_list_length=data.max_list_length,
        drop_duplicates=data.duplicates == "drop",
        scratch=scratch,
    )
    events = pl.scan_parquet(intake.blocks)
    totals = events.select(
        positive=pl.col("label").mean(), first=pl.col("timestamp").min(), last=pl.col("timestamp").max(),
        future=(pl.col("timestamp") > int(time.time())).sum(), items=pl.col("item").n_unique(),
    ).collect(engine="streaming")  # fmt: skip
    users = events.group_by("user").len().collect(engine="streaming")
    found = totals.row(0, named=True)
    report.section(
        "prepared, that would be",
        [
            f"{intake.num_events:,} of {intake.num_read:,} events of {len(users):,} users on {found['items']:,} items",
            *([_time_line(found["first"], found["last"], raw)] if raw.has_clock else []),
            "per user  "
            + ", ".join(f"{_quantile(q)} {int(users['len'].quantile(q) or 0):,}" for q in QUANTILES)
            + " events",
            f"label     {found['positive']:.2%} positive",
            seen_line(intake.num_with_earlier / intake.num_events, has_clock=raw.has_clock),
        ],
    )
    if raw.request:
        report.lines.insert(-1, f"  {intake.num_by_themselves:,} events have no request: each was shown by itself")
    report.warnings += seen_warnings(intake.num_without_history / intake.num_events)
    left_out = count_reasons(intake.quarantine)
    report.section(
        "quarantined, with the reason", [f"{count:,} {reason}" for reason, count in left_out.items()] or ["none"]
    )
    _warn_of_events(report, raw, data, intake, left_out, found, users["len"])
    return intake


def _warn_of_events(
    report: Report,
    raw: RawLog,
    data: DataConfig,
    intake: Intake,
    left_out: dict[str, int],
    found: dict[str, Any],
    per_user: pl.Series,
) -> None:
    warn, positive = report.warnings.append, found["positive"]
    singles, busiest = int((per_user < 2).sum()), int(per_user.sort(descending=True)[0])
    lost = intake.num_read - intake.num_events
    if lost > 0.01 * intake.num_read:
        most = max((r for r in left_out if r.startswith("events: ")), key=left_out.__getitem__)
        warn(f"{lost / intake.num_read:.1%} of the events would be quarantined, most: {most.removeprefix('events: ')}")
    if positive in (0.0, 1.0):
        warn(
            f"every event is {'positive' if positive else 'negative'}: rankers have nothing to tell apart, and AUC is "
            "undefined; a LUM can be trained (data.split.kind=leave_one_out tests what it retrieves)"
            + ("" if data.source != "log" else ". Is data.label right?")
        )
    elif not RARE < positive < 1 - RARE:
        warn(f"{positive:.3%} of the events are positive; is data.label right? Few of one class make figures uncertain")
    if singles > 0.5 * len(per_user):
        warn(
            f"{singles / len(per_user):.0%} of the users have fewer than 2 events: there is no history to learn from. "
            f"Is {data.log.user if data.source == 'log' else 'user_id'!r} the user, or a session?"
        )
    if busiest > BUSY * intake.num_events and len(per_user) > 100:
        warn(
            f"one user has {busiest:,} events, {busiest / intake.num_events:.0%} of all: a robot, or an id for nobody?"
        )
    if found["future"]:
        warn(f"{found['future']:,} events lie in the future; is data.log.time_unit right?")
    if intake.num_events < 1000:
        warn(f"{intake.num_events:,} events are too few to learn from; fine for trying the commands")


def _warn_of_columns(
    report: Report, facts: Sequence[ColumnFacts], after: Sequence[str], only_days: bool, data: DataConfig
) -> None:
    given = as_list(data.log.known_after)
    new = [name for name in after if name not in given and name.removesuffix("_raw") not in given]
    if new:
        report.warnings.append(
            f"sounds like what is known only after the item was shown: {', '.join(new)}. The suggested config has it "
            "in known_after, so that no model reads it for the item in question; remove there what is known before"
        )
    if only_days:
        report.warnings.append(
            "all times are dates without a time of day: rankers see the events of earlier days alone, as the order "
            "within one is not known, and hour says nothing"
        )
    for column in facts:
        if column.distinct > MANY_VALUES and not column.is_number:
            report.warnings.append(
                f"column {column.name!r} has about {column.distinct:,} values: a table with as many rows; "
                "data.min_count leaves out those that are rare"
            )


def _guess_lines(guesses: Sequence[Guess]) -> list[str]:
    width = max(len(guess.what) for guess in guesses)
    return [f"{guess.what.ljust(width)}  {guess.value}  ({guess.why})" for guess in guesses]


def _column_lines(facts: Sequence[ColumnFacts]) -> list[str]:
    if not facts:
        return []
    rows = [("table", "column", "type", "missing", "distinct", "such as")]
    rows += [
        (
            c.table,
            c.name,
            _type(c),
            f"{c.missing:.1%}",
            f"{'~' if c.distinct > 100 else ''}{c.distinct:,}",
            _examples(c),
        )
        for c in facts
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(5)]
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
    relative = "" if raw.absolute_time else " (counted from each user's first event)"
    return f"times     {_day(first, raw)} … {_day(last, raw)}{relative}"


def _quantile(q: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(q, f"{100 * q:g} %")


def _day(seconds: int | None, raw: RawLog) -> str:
    if not raw.absolute_time:
        return f"{(seconds or 0) / 86_400:,.1f} days"
    return datetime.fromtimestamp(seconds or 0, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
