"""The pipeline: its plan, what is run again, and one run from a simulated log to the report."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import load
from lumrec.experiments.jobs import JobFailed
from lumrec.experiments.pipeline import (
    add_up,
    check,
    collect,
    differences,
    discard,
    make,
    pending,
    resolve_dataset,
    run,
)
from lumrec.experiments.plan import plan, stage_overrides
from lumrec.experiments.report_page import write_page
from lumrec.experiments.report_table import comparison, rows, what_next
from lumrec.metrics.compare import Scores, read_scores, write_scores
from lumrec.run.config_file import with_overrides
from lumrec.run.errors import UserError
from lumrec.run.typed_yaml import to_yaml
from lumrec.run.unread import without_effect
from lumrec.stages.registry import STAGES

SHOP = Path(__file__).parents[2] / "examples" / "shop"


@pytest.fixture
def config(tiny_words, tmp_path):
    words = [f"runs_dir={tmp_path}", "run=all", "pipeline.rankers=[din, dlrm]", "pipeline.seeds=[0, 1]", "seed=5"]
    return load(None, [*tiny_words, *words])


def finish(stage, **result):
    stage.path.mkdir(parents=True, exist_ok=True)
    (stage.path / "config.yaml").write_text(to_yaml(stage.config))
    (stage.path / "versions.json").write_text(json.dumps({"stage": stage.app}))
    (stage.path / "result.json").write_text(json.dumps(result))


def test_plan_covers_every_combination_in_an_order_that_works(config):
    stages = plan(config)
    names = [stage.name for stage in stages]
    assert names[:4] == ["prepare", "lum-0of2", "lum-1of2", "query"]
    assert len(names) == len(set(names)) == 4 + 2 * 4 * 2
    for place, stage in enumerate(stages):
        assert set(stage.needs) <= set(names[:place])
    by_name = {stage.name: stage for stage in stages}
    assert by_name["rank-din-none-s1"].needs == ("prepare",)
    ranker = by_name["rank-dlrm-both-s1"]
    assert ranker.needs == ("query",)
    assert (ranker.config.seed, ranker.config.rank.model, ranker.config.rank.knowledge) == (1, "dlrm", "both")
    assert ranker.config.inputs.knowledge == "all/query"
    assert by_name["query"].config.inputs.lums == ["all/lum-0of2", "all/lum-1of2"]
    assert by_name["lum-1of2"].config.fold == "1/2"
    assert by_name["lum-1of2"].config.seed == 5


def test_words_of_a_stage_give_its_config(config, tmp_path):
    base = tmp_path / "config.yaml"
    base.write_text(to_yaml(config))
    for stage in plan(config):
        assert load(base, stage_overrides(stage, config)) == stage.config


def test_a_stage_has_the_settings_of_its_ranker_and_no_others(config):
    words = ["pipeline.rankers=[din, sim]", "rank.sim.search=hard", "rank.knowledge_dim=8"]
    words += ["pipeline.tuned={din: [rank.knowledge_dropout=0.5, rank.din.softmax=true]}"]
    config = with_overrides(config, words, origin="test")
    check(config)
    for stage in plan(config):
        if stage.app == "rank":
            rank, is_base = stage.config.rank, stage.knowledge == "none"
            assert rank.sim.search == ("hard" if stage.ranker == "sim" else "soft")
            assert rank.knowledge_dim == (32 if is_base or stage.knowledge == "matching" else 8)
            assert (rank.knowledge_dropout, rank.din.softmax) == (
                (0.0 if is_base else 0.5, True) if stage.ranker == "din" else (0.0, False)
            )
            assert without_effect(rank) == {}


def test_without_knowledge_no_lum_is_trained(config):
    alone = dataclasses.replace(config, pipeline=dataclasses.replace(config.pipeline, knowledge=["none"], seeds=[0]))
    assert [stage.name for stage in plan(alone)] == ["prepare", "rank-din-none-s0", "rank-dlrm-none-s0"]


def test_lum_tables_are_a_variant_of_their_own_and_never_the_base(config):
    settings = dataclasses.replace(config.pipeline, knowledge=["none", "tables", "both"], rankers=["din"], seeds=[0])
    stages = plan(dataclasses.replace(config, pipeline=settings, rank=dataclasses.replace(config.rank, tables="lum")))
    ranks = {stage.name: stage for stage in stages if stage.app == "rank"}
    read = {name: (stage.config.rank.knowledge, stage.config.rank.tables) for name, stage in ranks.items()}
    assert read == {
        "rank-din-none-s0": ("none", "fresh"),
        "rank-din-tables-s0": ("none", "lum"),
        "rank-din-both-s0": ("both", "lum"),
    }
    assert ranks["rank-din-tables-s0"].needs == ("lum-0of2", "lum-1of2")
    assert ranks["rank-din-tables-s0"].config.inputs.lums == ["all/lum-0of2", "all/lum-1of2"]


def test_one_fold_is_a_lum_of_all_users(config):
    stages = plan(dataclasses.replace(config, pipeline=dataclasses.replace(config.pipeline, folds=1)))
    assert [stage.name for stage in stages][:3] == ["prepare", "lum", "query"]
    assert stages[1].config.fold == ""


def test_finished_stages_are_not_run_again(config):
    stages = plan(config)
    assert set(pending(stages, overwrite=False)) == {stage.name for stage in stages}
    for stage in stages[:3]:
        finish(stage)
    left = pending(stages, overwrite=False)
    assert "lum-0of2" not in left
    assert left["query"] is False
    for stage in stages:
        finish(stage)
    assert pending(stages, overwrite=False) == {}
    shutil.rmtree(stages[1].path)  # as one does who wants it again: what read it is to be made again too
    readers = {stage.name: True for stage in stages[3:] if "none" not in stage.name}
    assert pending(stages, overwrite=True) == {"lum-0of2": False, **readers}


def test_other_settings_are_refused_or_replace_what_they_touch(config):
    for stage in plan(config):
        finish(stage)
    changed = dataclasses.replace(config, query=dataclasses.replace(config.query, stride=7))
    with pytest.raises(ValueError, match=r"all/query was made with other settings or files \(query.stride: 0 → 7\)"):
        pending(plan(changed), overwrite=False)
    again = pending(plan(changed), overwrite=True)
    assert {name.split("-")[0] for name in again} == {"query", "rank"}
    assert not any("none" in name for name in again)
    assert all(again.values())


def test_your_log_has_changed_and_nothing_of_the_old_one_counts(tmp_path, capsys, stages_in_forks):
    events = shutil.copy(SHOP / "clicks.csv", tmp_path)
    words = [f"data.log.events={events}", f"data.log.items={SHOP / 'products.csv'}", f"runs_dir={tmp_path}", "run=all"]
    config = load(SHOP / "shop.yaml", words)
    stages = plan(config)
    prepare(stages[0].config, stages[0].path)
    for stage in stages[1:]:
        finish(stage)
    assert pending(stages, overwrite=False) == {}
    text = Path(events).read_text()
    Path(events).unlink()
    assert pending(stages, overwrite=False) == {}
    assert "whether the log has changed is not known" in capsys.readouterr().out
    Path(events).write_text(text.replace("product,", "thing,", 1))
    with pytest.raises(ValueError, match=r"all/prepare was made with other settings or files \(file clicks.csv: chang"):
        pending(stages, overwrite=False)
    # Killed or, as here, failed before everything is made again: no stage that read the old log may look finished.
    with pytest.raises(JobFailed, match="has no column 'product'"):
        make(dataclasses.replace(config, overwrite=True), stages, "a changed log")
    assert pending(stages, overwrite=False) == {stage.name: False for stage in stages}


def test_a_stage_that_another_process_writes_is_not_made_again(config):
    stage = next(stage for stage in plan(config) if stage.app == "pretrain")
    finish(stage)
    hold = "import pathlib, sys; from lumrec.run.folder import RunFolder\n"
    hold += "folder = RunFolder.locked(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(stage.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"is being written by process {holder.pid}"):
            discard(stage)
        holder.stdin.close()
    assert (stage.path / "result.json").exists()
    discard(stage)
    assert {file.name for file in stage.path.iterdir()} == {".lock", ".clearing"}


def test_what_other_stages_or_strangers_made_is_not_removed(config):
    stages = {stage.app: stage for stage in plan(config)}
    for name in ("prepare", "query"):
        stages[name].path.mkdir(parents=True)
        (stages[name].path / "config.yaml").write_text("years: of work")
        with pytest.raises(ValueError, match="is never replaced|holds no prepared data"):
            discard(stages[name])
        assert (stages[name].path / "config.yaml").exists()


@pytest.mark.parametrize("files", ["manifest.json", "thesis.txt", "config.yaml versions.json result.json"])
@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_folder_of_something_else_is_not_written_over(config, tmp_path, files, overwrite):
    folder = tmp_path / "all"
    folder.mkdir()
    for name in files.split():
        (folder / name).write_text("run: mine\n")
    config = with_overrides(config, [f"overwrite={overwrite}"], origin="test")
    with pytest.raises(UserError, match=f"all was not made by a pipeline .it holds {files.split()[0]}"):
        make(config, plan(config), "")
    assert {file.name: file.read_text() for file in folder.iterdir()} == dict.fromkeys(files.split(), "run: mine\n")


def test_published_answers_and_prepared_data_stay_until_they_are_replaced(config, tiny_prepared):
    stages = {stage.app: stage for stage in plan(config)}
    shutil.copytree(tiny_prepared.path, stages["prepare"].path)
    finish(stages["query"])
    (stages["query"].path / "manifest.json").write_text("{}")
    for name in ("prepare", "query"):
        discard(stages[name])
        assert not (stages[name].path / "result.json").exists()
    assert PreparedData.open(stages["prepare"].path).num_users == tiny_prepared.num_users
    assert (stages["query"].path / "manifest.json").read_text() == "{}"


def test_settings_of_other_stages_do_not_count(config):
    stage = plan(config)[0]
    finish(stage)
    other = dataclasses.replace(stage.config, rank=dataclasses.replace(config.rank, dropout=0.9), threads=3)
    assert differences(dataclasses.replace(stage, config=other)) == []


def test_a_feature_that_is_gone_is_another_setting(config):
    """What is missing now counts as much as what is new: a finished stage without it must not stand."""
    words = ["schema.features={genre: {role: item}, hour: {role: context}}"]
    with_hour = with_overrides(config, words, origin="test")
    for stage in plan(with_hour):
        finish(stage)
    assert pending(plan(with_hour), overwrite=False) == {}
    without = with_overrides(config, ["schema.features={genre: {role: item}}"], origin="test")
    with pytest.raises(ValueError, match=r"all/prepare was made with other settings or files \(schema.features.hour"):
        pending(plan(without), overwrite=False)
    assert set(pending(plan(without), overwrite=True)) == {stage.name for stage in plan(without)}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("pipeline.rankers=[dim]", "got 'dim' (did you mean 'sim'?), expected one of din, dlrm"),
        ("pipeline.knowledge=[all]", "got 'all', expected one of none, tables, direct"),
        ("pipeline.dataset=ml", "pipeline.dataset: got 'ml'"),
        ("pipeline.seeds=[]", "pipeline.seeds: got [], expected one or more"),
        ("pipeline.seeds=[1, 1]", "pipeline.seeds: got [1, 1], expected one or more, without repetitions"),
        ("pipeline.folds=0", "pipeline.folds: got 0, expected at least 1"),
        ("pipeline.job_options={pretain: [j=2x8]}", "pipeline.job_options.pretain: expected one of all, prepare"),
        ("pipeline.job_options={rank: [--gpu 8]}", "pipeline.job_options.rank: got '--gpu 8'; expected name=value"),
        ("pipeline.job_options={rank: [config=a.yaml]}", "got 'config=a.yaml'; expected name=value, such as j=2x8"),
        ("fold=0/2", "fold=0/2 is for apps/pretrain.py"),
    ],
)
def test_settings_that_cannot_work(word, says):
    with pytest.raises(ValueError) as error:
        check(load(None, [word]))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("query.conditions=[{feedbck: like}]", "query.conditions: got 'feedbck' (did you mean 'feedback'?)"),
        ("model.conditions=[mood]", "model.conditions names ['mood']"),
        ("pretrain.contrast.feature=mood", "pretrain.contrast.feature: got 'mood'"),
        ("pretrain.contrast.feature=query", "'query' is multi-valued"),
        ("pretrain.evaluate.condition={mood: sad}", "pretrain.evaluate.condition: got 'mood'"),
        ("pretrain.train.optimizer.table_lrs={itm: 0.1}", "table_lrs: got 'itm'"),
        ("rank.leave_out=[mood]", "rank.leave_out: got 'mood'"),
        ("pipeline.rankers=[twin] rank.twin.category=mood", "rank.twin.category: got 'mood'"),
        ("rank.sim.search=hard", "rank.sim.search=hard has no effect with pipeline.rankers=[din, dlrm]: remove"),
        ("pipeline.knowledge=[none,tables] rank.knowledge_dim=9", "no effect with pipeline.knowledge=[none, tables]"),
        ("pipeline.tuned={din: [rank.sim.search=hard]}", "rank.sim.search=hard has no effect with rank.model=din"),
        ("pipeline.tuned={din/none: [rank.knowledge_dim=9]}", "rank.knowledge_dim=9 has no effect with rank.knowledge"),
        ("inputs.lums=[a, b]", "inputs.lums=[a, b] has no effect in the pipeline"),
        ("rank.model=twin", "rank.model=twin has no effect in the pipeline: pipeline.rankers=[din, dlrm] decides"),
        ("pipeline.knowledge=[none,direct] rank.knowledge=both", "rank.knowledge=both has no effect in the pipeline"),
        ("query.stride=32", "query.stride: got 32, expected less than the LUM's model.max_events=32"),
        ("pipeline.tuned={din: [rank.droput=0]}", "unknown key 'rank.droput'"),
        ("pipeline.tuned={din: [rank.dropout=2]}", "rank.dropout: got 2.0"),
    ],
)
def test_what_a_later_stage_cannot_do_is_found_before_the_first(config, word, says):
    with pytest.raises(UserError) as error:
        run(with_overrides(config, re.split(r" (?=rank\.)", word), origin="test"))
    assert says in str(error.value)
    assert list(Path(config.runs_dir).iterdir()) == []


def test_values_are_checked_once_the_data_are_prepared(config):
    stages = plan(config)
    prepare(stages[0].config, stages[0].path)
    for word, says in (
        ("query.conditions=[{feedback: liked}]", "'liked' does not occur in the training part (did you mean 'like'?)"),
        ("pretrain.evaluate.condition={feedback: liked}", "'liked' does not occur"),
        ("query.conditions=[{category: 'top 9'}, {category: '*'}]", "query.max_conditions is 4"),
    ):
        wrong = with_overrides(config, [word, "query.max_conditions=4"], origin="test")
        with pytest.raises(UserError) as error:
            run(wrong)
        assert says in str(error.value)
    assert {path.name for path in (Path(config.runs_dir) / "all").iterdir()} == {"prepare"}


def test_without_test_events_no_stage_is_begun(config):
    config = with_overrides(config, ["data.split.fractions=[0.9, 0.1, 0.0]"], origin="test")
    stages = plan(config)
    prepare(stages[0].config, stages[0].path)
    with pytest.raises(UserError, match="the test part has no events to measure by; choose another data.split"):
        run(config)


def test_what_a_failed_stage_left_does_not_stop_the_corrected_command(config):
    stage = plan(config)[1]
    stage.path.mkdir(parents=True)
    wrong = with_overrides(stage.config, ["pretrain.train.optimizer.dense_lr=9"], origin="test")
    for name, text in (("config.yaml", to_yaml(wrong)), ("metrics.jsonl", "{}\n"), ("non-finite-step-1.pt", "")):
        (stage.path / name).write_text(text)
    assert differences(stage) == []
    (stage.path / "checkpoints/step-00000001").mkdir(parents=True)
    assert differences(stage) == ["pretrain.train.optimizer.dense_lr: 9.0 → 0.001"]


def test_auto_falls_back_to_the_simulator_and_says_so(tmp_path, capsys):
    config = load(None, ["name=quick", "pipeline.dataset=auto", f"data.path={tmp_path / 'nowhere'}"])
    resolved, note = resolve_dataset(config)
    assert (resolved.data.source, resolved.run) == ("simulator", "quick-simulator")
    assert "SIMULATED LOG" in note
    assert "MovieLens-1M is not available here" in capsys.readouterr().out


def test_auto_takes_movielens_where_it_is(ml1m):
    resolved, note = resolve_dataset(load(None, ["name=quick", "pipeline.dataset=auto", f"data.path={ml1m}"]))
    assert (resolved.data.source, resolved.run) == ("movielens-1m", "quick-ml-1m")
    assert str(ml1m) in note


FACTS = {
    "dataset": "simulator",
    "events": 9,
    "users": 3,
    "items": 4,
    "train_events": 5,
    "valid_events": 2,
    "test_events": 2,
}


def finish_all(config):
    stages = plan(config)
    for stage in stages:
        if stage.app == "prepare":
            finish(stage, **FACTS, best_auc=0.9)
        elif stage.app == "pretrain":
            finish(stage, **{"ndcg@10": 0.1 if "0of2" in stage.name else 0.3, "hr@10": None})
        elif stage.app == "query":
            finish(stage, hazard="cross_fit", dataset="simulator")
        else:
            gain = 0.02 * (stage.config.rank.knowledge == "both")
            finish(stage, auc=0.7 + gain + 0.01 * stage.config.seed, gauc=None, log_loss=0.5, knowledge="x")
        (stage.path / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0, "valid/auc": null}\n'
        )
    return stages


def test_result_holds_means_and_deviations_over_seeds(config):
    result = collect(config, finish_all(config))
    assert result["dataset"] == "simulator"
    assert result["rank/din/none/auc"] == pytest.approx(0.705)
    assert result["rank/din/none/auc_sd"] == pytest.approx(0.01 / math.sqrt(2))
    assert result["lum/ndcg@10"] == pytest.approx(0.2)
    assert "lum/hr@10" not in result
    assert "rank/din/none/gauc" not in result
    assert all(isinstance(value, (int, float, str)) for value in result.values())


def test_table_and_page_show_the_figures_and_what_is_missing(config):
    stages = finish_all(config)
    result = {**collect(config, stages), "wall_s/prepare": 3.0}
    table = comparison(config, result)
    assert "0.7250 ± 0.0071 (+0.0200)" in table
    assert "cross-fitted over 2 folds" in table
    assert [row.knowledge for row in rows(config, result)] == ["none", "direct", "matching", "both"] * 2
    assert "–" in table
    assert "best possible AUC 0.9000" in table
    folder = Path(config.runs_dir) / config.run
    (folder / "config.yaml").write_text(to_yaml(config))
    page = write_page(folder, config, stages, result, "a <log>").read_text()
    assert page.count("<svg") == 2 + 2  # AUC and log loss, and the training loss of rankers and LUMs; no gAUC here
    assert ">± 0.0071<" in page and "+0.0200" in page
    assert "a &lt;log&gt;" in page
    assert "simulated clicks" in page
    assert set(re.findall(r"https?://[\w.]+", page)) == {"http://www.w3.org"}  # the names of SVG


def keep_scores(config, *, better: float, users: int = 60):
    """Test rows of each ranker; with both kinds of knowledge the scores follow the labels by so much more."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(users), 40)
    label = (rng.random(len(user)) < 0.4).astype(np.int8)
    for stage in plan(config):
        if stage.app == "rank":
            noise = np.random.default_rng(stage.config.seed).normal(size=len(user))
            signal = 1.0 + better * (stage.config.rank.knowledge == "both")
            write_scores(stage.path, Scores(np.arange(len(user)), label, user, signal * label + noise - 0.9))


@pytest.mark.parametrize(
    ("better", "users", "note", "verdict"),
    [
        (0.5, 60, "", "better"),
        (-0.5, 60, "", "worse"),
        (0.0, 60, "", "within noise"),
        (0.5, 20, "", "too few test rows to say"),
        (0.5, 60, "4 steps of training are too few to learn from", "trained in too few steps to say"),
    ],
)
def test_each_gain_has_its_interval_and_a_verdict_in_words(config, better, users, note, verdict):
    stages = finish_all(config)
    keep_scores(config, better=better, users=users)
    for stage in stages:
        if note and stage.name == "rank-din-none-s1":
            finish(stage, auc=0.7, log_loss=0.5, note=note)
    result = {**collect(config, stages), "wall_s/prepare": 3.0}
    key = "rank/din/both/auc"
    assert result[f"{key}_verdict"] == verdict
    assert result[f"{key}_gain_low"] <= result[f"{key}_gain"] <= result[f"{key}_gain_high"]
    assert result["rank/test_rows"] == users * 40 and result["rank/test_users"] == users
    told = comparison(config, result)
    assert f"{users * 40:,} test rows of {users} users" in told
    assert re.search(rf"DIN \+ both +AUC +[+-]0\.\d+ \[[+-].*\] +± 0\.\d+ over seeds +{verdict}", told), told
    folder = Path(config.runs_dir) / config.run
    (folder / "config.yaml").write_text(to_yaml(config))
    page = write_page(folder, config, stages, result, "a log").read_text()
    plain = {"better": "gains 0.", "worse": "loses 0.", "within noise": "no more than chance."}
    said = plain.get(verdict, f"cannot be judged ({verdict}).")
    assert page.index(said) < page.index("<h2>Figures") < page.index(f'<b class="{verdict}">{verdict}</b>')
    if note:
        assert f"! rank-din-none-s1: {note}" in told and f"rank-din-none-s1: {note}" in page


def test_a_base_that_is_chance_is_named(config):
    stages = finish_all(config)
    keep_scores(config, better=0.0)
    for stage in stages:
        if stage.app == "rank" and stage.config.rank.knowledge == "none":
            scores = read_scores(stage.path)
            write_scores(stage.path, scores._replace(logit_N=-scores.logit_N))
    assert collect(config, stages)["rank/din/both/auc_verdict"] == "the base is no better than chance"


def test_what_to_run_next_is_for_the_log_at_hand(config):
    assert "prepare.py --check" in what_next(Path("runs/x"), Path("report.html"), config)
    on_log = what_next(Path("runs/x"), Path("report.html"), with_overrides(config, ["data.source=log"], origin="test"))
    assert "apps/show_user.py --config <this config>" in on_log and "--check" not in on_log


def test_wall_time_adds_up_over_calls(config, tmp_path):
    stages = plan(config)
    total, by_stage = add_up(tmp_path, stages, {stage.name: 1.0 for stage in stages}, 10.0)
    assert total == 10.0
    assert len(by_stage) == len(stages)
    total, by_stage = add_up(tmp_path, stages, {"query": 5.0}, 6.0)
    assert total == 16.0
    assert by_stage["query"] == 5.0


def test_a_stage_as_a_torchx_job(tiny_words, tmp_path, capsys):
    words = [*tiny_words, f"runs_dir={tmp_path}", "run=all", "pipeline.knowledge=[none]", "rank.train.epochs=1"]
    config = load(None, words)
    prepared = plan(config)[0]
    prepare(prepared.config, prepared.path)
    result = run(config)
    told = capsys.readouterr().out
    assert "2 stages, 1 finished before" in told and "rank-din-none-s0: done in" in told
    assert 0 < result["rank/din/none/auc"] < 1 and result["stages_run"] == 1
    assert "rank finished: " in (tmp_path / "all" / "logs" / "rank-din-none-s0.log").read_text()


def test_from_a_simulated_log_to_the_report(tiny_words, stages_in_forks, tmp_path, capsys):
    config = load(None, [*tiny_words, f"runs_dir={tmp_path}", "run=all", "pipeline.knowledge=[none, both]"])
    result = run(config)
    told = capsys.readouterr().out
    assert "DIN base" in told
    assert "+ both" in told
    assert "One seed: the variation between seeds is not measured." in told
    stored = json.loads((tmp_path / "all" / "result.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert stored["dataset"] == "simulator"
    assert 0 < stored["rank/din/none/auc"] < 1
    assert 0 < stored["rank/din/both/log_loss"]
    assert stored["query/hazard"] == "cross_fit"
    assert stored["stages_run"] == 6
    assert "Cross-fitted over users" in (tmp_path / "all" / "report.html").read_text()

    user = PreparedData.open(tmp_path / "all" / "prepare").user_keys()[0]
    assert STAGES["show_user"].run(
        load(None, [*tiny_words, f"runs_dir={tmp_path}", "run=all", f"show_user.user={user}"])
    )
    assert f"user {user}: " in capsys.readouterr().out

    again = run(config)
    assert "6 finished before" in capsys.readouterr().out
    assert again["stages_run"] == 0
    figures = [name for name in stored if not name.startswith(("stages_run", "wall_s"))]
    assert all(again[name] == stored[name] for name in figures)
