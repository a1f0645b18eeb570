"""report.html of a pipeline: the verdict, the figures, charts, and how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lumrec.data.moments import seen_line
from lumrec.experiments.config import Config, load
from lumrec.experiments.jobs import as_typed, torchx_command
from lumrec.experiments.plan import PlannedStage, stage_overrides
from lumrec.experiments.report_gains import notes_of
from lumrec.experiments.report_plots import KNOWLEDGE_COLOURS, Dot, Series, curves, dot_chart, read_series
from lumrec.experiments.report_table import (
    METRICS,
    ONE_SEED,
    Row,
    lum_alone,
    rows,
    split_text,
    test_part,
    treatment,
    verdicts,
)
from lumrec.metrics.compare import LOWER_IS_BETTER
from lumrec.run import page
from lumrec.run.changes import changes
from lumrec.run.config_file import as_text
from lumrec.run.files import read_json
from lumrec.run.typed_yaml import plain

HAZARD = {
    "cross_fit": """Cross-fitted over users: the users were split into {folds} folds, and one LUM was trained without
each fold. Every user, of training and test alike, is answered by the LUM that was not trained on that user, so a
training row's knowledge is no better than a test row's. The ranker has one projection for each LUM, as their spaces
differ.""",
    "time_split": """Split in time: the LUM was trained on the earliest part of the training events, and the rankers
that read its knowledge only on the later rows; the base is trained on all of them.""",
    "in_sample": """In-sample: one LUM was trained on all users, so it has memorised the training rows that the ranker
learns from, and knowledge looks better in training than in testing. Use pipeline.folds=2 for honest knowledge.""",
}
MEANING = {
    "auc": "higher is better",
    "gauc": "within each user, higher is better",
    "log_loss": "in nats, lower is better: here a gain is below 0",
}


def write_page(
    folder: Path, config: Config, stages: Sequence[PlannedStage], result: Mapping[str, Any], note: str
) -> Path:
    """Writes report.html into `folder`; returns its path. note: a few words about the run's data."""
    table, seeds = rows(config, result), config.pipeline.seeds
    best_auc = result.get("prepare/best_auc")
    metrics = [
        {"key": key, "label": label, "meaning": MEANING[key], "has_gains": has_gains(table, key)}
        for key, label in METRICS.items()
    ]
    return page.write_page(
        folder / "report.html",
        "report.html.j2",
        run=config.run,
        dataset=result["dataset"],
        test_part=test_part(result),
        seeds=f"mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else f"one seed ({seeds[0]})",
        best_auc=None if best_auc is None else float(best_auc),
        notes=notes_of(result),
        verdicts=verdicts(config, table),
        one_seed="" if len(seeds) > 1 else ONE_SEED,
        remarks=" ".join(lum_alone(result) + treatment(config)),
        metrics=metrics,
        table=table,
        charts=_charts(stages, table),
        made=_made(stages, config, result, note),
        config_file=folder / "config.yaml",
        settings=[
            (key, as_text(here), as_text(default)) for key, (here, default) in changes(plain(config), load()).items()
        ],
        wall=f"{float(result['wall_s']):,.0f} seconds" if "wall_s" in result else "",
        times=[
            (stage.name, f"{float(result[f'wall_s/{stage.name}']):,.0f}")
            for stage in stages
            if f"wall_s/{stage.name}" in result
        ],
        versions=_versions(stages).items(),
        commands=[
            as_typed(torchx_command(stage.app, stage_overrides(stage, config), config=folder / "config.yaml"))
            for stage in stages
        ],
    )


def has_gains(table: Sequence[Row], metric: str) -> bool:
    """Whether any row has a gain over a base."""
    return any(row.figures[metric].gain is not None for row in table if metric in row.figures)


def _charts(stages: Sequence[PlannedStage], table: Sequence[Row]) -> list[dict[str, Any]]:
    """Charts of the gains with their intervals (without a base: of the figures), then of the training curves."""
    charts = []
    for metric, label in METRICS.items():
        if has_gains(table, metric):
            title, xlabel = f"Gain in {label} over the base, with its 95 % interval over users", f"gain in {label}"
            xlabel += " (below 0 is better)" if metric in LOWER_IS_BETTER else ""
        else:
            title, xlabel = f"{label}, ± one standard deviation over the seeds", label
        found = {row.name: dot for row in table if (dot := _dot(row, metric, is_gain=has_gains(table, metric)))}
        if found:
            svg = dot_chart(list(found), xlabel, list(found.values()), zero=has_gains(table, metric))
            charts.append({"title": title, "svg": svg})
    for app, metric, title, ylabel in (
        ("rank", "loss", "Rankers: training loss", "log loss of a batch (nats)"),
        ("rank", "valid/auc", "Rankers: AUC on the validation part", "AUC"),
        ("pretrain", "loss", "LUM: training loss", "loss of a batch (nats)"),
        ("pretrain", "valid/ndcg@10", "LUM: NDCG@10 of the next item on the validation part", "NDCG@10"),
    ):
        lines = [line for line in _series(stages, app, metric) if len(line.steps) > 1]
        if lines:
            charts.append({"title": title, "svg": curves(lines, ylabel=ylabel)})
    return charts


def _dot(row: Row, metric: str, *, is_gain: bool) -> Dot | None:
    figure, colour = row.figures.get(metric), KNOWLEDGE_COLOURS[row.knowledge]
    if figure is None:
        return None
    if not is_gain:
        sd = figure.sd or 0.0
        return Dot(figure.value, figure.value - sd, figure.value + sd, colour)
    if figure.gain is None:
        return None
    low, high = (figure.gain if end is None else end for end in (figure.low, figure.high))
    return Dot(figure.gain, low, high, colour)


def _series(stages: Sequence[PlannedStage], app: str, metric: str) -> list[Series]:
    """One line for each stage; only those with the first seed, so that the chart stays readable."""
    of_app = [stage for stage in stages if stage.app == app]
    rankers = list(dict.fromkeys(stage.ranker for stage in of_app))
    lines = []
    for stage in of_app:
        if stage.seed == of_app[0].seed:
            line = read_series(stage.path / "metrics.jsonl", metric, stage.name)
            if stage.ranker:
                name = Row(stage.ranker, stage.knowledge, {}).name
                colour = KNOWLEDGE_COLOURS[stage.knowledge]
                line = line._replace(label=name, colour=colour, dashes=rankers.index(stage.ranker))
            lines.append(line)
    return lines


def _made(
    stages: Sequence[PlannedStage], config: Config, result: Mapping[str, Any], note: str
) -> list[tuple[str, str]]:
    """(heading, text) about the data, the protocol and the LUM behind the figures."""
    prepared = stages[0].path
    facts = read_json(prepared / "result.json", again="prepare the data again with overwrite=true")
    counts = (
        f"{facts['events']:,} events of {facts['users']:,} users on {facts['items']:,} items; "
        f"{facts['train_events']:,} to train, {facts['valid_events']:,} to validate, {facts['test_events']:,} to test"
    )
    drawn = config.data.negatives
    rows_of = f"positives, and {drawn.per_positive} drawn beside each ({drawn.sampling})" if drawn else "the log's rows"
    made = [
        ("Data", f"{note}, {counts}."),
        ("Protocol", f"{split_text(config.data.split)}; tested on {rows_of}."),
    ]
    if "same_moment_share" in facts:
        manifest = read_json(prepared / "manifest.json", again="prepare the data again with overwrite=true")
        line = seen_line(facts["same_moment_share"], has_clock=manifest["absolute_time"])
        made.append(("Rows of the same moment", f"{line[0].upper()}{line[1:]}."))
    hazard = result.get("query/hazard")
    knowledge = HAZARD[hazard].format(folds=config.pipeline.folds) if hazard else "No ranker of this run used it."
    made.append(("LUM knowledge", knowledge.replace("\n", " ")))
    names = [name for name in result if name.startswith("lum/") and name.count("/") == 1 and "@" in name]
    if names:
        figures = ", ".join(f"{name.removeprefix('lum/').upper()} {float(result[name]):.4f}" for name in names)
        made.append(("LUM", f"Next item among the whole catalogue, test part, mean over the LUMs: {figures}."))
    return made


def _versions(stages: Sequence[PlannedStage]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in stages:
        path = stage.path / "versions.json"
        if path.exists():
            found |= read_json(path, again=f"make {stage.path} again with overwrite=true")
    return {name: value for name, value in found.items() if name not in ("stage", "id")}  # these differ by stage
