"""Writes docs/results/**/*.md and .svg from the .json beside them, by the code that makes the tables.

    python docs/hooks/results_pages.py

A page says where its figures were measured before 2026-11-29, when a row still saw events of its own second. Rows that
were made from uncommitted code are no results: they come last, under a heading that says so, and no average has them.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumrec.experiments import paper_tables
from lumrec.experiments.paper_tables import Case
from lumrec.experiments.report_gains import NO_SCORES
from lumrec.experiments.report_plots import result_plot
from lumrec.experiments.report_table import METRICS, RANKER_NAMES

RESULTS = Path(__file__).resolve().parents[1] / "results"
NEW_RULE = "strictly earlier moments"  # in the protocol of every table since 2026-11-29
OLD = """\
> **Measured before 2026-11-29, by the old rule of the same moment**: a row also saw the events of its own second that
> came before it in the file. What this changes: [old rule and new]({up}lab-log/ranking.md#old-rule-and-new).
"""
NO_INTERVALS = "These runs kept no scores of single rows, so the gains have no interval over users.\n\n"
WHICH = {"fresh-users": "on users not used for tuning", "warm-up": "warm-up rows"}
LAB_NOTE = """
## Lab note, not a result

One of the runs behind these rows was started from uncommitted code (`-dirty` below), so no commit gives them again.

"""
INDEX = """# Results

Each page is generated from the figures beside it (docs/results/*.json) and names the protocol, the command and the
commit. ± is one standard deviation over the seeds. A page says where its figures were measured before 2026-11-29.

| page | figures | protocol |
|---|---|---|
"""


def pages() -> Iterator[tuple[Path, str, str]]:
    """(path of the .json, Markdown, title) of each result."""
    for path in sorted(RESULTS.rglob("*.json")):
        text = page(path, read(path))
        yield path, text, text.partition("\n")[0].removeprefix("# ")


def read(path: Path) -> dict[str, Any]:
    """A result; where it has one command for all rows, as older ones do, each model has it."""
    result = json.loads(path.read_text(encoding="utf-8"))
    for name in ("command", "commit"):
        if name in result:
            result |= {f"{model}/{name}": result[name] for model in ("dlrm", "lum")}
    return result


def page(path: Path, result: dict[str, Any]) -> str:
    """The page of one result, in Markdown."""
    cases, metrics, table = _cases(result)
    clean = [case for case in cases if not _is_dirty(result, case)]
    dirty = [case for case in cases if _is_dirty(result, case)]
    shown = {key: value for key, value in result.items() if not (dirty and key.startswith("average/"))}
    head, blank, rest = paper_tables.markdown(table, clean, shown, path.stem, metrics).partition("\n\n")
    head += "".join(f", {which}" for part, which in WHICH.items() if part in str(path.relative_to(RESULTS)))
    up = "../" * len(path.relative_to(RESULTS).parts)
    note = "" if NEW_RULE in result["protocol"] else OLD.format(up=up) + "\n"
    if dirty:
        only = {key: value for key, value in shown.items() if not key.startswith("online/")}
        table_of_dirty = paper_tables.markdown(table, dirty, only, path.stem, metrics).split("\n\n", 2)[2]
        rest += LAB_NOTE + table_of_dirty.partition("\n![]")[0]
    if NO_SCORES in rest:
        rest = NO_INTERVALS + rest.replace(f"–, {NO_SCORES}", "").replace(f", {NO_SCORES}", "")
    return head + blank + note + "\n".join(map(_wrapped, rest.splitlines())) + "\n"


def _wrapped(line: str) -> str:
    """A line of prose in lines of at most 120 characters; tables and commands as they are."""
    return line if line.startswith(("|", "    ", "!")) else "\n".join(textwrap.wrap(line, 120, break_on_hyphens=False))


def plot(result: dict[str, Any]) -> str:
    """The plot of one result, without the rows that are no results."""
    cases, metrics, _ = _cases(result)
    clean = [case for case in cases if not _is_dirty(result, case)]
    return result_plot([(case.label, case.key) for case in clean], result, *next(iter(metrics.items())))


def titles() -> dict[str, str]:
    """Path of each page under results/ → its title."""
    return {str(path.relative_to(RESULTS).with_suffix(".md")): title for path, _, title in pages()}


def index() -> str:
    """The overview of all results, in Markdown."""
    lines = []
    for path, _, title in pages():
        result = read(path)
        rule = "new rule" if NEW_RULE in result["protocol"] else "old rule"
        link = path.relative_to(RESULTS).with_suffix(".md")
        lines.append(f"| [{title}]({link}) | {rule} | {result['protocol'].partition(',')[0]} |")
    return INDEX + "\n".join(lines) + "\n"


def _cases(result: dict[str, Any]) -> tuple[list[Case], dict[str, str], str]:
    """The rows of a result, its metrics, and its table, from the command that made it."""
    words = shlex.split(next(value for key, value in result.items() if key.endswith("/command")))
    given = dict(zip(words, words[1:]))
    table, dataset, rows = given["--table"], given["--dataset"], given.get("--rows", "")
    ranked = [model for model in paper_tables.models_of(result) if model in RANKER_NAMES]
    chosen = [f"pipeline.rankers={json.dumps(ranked)}"] if ranked else []
    config = paper_tables.table_config(table, dataset, rows, chosen)
    cases = paper_tables.choose(table, dataset, rows, config)
    return cases, paper_tables.RETRIEVED if table == "retrieval" else METRICS, table


def _is_dirty(result: dict[str, Any], case: Case) -> bool:
    return "-dirty" in result[f"{case.model}/commit"]


if __name__ == "__main__":
    for json_path, markdown, _ in pages():
        json_path.with_suffix(".md").write_text(markdown, encoding="utf-8")
        found = read(json_path)
        if any("-dirty" in str(value) for value in found.values()):
            json_path.with_suffix(".svg").write_text(plot(found), encoding="utf-8")
