"""A ranker of apps/rank.py that begins from a checkpoint, and the dry run of apps/warm_start.py."""

import json
from pathlib import Path

import pytest

from lumrec.config import Config, load
from lumrec.stages import run_stage
from lumrec.train import rank
from lumrec.train.checkpoint import best_checkpoint

RULES = """
source_prefix: model.
optimizer_prefix: optim.
rules:
  - {source: "", match: prefix}
"""


@pytest.fixture(scope="module")
def words(tiny_words, tmp_path_factory) -> list[str]:
    """Words of a runs folder that holds prepared data and "production", a ranker that is trained already."""
    folder = tmp_path_factory.mktemp("stage")
    (folder / "rules.yaml").write_text(RULES)
    words = [*tiny_words, f"runs_dir={folder}", "rank.model=dlrm", "rank.train.epochs=1"]
    rank.run(load(None, [*words, "run=production"]))
    return words


def config(words: list[str], *more: str) -> Config:
    return load(None, [*words, *more])


def from_production(words: list[str], rules: str = "rules.yaml") -> list[str]:
    folder = Path(config(words).runs_dir)
    source = best_checkpoint(folder / "production")
    return [*words, f"rank.warm_start.source={source}", f"rank.warm_start.rules={folder / rules}"]


def test_a_ranker_goes_on_where_production_stands(words):
    folder = Path(config(words).runs_dir)
    still = ["rank.train.optimizer.table_lr=0", "rank.train.optimizer.dense_lr=0"]
    result = rank.run(config(from_production(words), "run=warm", *still))
    production = json.loads((folder / "production" / "result.json").read_text())
    assert result["auc"] == pytest.approx(production["auc"], abs=1e-9)
    assert result["warm_start"] == str(best_checkpoint(folder / "production"))
    audit = json.loads((folder / "warm" / "warm_start.json").read_text())
    tables = [row for row in audit["rows"] if ".embedding_bags." in row["target"]]
    assert tables and all(row["optimizer"] == "kept" and row["rows_new"] == 0 for row in tables)
    assert audit["applied"] and audit["fresh"] == audit["unused"] == []
    assert "| tables.embedding_bags.item_id.weight | model.tables" in (folder / "warm" / "warm_start.md").read_text()
    cold = rank.run(config(words, "run=cold", *still))
    assert abs(cold["auc"] - production["auc"]) > 1e-3


def test_the_app_prints_the_audit_and_changes_nothing(words, capsys):
    run_stage("warm_start", "", from_production(words))
    out = capsys.readouterr().out
    assert "dry run, nothing is changed" in out and "tables.embedding_bags.item_id.weight" in out
    assert not (Path(config(words).runs_dir) / "tiny-warm_start").exists()


def test_the_app_says_what_does_not_fit(words, capsys):
    (Path(config(words).runs_dir) / "tables.yaml").write_text(RULES.replace('""', "tables"))
    with pytest.raises(SystemExit, match="2"):
        run_stage("warm_start", "", from_production(words, "tables.yaml"))
    out, err = capsys.readouterr()
    assert "tables.embedding_bags.item_id.weight" in out
    assert "has no source; the nearest is" in err and "is left over" in err


def test_contradictions(words):
    with pytest.raises(ValueError, match="both fill the tables"):
        rank.run(config(from_production(words), "rank.tables=lum", "run=both"))
    with pytest.raises(ValueError, match="source is 'somewhere' and warm_start.rules ''"):
        rank.run(config(words, "rank.warm_start.source=somewhere", "run=half"))
    with pytest.raises(FileNotFoundError, match="there is no somewhere; expected a DCP folder"):
        more = ("rank.warm_start.source=somewhere", "rank.warm_start.rules=rules.yaml")
        rank.run(config(words, *more, "run=nowhere"))
