"""All steps as one run: prepare → LUM per fold → query → rankers without and with knowledge → result and report.

    runs/<run>/  prepare/ lum-0of2/ lum-1of2/ query/ rank-din-none-s0/ …  logs/  config.yaml result.json report.html

Each stage is a TorchX job of its own. Stages that are finished with the same settings are not run again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Literal, get_args

from lumrec import limits
from lumrec.data.splits import MOST_FOLDS
from lumrec.errors import UserError
from lumrec.jobs import Job, run_jobs, torchx_command
from lumrec.limits import count, setting
from lumrec.printable import say
from lumrec.train.files import read_json

if TYPE_CHECKING:
    from lumrec.config import Config

# none: the plain ranker on fresh tables. tables: it starts with the LUM's tables and reads nothing else of the LUM.
Knowledge = Literal["none", "tables", "direct", "matching", "both"]
Ranker = Literal["din", "dlrm", "dien", "sim", "twin"]
KNOWLEDGE, RANKERS = get_args(Knowledge), get_args(Ranker)
MEASURED = ("auc", "gauc", "log_loss")
DECIDED = ("rank.model=", "rank.knowledge=", "rank.tables=")


@dataclass(frozen=True)
class PipelineConfig:
    """What to run and compare.

    dataset: "" = what `data` says; auto = MovieLens-1M where it is found or can be downloaded, else the simulator.
    folds: cross-fitting: each user is asked of a LUM that has not seen them; 1 = one LUM of all users (in-sample).
    rankers, knowledge, seeds: every combination is trained. knowledge: none (the base; always on fresh tables), tables
    (the base on the LUM's tables: the control where rank.tables is lum), direct, matching, both.
    tuned: settings of a ranker ("din") or of one with a kind of knowledge ("din/both", over the former), as key=value
    words; apps/tune.py finds them.
    jobs: stages at a time; 0 = one per core.
    """

    dataset: Literal["", "auto"] = ""
    folds: int = count(2, least=1, most=MOST_FOLDS)
    rankers: List[Ranker] = field(default_factory=lambda: ["din"])
    knowledge: List[Knowledge] = field(default_factory=lambda: ["none", "direct", "matching", "both"])
    seeds: List[int] = setting(lambda: [0], least=0, most=limits.MOST_SEED)
    tuned: Dict[str, List[str]] = field(default_factory=dict)
    jobs: int = count(0, most=4096)

    def check(self, at: str) -> None:
        """Raises UserError for settings that cannot work (`at`: the section, with a dot)."""
        for name in ("rankers", "knowledge", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UserError(f"{at}{name}: got {list(given)}, expected one or more, none of them twice")
        for name, words in self.tuned.items():
            ranker, slash, kind = name.partition("/")
            if ranker not in RANKERS or (slash and kind not in KNOWLEDGE):
                raise UserError(
                    f"{at}tuned.{name}: expected a ranker, such as din, or with knowledge, such as din/both"
                )
            wrong = [word for word in words if not word.startswith("rank.") or word.startswith(DECIDED)]
            if wrong:
                raise UserError(
                    f"{at}tuned.{name}: got {wrong[0]!r}; expected settings of rank, without {', '.join(DECIDED)}, "
                    "which the pipeline sets"
                )


@dataclass(frozen=True)
class Stage:
    """One stage of the plan: the app that runs it, its config, and the stages it reads."""

    name: str
    app: str
    config: Config
    needs: tuple[str, ...] = ()
    exclusive: bool = False

    @property
    def path(self) -> Path:
        return Path(self.config.runs_dir) / self.config.run


def run(config: Config) -> dict[str, float | str]:
    """Runs what is not finished yet, and gives the pipeline's flat result.json: "rank/<ranker>/<knowledge>/<metric>"
    (means over seeds, with "…/auc_sd" beside), "lum/<metric>" (means over folds), "dataset", "wall_s/<stage>".

    Raises UserError for settings that cannot work and for a run folder of other settings; jobs.JobFailed where a
    stage fails.
    """
    from lumrec.report.page import write_page
    from lumrec.report.table import comparison, what_next

    check(config)
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
    say(what_next(folder, page, is_movielens=config.data.source == "movielens-1m"))
    return result


def make(
    config: Config, stages: list[Stage], note: str, *, only: Sequence[str] | None = None
) -> tuple[int, float, dict[str, float]]:
    """Runs the stages that are not finished yet, in the pipeline's folder; how many those were, the wall time, and that
    of each stage, in seconds, with those of earlier calls. only: names of those that run now, the others later.
    Raises as `run` does.
    """
    from lumrec.typed_yaml import to_yaml

    check_stages(config, stages)
    left = pending(stages, overwrite=config.overwrite)
    reads = [stage for stage in stages if stage.name in left and stage.app != "prepare"]
    if "prepare" not in left:
        check_prepared(stages[0], reads)
    # All that is to be made again is marked before anything is made: after a kill, no stage that read the old one is
    # taken for finished.
    for stage in stages:
        if left.get(stage.name):
            discard(stage)
    config = dataclasses.replace(config, overwrite=False)
    folder = Path(config.runs_dir) / config.run
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")

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
            command = torchx_command(stage.app, stage_words(stage, config), config=folder / "config.yaml")
            needs = tuple(need for need in stage.needs if need in left)
            then = partial(check_prepared, stage, reads) if stage.app == "prepare" else None
            jobs.append(Job(stage.name, command, needs, exclusive=stage.exclusive, then=then))
    seconds = run_jobs(jobs, parallel=parallel, cores=cores, logs=folder / "logs", say=say)
    return len(jobs), *add_up(folder, stages, seconds, time.monotonic() - start)


def check_stages(config: Config, stages: Sequence[Stage]) -> None:
    """Raises UserError for what the settings of any stage name and the schema has not."""
    from lumrec.data.prepare import schema_in_use
    from lumrec.precheck import check_schema

    schema = schema_in_use(config)
    for stage in stages:
        limits.check(stage.config)
        check_schema(stage.config, schema, stage.app)


def check_prepared(prepared: Stage, stages: Sequence[Stage]) -> None:
    """Raises UserError where one of the stages asks for what the prepared data have not."""
    from lumrec.data.prepared import PreparedData
    from lumrec.precheck import check_data

    if stages:
        data = PreparedData.open(prepared.path, verify=False)
        for stage in stages:
            check_data(stage.config, data, stage.app)


def discard(stage: Stage) -> None:
    """Empties a stage's run folder, but for what is read until the stage replaces it: prepared data, published answers.

    Raises UserError where another process is writing it, or another stage has made it.
    """
    from lumrec.data.prepare import check_replaceable
    from lumrec.query.stage import SERVED
    from lumrec.train.run import RunFolder, check_made_by, clear

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
    if config.fold:
        raise UserError(f"fold={config.fold} is for apps/pretrain.py; the pipeline makes pipeline.folds of them itself")


def resolve_dataset(config: Config) -> tuple[Config, str]:
    """The config with its data source and run name settled, and what data that is, in a sentence."""
    from lumrec.data.sources import movielens
    from lumrec.data.sources.raw_log import DataSetMissing

    data, run_name = config.data, config.run or config.name
    if config.pipeline.dataset == "auto":
        try:
            folder, origin = movielens.resolve(config.data.path)
            data = dataclasses.replace(data, source="movielens-1m", path=str(folder))
            note = f"MovieLens-1M from {folder} ({origin})"
        except DataSetMissing as error:
            say(f"MovieLens-1M cannot be had here: {error}")
            data = dataclasses.replace(data, source="simulator")
            note = "a SIMULATED LOG in place of MovieLens-1M: its figures say nothing about real data"
        run_name = config.run or f"{config.name}-{'ml-1m' if data.source == 'movielens-1m' else data.source}"
    else:
        note = f"data source {data.source}"
    return dataclasses.replace(config, data=data, run=run_name), note


def plan(config: Config) -> list[Stage]:
    """The stages of a pipeline run, in an order in which each comes after what it needs."""
    settings, run_name = config.pipeline, config.run

    def stage_config(name: str, **changes: Any) -> Config:
        inputs = dataclasses.replace(config.inputs, prepared=f"{run_name}/prepare", **changes.pop("inputs", {}))
        return dataclasses.replace(config, run=f"{run_name}/{name}", inputs=inputs, overwrite=False, **changes)

    stages = [Stage("prepare", "prepare", stage_config("prepare"), exclusive=True)]
    folds = [""] if settings.folds == 1 else [f"{k}/{settings.folds}" for k in range(settings.folds)]
    lums = {fold: f"lum-{fold.replace('/', 'of')}" if fold else "lum" for fold in folds}
    inputs: dict[str, Any] = {}
    if any(kind != "none" for kind in settings.knowledge):
        stages += [Stage(lums[fold], "pretrain", stage_config(lums[fold], fold=fold), ("prepare",)) for fold in folds]
        inputs["lums"] = [f"{run_name}/{lum}" for lum in lums.values()]
    if any(kind not in ("none", "tables") for kind in settings.knowledge):
        stages.append(Stage("query", "query", stage_config("query", inputs=inputs), tuple(lums.values())))
    for ranker in settings.rankers:
        for kind in settings.knowledge:
            for seed in settings.seeds:
                name = f"rank-{ranker}-{kind}-s{seed}"
                decided: dict[str, Any] = {"model": ranker, "knowledge": "none" if kind == "tables" else kind}
                decided["tables"] = {"none": "fresh", "tables": "lum"}.get(kind, config.rank.tables)
                changes: dict[str, Any] = {"rank": dataclasses.replace(config.rank, **decided)}
                needs: tuple[str, ...] = ("prepare",)
                if kind == "tables":
                    changes["inputs"], needs = inputs, tuple(lums.values())
                elif kind != "none":
                    changes["inputs"], needs = {"knowledge": f"{run_name}/query", **inputs}, ("query",)
                tuned = with_tuned(stage_config(name, seed=seed, **changes), ranker, kind)
                stages.append(Stage(name, "rank", tuned, needs))
    return stages


def with_tuned(config: Config, ranker: str, kind: str) -> Config:
    """The config of a ranker's stage with what `pipeline.tuned` has for it."""
    from lumrec.config import with_words

    for name in (ranker, f"{ranker}/{kind}"):
        if words := config.pipeline.tuned.get(name):
            config = with_words(config, words, origin=f"pipeline.tuned.{name}")
    return config


def pending(stages: list[Stage], *, overwrite: bool) -> dict[str, bool]:
    """Stages to run, by name; True where the stage must replace what its folder holds.

    Raises UserError where a folder holds a run of other settings and `overwrite` is not given.
    """
    again: dict[str, bool] = {}
    for stage in stages:
        changes = differences(stage)
        if changes and not overwrite:
            raise UserError(
                f"{stage.path} was made with other settings or files ({'; '.join(changes[:5])}). Say overwrite=true to "
                "make again what they touch, or run=<name> for a folder of its own"
            )
        upstream = any(need in again for need in stage.needs)
        replace = bool(changes) or (overwrite and upstream)
        if replace or upstream or not (stage.path / "result.json").exists():
            again[stage.name] = replace
    return again


def differences(stage: Stage) -> list[str]:
    """What the stage's folder was made with and its config do not share, as "key: stored → now", and the files of a log
    of one's own that are not those it was prepared from; [] for no folder.
    """
    from lumrec.data.prepare import changed_files
    from lumrec.train.run import config_differences, has_work

    if not (stage.path / "config.yaml").exists() or not has_work(stage.path):
        return []
    if stage.app == "prepare" and not (stage.path / "result.json").exists():  # see `discard`
        return []
    changes = config_differences(stage.path, stage.config, stage.app)
    sections = {key.split(".")[0] for key in changes} - {"name"}
    if stage.app == "prepare":
        sections &= {"data", "schema", "seed"}
    # data.path may be another one to the same published files.
    found = [text for key, text in changes.items() if key.split(".")[0] in sections and key != "data.path"]
    return found + (changed_files(stage.path, stage.config) if stage.app == "prepare" and not found else [])


def stage_words(stage: Stage, base: Config) -> list[str]:
    """key=value words that turn the pipeline's config into the stage's."""
    from lumrec.config import as_word, leaves

    before = leaves(base)
    return [f"{key}={as_word(now)}" for key, now in leaves(stage.config).items() if now != before.get(key)]


def collect(config: Config, stages: list[Stage]) -> dict[str, float | str]:
    """The flat result of the pipeline from the stages' result.json; a metric that is not finite there is left out."""
    from lumrec.report.gains import gains

    paths = {stage.name: stage.path for stage in stages}
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
    for ranker in config.pipeline.rankers:
        for kind in config.pipeline.knowledge:
            runs = [results[f"rank-{ranker}-{kind}-s{seed}"] for seed in config.pipeline.seeds]
            collected |= mean_and_sd(runs, f"rank/{ranker}/{kind}")
            if kind != "none" and "none" in config.pipeline.knowledge:
                base, other = (
                    [f"rank-{ranker}-{of}-s{seed}" for seed in config.pipeline.seeds] for of in ("none", kind)
                )
                found = gains([paths[name] for name in base], [paths[name] for name in other])
                test = {f"rank/{name}": found.pop(name) for name in ("test_rows", "test_users") if name in found}
                collected |= test | {f"rank/{ranker}/{kind}/{name}": value for name, value in found.items()}
    collected |= {f"note/{name}": result["note"] for name, result in results.items() if result.get("note")}
    return collected


def mean_and_sd(results: list[dict[str, Any]], prefix: str, *, measured: Sequence[str] = MEASURED) -> dict[str, float]:
    """Means over the seeds of what all have, "<prefix>/<name>", and "…_sd" of what they are compared by."""
    found = {f"{prefix}/{name}": value for name, value in _mean(results).items()}
    if len(results) > 1:
        for name in measured:
            values = [run[name] for run in results if isinstance(run.get(name), float)]
            if len(values) == len(results):
                found[f"{prefix}/{name}_sd"] = statistics.stdev(values)
    return found


def _mean(results: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of each number that all results have."""
    names = [name for name in (results[0] if results else {}) if isinstance(results[0][name], (int, float))]
    shared = [name for name in names if all(isinstance(result.get(name), (int, float)) for result in results)]
    return {name: sum(result[name] for result in results) / len(results) for name in shared}


def read_result(stage: Stage) -> dict[str, Any]:
    """The stage's result.json; a metric that was not a number is None."""
    return read_json(stage.path / "result.json", again=f"make {stage.path} again: remove the file, and run this again")


def add_up(
    folder: Path, stages: list[Stage], seconds: Mapping[str, float], wall_s: float
) -> tuple[float, dict[str, float]]:
    """Wall time of the run and of each stage, those of earlier calls included where a stage is from one of them."""
    path = folder / "seconds.json"
    before: dict[str, Any] = {"wall_s": 0.0, "stages": {}}
    if path.exists() and len(seconds) < len(stages):
        before |= read_json(path, again="remove it; it holds only how long the stages took")
    wall_s += before["wall_s"]
    known = {**before["stages"], **seconds}
    by_stage = {stage.name: float(known[stage.name]) for stage in stages if stage.name in known}
    write_json(path, {"wall_s": wall_s, "stages": by_stage})
    return wall_s, by_stage


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(new, path)
