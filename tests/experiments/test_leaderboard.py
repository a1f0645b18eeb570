"""The leaderboard over all runs of a folder, which may hold anything."""

import json
import os
import shutil
from html.parser import HTMLParser

import pytest

from lumrec.experiments.config import load
from lumrec.experiments.leaderboard import as_text_tables, leaderboard, main, make_tables
from lumrec.experiments.read_runs import MOST_BYTES, read_runs
from lumrec.run.errors import MissingFileError
from lumrec.run.folder import RunFolder
from lumrec.run.typed_yaml import to_yaml
from lumrec.stages.registry import STAGES


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A finished ranker's folder, which the runs of these tests are copies of: each RunFolder asks git for a commit."""
    path = tmp_path_factory.mktemp("template") / "run"
    RunFolder.create(path, "rank", STAGES["rank"].settings(load()), inputs={"data": "d1"}).close()
    return path


@pytest.fixture
def make(template, tmp_path):
    def made(name, result, *words, stage="rank", commit="c" * 40, **inputs):
        """A run of a stage; without a result (None) an unfinished one."""
        folder = tmp_path / "runs" / name
        shutil.copytree(template, folder)
        (folder / "config.yaml").write_text(to_yaml(STAGES[stage].settings(load(None, words))))
        versions = json.loads((folder / "versions.json").read_text())
        (folder / "versions.json").write_text(json.dumps({**versions, "stage": stage, "commit": commit}))
        (folder / "inputs.json").write_text(json.dumps({"data": "d1", **inputs}))
        if result is not None:
            (folder / "result.json").write_text(json.dumps({"model": "din", "knowledge": "none", **result}))
        return folder

    return made


def figures(auc, **more):
    return {"auc": auc, "auc_low": auc - 0.01, "auc_high": auc + 0.01, "num_rows": 9, "num_users": 3, **more}


def tables_of(tmp_path):
    runs, left_out = read_runs(tmp_path / "runs")
    tables, untested = make_tables(runs)
    return tables, [*left_out, *untested]


def test_seeds_are_one_row_and_the_best_row_is_first(make, tmp_path):
    for seed, auc in enumerate((0.70, 0.72)):
        make(f"p/din-s{seed}", figures(auc, wall_s=10.0), f"seed={seed}", "rank.dropout=0.3")
        make(f"p/both-s{seed}", figures(auc + 0.02, knowledge="both", knowledge_hazard="cross_fit"), f"seed={seed}")
    make("p/again", figures(0.5), "rank.dropout=0.3")  # seed 0 once more: not averaged with the first
    make("p/other-code", figures(0.6), "rank.dropout=0.3", commit="d" * 40 + "-dirty")
    (table,), left_out = tables_of(tmp_path)
    assert left_out == [] and [row.seeds for row in table.rows] == ["0, 1", "0, 1", "0", "0"]
    best, base, dirty, _ = table.rows
    assert (best.knowledge, best.cell("auc")) == ("both, cross-fitted", "0.7300 ± 0.0141 [0.7200, 0.7400]")
    assert base.cell("auc") == "0.7100 ± 0.0141 [0.7000, 0.7200]" and base.cell("gauc") == "–"
    assert table.own(base) == ["rank.dropout=0.3"] and "rank.dropout=0.3" not in table.shared
    assert base.made.endswith(", 10 s, commit cccccccccc") and dirty.made.endswith("commit dddddddddd dirty")


@pytest.mark.parametrize(
    "differs",
    [{"data": "d2"}, {"words": ["data.split.kind=user"]}, {"result": figures(0.7, num_rows=10)}],
    ids=["other data", "other split", "other rows"],
)
def test_only_what_can_be_compared_is_in_one_table(make, tmp_path, differs):
    make("a", figures(0.7))
    make("b", differs.pop("result", figures(0.8)), *differs.pop("words", []), **differs)
    tables, _ = tables_of(tmp_path)
    assert [[row.folders for row in table.rows] for table in tables] in ([[["a"]], [["b"]]], [[["b"]], [["a"]]])


def test_another_lum_behind_the_knowledge_is_another_row(make, tmp_path):
    make("a-s0", figures(0.7, knowledge="both"), "seed=0", knowledge="k1")
    make("a-s1", figures(0.7, knowledge="both"), "seed=1", knowledge="k2")
    (table,), _ = tables_of(tmp_path)
    assert [row.seeds for row in table.rows] == ["0", "1"]


def test_lums_and_towers_have_tables_of_their_own(make, tmp_path):
    for fold in range(2):
        result = {"ndcg@10": 0.1 + fold / 10, "hr@10": 0.3, "valid/ndcg@10": 0.9}
        make(f"lum-{fold}of2", result, f"fold={fold}/2", stage="pretrain")
    make("whole", {"ndcg@10": 0.1}, stage="pretrain")
    make("towers", {"hr@10": 0.25, "ndcg@10": 0.2, "retrieval_users": 7}, stage="retrieve")
    tables, _ = tables_of(tmp_path)
    assert sorted((table.stage, len(table.rows)) for table in tables) == [
        ("pretrain", 1),
        ("pretrain", 1),
        ("retrieve", 1),
    ]
    folds = next(table for table in tables if "folds" in table.protocol)
    assert folds.rows[0].cell("ndcg@10").startswith("0.1500 ± ") and list(folds.metrics) == ["ndcg@10", "hr@10"]
    text = as_text_tables(tables, [])
    assert "LUMs: the next item" in text and "Two towers" in text and "2 of 2 folds" in text


def test_runs_that_no_table_holds_are_listed_with_the_reason(make, tmp_path, capsys):
    make("fine", figures(0.7))
    make("untested", {"loss": 0.5})
    (make("old", figures(0.7)) / "inputs.json").unlink()
    make("p/unfinished", None)
    make("p/failed", None)
    (tmp_path / "runs/p/logs").mkdir()
    (tmp_path / "runs/p/logs/failed.log").write_text("x\nrank/0 lumrec: no space left\nTraceback\n")
    (make("diverged", None) / "non-finite-step-7.pt").touch()
    (make("cut", {}) / "result.json").write_text('{"auc": 0.')
    make("prepared", {}, stage="prepare")  # finished, and no model: nothing to say
    main([str(tmp_path / "runs")])
    said = capsys.readouterr().out
    for name, why in {
        "untested": "has no test metrics",
        "old": "does not name the data",
        "p/unfinished": "unfinished: ",
        "p/failed": "failed: no space left",
        "diverged": "failed: the loss or a gradient was not finite (non-finite-step-7.pt)",
        "cut": "result.json is damaged",
    }.items():
        assert f"  {name}: {why}" in said
        assert name in (tmp_path / "runs/leaderboard.html").read_text()
    assert "prepared:" not in said


def test_a_hostile_folder_is_only_shown(make, tmp_path, capsys):
    """Nothing outside is read or written, nothing hangs, and no name or value becomes markup or a line of its own."""
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    shutil.copytree(make("x", figures(0.7)), outside / "run")
    (outside / "secret").write_text('{"auc": 0.123456}')
    evil = "<script>alert(1)</script>\u202e\n  forged: row\x1b[2J"
    make(
        f"p/{evil.replace('/', '-')}", figures(0.6, model=evil, knowledge=evil), f"rank.leave_out=['{evil.split()[0]}']"
    )
    (runs / os.fsdecode(b"\xff\xfe")).mkdir()
    (runs / "linked").symlink_to(outside / "run")
    (runs / "loop").symlink_to(runs)
    (runs / "root").symlink_to("/")
    for number, content in enumerate(
        (
            "[" * 50_000,
            "[1]",
            '{"auc": ' + "9" * 5000 + "}",
            "\xff",
            '{"auc": 1e999}',
            '{"auc": "0.9"}',
            '{"auc": true}',
        )
    ):
        (make(f"json-{number}", {}) / "result.json").write_text(content, encoding="latin-1")
    (make("huge", {}) / "result.json").write_bytes(b" " * (MOST_BYTES + 1))
    (make("yaml", {}) / "config.yaml").write_text("a: &a [x]\nb: !!python/object/apply:os.system ['touch /tmp/x']\n")
    (make("deep", {}) / "config.yaml").write_text("rank: {x: " + "[" * 300 + "]" * 300 + "}")
    for name, replace in (
        ("pipe", os.mkfifo),
        ("folder", os.mkdir),
        ("link", lambda p: p.symlink_to(outside / "secret")),
    ):
        path = make(name, {}) / "result.json"
        path.unlink()
        replace(path)
    victims = [outside / "one", outside / "two"]
    for victim, name in zip(victims, ("leaderboard.html", ".leaderboard.html.tmp")):
        victim.write_text("kept")
        (runs / name).symlink_to(victim)

    page = leaderboard(runs).read_text()
    said = capsys.readouterr().out
    assert [victim.read_text() for victim in victims] == ["kept", "kept"] and not (
        runs / "leaderboard.html"
    ).is_symlink()
    assert "0.1235" not in page and "0.123456" not in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert not {"\u202e", "\x1b"} & set(page + said) and "\n  forged: row" not in said
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed(page)
    assert not {"script", "img", "link", "iframe", "a"} & set(tags)
    listed = said[said.index("In no table:") :]
    names = [
        "linked",
        "loop",
        "root",
        "huge",
        "yaml",
        "deep",
        "pipe",
        "folder",
        "link",
        *(f"json-{n}" for n in range(7)),
    ]
    assert all(f"\n  {name}: " in listed for name in names)


def test_no_runs(tmp_path, capsys):
    with pytest.raises(MissingFileError, match="there is no folder .*nowhere"):
        leaderboard(tmp_path / "nowhere")
    assert "No finished ranker" in leaderboard(tmp_path).read_text()
    assert "no runs" in capsys.readouterr().out
