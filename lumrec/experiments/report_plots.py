"""Charts as SVG: curves from metrics.jsonl, and figures with their intervals.

Charts of a page are 360 points wide with text of 9 points, which is 11.7 pixels on a page that is 500 pixels wide.
Their text is stored as text, and their colours are the variables of templates/base.html.j2, so they follow dark mode.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from lumrec.run.errors import UserError
from lumrec.run.printable import printable

# Okabe and Ito's colours, which colour-blind readers can distinguish. On a page, the n-th is the CSS variable --c<n>.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31", "#7f7f7f")
KNOWLEDGE_COLOURS = {"none": 8, "tables": 4, "direct": 0, "matching": 2, "both": 1}
DASHES = ("-", "--", ":", "-.")  # one for each ranker
INK, GRID = "#1d2025", "#e3e5e8"
ON_PAGE = {INK: "currentColor", GRID: "var(--line)"} | {colour: f"var(--c{n})" for n, colour in enumerate(COLOURS)}
SIZE = 9  # of text, in points
LEGEND_COLUMNS = 2


class Series(NamedTuple):
    """One line of a chart. colour: index into COLOURS, None for the next one. dashes: index into DASHES."""

    label: str
    steps: list[float]
    values: list[float]
    colour: int | None = None
    dashes: int = 0


class Dot(NamedTuple):
    """A figure with its interval. colour: index into COLOURS."""

    value: float
    low: float
    high: float
    colour: int


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


def curves(lines: Sequence[Series], *, ylabel: str) -> Markup:
    """A page's chart of lines over training steps, with a legend below; lines with few points have markers."""
    figure = Figure(figsize=(5.0, 2.9 + 0.2 * -(-len(lines) // LEGEND_COLUMNS)), layout="constrained")
    axes = figure.add_subplot()
    handles: list[Artist] = []
    for number, line in enumerate(lines):
        handles += axes.plot(
            line.steps,
            line.values,
            color=COLOURS[(number if line.colour is None else line.colour) % len(COLOURS)],
            linestyle=DASHES[line.dashes % len(DASHES)],
            marker="o" if len(line.steps) <= 30 else None,
            markersize=3,
            linewidth=1.4,
        )
    axes.set_ylabel(ylabel)
    _finish(axes, "training step", grid="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.legend(
        handles,
        [line.label for line in lines],
        loc="outside lower center",
        ncols=LEGEND_COLUMNS,
        fontsize=SIZE,
        frameon=False,
        handlelength=3,
        labelcolor=INK,
    )
    return Markup(_svg(figure, on_page=True))


def dots(labels: Sequence[str], panels: Mapping[str, Sequence[Dot | None]], *, zero: bool = False) -> Figure:
    """Figures with their intervals: a panel for each axis title, and one line for each label, from the top.

    zero: draw a line at 0.
    """
    figure = Figure(figsize=(5.0 * len(panels), 0.75 + 0.3 * len(labels)), layout="constrained")
    heights = list(range(len(labels)))[::-1]
    for number, (title, found) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        if zero:
            axes.axvline(0.0, color=INK, linewidth=0.8, linestyle=":")
        for y, dot in zip(heights, found):
            if dot is not None:
                colour = COLOURS[dot.colour % len(COLOURS)]
                axes.plot([dot.low, dot.high], [y, y], color=colour, linewidth=1.6, marker="|", markersize=8)
                axes.plot([dot.value], [y], color=colour, marker="o", markersize=6)
        axes.set_yticks(heights, [printable(label) if number == 0 else "" for label in labels])
        axes.set_ylim(-0.6, len(labels) - 0.4)
        _finish(axes, title, grid="x")
        axes.tick_params(axis="y", left=False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.1)
    return figure


def dot_chart(labels: Sequence[str], xlabel: str, found: Sequence[Dot | None], *, zero: bool = False) -> Markup:
    """`dots` with one panel, as a page's chart."""
    return Markup(_svg(dots(labels, {xlabel: found}, zero=zero), on_page=True))


def result_plot(
    rows: Sequence[tuple[str, str]], result: Mapping[str, float | str], metric: str = "auc", title: str = "AUC"
) -> str:
    """A metric of each row (label, key) of a flat result as dots with ± one standard deviation, as the text of an SVG.

    Rows of one model (the key's first part) share a colour. The paper's figures have a separate panel: its logs and
    splits differ from ours, and on a common scale the differences between our rows would be invisible.
    """
    panels = {metric: f"{title} of the test part"}
    if any(f"{key}/paper_auc" in result for _, key in rows):
        panels["paper_auc"] = "the paper's AUC, by its own protocol"
    families = list(dict.fromkeys(key.partition("/")[0] for _, key in rows))

    def dot(key: str, name: str) -> Dot | None:
        value, sd = result.get(f"{key}/{name}"), result.get(f"{key}/{name}_sd")
        if not isinstance(value, float):
            return None
        spread = sd if isinstance(sd, float) else 0.0
        return Dot(value, value - spread, value + spread, families.index(key.partition("/")[0]))

    found = {says: [dot(key, name) for _, key in rows] for name, says in panels.items()}
    return _svg(dots([label for label, _ in rows], found))


def _finish(axes: Axes, xlabel: str, *, grid: str) -> None:
    axes.set_xlabel(xlabel, color=INK, fontsize=SIZE)
    axes.yaxis.label.set(color=INK, fontsize=SIZE)
    axes.tick_params(labelsize=SIZE, colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_edgecolor(INK)
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _svg(figure: Figure, *, on_page: bool = False) -> str:
    """The figure as an <svg> element that scales with the page, without the XML header, which HTML does not accept."""
    for label in figure.findobj(Text):
        label.set_parse_math(False)  # a "$" in a name is a dollar
        label.set_text(printable(label.get_text()))
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none" if on_page else "path", "svg.hashsalt": "lumrec"}):
        figure.savefig(
            text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=on_page
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    if on_page:
        svg = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda colour: ON_PAGE.get(colour[0], colour[0]), svg)
    return svg
