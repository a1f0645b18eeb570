"""The rows of two towers (EDB) without and with a LUM's knowledge, over seeds, in one run folder.

::

    runs/<run>/  prepare/ lum/ query/  retrieve-none-s0/ … retrieve-direct-s0/ …
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lumrec.experiments import pipeline
from lumrec.experiments.config import Config
from lumrec.experiments.plan import PlannedStage, by_row
from lumrec.run.unread import as_read


def run(config: Config, measured: Sequence[str]) -> dict[str, float | str]:
    """Runs the stages that are not finished yet, and returns the metrics of the towers and of the LUM.

    Keys: "retrieve/<knowledge>/<metric>" (means over the seeds, with "…_sd" for what is `measured`),
    "retrieve/lum/<metric>" (the LUM without towers, asked without a condition; means over the folds) and "dataset".
    pipeline.knowledge is that of the towers: none and direct. Raises UserError like the pipeline.
    """
    pipeline.check(config)
    config, note = pipeline.resolve_dataset(config)
    stages = plan(config)
    pipeline.make(config, stages, note)
    results = {stage.name: pipeline.read_result(stage) for stage in stages}
    collected: dict[str, float | str] = {"dataset": results["prepare"].get("dataset", config.data.source)}
    lums = [results[stage.name] for stage in stages if stage.app == "pretrain"]
    collected |= pipeline.mean_and_sd(lums, "retrieve/lum", measured=())
    for (_, kind, _), of_row in by_row(stages).items():
        runs = [results[stage.name] for stage in of_row]
        collected |= pipeline.mean_and_sd(runs, f"retrieve/{kind}", measured=measured)
    return collected


def plan(config: Config) -> list[PlannedStage]:
    """The pipeline's stages with the towers instead of its (one) ranker."""
    stages: list[PlannedStage] = []
    for stage in pipeline.plan(config):
        if stage.app == "rank":
            name = f"retrieve-{stage.knowledge}-s{stage.seed}"
            decided: dict[str, Any] = {"knowledge": stage.knowledge}
            settings = as_read(dataclasses.replace(stage.config.retrieve, **decided))
            towers = dataclasses.replace(stage.config, run=f"{config.run}/{name}", retrieve=settings)
            stage = dataclasses.replace(stage, name=name, app="retrieve", ranker="", config=towers)
        stages.append(stage)
    return stages
