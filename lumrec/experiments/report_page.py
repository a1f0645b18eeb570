"""The report of a pipeline run: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape as escape_html
from pathlib import Path
from typing import Any

from lumrec.experiments.config import Config
from lumrec.experiments.jobs import as_typed, torchx_command
from lumrec.experiments.plan import PlannedStage, stage_words
from lumrec.experiments.report_gains import notes_of
from lumrec.experiments.report_plots import Series, comparison_plot, curves, read_series
from lumrec.experiments.report_table import (
    LABELS,
    METRICS,
    ONE_SEED,
    RANKER_NAMES,
    Row,
    alone,
    interval_of,
    rows,
    spoken,
    test_part,
    treatment,
)
from lumrec.run.files import read_json
from lumrec.run.printable import printable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: .2em; } h2 { font-size: 1.15em; margin-top: 2em; }
.note { color: #555; } .warning { background: #fff3cd; padding: .6em .9em; border-left: 4px solid #e0a800; }
table { border-collapse: collapse; margin: .6em 0; } td, th { padding: .25em .9em .25em 0; text-align: left; }
th { border-bottom: 1px solid #999; font-weight: 600; } td.number { font-variant-numeric: tabular-nums; }
tr.base td { border-top: 1px solid #ddd; } code, pre { font-size: .87em; background: #f5f5f5; }
pre { padding: .7em .9em; overflow-x: auto; } svg { width: 100%; height: auto; }
"""
HAZARD = {
    "cross_fit": """Cross-fitted over users: the users were split into {folds} folds, one LUM was trained without each
fold, and every user, of training and test alike, was asked of the LUM that never saw them. So a training row's
knowledge is no better than a test row's. Each fold's outputs get a projection of their own in the ranker, as the spaces
of two LUMs differ.""",
    "time_split": """Split in time: the LUM was trained on the earliest part of the training events, and the rankers
that read its knowledge on the later rows alone; the base is trained on all of them.""",
    "in_sample": """In-sample: one LUM was trained on all users, so it has memorised the training rows that the ranker
learns from, and knowledge looks better in training than in testing. Use pipeline.folds=2 for honest knowledge.""",
}


# Text is escaped where it is written; should one place be missed, the browser runs nothing all the same.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def escape(text: str) -> str:
    """Text of a log or a run as HTML shows it."""
    return escape_html(printable(text, lines=True))


def write_page(
    folder: Path, config: Config, stages: Sequence[PlannedStage], result: Mapping[str, float | str], note: str
) -> Path:
    """Writes report.html into `folder` and gives its path."""
    table = rows(config, result)
    facts = _facts(stages)
    parts = [
        f"<h1>LUM knowledge for a ranker: {escape(str(result['dataset']))}</h1>",
        f"<p class='note'>Run {escape(config.run)}. Data: {escape(note)}, {escape(_counts(facts))}.</p>",
        _simulated(result),
        *(f"<p class='warning'>{escape(note)}</p>" for note in notes_of(result)),
        _gains(config, table, result),
        "<h2>Rankers without and with LUM knowledge</h2>",
        f"<p class='note'>Test part of the {escape(config.data.split.kind)} split; {escape(_seeds(config))}; "
        "differences to the base in brackets. gAUC is the mean of the users' AUC weighted by their rows. "
        f"{escape(' '.join(alone(result) + treatment(config)))}</p>",
        _comparison_table(config, table),
        comparison_plot(table),
        "<h2>How the LUM was kept from what it is asked about</h2>",
        f"<p>{escape(_hazard(config, result))}</p>",
        _lum(stages, result),
        "<h2>Training of the rankers</h2>",
        curves(
            {
                "training loss (log loss of a batch)": _series(stages, "rank", "loss"),
                "AUC on the validation part": _series(stages, "rank", "valid/auc"),
            }
        ),
        "<h2>Time</h2>",
        _times(stages, result),
        "<h2>Versions and settings</h2>",
        _versions(stages),
        "<p>Commands of the stages:</p>",
        f"<pre>{escape(chr(10).join(_commands(folder, config, stages)))}</pre>",
        f"<pre>{escape((folder / 'config.yaml').read_text(encoding='utf-8'))}</pre>",
    ]
    title = f"lumrec: {escape(config.run)}"
    page = (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{title}</title><style>{STYLE}</style>"
        f"</head><body>\n{chr(10).join(part for part in parts if part)}\n</body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _facts(stages: Sequence[PlannedStage]) -> dict[str, Any]:
    return read_json(stages[0].path / "result.json", again="prepare the data again with overwrite=true")


def _counts(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['events']:,} events of {facts['users']:,} users on {facts['items']:,} items; "
        f"{facts['train_events']:,} to train, {facts['valid_events']:,} to validate, {facts['test_events']:,} to test"
    )


def _simulated(result: Mapping[str, float | str]) -> str:
    if "prepare/best_auc" not in result:
        return ""
    return (
        "<p class='warning'>These are simulated clicks: the figures show that the parts work together and say nothing "
        "about real data. The best possible AUC, of the true click probabilities, is "
        f"{float(result['prepare/best_auc']):.4f}.</p>"
    )


def _seeds(config: Config) -> str:
    seeds = config.pipeline.seeds
    return f"mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else f"one seed ({seeds[0]})"


def _hazard(config: Config, result: Mapping[str, float | str]) -> str:
    if "query/hazard" not in result:
        return "No ranker of this run used LUM knowledge."
    return HAZARD[str(result["query/hazard"])].format(folds=config.pipeline.folds)


def _gains(config: Config, table: Sequence[Row], result: Mapping[str, float | str]) -> str:
    """Each gain over the base with its interval and verdict; nothing where there are none."""
    body = []
    for row in table:
        for metric, figure in row.figures.items():
            if figure.gain is not None and figure.verdict:
                name = f"{RANKER_NAMES.get(row.ranker, row.ranker)} {LABELS[row.knowledge]}"
                spread = "" if figure.gain_sd is None else f"± {figure.gain_sd:.4f}"
                cells = [f"{figure.gain:+.4f}", interval_of(figure), spread]
                numbers = "".join(f"<td class='number'>{cell}</td>" for cell in cells)
                body.append(
                    f"<tr><td>{escape(name)}</td><td>{METRICS[metric]}</td>{numbers}"
                    f"<td><b>{escape(figure.verdict)}</b></td></tr>"
                )
    if not body:
        return ""
    one_seed = "" if len(config.pipeline.seeds) > 1 else f" {ONE_SEED}"
    return (
        f"<h2>What LUM knowledge gives</h2><p class='note'>{escape(test_part(result))}. Better or worse: the interval "
        f"leaves 0 out, and every seed agrees; else the gain is within noise.{one_seed}</p>"
        "<table><tr><th></th><th></th><th>gain over the base</th><th>95 % interval over users</th><th>over seeds</th>"
        f"<th></th></tr>{''.join(body)}</table>"
    )


def _comparison_table(config: Config, table: Sequence[Row]) -> str:
    head = "".join(f"<th>{label}</th>" for label in METRICS.values())
    body = []
    for row in table:
        figures = "".join(f"<td class='number'>{spoken(row.figures.get(metric))}</td>" for metric in METRICS)
        name = f"{RANKER_NAMES.get(row.ranker, row.ranker)} {LABELS[row.knowledge]}"
        first = row.knowledge == config.pipeline.knowledge[0]
        body.append(f"<tr{' class=base' if first else ''}><td>{escape(name)}</td>{figures}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(body)}</table>"


def _lum(stages: Sequence[PlannedStage], result: Mapping[str, float | str]) -> str:
    if not any(stage.app == "pretrain" for stage in stages):
        return ""
    names = [name for name in result if name.startswith("lum/") and name.count("/") == 1 and "@" in name]
    figures = ", ".join(f"{escape(name.removeprefix('lum/').upper())} {float(result[name]):.4f}" for name in names)
    quality = f"<p class='note'>Next item among the whole catalogue, test part, mean over the LUMs: {figures}.</p>"
    panels = {
        "training loss of the LUM": _series(stages, "pretrain", "loss"),
        "NDCG@10 on the validation part": _series(stages, "pretrain", "valid/ndcg@10"),
    }
    return "<h2>Pre-training of the LUM</h2>" + (quality if names else "") + curves(panels)


def _series(stages: Sequence[PlannedStage], app: str, metric: str) -> list[Series]:
    """One line a stage; of several seeds only the first, so that the plot stays readable."""
    seeds = {stage.config.seed: None for stage in stages if stage.app == app}
    chosen = [stage for stage in stages if stage.app == app and stage.config.seed == next(iter(seeds))]
    return [
        read_series(
            stage.path / "metrics.jsonl",
            metric,
            stage.name.removeprefix("rank-").removesuffix(f"-s{stage.config.seed}"),
        )
        for stage in chosen
    ]


def _times(stages: Sequence[PlannedStage], result: Mapping[str, float | str]) -> str:
    body = "".join(
        f"<tr><td>{escape(stage.name)}</td><td class='number'>{float(result[f'wall_s/{stage.name}']):,.0f}</td></tr>"
        for stage in stages
        if f"wall_s/{stage.name}" in result
    )
    return (
        "<p class='note'>Seconds on the wall, each with the start of its processes; stages run beside each other, so "
        f"they do not add up.</p><table><tr><th>stage</th><th>seconds</th></tr>{body}</table>"
    )


def _versions(stages: Sequence[PlannedStage]) -> str:
    found: dict[str, Any] = {}
    for stage in stages:
        path = stage.path / "versions.json"
        if path.exists():
            found |= read_json(path, again=f"make {stage.path} again with overwrite=true")
    found = {name: value for name, value in found.items() if name not in ("stage", "id")}  # of one run each
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in found.items())
    return f"<table>{body}</table>"


def _commands(folder: Path, config: Config, stages: Sequence[PlannedStage]) -> list[str]:

    path = folder / "config.yaml"
    return [as_typed(torchx_command(stage.app, stage_words(stage, config), config=path)) for stage in stages]
