"""The search of settings: its draws, its plan, and one run whose winners a pipeline takes."""

import dataclasses
import json

import pytest
import yaml

from lumrec.experiments import pipeline
from lumrec.experiments.config import load
from lumrec.experiments.settings import TuneConfig, draw
from lumrec.experiments.tune import plan, run

SPACE = ["rank.dropout=0.0|0.3", "rank.train.optimizer.table_lr=0.05|0.1|0.2"]


def test_trials_are_distinct_seeded_and_begin_with_the_config_as_it_stands():
    trials = draw(TuneConfig(trials=7, seed=3, space=SPACE))
    assert trials[0] == []
    assert sorted(trials[1:]) == sorted(
        [f"rank.dropout={a}", f"rank.train.optimizer.table_lr={b}"] for a in ("0.0", "0.3") for b in (0.05, 0.1, 0.2)
    )
    assert draw(TuneConfig(trials=4, seed=3, space=SPACE)) == draw(TuneConfig(trials=4, seed=3, space=SPACE))
    assert draw(TuneConfig(trials=4, seed=3, space=SPACE)) != draw(TuneConfig(trials=4, seed=4, space=SPACE))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trials": 8, "space": SPACE}, "tune.trials is 8; expected at most 7: the config itself and the 6"),
        ({"trials": 0}, "tune.trials is 0"),
        ({"space": ["rank.dropout"]}, "got 'rank.dropout'; expected key=a|b|c"),
        ({"space": ["rank.dropout=0.1|0.1"]}, "with different values"),
    ],
)
def test_a_space_that_cannot_be_drawn_from(settings, says):
    with pytest.raises(ValueError) as error:
        draw(TuneConfig(**settings))
    assert says in str(error.value)


def test_base_and_knowledge_get_the_same_trials_and_none_reads_the_test_part(tiny_words, tmp_path):
    config = load(None, [*tiny_words, f"runs_dir={tmp_path}", "run=all", "pipeline.rankers=[din, dlrm]"])
    config = dataclasses.replace(config, pipeline=dataclasses.replace(config.pipeline, knowledge=["none", "both"]))
    words = draw(TuneConfig(trials=3, space=SPACE))
    trials = [stage for stage in plan(config, words) if stage.name.startswith("trial-")]
    assert len(trials) == 2 * 2 * 3
    assert not any(stage.config.rank.test for stage in trials)
    settings = {}
    for stage in trials:
        rank, (_, ranker, kind, place) = stage.config.rank, stage.name.split("-")
        settings.setdefault(place, set()).add((rank.dropout, rank.train.optimizer.table_lr))
        assert (rank.model, rank.knowledge, stage.needs) == (ranker, kind, ("prepare" if kind == "none" else "query",))
    assert all(len(of_place) == 1 for of_place in settings.values())


def test_a_search_ends_with_settings_that_the_pipeline_takes(tiny_words, stages_in_forks, tmp_path, capsys):
    words = [*tiny_words, f"runs_dir={tmp_path}", "run=all", "pipeline.knowledge=[none]", "pipeline.seeds=[0, 1]"]
    search = [*words, "tune.trials=3", 'tune.space=["rank.train.optimizer.dense_lr=1e-5|1e-2"]']
    result = run(load(None, search))
    trials = json.loads((tmp_path / "all" / "trials.json").read_text())
    assert [trial["trial"] for trial in trials] == [0, 1, 2]
    assert not any("auc" in trial for trial in trials)
    assert result["din/none/valid/auc"] == max(trial["valid/auc"] for trial in trials)
    assert result["din/none/first/valid/auc"] == trials[0]["valid/auc"]
    told = capsys.readouterr().out
    assert told.count("best ") == 1

    tuned = tmp_path / "tuned.yaml"
    tuned.write_text((tmp_path / "all" / "tuned.yaml").read_text())
    best = yaml.safe_load(tuned.read_text())["pipeline"]["tuned"]["din/none"]
    assert best == trials[int(result["din/none/trial"])]["overrides"]
    config = load(tuned, words)
    stages = {stage.name: stage.config.rank for stage in pipeline.plan(config)}
    expected = float(best[0].split("=")[1]) if best else config.rank.train.optimizer.dense_lr
    assert stages["rank-din-none-s1"].train.optimizer.dense_lr == expected


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("{dim: [rank.dropout=0.1]}", "pipeline.tuned.dim: expected a ranker"),
        ("{din/none: [model.dim=3]}", "got 'model.dim=3'; expected settings of rank"),
        ("{din: [rank.model=dlrm]}", "got 'rank.model=dlrm'"),
    ],
)
def test_tuned_settings_that_cannot_work(words, says):
    with pytest.raises(ValueError) as error:
        pipeline.check(load(None, [f"pipeline.tuned={words}"]))
    assert says in str(error.value)
