"""The paper's tables: which rows, which pipelines, and the files at the end of a real run."""

import json

import numpy as np
import pytest

from lumrec.batches.rows import training_rows
from lumrec.data.prepared import PreparedData
from lumrec.data.splits import TRAIN
from lumrec.experiments import paper_tables as reproduce
from lumrec.experiments import report_gains
from lumrec.experiments import two_towers as towers
from lumrec.experiments import warm_up_rows as warm_up
from lumrec.experiments.config import load
from lumrec.knowledge.store import Knowledge
from lumrec.metrics.bootstrap import METRICS
from lumrec.metrics.compare import RANKS, Ranks, Scores, write_scores
from lumrec.stages.registry import STAGES


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
        ({"table": "7"}, "--table 7: expected 4, 5, retrieval or hazard"),
        ({"dataset": "netflix"}, "the data sets and variants are beauty, kuairand"),
        ({"table": "5", "rows": "utilisation"}, "'utilisation' is none of scratch, utilization"),
        ({"rows": "scratch"}, "--rows is for table 5"),
    ],
)
def test_what_is_not_known_is_told(options, says):
    with pytest.raises(ValueError) as error:
        reproduce.run([], **options)
    assert says in str(error.value)


@pytest.mark.parametrize("dataset", ["ml-1m", "ml-1m-plain", "kuairand", "beauty", "simulator"])
def test_table_4_has_every_ranker_unless_some_are_named(dataset):
    def models(words, table="4"):
        config = reproduce.table_config(table, dataset, "", words)
        return reproduce.models_of(reproduce.choose(table, dataset, "", config))

    assert models([]) == ["din", "dlrm", "dien", "sim", "twin"]
    assert models(["pipeline.rankers=[twin]"]) == ["twin"]
    assert models([], table="hazard") == ["din", "dlrm"]


def test_gains_are_of_the_rankers_that_have_both_rows():
    cases = reproduce.table_4("ml-1m", ["din", "dlrm"])
    result = {"din/base/auc": 0.75, "din/lum/auc": 0.76, "dlrm/base/auc": 0.7, "dlrm/lum/auc": 0.73}
    result |= {"din/base/paper_auc": 0.7455, "din/lum/paper_auc": 0.7472}
    gains = reproduce.gains(cases, result)
    assert gains["din/gain/auc"] == pytest.approx(0.01)
    assert gains["average/gain/auc"] == pytest.approx(0.02)
    assert gains["average/gain/paper_auc"] == pytest.approx(0.0017)
    assert "dlrm/gain/paper_auc" not in gains


def test_a_table_on_the_simulator(tiny_words, stages_in_forks, tmp_path):
    words = [*tiny_words, f"runs_dir={tmp_path}/runs", "pipeline.seeds=[0]", "pipeline.rankers=[din]"]
    words.remove("name=tiny")
    result = reproduce.run(words, table="4", dataset="simulator", out=str(tmp_path / "results"))
    stem = tmp_path / "results" / "table4-simulator"
    assert json.loads(stem.with_suffix(".json").read_text()) == json.loads(json.dumps(result))
    gain = result["din/lum/auc"] - result["din/base/auc"]
    assert result["average/gain/auc"] == result["din/gain/auc"] == pytest.approx(gain)
    text = stem.with_suffix(".md").read_text()
    assert f"| DIN + LUM | {result['din/lum/auc']:.4f} |" in text
    assert f"| Imp. | {gain:+.4f} [" in text and f"], {result['din/lum/auc_verdict']} |" in text
    assert f"{result['test_rows']:,} test rows of {result['test_users']} users" in text
    assert "average Imp." not in text
    assert f"--table 4 --dataset simulator --out {tmp_path}/results" in text
    assert "cross-fitted over 2 folds of users" in text
    assert stem.with_suffix(".svg").read_text().startswith("<svg")
    again = reproduce.run(words, table="4", dataset="simulator", out=str(tmp_path / "results"))
    assert again == result

    version = json.loads((tmp_path / "runs/reproduce-simulator/rank-din-both-s0/versions.json").read_text())["commit"]
    assert result["din/commit"] == (version or "unknown")

    # Another ranker is added to the table; by another protocol it is refused, before anything is run.
    words[words.index("pipeline.rankers=[din]")] = "pipeline.rankers=[dlrm]"
    both = reproduce.run(words, table="4", dataset="simulator", out=str(tmp_path / "results"))
    assert {key: value for key, value in both.items() if key.startswith("din/")} == {
        key: value for key, value in again.items() if key.startswith("din/")
    }
    gains = [both[f"{ranker}/gain/auc"] for ranker in ("din", "dlrm")]
    assert both["average/gain/auc"] == pytest.approx(sum(gains) / 2)
    text = stem.with_suffix(".md").read_text()
    assert text.index("| DIN + LUM |") < text.index("| DLRM + LUM |") < text.index("| average Imp. |")
    assert "], " + both["dlrm/lum/gauc_verdict"] in text and f", {reproduce.EARLIER} |" in text
    assert "DIN: commit" in text and "DLRM: commit" in text and "pipeline.rankers=[dlrm]" in text
    with pytest.raises(ValueError, match="rows of din with another protocol .*seeds .0., .* seeds .0, 1., "):
        reproduce.run([*words, "pipeline.seeds=[0,1]"], table="4", dataset="simulator", out=str(tmp_path / "results"))


def test_rows_that_were_drawn_beside_the_positives_are_named():
    log, drawn = (reproduce.protocol(reproduce.read_config(name, "", [])) for name in ("kuairand", "beauty"))
    assert log.startswith("user split, test part, mean over")
    assert drawn.startswith("leave_one_out split, test part (positives, and 1 drawn beside each, uniform), mean over")


def test_another_user_split_is_named():
    def named(*words):
        return reproduce.protocol(reproduce.read_config("ml-1m", "", words))

    assert named().startswith("user split, test part")
    assert named("data.split.rotation=0.36").startswith("user split (rotation 0.36), test part")
    assert named("data.split.seed=1", "data.split.rotation=0.5").startswith("user split (seed 1, rotation 0.5), test")


def test_rankers_without_statistics_are_named():
    log, plain = (reproduce.protocol(reproduce.read_config(name, "", [])) for name in ("ml-1m", "ml-1m-plain"))
    assert plain == f"{log}; rankers read no statistics of users and items"


def test_the_towers_stand_in_the_rankers_place():
    config = reproduce.read_config("ml-1m", "-retrieval", ["pipeline.seeds=[0,7]"])
    stages = {stage.name: stage for stage in towers.plan(config)}
    assert list(stages)[:3] == ["prepare", "lum", "query"]
    assert list(stages)[3:] == [f"retrieve-{kind}-s{seed}" for kind in ("none", "direct") for seed in (0, 7)]
    base, lum = stages["retrieve-none-s7"], stages["retrieve-direct-s7"]
    assert (base.needs, lum.needs, lum.config.seed) == (("prepare",), ("query",), 7)
    assert (base.config.retrieve.knowledge, base.config.inputs.knowledge) == ("none", "")
    assert (lum.config.retrieve.knowledge, lum.config.inputs.knowledge) == ("direct", "reproduce-ml-1m-retrieval/query")


def test_the_towers_table_has_a_gain_and_no_column_of_the_papers():
    figures = {"retrieve/none/hr@10": 0.25, "retrieve/direct/hr@10": 0.28, "retrieve/direct/hr@10_sd": 0.01}
    cases, result = reproduce.RETRIEVAL, {"dataset": "a log", "protocol": "p"}
    result |= {f"{model}/{name}": "x" for model in ("edb", "lum") for name in ("commit", "command")}
    for case in cases:
        result |= reproduce._figures(case, figures, reproduce.RETRIEVED)
    result |= reproduce.gains(cases, result, reproduce.RETRIEVED)
    result |= {f"edb/lum/hr@10_{name}": value for name, value in (("gain_low", 0.02), ("gain_high", 0.04))}
    result |= {"edb/lum/hr@10_verdict": "better", "test_rows": 90, "test_users": 90}
    text = reproduce.markdown("retrieval", cases, result, "retrieval-a-log", reproduce.RETRIEVED)
    assert "P. 90 test rows of 90 users. Imp.: the gain" in text
    assert "|  | R@10 | NDCG@10 | R@50 | NDCG@50 |\n|---|---|---|---|---|" in text
    assert "| EDB + LUM | 0.2800 ± 0.0100 | – | – | – |\n| Imp. | +0.0300 [+0.0200, +0.0400], better |" in text
    assert "average" not in text


def test_the_towers_on_the_simulator(tiny_words, stages_in_forks, tmp_path):
    words = [*tiny_words, f"runs_dir={tmp_path}/runs", "run=towers", "pipeline.seeds=[0,1]", "pipeline.folds=1"]
    words += ["pipeline.knowledge=[none,direct]", "retrieve.train.epochs=1"]
    result = towers.run(load(None, words), ["hr@10"])
    for kind in ("none", "direct"):
        runs = [
            json.loads((tmp_path / f"runs/towers/retrieve-{kind}-s{seed}/result.json").read_text()) for seed in (0, 1)
        ]
        assert runs[0]["best_step"] and runs[0]["knowledge"] == kind
        assert result[f"retrieve/{kind}/hr@10"] == pytest.approx((runs[0]["hr@10"] + runs[1]["hr@10"]) / 2)
        assert result[f"retrieve/{kind}/hr@10_sd"] == pytest.approx(abs(runs[0]["hr@10"] - runs[1]["hr@10"]) / 2**0.5)
    folders = [[tmp_path / f"runs/towers/retrieve-{kind}-s{seed}" for seed in (0, 1)] for kind in ("none", "direct")]
    found = report_gains.gains(*folders, ["hr@10", "ndcg@50"])
    gain = result["retrieve/direct/hr@10"] - result["retrieve/none/hr@10"]
    assert found["hr@10_gain"] == pytest.approx(gain)
    assert found["hr@10_gain_low"] <= found["hr@10_gain"] <= found["hr@10_gain_high"] and "hr@10_gain_sd" in found
    assert "ndcg@50_verdict" in found and found["test_rows"] == found["test_users"] > 0
    (folders[1][1] / RANKS).unlink()
    assert report_gains.gains(*folders, ["hr@10"]) == {"hr@10_verdict": report_gains.NO_SCORES}
    lum = json.loads((tmp_path / "runs/towers/lum/result.json").read_text())
    assert result["retrieve/lum/hr@10"] == lum["hr@10"]


def keep(folder, scores):
    folder.mkdir(parents=True, exist_ok=True)
    write_scores(folder, scores)
    (folder / "result.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("hits", "users", "verdict"),
    [(0.8, 60, "better"), (0.2, 60, "worse"), (0.5, 60, "within noise"), (0.8, 20, report_gains.NO_ROWS)],
)
def test_a_gain_of_two_towers_is_paired_over_users(tmp_path, hits, users, verdict):
    """Half of the users are hit at 10 by the base; of few users, and of hits that are few, nothing can be said."""
    user = np.arange(users)

    def runs(name, share):
        found = []
        for seed in (0, 1):
            is_hit = np.random.default_rng([seed, name == "b" and share != 0.5]).permutation(users) < share * users
            found.append(keep(tmp_path / f"{name}{seed}", Ranks(user * 3, user, np.where(is_hit, 1, 999))))
        return found

    found = report_gains.gains(runs("a", 0.5), runs("b", hits), ["hr@10", "ndcg@10", "hr@1"])
    assert {found[f"{metric}_verdict"] for metric in ("hr@10", "ndcg@10", "hr@1")} == {verdict}
    assert found["hr@10_gain"] == pytest.approx(hits - 0.5) and found["test_users"] == users
    rare = report_gains.gains(runs("a", 0.02), runs("b", 0.02), ["hr@10"])
    assert rare["hr@10_verdict"] in (report_gains.NO_HITS, report_gains.NO_ROWS)
    keep(tmp_path / "a0", Ranks(user * 3 + 1, user, np.ones(users, np.int64)))
    assert report_gains.gains([tmp_path / "a0"], [tmp_path / "b0"], ["hr@10"]) == {
        "hr@10_verdict": report_gains.OTHER_ROWS
    }


def test_the_average_gain_is_of_all_rankers_and_of_this_call_only(tmp_path):
    """The spread is that of the seeds' averages, not that of the rankers."""
    random = np.random.default_rng(0)
    user, label = np.repeat(np.arange(60), 20), (random.random(1200) < 0.4).astype(np.int8)
    cases, folders = reproduce.table_4("ml-1m", ["din", "dlrm"]), {}
    for place, case in enumerate(cases):
        signal = {"none": 1.0, "tables": 1.0, "both": 1.5 + place / 10}[case.knowledge]
        folders[case.key] = [
            keep(
                tmp_path / f"{case.key}-s{seed}".replace("/", "-"),
                Scores(np.arange(1200), label, user, signal * label + random.normal(size=1200)),
            )
            for seed in (0, 1)
        ]
    found = reproduce.paired_gains(cases, folders, METRICS)
    each = [found[f"{ranker}/lum/auc_gain"] for ranker in ("din", "dlrm")]
    assert found["average/lum/auc_gain"] == pytest.approx(sum(each) / 2)
    assert found["average/lum/auc_verdict"] == "better" and "din/tables/auc_verdict" not in found
    assert found["average/lum/auc_gain_low"] < found["average/lum/auc_gain"] < found["average/lum/auc_gain_high"]
    one_by_one = [
        reproduce.paired_gains(cases, {key: [of[seed]] for key, of in folders.items()}, METRICS) for seed in (0, 1)
    ]
    low, high = sorted(one["average/lum/auc_gain"] for one in one_by_one)
    assert found["average/lum/auc_gain_sd"] == pytest.approx((high - low) / 2**0.5)
    del folders["din/lum"]
    assert reproduce.paired_gains(cases, folders, METRICS)["average/lum/auc_verdict"] == reproduce.EARLIER


def test_rules_of_the_warm_up_keep_the_columns_of_what_is_still_read():
    theirs = warm_up.Layout({"user": 4, "cross": 2, "item": 3, "interest": 5, "rate": 1, "price": 1}, {"a", "cross"})
    ours = warm_up.Layout({"user": 4, "item": 3, "interest": 5, "price": 1}, {"a"})
    rules = warm_up.rules(theirs, ours, knowledge=True)
    assert rules["rules"][1]["parts"] == [[0, 4, 0], [6, 8, 4], [15, 1, 12]]
    assert (rules["rules"][1]["columns"], rules["unused"], rules["fresh"]) == (
        "slice_pad_zero",
        ["cross"],
        ["knowledge.*"],
    )
    same = warm_up.rules(theirs, theirs, knowledge=False)
    assert same["rules"] == [{"source": "", "match": "prefix"}] and same["unused"] == same["fresh"] == []
    with pytest.raises(ValueError, match="item has 4 columns and the online model 3"):
        warm_up.rules(theirs, warm_up.Layout({"item": 4}, set()), knowledge=False)


def test_the_warm_up_rows_stand_beside_the_papers_and_the_online_model():
    config = reproduce.read_config("simulator", "-warm-up", [])
    cases = reproduce.choose("5", "simulator", "warm-up", config)
    assert [case.key for case in cases] == [f"{model}/{row}" for model in ("dlrm", "lum") for row in warm_up.ROWS]
    figures = {
        "rank/dlrm/both/scratch/auc": 0.53,
        "rank/dlrm/both/param_feature/auc": 0.75,
        "rank/dlrm/none/scratch/auc": 0.5,
        "dataset": "a log",
    }
    result = {"online/auc": 0.7, "dataset": "a log"}
    result |= {f"{model}/{name}": "x" for model in ("dlrm", "lum") for name in ("commit", "command")}
    result |= {"protocol": reproduce.protocol(config, is_warm_up=True)}
    for case in cases:
        result |= reproduce._figures(case, figures)
    text = reproduce.markdown("5", cases, result, "table5-warm-up-simulator")
    assert "| LUM (param + feature) | 0.7500 | – | – | 0.7794 |" in text
    assert f"| Imp. over DLRM (scratch) | +0.0300, {report_gains.NO_SCORES} |" in text
    assert (
        "| DLRM (scratch) | 0.5000 | – | – | 0.7338 |" in text
        and "| the online model itself | 0.7000 | – | – |  |" in text
    )
    assert "the earliest 80% of the training events" in text and "segment_category" in text


def test_the_warm_up_rows_on_the_simulator(tiny_words, stages_in_forks, tmp_path):
    """Without the rows of the plain ranker, which are of the same kind."""
    words = [*tiny_words, f"runs_dir={tmp_path}/runs", "run=study", "pipeline.seeds=[0]", "data.split.kind=time"]
    config = reproduce.read_config("simulator", "-warm-up", words)
    config = reproduce.only(config, [case for case in reproduce.WARM_UP if case.knowledge == "both"])
    result = warm_up.run(config)
    assert all(0 < result[f"rank/dlrm/both/{row}/auc"] < 1 for row in warm_up.ROWS) and 0 < result["online/auc"] < 1

    runs = tmp_path / "runs" / "study"
    data = PreparedData.open(runs / "prepare")
    before, study = training_rows(data, None, [0, 0.8]), training_rows(data, None, [0.8, 1])
    knowledge = Knowledge.open(runs / "query", data)
    assert len(before) and data.timestamp[before].max() < data.timestamp[study].min()
    assert len(before) + len(study) == (data.split == TRAIN).sum()
    assert data.timestamp[study].min() > knowledge.learnt_until >= data.timestamp[before].max()
    stored = {name: load(runs / name / "config.yaml", []).rank for name in ("online", "rank-dlrm-both-param-s0")}
    assert (stored["online"].time_window, stored["online"].select) == ([0, 0.8], "")
    assert stored["rank-dlrm-both-param-s0"].time_window == [0.8, 1]
    audit = json.loads((runs / "rank-dlrm-both-param-s0" / "warm_start.json").read_text())
    first = next(row for row in audit["rows"] if row["target"] == warm_up.FIRST_LAYER)
    assert first["columns_unused"] > 0 and first["columns_new"] > 0 and first["new_columns"] == "zero"
    # With learning rates of 0 the row is the online model, answers and all.
    still = ["run=study/still", "rank.train.optimizer.table_lr=0", "rank.train.optimizer.dense_lr=0"]
    untrained = STAGES["rank"].run(load(runs / "rank-dlrm-both-param_feature-s0" / "config.yaml", still))
    assert untrained["auc"] == pytest.approx(result["online/auc"], abs=1e-9)
