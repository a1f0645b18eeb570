"""The paper's tables: which rows, which pipelines, and the files at the end of a real run."""

import json

import pytest

from lumrec import reproduce
from lumrec.config import load


def test_rows_of_table_4_have_the_papers_figures_and_a_control():
    cases = reproduce.table_4("ml-1m", ["din", "dlrm"])
    assert [(case.key, case.knowledge, case.paper) for case in cases] == [
        ("din/base", "none", 0.7455),
        ("din/tables", "tables", None),
        ("din/lum", "both", 0.7472),
        ("dlrm/base", "none", None),
        ("dlrm/tables", "tables", None),
        ("dlrm/lum", "both", None),
    ]
    assert all(case.paper is None for case in reproduce.table_4("kuairand", ["din"]))


@pytest.mark.parametrize("dataset", ["ml-1m", "kuairand", "beauty", "simulator"])
def test_each_data_set_has_a_pipeline_of_its_own(dataset):
    config = reproduce.read_config(dataset, "", ["rank.dropout=0.7"])
    assert config.run == f"reproduce-{dataset}"
    assert config.rank.dropout == 0.7
    assert config.rank.tables == "lum"  # the control row would equal the base otherwise


def test_rows_of_table_5_are_of_several_pipelines():
    config = load(None, [])
    cases = reproduce.choose("5", "ml-1m", "", config)
    assert [case.variant for case in cases] == ["", "", "", "", "-no-condition", "-multi-conditions"]
    chosen = reproduce.choose("5", "ml-1m", "tokenization,scratch", config)
    assert [case.key for case in chosen][:2] == ["lum/no_condition", "lum/multi_conditions"]
    needed = reproduce.only(reproduce.read_config("ml-1m", "", []), reproduce.TABLE_5["utilization"])
    assert (needed.pipeline.rankers, needed.pipeline.knowledge) == (["dlrm"], ["direct", "both"])
    alone = reproduce.read_config("ml-1m", "-no-condition", [])
    assert (alone.model.conditions, alone.query.conditions, alone.pretrain.contrast.feature) == ([], [{}], "")


def test_the_hazard_is_shown_for_each_ranker():
    config = reproduce.read_config("ml-1m", "", ["pipeline.rankers=[din]"])
    cases = reproduce.choose("hazard", "ml-1m", "", config)
    assert [case.key for case in cases] == ["din/base", "din/cross_fit", "din/in_sample", "din/time_split"]
    variants = {case.key: reproduce.read_config("ml-1m", case.variant, []) for case in cases}
    assert [variants[key].pipeline.folds for key in variants] == [2, 2, 1, 1]
    assert [variants[key].pretrain.time_share for key in variants] == [1.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"table": "7"}, "--table 7: expected 4, 5 or hazard"),
        ({"dataset": "netflix"}, "data sets and variants that there are: beauty, kuairand"),
        ({"table": "5", "rows": "utilisation"}, "'utilisation' is none of scratch, utilization"),
        ({"rows": "scratch"}, "--rows is for table 5"),
    ],
)
def test_what_is_not_known_is_told(options, says):
    with pytest.raises(ValueError) as error:
        reproduce.run([], **options)
    assert says in str(error.value)


def test_gains_are_of_the_rankers_that_have_both_rows():
    cases = reproduce.table_4("ml-1m", ["din", "dlrm"])
    result = {"din/base/auc": 0.75, "din/lum/auc": 0.76, "dlrm/base/auc": 0.7, "dlrm/lum/auc": 0.73}
    result |= {"din/base/paper_auc": 0.7455, "din/lum/paper_auc": 0.7472}
    gains = reproduce.gains(cases, result)
    assert gains["din/gain/auc"] == pytest.approx(0.01)
    assert gains["average/gain/auc"] == pytest.approx(0.02)
    assert gains["average/gain/paper_auc"] == pytest.approx(0.0017)
    assert "dlrm/gain/paper_auc" not in gains


@pytest.mark.slow
def test_a_table_on_the_simulator(tiny_words, tmp_path):
    words = [*tiny_words, f"runs_dir={tmp_path}/runs", "pipeline.seeds=[0]", "pipeline.rankers=[din]"]
    words.remove("name=tiny")
    result = reproduce.run(words, table="4", dataset="simulator", out=str(tmp_path / "results"))
    stem = tmp_path / "results" / "table4-simulator"
    assert json.loads(stem.with_suffix(".json").read_text()) == json.loads(json.dumps(result))
    gain = result["din/lum/auc"] - result["din/base/auc"]
    assert result["average/gain/auc"] == result["din/gain/auc"] == pytest.approx(gain)
    text = stem.with_suffix(".md").read_text()
    assert f"| DIN + LUM | {result['din/lum/auc']:.4f} |" in text
    assert f"| Imp. | {gain:+.4f} |" in text
    assert "--table 4 --dataset simulator" in text
    assert "cross-fitted over 2 folds of users" in text
    assert stem.with_suffix(".svg").read_text().startswith("<svg")
    again = reproduce.run(words, table="4", dataset="simulator", out=str(tmp_path / "results"))
    assert {name: again[name] for name in result if name != "command"} == {
        name: result[name] for name in result if name != "command"
    }
