"""The results pages in docs/results are what their figures give."""

import json
import re

from results_pages import RESULTS, index, page, pages, read


def test_pages_are_up_to_date():
    for path, text, _ in pages():
        assert path.with_suffix(".md").read_text(encoding="utf-8") == text, "run: python docs/hooks/results_pages.py"
    assert sorted(RESULTS.rglob("*.md")) == [path.with_suffix(".md") for path, _, _ in pages()]


def test_titles_differ():
    titles = [title for _, _, title in pages()]
    assert len(set(titles)) == len(titles)
    assert all(f"[{title}]" in index() for title in titles)


def test_figures_by_the_old_rule_are_marked():
    path = RESULTS / "table5-ml-1m.json"
    result = read(path)
    assert "**Measured before 2026-11-29" in page(path, result)
    result["protocol"] += ", rows see strictly earlier moments"
    assert "Measured before" not in page(path, result)


def test_configs_mark_ranking_figures_by_the_old_rule():
    """AUCs that a config tells to expect; retrieval keeps the order among equal times by both rules."""
    configs = RESULTS.parents[1] / "configs"
    tops = {file: file.read_text(encoding="utf-8").partition("\n\n")[0] for file in configs.rglob("*.yaml")}
    expecting = {file: top for file, top in tops.items() if re.search(r"Expect.* \.[78]\d{2,3}\b", top, re.DOTALL)}
    assert len(expecting) >= 7
    assert [file.name for file, top in expecting.items() if "2026-11-29" not in top] == []


def test_rows_of_uncommitted_code_are_no_results():
    path = RESULTS / "fresh-users" / "table4-ml-1m.json"
    clean = page(path, read(path))
    assert "average Imp." in clean and "Lab note" not in clean
    result = json.loads(path.read_text(encoding="utf-8"))
    result["sim/commit"] += "-dirty"
    results, _, lab_note = page(path, result).partition("## Lab note, not a result")
    assert "SIM" not in results and "SIM + LUM" in lab_note and "TWIN" not in lab_note
    assert "average Imp." not in results + lab_note
