"""Plans the stages of a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumrec.experiments.config import Config
from lumrec.run.config_file import as_text, leaves, with_overrides
from lumrec.run.errors import UserError
from lumrec.run.files import read_json
from lumrec.run.unread import as_read, without_effect


@dataclass(frozen=True)
class PlannedStage:
    """One stage of the plan: the app that runs it, its config, and the names of the stages that it needs.

    ranker, knowledge, seed: what a stage of a ranker or of two towers (ranker = "") trains. variant: its row of the
    warm-up table, or the number of its trial. exclusive: no other stage runs beside it.
    """

    name: str
    app: str
    config: Config
    needs: tuple[str, ...] = ()
    exclusive: bool = False
    ranker: str = ""
    knowledge: str = ""
    seed: int = 0
    variant: str = ""

    @property
    def path(self) -> Path:
        return Path(self.config.runs_dir) / self.config.run


def plan(config: Config) -> list[PlannedStage]:
    """The stages of a pipeline run; each comes after the stages that it needs."""
    settings, run_name = config.pipeline, config.run

    def stage_config(name: str, **changes: Any) -> Config:
        inputs = dataclasses.replace(config.inputs, prepared=f"{run_name}/prepare", **changes.pop("inputs", {}))
        return dataclasses.replace(config, run=f"{run_name}/{name}", inputs=inputs, overwrite=False, **changes)

    stages = [PlannedStage("prepare", "prepare", stage_config("prepare"), exclusive=True)]
    folds = [""] if settings.folds == 1 else [f"{k}/{settings.folds}" for k in range(settings.folds)]
    lums = {fold: f"lum-{fold.replace('/', 'of')}" if fold else "lum" for fold in folds}
    inputs: dict[str, Any] = {}
    if any(kind != "none" for kind in settings.knowledge):
        stages += [
            PlannedStage(lums[fold], "pretrain", stage_config(lums[fold], fold=fold), ("prepare",)) for fold in folds
        ]
        inputs["lums"] = [f"{run_name}/{lum}" for lum in lums.values()]
    if any(kind not in ("none", "tables") for kind in settings.knowledge):
        stages.append(PlannedStage("query", "query", stage_config("query", inputs=inputs), tuple(lums.values())))
    for ranker in settings.rankers:
        for kind in settings.knowledge:
            for seed in settings.seeds:
                name = f"rank-{ranker}-{kind}-s{seed}"
                tables = {"none": "fresh", "tables": "lum"}.get(kind, config.rank.tables)
                decided: dict[str, Any] = {"tables": tables, **choice(ranker, kind)}
                changes: dict[str, Any] = {"rank": as_read(dataclasses.replace(config.rank, **decided))}
                needs: tuple[str, ...] = ("prepare",)
                if kind == "tables":
                    changes["inputs"], needs = inputs, tuple(lums.values())
                elif kind != "none":
                    changes["inputs"], needs = {"knowledge": f"{run_name}/query", **inputs}, ("query",)
                tuned = with_tuned(stage_config(name, seed=seed, **changes), ranker, kind)
                stages.append(PlannedStage(name, "rank", tuned, needs, ranker=ranker, knowledge=kind, seed=seed))
    return stages


def by_row(stages: Sequence[PlannedStage]) -> dict[tuple[str, str, str], list[PlannedStage]]:
    """The stages of rankers and towers by (ranker, knowledge, variant), one for each seed."""
    rows: dict[tuple[str, str, str], list[PlannedStage]] = {}
    for stage in stages:
        if stage.knowledge:
            rows.setdefault((stage.ranker, stage.knowledge, stage.variant), []).append(stage)
    return rows


def choice(ranker: str, kind: str) -> dict[str, Any]:
    """The settings of rank that determine which other settings are read."""
    return {"model": ranker, "knowledge": "none" if kind == "tables" else kind}


def check_read_by_some(config: Config) -> None:
    """Raises UserError for a setting of rank that none of the pipeline's rankers reads."""
    settings, rank, default = config.pipeline, config.rank, type(config.rank)()
    for key, instead in (("model", "rankers"), ("knowledge", "knowledge")):
        given, chosen = getattr(rank, key), getattr(settings, instead)
        if given not in (getattr(default, key), *chosen):
            raise UserError(
                f"rank.{key}={given} has no effect in the pipeline: pipeline.{instead}={as_text(chosen)} decides what "
                "is compared; change that, or leave the other out"
            )
    lost = [
        without_effect(dataclasses.replace(rank, **choice(ranker, kind)))
        for ranker in settings.rankers
        for kind in settings.knowledge
    ]
    for key, field in lost[0].items():
        if all(key in of_stage for of_stage in lost):
            decides = {"model": "rankers"}.get(field, field)
            raise UserError(
                f"rank.{key}={as_text(leaves(rank)[key])} has no effect with pipeline.{decides}="
                f"{as_text(getattr(settings, decides))}: remove the first or change the second"
            )


def with_tuned(config: Config, ranker: str, kind: str) -> Config:
    """The config of a ranker's stage with its settings from `pipeline.tuned`.

    Settings of knowledge that are tuned for all rows of a ranker are left out of its base.
    """
    for name in (ranker, f"{ranker}/{kind}"):
        if overrides := config.pipeline.tuned.get(name):
            config = with_overrides(config, overrides, origin=f"pipeline.tuned.{name}")
        if name == ranker:
            config = dataclasses.replace(config, rank=as_read(config.rank, because_of="knowledge"))
    return config


def stage_overrides(stage: PlannedStage, base: Config) -> list[str]:
    """The key=value overrides that turn the pipeline's config into the stage's."""
    before = leaves(base)
    return [f"{key}={as_text(now)}" for key, now in leaves(stage.config).items() if now != before.get(key)]


def read_result(stage: PlannedStage) -> dict[str, Any]:
    """The stage's result.json; a metric that is not finite is None."""
    return read_json(stage.path / "result.json", again=f"make {stage.path} again: remove the file, and run this again")
