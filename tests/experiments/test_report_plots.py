"""Charts of a page: readable where it is 500 pixels wide, and in dark mode."""

import re

import pytest

from lumrec.experiments.report_plots import COLOURS, Dot, Series, curves, dot_chart, result_plot

CHARTS = {
    "curves": lambda: curves(
        [Series(f"line {n}", [1.0, 2.0], [n, 2.0]) for n in range(len(COLOURS))], ylabel="loss (nats)"
    ),
    "dots": lambda: dot_chart(["a", "b"], "gain", [Dot(0.1, -0.1, 0.2, 0), None], zero=True),
}


@pytest.mark.parametrize("make", CHARTS.values(), ids=CHARTS)
def test_a_chart_of_a_page(make):
    svg = make()
    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', svg)[1])
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
    assert sizes and min(sizes) * 468 / width >= 11  # the page's edges take 32 of 500 pixels
    assert "currentColor" in svg and "var(--line)" in svg and "var(--c0)" in svg
    assert not re.search(r": #[0-9a-f]{6}", svg)  # no colour that dark mode cannot change
    assert svg == make() and "matplotlib.org" not in svg


def test_an_interval_is_drawn_from_end_to_end():
    svg = dot_chart(["a"], "gain", [Dot(0.5, 0.0, 1.0, 3)])
    assert svg.count("stroke: var(--c3)") >= 2 and svg != dot_chart(["a"], "gain", [Dot(0.5, 0.4, 0.6, 3)])


def test_a_file_has_colours_of_its_own():
    svg = result_plot([("DIN", "din/base")], {"din/base/auc": 0.7, "din/base/auc_sd": 0.1})
    assert svg.startswith("<svg") and "var(" not in svg and "currentColor" not in svg
