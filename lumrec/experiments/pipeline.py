"""Runs all steps: prepare → LUM per fold → query → rankers without and with knowledge → result and report.

    runs/<run>/  prepare/ lum-0of2/ lum-1of2/ query/ rank-din-none-s0/ …  logs/  config.yaml result.json report.html

Each stage is a separate TorchX job. Stages that are finished with the same settings are not run again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lumrec.data.open_log import schema_in_use
from lumrec.data.prepare import changed_files, check_replaceable
from lumrec.data.prepared import PreparedData
from lumrec.data.sources import movielens
from lumrec.data.sources.raw_log import DataSetMissing
from lumrec.experiments.config import Config
from lumrec.experiments.jobs import LOCAL, Job, check_job, run_jobs, torchx_command
from lumrec.experiments.plan import PlannedStage, by_row, check_read_by_some, plan, read_result, stage_overrides
from lumrec.experiments.report_gains import gains
from lumrec.experiments.report_page import write_page
from lumrec.experiments.report_table import comparison, what_next
from lumrec.run import limits
from lumrec.run.changes import config_differences
from lumrec.run.config_file import as_text
from lumrec.run.errors import UserError
from lumrec.run.files import read_json, write_atomically
from lumrec.run.folder import RunFolder, check_made_by, clear, has_work, names_in
from lumrec.run.printable import say
from lumrec.run.typed_yaml import read, to_yaml
from lumrec.stages.query import SERVED
from lumrec.stages.registry import STAGES
from lumrec.warm_start.config import WarmStartConfig

MEASURED = ("auc", "gauc", "log_loss")


def run(config: Config) -> dict[str, float | str]:
    """Runs the stages that are not finished yet, and returns the pipeline's flat result.json.

    Keys: "rank/<ranker>/<knowledge>/<metric>" (means over seeds, and "…/auc_sd"), "lum/<metric>" (means over folds),
    "dataset", "wall_s/<stage>", … Raises UserError for settings that cannot work and for a run folder with other
    settings; jobs.JobFailed where a stage fails.
    """
    check(config)
    if given := [f"inputs.{key}={as_text(value)}" for key, value in vars(config.inputs).items() if value]:
        raise UserError(
            f"{given[0]} has no effect in the pipeline, whose stages read each other's results: leave it out, or run "
            "the stages one by one"
        )
    config, note = resolve_dataset(config)
    folder = Path(config.runs_dir) / config.run
    stages = plan(config)
    num_run, wall_s, seconds = make(config, stages, note)
    result = collect(config, stages)
    result |= {f"wall_s/{name}": round(value, 1) for name, value in seconds.items()}
    result |= {"stages_run": num_run, "wall_s": round(wall_s, 1)}
    write_json(folder / "result.json", result)
    page = write_page(folder, config, stages, result, note)
    say("\n" + comparison(config, result) + "\n")
    say(what_next(folder, page, config))
    return result


def make(
    config: Config, stages: list[PlannedStage], note: str, *, only: Sequence[str] | None = None
) -> tuple[int, float, dict[str, float]]:
    """Runs the stages that are not finished yet; returns (num_stages, wall_s, wall_s_by_stage).

    The times include those of stages that earlier calls ran. only: names of the stages to run now. Raises like `run`.
    """
    settings, folder = config.pipeline, Path(config.runs_dir) / config.run
    config_file = folder / "config.yaml"
    _check_place(folder)
    check_stages(config, stages)
    left = pending(stages, overwrite=config.overwrite)
    reads = [stage for stage in stages if stage.name in left and stage.app != "prepare"]
    if "prepare" not in left:
        check_prepared(stages[0], reads)

    def command(app: str, overrides: Sequence[str]) -> list[str]:
        return torchx_command(
            app,
            overrides,
            config=config_file,
            scheduler=settings.scheduler,
            scheduler_args=settings.scheduler_args,
            options=[*settings.job_options.get("all", []), *settings.job_options.get(app, [])],
        )

    if settings.scheduler != LOCAL or settings.scheduler_args or settings.job_options:
        for app in {stage.app: None for stage in stages if stage.name in left}:
            check_job(command(app, []), "pipeline.scheduler, scheduler_args and job_options", app)
    # All stages that must run again are discarded before any stage runs: after a kill, a stage that read an old result
    # does not count as finished.
    for stage in stages:
        if left.get(stage.name):
            discard(stage)
    config = dataclasses.replace(config, overwrite=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(config_file, to_yaml(config))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parallel = config.pipeline.jobs or cores
    say(f"{config.run}: {note}")
    done = len(stages) - len(left)
    say(
        f"{len(stages)} stages{f', {done} finished before' if done else ''}; up to {parallel} at a time on {cores} "
        f"cores; logs in {folder / 'logs'}"
    )
    start = time.monotonic()
    jobs = []
    for stage in stages:
        if stage.name in left and (only is None or stage.name in only):
            needs = tuple(need for need in stage.needs if need in left)
            then = partial(check_prepared, stage, reads) if stage.app == "prepare" else None
            words = command(stage.app, stage_overrides(stage, config))
            jobs.append(Job(stage.name, words, needs, exclusive=stage.exclusive, then=then))
    seconds = run_jobs(jobs, parallel=parallel, cores=cores, logs=folder / "logs", say=say)
    return len(jobs), *add_up(folder, stages, seconds, time.monotonic() - start)


def _check_place(folder: Path) -> None:
    """Raises UserError for a folder that holds something else than the runs of a pipeline."""
    files = sorted(name for name in names_in(folder) if not name.startswith(".") and not (folder / name).is_dir())
    settings = read(folder / "config.yaml") if "config.yaml" in files else None
    if files and not (isinstance(settings, Mapping) and "pipeline" in settings):
        raise UserError(
            f"{folder} was not made by a pipeline (it holds {', '.join(files[:3])}), and is never written over: choose "
            "another run=<name>, or remove it yourself"
        )


def check_stages(config: Config, stages: Sequence[PlannedStage]) -> None:
    """Raises UserError where the settings of a stage name something that the schema does not have."""
    schema, made = schema_in_use(config.data, config.schema), {stage.path for stage in stages}
    for stage in stages:
        limits.check(stage.config)
        named, rank = stage.config, stage.config.rank
        if Path(rank.warm_start.source) in made:  # made by an earlier stage, as are its rules
            named = dataclasses.replace(named, rank=dataclasses.replace(rank, warm_start=WarmStartConfig()))
        STAGES[stage.app].check_inputs(named)
        STAGES[stage.app].check_schema(named, schema)


def check_prepared(prepared: PlannedStage, stages: Sequence[PlannedStage]) -> None:
    """Raises UserError where a stage asks for what the prepared data do not have, or nothing could be measured."""
    if stages:
        data = PreparedData.open(prepared.path, verify=False)
        measures = any(stage.app in ("rank", "retrieve") and not stage.variant for stage in stages)
        if measures and not data.manifest["counts"]["test_events"]:
            raise UserError(f"{prepared.path}: the test part has no events to measure by; choose another data.split")
        for stage in stages:
            STAGES[stage.app].check_data(stage.config, data)


def discard(stage: PlannedStage) -> None:
    """Empties a stage's run folder, except for prepared data and published answers, which are read until replaced.

    Raises UserError where another process is writing it, or another stage has made it.
    """
    if not stage.path.exists():
        return
    if stage.app == "prepare":
        check_replaceable(stage.path)
        (stage.path / "result.json").unlink(missing_ok=True)
        return
    check_made_by(stage.path, stage.app)
    run_folder = RunFolder.locked(stage.path)
    clear(stage.path, keep=SERVED if stage.app == "query" else ())
    run_folder.close()


def check(config: Config) -> None:
    """Raises UserError for pipeline settings that cannot work."""
    limits.check(config)
    check_read_by_some(config)
    if config.fold:
        raise UserError(
            f"fold={config.fold} is for apps/pretrain.py; the pipeline trains a LUM for each of pipeline.folds folds"
        )


def resolve_dataset(config: Config) -> tuple[Config, str]:
    """The config with its data source and run name resolved, and a sentence about the data."""
    data, run_name = config.data, config.run or config.name
    if config.pipeline.dataset == "auto":
        try:
            folder, origin = movielens.resolve(config.data.path)
            data = dataclasses.replace(data, source="movielens-1m", path=str(folder))
            note = f"MovieLens-1M from {folder} ({origin})"
        except DataSetMissing as error:
            say(f"MovieLens-1M is not available here: {error}")
            data = dataclasses.replace(data, source="simulator")
            note = "a SIMULATED LOG in place of MovieLens-1M: its figures say nothing about real data"
        run_name = config.run or f"{config.name}-{'ml-1m' if data.source == 'movielens-1m' else data.source}"
    else:
        note = f"data source {data.source}"
    return dataclasses.replace(config, data=data, run=run_name), note


def pending(stages: list[PlannedStage], *, overwrite: bool) -> dict[str, bool]:
    """The stages to run, by name; True where the stage must replace the contents of its folder.

    Raises UserError where a folder has a run with other settings and `overwrite` is not set.
    """
    again: dict[str, bool] = {}
    for stage in stages:
        changes = differences(stage)
        if changes and not overwrite:
            raise UserError(
                f"{stage.path} was made with other settings or files ({'; '.join(changes[:5])}). Use overwrite=true to "
                "run again what they affect, or run=<name> for another folder"
            )
        upstream = any(need in again for need in stage.needs)
        replace = bool(changes) or (overwrite and upstream)
        if replace or upstream or not (stage.path / "result.json").exists():
            again[stage.name] = replace
    return again


def differences(stage: PlannedStage) -> list[str]:
    """How the stage's config differs from that of its folder, as "key: stored → now"; [] if there is no folder.

    For prepare, also the files of your log that have changed since.
    """
    if not (stage.path / "config.yaml").exists() or not has_work(stage.path):
        return []
    if stage.app == "prepare" and not (stage.path / "result.json").exists():  # see `discard`
        return []
    changes = config_differences(stage.path, STAGES[stage.app].settings(stage.config))
    sections = {key.split(".")[0] for key in changes} - {"name"}
    if stage.app == "prepare":
        sections &= {"data", "schema", "seed"}
    # data.path may differ and still lead to the same published files.
    found = [text for key, text in changes.items() if key.split(".")[0] in sections and key != "data.path"]
    return found + (changed_files(stage.path, stage.config.data) if stage.app == "prepare" and not found else [])


def collect(config: Config, stages: list[PlannedStage]) -> dict[str, float | str]:
    """The flat result of the pipeline from the stages' result.json; a metric that is not finite there is left out."""
    results = {stage.name: read_result(stage) for stage in stages}
    prepared = results["prepare"]
    collected: dict[str, float | str] = {"dataset": prepared.get("dataset", config.data.source)}
    for name in ("best_auc", "popularity_auc"):
        if name in prepared:
            collected[f"prepare/{name}"] = prepared[name]
    lums = [results[stage.name] for stage in stages if stage.app == "pretrain"]
    collected |= {f"lum/{name}": value for name, value in _mean(lums).items()}
    if "query" in results:
        collected |= {f"query/{name}": value for name, value in results["query"].items() if name != "dataset"}
    rows = by_row(stages)
    for (ranker, kind, _), of_row in rows.items():
        prefix, base = f"rank/{ranker}/{kind}", rows.get((ranker, "none", ""), [])
        collected |= mean_and_sd([results[stage.name] for stage in of_row], prefix)
        if kind != "none" and base:
            found = gains([stage.path for stage in base], [stage.path for stage in of_row])
            test = {f"rank/{name}": found.pop(name) for name in ("test_rows", "test_users") if name in found}
            collected |= test | {f"{prefix}/{name}": value for name, value in found.items()}
    collected |= {f"note/{name}": result["note"] for name, result in results.items() if result.get("note")}
    return collected


def mean_and_sd(results: list[dict[str, Any]], prefix: str, *, measured: Sequence[str] = MEASURED) -> dict[str, float]:
    """ "<prefix>/<name>": means over the seeds; "<prefix>/<name>_sd": standard deviations of what is `measured`."""
    found = {f"{prefix}/{name}": value for name, value in _mean(results).items()}
    if len(results) > 1:
        for name in measured:
            values = [run[name] for run in results if isinstance(run.get(name), float)]
            if len(values) == len(results):
                found[f"{prefix}/{name}_sd"] = statistics.stdev(values)
    return found


def _mean(results: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each number that all results have."""
    names = [name for name in (results[0] if results else {}) if isinstance(results[0][name], (int, float))]
    shared = [name for name in names if all(isinstance(result.get(name), (int, float)) for result in results)]
    return {name: sum(result[name] for result in results) / len(results) for name in shared}


def add_up(
    folder: Path, stages: list[PlannedStage], seconds: Mapping[str, float], wall_s: float
) -> tuple[float, dict[str, float]]:
    """Wall time of the run and of each stage; for stages that an earlier call ran, it is their time then."""
    path = folder / "seconds.json"
    before: dict[str, Any] = {"wall_s": 0.0, "stages": {}}
    if path.exists() and len(seconds) < len(stages):
        before |= read_json(path, again="remove it; it only has the stages' durations")
    wall_s += before["wall_s"]
    known = {**before["stages"], **seconds}
    by_stage = {stage.name: float(known[stage.name]) for stage in stages if stage.name in known}
    write_json(path, {"wall_s": wall_s, "stages": by_stage})
    return wall_s, by_stage


def write_json(path: Path, value: Any) -> None:
    """Writes the file atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")
