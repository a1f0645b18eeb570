"""The warm-up rows of table 5 (LUM section 5.3): the gain of a ranker from an online model, and from a LUM.

::

    training part by time  |──────── the online model and the LUM learn ────────|── the study's rankers ──| valid | test
                           0                                                  share                       1

    scratch        fresh weights, without the engineered features
    feature        fresh weights, with them
    param          the online model's weights, without them
    param_feature  the online model's weights, with them

Each row is trained without and with LUM knowledge, all in one run folder::

    runs/<run>/  prepare/ online/ lum/ query/  rules/param-none.yaml …  rank-dlrm-none-scratch-s0/ …

The online model is the ranker with all features, trained only on the earlier days. It never sees an event of the study,
not even to select its weights (its last ones are kept). The study's rankers take its weights by the audited warm start:
the first layer keeps the columns of the inputs that are left, and the LUM's columns start at zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lumrec.data.prepared import PreparedData
from lumrec.experiments import pipeline
from lumrec.experiments.config import Config
from lumrec.experiments.plan import PlannedStage, by_row
from lumrec.features.statistics import dense_inputs
from lumrec.models.ranker import build_ranker
from lumrec.run.config_file import with_overrides
from lumrec.run.errors import UserError
from lumrec.run.files import write_atomically
from lumrec.run.unread import as_read

ROWS = ("scratch", "feature", "param", "param_feature")
FIRST_LAYER = "over_arch.0.weight"


def run(config: Config) -> dict[str, float | str]:
    """Runs the stages that are not finished yet, and returns the metrics of the rows and of the online model.

    Keys: "rank/<ranker>/<knowledge>/<row>/<metric>" (means over the seeds, and "…/auc_sd"), "online/<metric>" (the
    online model on the test part) and "dataset". Raises UserError like the pipeline.
    """
    settings = config.warm_up
    config = dataclasses.replace(
        config,
        pretrain=dataclasses.replace(config.pretrain, time_share=settings.share),
        pipeline=dataclasses.replace(config.pipeline, folds=1),
    )
    pipeline.check(config)
    config, note = pipeline.resolve_dataset(config)
    stages = plan(config)
    # The rules contain columns, which are only known when the data are prepared.
    pipeline.make(config, stages, note, only=["prepare"])
    write_rules(stages)
    pipeline.make(config, stages, note)
    return collect(config, stages)


def plan(config: Config) -> list[PlannedStage]:
    """The pipeline's stages, with the online model after the first and the rows instead of its rankers."""
    folder, share = Path(config.runs_dir) / config.run, config.warm_up.share
    without = ["rank.statistics=none", f"rank.leave_out={list(config.warm_up.engineered)}"]
    source = [f"rank.warm_start.source={folder / 'online'}", "rank.tables=fresh"]
    stages: list[PlannedStage] = []
    for stage in pipeline.plan(config):
        if stage.app != "rank":
            stages.append(stage)
            continue
        if not any(other.name == "online" for other in stages):
            overrides = [f"rank.time_window=[0, {share}]", "rank.select=", "rank.knowledge=none", "rank.tables=fresh"]
            online = with_overrides(
                dataclasses.replace(stage.config, run=f"{config.run}/online"), overrides, origin="warm_up"
            )
            inputs = dataclasses.replace(online.inputs, knowledge="", lums=[])
            online = dataclasses.replace(online, seed=config.seed, inputs=inputs, rank=as_read(online.rank))
            stages.insert(1, PlannedStage("online", "rank", online, ("prepare",)))
        for row in ROWS:
            name = f"rank-{stage.ranker}-{stage.knowledge}-{row}-s{stage.seed}"
            overrides = [f"rank.time_window=[{share}, 1]"]
            overrides += [] if row.endswith("feature") else without
            needs = stage.needs
            if row.startswith("param"):
                overrides += [*source, f"rank.warm_start.rules={folder / 'rules' / f'{row}-{stage.knowledge}.yaml'}"]
                needs = (*needs, "online")
            config_of_row = with_overrides(stage.config, overrides, origin="warm_up")
            config_of_row = dataclasses.replace(config_of_row, run=f"{config.run}/{name}")
            stages.append(dataclasses.replace(stage, name=name, config=config_of_row, needs=needs, variant=row))
    return stages


def write_rules(stages: list[PlannedStage]) -> None:
    """Writes the rules files that the stages name: they copy the online model, by columns where the inputs differ."""
    online = next(stage for stage in stages if stage.name == "online")
    data = PreparedData.open(Path(online.config.runs_dir) / online.config.inputs.prepared)
    theirs = _layout(online.config, data)
    for path, stage in {stage.config.rank.warm_start.rules: stage for stage in stages if stage.app == "rank"}.items():
        if path:
            ours = _layout(stage.config, data)
            text = yaml.safe_dump(rules(theirs, ours, knowledge=stage.config.rank.knowledge != "none"), sort_keys=False)
            Path(path).parent.mkdir(exist_ok=True)
            write_atomically(Path(path), text)


@dataclass(frozen=True)
class Layout:
    """columns: name → width of each input of the first layer, in order. parameters: names of all parameters."""

    columns: dict[str, int]
    parameters: set[str]


def _layout(config: Config, data: PreparedData) -> Layout:
    settings = as_read(dataclasses.replace(config.rank, knowledge="none"))
    data = data.without(settings.leave_out)
    statistics = dense_inputs(data, kind=settings.statistics).names
    ranker = build_ranker(settings, data, num_statistics=len(statistics), device="meta")
    columns = ranker.input_columns()
    del columns["statistics"]  # the last of them, one column each
    return Layout(columns | dict.fromkeys(statistics, 1), {name for name, _ in ranker.named_parameters()})


def rules(theirs: Layout, ours: Layout, *, knowledge: bool) -> dict[str, Any]:
    """The rules by which a ranker starts from the online model: inputs of the same name keep their weights."""
    own = {name: (start, ours.columns[name]) for name, start in _starts(ours.columns).items()}
    parts: list[list[int]] = []
    for name, start in _starts(theirs.columns).items():
        if name not in own:
            continue
        to, width = own[name]
        if width != theirs.columns[name]:
            raise UserError(f"{name} has {width} columns and the online model {theirs.columns[name]}")
        if parts and (start, to) == (parts[-1][0] + parts[-1][1], parts[-1][2] + parts[-1][1]):
            parts[-1][1] += width
        else:
            parts.append([start, width, to])
    found: list[dict[str, Any]] = [{"source": "", "match": "prefix"}]
    dropped = sum(number for _, number, _ in parts) < sum(theirs.columns.values())
    if dropped or knowledge:
        columns = {(True, True): "slice_pad_zero", (True, False): "slice", (False, True): "pad_zero"}
        found[0]["exclude"] = [FIRST_LAYER]
        found.append({"source": FIRST_LAYER, "columns": columns[dropped, knowledge], "parts": parts})
    return {
        "source_prefix": "model.",
        "optimizer_prefix": "optim.",
        "rules": found,
        "unused": sorted(theirs.parameters - ours.parameters),
        "fresh": ["knowledge.*"] if knowledge else [],
    }


def _starts(columns: Mapping[str, int]) -> dict[str, int]:
    starts, start = {}, 0
    for name, width in columns.items():
        starts[name] = start
        start += width
    return starts


def collect(config: Config, stages: list[PlannedStage]) -> dict[str, float | str]:
    """The flat result of all stages; see `run`."""
    results = {stage.name: pipeline.read_result(stage) for stage in stages if stage.app in ("rank", "prepare")}
    collected: dict[str, float | str] = {"dataset": results["prepare"].get("dataset", config.data.source)}
    collected |= {f"online/{name}": results["online"][name] for name in pipeline.MEASURED}
    for row, of_row in by_row(stages).items():
        collected |= pipeline.mean_and_sd([results[stage.name] for stage in of_row], "/".join(["rank", *row]))
    return collected
