"""Foreign text on a terminal, in a report and in an audit: shown, never obeyed."""

import io
import logging
import sys
from html.parser import HTMLParser

import pytest

from lumrec.experiments.report_plots import Dot, Series, curves, dot_chart
from lumrec.launch.main import tell
from lumrec.run.page import render
from lumrec.run.printable import PrintableFormatter, markdown, printable, say
from lumrec.stages.show_user import Event, Match, UserView, text
from lumrec.warm_start.audit import Audit, AuditRow

HOSTILE = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x9b31m",
    "a\rb",
    "a\bb",
    "\x00",
    "\x7f",
    "\u202eexe.txt",
    "\u2066x\u2069",
    "\u200b",
    "\ufeff",
    "\u2028",
    "\ud800",
    "\U000e0041",
]
OBEYED = set("\x1b\x07\x9b\r\b\x00\x7f\u202e\u2066\u2069\u200b\ufeff\u2028\ud800\U000e0041")


def page_of(text):
    """A report in which every text is `text`."""
    figure = {"text": text, "gain": 1.0, "interval": text, "gain_sd": None, "verdict": text}
    return render(
        "report.html.j2",
        run=text, dataset=text, test_part=text, seeds=text, best_auc=None, notes=[text], one_seed=text, remarks=text,
        verdicts=[{"verdict": text, "text": text}],
        table=[{"name": text, "knowledge": text, "figures": {text: figure}}],
        metrics=[{"key": text, "label": text, "meaning": text, "has_gains": True}], config_file=text, wall=text,
        charts=[{"title": text, "svg": dot_chart([text], text, [Dot(1.0, 0.5, 1.5, 0)])}], made=[(text, text)],
        settings=[(text, text, text)], times=[(text, text)], versions=[(text, text)], commands=[text],
    )  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
def test_every_place_that_shows_text(hostile, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    view = UserView(hostile, 1, [Event("", hostile, {"f": hostile})], [{"f": hostile}], [[Match(hostile, 1, 1, True)]])
    row = AuditRow(
        target=hostile, source=hostile, target_size=[1], source_size=[2], dtype=hostile, rows_taken=1, rows_new=0,
        rows_unused=0, new_rows="", joined=None, columns_taken=1, columns_new=0,
        columns_unused=0, new_columns="", optimizer=hostile,
    )  # fmt: skip
    audit = Audit(hostile, "dcp", [row], fresh=[hostile], unused=[hostile], others=[hostile])
    record = logging.LogRecord("x", logging.INFO, "x", 1, "%s", (hostile,), None)
    tell(hostile)
    say(hostile)
    shown = [printable(hostile), text(view), audit.text(), audit.markdown(), *capsys.readouterr()]
    shown += [
        PrintableFormatter("%(message)s").format(record),
        curves([Series(hostile, [1], [2])], ylabel=hostile),
        page_of(hostile),
    ]
    for output in shown:
        assert not OBEYED & set(output), ascii(output)


@pytest.mark.parametrize("fine", ["Amélie (2001)", "千と千尋", "نیم‌فاصله", "👩‍🚀", "a b", "50 % — “x”", "\u00a0"])
def test_text_to_be_read_stays(fine):
    assert printable(fine) == fine


def test_an_encoding_that_has_not_all_letters(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    say("Amélie →")
    assert stream.buffer.getvalue() == b"Am\\xe9lie \\u2192\n"


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "' onload='x", '"><img src=x onerror=y>', "</svg><b>", "-->"]
)
def test_html_and_svg(hostile):
    svg = curves([Series(hostile, [1, 2], [1, 2]), Series("$\\frac{$", [1], [1])], ylabel=hostile)
    page, fine = page_of(hostile), page_of("fine")
    assert "<script>" not in svg + page and "<img" not in svg + page and "<b>" not in svg + page
    assert html_shape(page) == html_shape(fine)


def html_shape(page):
    """The elements of a page, and their attributes without the values, in order."""
    shape = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: shape.append((tag, [name for name, _ in attributes]))
    parser.handle_endtag = shape.append
    parser.handle_comment = lambda text: shape.append("a comment")
    parser.feed(page)
    return shape


def test_markdown_cells():
    assert markdown("a|b`c\nd<e>[f](g)") == r"a\|b\`c\\nd\<e\>\[f\](g)"
