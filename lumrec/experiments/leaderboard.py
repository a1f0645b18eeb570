"""The leaderboard of all runs in a folder, as runs/leaderboard.html and on the terminal.

    lumrec report runs

A table compares only runs that were tested on the same prepared data by the same protocol, the best first. Runs that
differ only in the seed, or in the fold of users that a LUM leaves out, form one row. Runs that are in no table are
listed with the reason.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumrec.experiments.read_runs import LeftOut, StoredRun, read_runs, short
from lumrec.experiments.report_table import METRICS, RANKER_NAMES
from lumrec.run import page
from lumrec.run.failures import command_parser, reported
from lumrec.run.printable import say, text_table

NAME = "leaderboard.html"
TITLES = {"rank": "Rankers", "pretrain": "LUMs: the next item among the whole catalogue", "retrieve": "Two towers"}
HAZARDS = {"cross_fit": "cross-fitted", "time_split": "split in time", "in_sample": "in-sample"}
# Settings that have a column of the table.
SHOWN = ("rank.model", "rank.knowledge", "retrieve.knowledge")
# Settings that determine how a run is tested; runs that differ in one of them are in different tables.
PROTOCOL = {"rank": (), "pretrain": ("pretrain.evaluate",), "retrieve": ("retrieve.positives", "retrieve.ks")}


@dataclass
class Row:
    """Runs that differ only in seed and fold."""

    runs: list[StoredRun]

    @property
    def name(self) -> str:
        model = short(self.runs[0].result.get("model", ""))
        names = {"pretrain": "LUM", "retrieve": "two towers"}
        return names.get(self.runs[0].stage) or RANKER_NAMES.get(model, model) or "?"

    @property
    def knowledge(self) -> str:
        result = self.runs[0].result
        kind, hazard = short(result.get("knowledge", "")), short(result.get("knowledge_hazard", ""))
        tables = "LUM's tables" if result.get("tables_from_lum") else ""
        if kind in ("none", ""):
            return tables or ("none" if kind else "")
        return ", ".join(filter(None, [kind, HAZARDS.get(hazard, hazard), tables]))

    @property
    def seeds(self) -> str:
        seeds = ", ".join(dict.fromkeys(run.seed for run in self.runs))
        folds = {run.fold for run in self.runs} - {""}
        return f"{seeds}; {len(folds)} of {next(iter(folds)).partition('/')[2]} folds" if folds else seeds

    @property
    def settings(self) -> dict[str, str]:
        """key → "key=value" of each setting of the stage that differs from its default."""
        changed = self.runs[0].changed
        return {key: short(f"{key}={value}") for key, value in changed.items() if key not in SHOWN}

    @property
    def made(self) -> str:
        """Day, duration and commit of the row's runs."""
        commit, wall_s = self.runs[0].commit, self.mean("wall_s")
        day = max(run.started[:10] for run in self.runs)
        dirty = " dirty" if commit.endswith("-dirty") else ""
        return f"{day}, {'' if wall_s is None else f'{wall_s:,.0f} s, '}commit {commit[:10]}{dirty}"

    @property
    def folders(self) -> list[str]:
        return [run.name for run in self.runs]

    def mean(self, metric: str) -> float | None:
        """Mean over the row's runs; None where one of them does not have the metric."""
        values = [run.number(metric) for run in self.runs]
        return None if None in values else statistics.fmean(value for value in values if value is not None)

    def cell(self, metric: str) -> str:
        """Such as 0.7988 ± 0.0004 [0.7950, 0.8021]; the interval is the mean of the seeds' intervals."""
        value, low, high = (self.mean(f"{metric}{end}") for end in ("", "_low", "_high"))
        if value is None:
            return "–"
        values = [run.number(metric) or 0.0 for run in self.runs]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        interval = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
        return f"{value:.4f}{spread}{interval}"


@dataclass
class Table:
    """Rows that can be compared: of one stage, on the same prepared data, tested by the same protocol."""

    stage: str
    data: str
    protocol: str
    metrics: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    @property
    def shared(self) -> list[str]:
        """The settings that all rows have in common; [] for a single row."""
        first, *others = (row.settings.values() for row in self.rows)
        return [text for text in first if others and all(text in other for other in others)]

    def own(self, row: Row) -> list[str]:
        """The settings of a row that not all rows have."""
        return [text for text in row.settings.values() if text not in self.shared]

    def sort(self) -> None:
        """Sorts the rows, best first."""
        metric = next(iter(self.metrics))
        self.rows.sort(key=lambda row: row.mean(metric) or 0.0, reverse=True)


def leaderboard(runs_dir: Path) -> Path:
    """Writes <runs_dir>/leaderboard.html, prints its tables, and returns its path.

    It reads only the config, versions, inputs and result of each run, follows no link and executes nothing. Raises
    MissingFileError where there is no such folder, UserError where it cannot be written.
    """
    runs, left_out = read_runs(runs_dir)
    tables, untested = make_tables(runs)
    left_out = sorted([*left_out, *untested])
    say(as_text_tables(tables, left_out))
    path = page.write_page(
        runs_dir / NAME,
        "leaderboard.html.j2",
        folder=runs_dir,
        sections=[
            (title, [table for table in tables if table.stage == stage])
            for stage, title in TITLES.items()
            if any(table.stage == stage for table in tables)
        ],
        left_out=left_out,
    )
    say(f"\nleaderboard {path}")
    return path


def make_tables(runs: Iterable[StoredRun]) -> tuple[list[Table], list[LeftOut]]:
    """The tables of rankers, LUMs and towers, the best row first; and the finished runs that fit into no table."""
    tables: dict[tuple[Any, ...], Table] = {}
    rows: dict[tuple[Any, ...], Row] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    left_out = []
    for run in sorted(runs, key=lambda run: (not re.search(r"-s\d+$", run.name), run.name)):  # a pipeline's seeds first
        metrics = _metrics(run)
        if not run.fingerprint or not metrics:
            why = "has no test metrics" if run.fingerprint else "does not name the data that it was trained on"
            left_out.append(LeftOut(run.name, why))
            continue
        test = tuple(run.number(name) for name in ("num_rows", "num_users"))
        folds = run.fold.partition("/")[2]
        settings = {key: value for key, value in run.changed.items() if key.startswith(PROTOCOL[run.stage])}
        at = (run.stage, run.fingerprint, run.split, test, folds, *settings.items(), *metrics)
        if at not in tables:
            tables[at] = Table(run.stage, run.data, _protocol(run, settings), metrics)
        same = (*at, *_identity(run))
        repeat = (*same, run.seed, run.fold)
        key = (*same, seen[repeat])  # a seed that was run twice starts another row
        seen[repeat] += 1
        if key not in rows:
            rows[key] = Row([])
            tables[at].rows.append(rows[key])
        rows[key].runs.append(run)
    for table in tables.values():
        table.sort()
    return sorted(tables.values(), key=lambda table: (list(TITLES).index(table.stage), table.data)), left_out


def _identity(run: StoredRun) -> tuple[Any, ...]:
    """What all runs of one row have in common, as a key."""
    model, knowledge = (str(run.result.get(name)) for name in ("model", "knowledge"))
    return model, knowledge, run.commit, *sorted(run.changed.items()), *sorted(run.inputs.items())


def _metrics(run: StoredRun) -> dict[str, str]:
    """Metric → heading, first the one to sort by: METRICS of rankers, NDCG@k and HR@k of LUMs and towers."""
    if run.stage == "rank":
        return {name: label for name, label in METRICS.items() if run.number("auc") is not None}
    names = [name for name in run.result if re.fullmatch(r"(hr|ndcg)@\d{1,6}", name) and run.number(name) is not None]
    return {name: name.upper() for name in sorted(names, key=lambda name: (not name.startswith("ndcg"), name))}


def _protocol(run: StoredRun, settings: dict[str, Any]) -> str:
    rows, users = run.number("num_rows"), run.number("num_users") or run.number("retrieval_users")
    said = [f"{run.split} split"]
    said += [f"{rows:,.0f} test rows"] if rows is not None else []
    said += [f"{users:,.0f} test users"] if users is not None and not run.fold else []
    said += [f"each LUM leaves out one of {run.fold.partition('/')[2]} folds of users"] if run.fold else []
    return "; ".join([*said, *(short(f"{key}={value}") for key, value in settings.items())])


def as_text_tables(tables: Sequence[Table], left_out: Sequence[LeftOut]) -> str:
    """The tables as text for the terminal."""
    lines = []
    for table in tables:
        lines += ["", f"{TITLES[table.stage]} on {table.data}", f"  {table.protocol}"]
        lines += [f"  all rows: {' '.join(table.shared)}"] if table.shared else []
        heads = ["", *(["knowledge"] if table.stage != "pretrain" else []), *table.metrics.values(), "seeds"]
        body = [
            [
                row.name,
                *([row.knowledge] if table.stage != "pretrain" else []),
                *(row.cell(metric) for metric in table.metrics),
                row.seeds,
            ]
            for row in table.rows
        ]
        for line, row in zip(text_table([heads, *body]), [None, *table.rows]):
            lines.append(f"  {line}")
            if row is not None:
                lines.append("    " + " ".join([f"{', '.join(row.folders)}:", row.made, *table.own(row)]))
    if left_out:
        lines += ["", "In no table:", *(f"  {name}: {why}" for name, why in left_out)]
    return "\n".join(lines[1:]) if lines else "no runs"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser("lumrec report", __doc__)
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="folder of the runs (default runs)")
    given = parser.parse_args(arguments)
    with reported():
        leaderboard(given.runs)


if __name__ == "__main__":
    main()
