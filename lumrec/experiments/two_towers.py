"""The two-tower's rows: EDB without and with a LUM's knowledge, over seeds, in one run folder.

::

    runs/<run>/  prepare/ lum/ query/  retrieve-none-s0/ … retrieve-direct-s0/ …
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lumrec.experiments import pipeline
from lumrec.experiments.config import Config
from lumrec.experiments.plan import PlannedStage
from lumrec.run.unread import as_read


def run(config: Config, measured: Sequence[str]) -> dict[str, float | str]:
    """Runs what is not finished yet, and gives "retrieve/<knowledge>/<metric>" (means over the seeds, with "…_sd"
    beside for what is `measured`), "retrieve/lum/<metric>" (the LUM by itself, asked without a condition, mean over the
    folds) and "dataset".

    The pipeline's `knowledge` is that of the towers, none and direct. Raises UserError for settings that cannot work,
    and as the pipeline does.
    """
    pipeline.check(config)
    config, note = pipeline.resolve_dataset(config)
    stages = plan(config)
    pipeline.make(config, stages, note)
    results = {stage.name: pipeline.read_result(stage) for stage in stages}
    collected: dict[str, float | str] = {"dataset": results["prepare"].get("dataset", config.data.source)}
    lums = [results[stage.name] for stage in stages if stage.app == "pretrain"]
    collected |= pipeline.mean_and_sd(lums, "retrieve/lum", measured=())
    for kind in config.pipeline.knowledge:
        runs = [results[f"retrieve-{kind}-s{seed}"] for seed in config.pipeline.seeds]
        collected |= pipeline.mean_and_sd(runs, f"retrieve/{kind}", measured=measured)
    return collected


def plan(config: Config) -> list[PlannedStage]:
    """The pipeline's stages with the towers in place of its (one) ranker."""
    stages: list[PlannedStage] = []
    for stage in pipeline.plan(config):
        if stage.app == "rank":
            name = f"retrieve-{stage.knowledge}-s{stage.seed}"
            decided: dict[str, Any] = {"knowledge": stage.knowledge}
            settings = as_read(dataclasses.replace(stage.config.retrieve, **decided))
            towers = dataclasses.replace(stage.config, run=f"{config.run}/{name}", retrieve=settings)
            stage = dataclasses.replace(stage, name=name, app="retrieve", config=towers)
        stages.append(stage)
    return stages
