"""Plots as SVG text, drawn from metrics.jsonl and from the rows of the comparison."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from lumrec.experiments.report_table import LABELS, METRICS, RANKER_NAMES, Row
from lumrec.run.errors import UserError
from lumrec.run.printable import printable

# Okabe and Ito's colours, which hold for colour-blind readers too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
KNOWLEDGE_COLOURS = {
    "none": "#7f7f7f",
    "tables": "#e69f00",
    "direct": "#0072b2",
    "matching": "#009e73",
    "both": "#d55e00",
}
DASHES = ("-", "--", ":", "-.")  # a ranker each
STYLE = {"fontsize": 9}


class Series(NamedTuple):
    """One line of a plot."""

    label: str
    steps: list[float]
    values: list[float]


def read_series(path: Path, metric: str, label: str) -> Series:
    """The metric over the steps of a run's metrics.jsonl; lines without it, or where it is null, are left out."""
    steps, values = [], []
    if path.exists():
        for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            try:
                line = dict(json.loads(text))
                step = float(line["step"])
            except (ValueError, TypeError, KeyError, RecursionError):
                raise UserError(
                    f"{path} is damaged: line {number} is {text[:60]!r}, expected JSON with a step; make the run again "
                    "with overwrite=true, or remove the line"
                ) from None
            if isinstance(line.get(metric), (int, float)):
                steps.append(step)
                values.append(line[metric])
    return Series(label, steps, values)


def curves(panels: Mapping[str, Sequence[Series]]) -> str:
    """Panels side by side, title → lines over steps, with one legend below; few points are marked. An SVG element.

    Lines named <ranker>-<knowledge> have the knowledge's colour and the ranker's dashes.
    """
    figure = Figure(figsize=(5.0 * len(panels), 3.4), layout="constrained")
    handles: dict[str, Artist] = {}
    for place, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), place + 1)
        families = list(dict.fromkeys(line.label.rpartition("-")[0] for line in lines))
        for number, line in enumerate(lines):
            family, _, kind = line.label.rpartition("-")
            is_ranker = kind in KNOWLEDGE_COLOURS
            (handles[line.label],) = axes.plot(
                line.steps,
                line.values,
                color=KNOWLEDGE_COLOURS[kind] if is_ranker else COLOURS[number % len(COLOURS)],
                linestyle=DASHES[families.index(family) % len(DASHES)] if is_ranker else "-",
                marker="o" if len(line.steps) <= 30 else None,
                markersize=3,
                linewidth=1.4,
            )
        axes.set_xlabel("step", **STYLE)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _plain(axes, title)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False, handlelength=3
    )
    return _svg(figure)


def comparison_plot(rows: Sequence[Row]) -> str:
    """The comparison as dots, one panel a metric, one line a row, with ± one standard deviation. An SVG element."""
    figure = Figure(figsize=(11.0, 0.9 + 0.34 * len(rows)), layout="constrained")
    names = [f"{RANKER_NAMES.get(row.ranker, row.ranker)} {LABELS[row.knowledge]}" for row in rows]
    places = list(range(len(rows)))[::-1]
    first: Axes | None = None
    for number, (metric, title) in enumerate(METRICS.items()):
        axes = figure.add_subplot(1, len(METRICS), number + 1, sharey=first)
        first = first or axes
        for place, row in zip(places, rows):
            if found := row.figures.get(metric):
                colour = KNOWLEDGE_COLOURS[row.knowledge]
                axes.errorbar(
                    [found.value], [place], xerr=[found.sd or 0.0], fmt="o", color=colour, markersize=6, capsize=3
                )
                if row.knowledge == "none":
                    axes.axvline(found.value, color=colour, linewidth=0.8, linestyle=":")
        axes.set_yticks(places, names, **STYLE)
        axes.tick_params(axis="y", left=False, labelleft=number == 0)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        _plain(axes, title + (" (lower is better)" if metric == "log_loss" else " (higher is better)"))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.15)
        axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    return _svg(figure)


def result_plot(
    rows: Sequence[tuple[str, str]], result: Mapping[str, float | str], metric: str = "auc", title: str = "AUC"
) -> str:
    """A metric of each row (label, key) of a flat result as dots with ± one standard deviation; an SVG file's text.

    Rows of one model (the key's first part) have a colour. Where the paper has figures they stand in a panel of their
    own, since its logs and splits are others and the differences within ours would vanish on a scale for both.
    """
    panels = {metric: f"{title} of the test part"}
    if any(f"{key}/paper_auc" in result for _, key in rows):
        panels["paper_auc"] = "the paper's AUC, by its own protocol"
    figure = Figure(figsize=(4.0 + 3.5 * len(panels), 1.0 + 0.34 * len(rows)), layout="constrained")
    families = list(dict.fromkeys(key.partition("/")[0] for _, key in rows))
    first: Axes | None = None
    for number, (name, says) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1, sharey=first)
        first = first or axes
        for place, (_, key) in zip(range(len(rows))[::-1], rows):
            colour = COLOURS[families.index(key.partition("/")[0]) % len(COLOURS)]
            value, sd = result.get(f"{key}/{name}"), result.get(f"{key}/{name}_sd")
            if isinstance(value, float):
                xerr = [sd if isinstance(sd, float) else 0.0]
                axes.errorbar([value], [place], xerr=xerr, fmt="o", color=colour, markersize=6, capsize=3)
        axes.set_yticks(range(len(rows))[::-1], [label for label, _ in rows], **STYLE)
        axes.tick_params(axis="y", left=False, labelleft=number == 0)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        _plain(axes, says)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    return _svg(figure)


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element that scales with the page, without the XML head that HTML does not take."""
    for label in figure.findobj(Text):
        label.set_parse_math(False)  # a "$" in a name is a dollar
        label.set_text(printable(label.get_text()))
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
