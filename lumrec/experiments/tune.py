"""Tunes each ranker with the same effort without and with knowledge: a seeded random search.

Every ranker with every kind of knowledge gets the same trials, each a full training with one seed. The best is chosen
on the validation part; no trial reads the test part. The stages before are the pipeline's, in the same run folder::

    runs/<run>/  prepare/ lum-0of2/ lum-1of2/ query/  trial-din-none-0/ …  trials.json tuned.yaml
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from lumrec.experiments import pipeline
from lumrec.experiments.config import Config
from lumrec.experiments.pipeline import say, write_json
from lumrec.experiments.plan import PlannedStage
from lumrec.experiments.report_table import METRICS
from lumrec.experiments.settings import draw
from lumrec.run.config_file import with_overrides
from lumrec.run.files import write_atomically
from lumrec.run.printable import text_table
from lumrec.run.typed_yaml import dump


def run(config: Config) -> dict[str, float | str]:
    """Runs the trials that are not finished yet; returns the best trial of each ranker and kind of knowledge.

    Keys for each "<ranker>/<knowledge>": "…/trial" (index of the best), "…/valid/<metric>" of the best trial and
    "…/first/valid/<metric>" of the first. Writes trials.json (overrides and metrics of all trials) and tuned.yaml, a
    config's `pipeline.tuned` section. Raises UserError for a space that cannot be drawn from, and like the pipeline.
    """
    overrides = draw(config.tune)
    pipeline.check(config)
    config, note = pipeline.resolve_dataset(config)
    folder = Path(config.runs_dir) / config.run
    stages = plan(config, overrides)
    pipeline.make(config, stages, note)

    trials = [_trial(stage, overrides, config) for stage in stages if stage.variant]
    write_json(folder / "trials.json", trials)
    result: dict[str, float | str] = {}
    tuned = {}
    for name in dict.fromkeys(trial["name"] for trial in trials):
        of_name = [trial for trial in trials if trial["name"] == name]
        best = max(of_name, key=lambda trial: _goodness(trial, config.rank.select))
        tuned[name] = best["overrides"]
        result[f"{name}/trial"] = best["trial"]
        for origin, trial in (("", best), ("first/", of_name[0])):
            result |= {f"{name}/{origin}{key}": value for key, value in trial.items() if key.startswith("valid/")}
    text = dump({"pipeline": {"tuned": tuned}}, width=120)
    head = f"# Chosen by {config.rank.select} of the validation part among {config.tune.trials} trials each, seed "
    write_atomically(folder / "tuned.yaml", f"{head}{config.pipeline.seeds[0]} (apps/tune.py).\n{text}")
    say(f"\n{table(trials, tuned)}\n\nevery trial  {folder / 'trials.json'}\nthe winners  {folder / 'tuned.yaml'}")
    return result


def plan(config: Config, overrides: list[list[str]]) -> list[PlannedStage]:
    """The pipeline's stages up to the knowledge, and the trials instead of its rankers."""
    one_seed = dataclasses.replace(config.pipeline, seeds=config.pipeline.seeds[:1])
    stages = []
    for stage in pipeline.plan(dataclasses.replace(config, pipeline=one_seed)):
        if stage.app != "rank":
            stages.append(stage)
            continue
        ranker, kind = stage.ranker, stage.knowledge
        for index, of_trial in enumerate(overrides):
            name = f"trial-{ranker}-{kind}-{index}"
            trial = with_overrides(stage.config, [*of_trial, "rank.test=false"], origin="tune.space")
            trial = dataclasses.replace(trial, run=f"{config.run}/{name}", pipeline=config.pipeline)
            stages.append(dataclasses.replace(stage, name=name, config=trial, variant=str(index)))
    return stages


def table(trials: list[dict[str, Any]], tuned: dict[str, list[str]]) -> str:
    """The trials as text for the terminal, with the best ones marked."""
    rows = [["", "", *METRICS.values(), "of the validation part"]]
    for trial in trials:
        figures = [f"{trial[f'valid/{metric}']:.4f}" for metric in METRICS]
        mark = "best " if tuned[trial["name"]] == trial["overrides"] else ""
        settings = " ".join(word.removeprefix("rank.").removeprefix("train.") for word in trial["overrides"])
        rows.append([trial["name"], str(trial["trial"]), *figures, mark + (settings or "the unchanged config")])
    return "\n".join(text_table(rows))


def _trial(stage: PlannedStage, overrides: list[list[str]], config: Config) -> dict[str, Any]:
    ranker, kind, index = stage.ranker, stage.knowledge, int(stage.variant)
    # Settings that the config already has for this ranker are part of every trial, and the best trial keeps them.
    before = [*config.pipeline.tuned.get(ranker, []), *config.pipeline.tuned.get(f"{ranker}/{kind}", [])]
    keys = {word.partition("=")[0] for word in overrides[index]}
    kept = [word for word in before if word.partition("=")[0] not in keys]
    figures = {key: value for key, value in pipeline.read_result(stage).items() if key.startswith("valid/")}
    return {
        "name": f"{ranker}/{kind}",
        "trial": index,
        "overrides": [*kept, *overrides[index]],
        **figures,
        "wall_s": pipeline.read_result(stage)["wall_s"],
    }


def _goodness(trial: dict[str, Any], select: str) -> float:
    sign = -1.0 if select.startswith("-") else 1.0
    value = trial.get(f"valid/{select.removeprefix('-')}")
    return -math.inf if value is None else sign * value
