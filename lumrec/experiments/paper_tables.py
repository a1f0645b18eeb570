"""The paper's tables on public data: runs the pipelines and writes our figures beside the paper's.

    table 4    every ranker: base, with the LUM's tables, with LUM knowledge; and the gain
    retrieval  two towers (EDB): without and with LUM knowledge; the LUM without towers (ours); see two_towers.py
    hazard     each ranker with knowledge that is in-sample, cross-fitted over users, or split in time (ours)
    table 5    the DLRM: scratch; utilization (direct; + matching); tokenization (without condition token; several);
               warm-up (run separately, as its log is split by time), see warm_up_rows.py

The rows come from pipelines (configs/reproduce/<dataset>*.yaml), each in runs/reproduce-<dataset>*. A stage that is
finished with the same settings is not run again; a stage whose settings have changed is.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lumrec.experiments import pipeline, report_gains
from lumrec.experiments import two_towers as towers
from lumrec.experiments import warm_up_rows as warm_up
from lumrec.experiments.config import Config, load
from lumrec.experiments.pipeline import say, write_json
from lumrec.experiments.plan import PlannedStage, by_row
from lumrec.experiments.report_plots import result_plot
from lumrec.experiments.report_table import METRICS, RANKER_NAMES, split_text
from lumrec.experiments.settings import KNOWLEDGE
from lumrec.run.config_file import with_overrides
from lumrec.run.errors import UserError
from lumrec.run.files import read_json, write_atomically
from lumrec.run.shipped import shipped

OUT = "docs/results"
EARLIER = "no interval: rows of an earlier call are in the average"
CONFIGS = shipped("configs") / "reproduce"
TITLES = {
    "4": "Table 4 of the LUM paper",
    "5": "Table 5 of the LUM paper",
    "hazard": "Knowledge kept from the rows that rankers train on",
    "retrieval": "Two towers without and with a LUM",
}
BY_RANKER = ("4", "hazard")  # tables with rows for each of pipeline.rankers
# Metrics of the table's columns; the plot and the gains use the first. With one target per user, HR equals R.
RETRIEVED = {"hr@10": "R@10", "ndcg@10": "NDCG@10", "hr@50": "R@50", "ndcg@50": "NDCG@50"}
# LUM (arXiv 2502.08309) table 4: AUC of Base and of Base + LUM on ML-1M.
ML_1M = {"din": (0.7455, 0.7472), "dien": (0.7527, 0.7604), "sim": (0.7579, 0.7615), "twin": (0.7539, 0.7675)}
PAPER_4 = {"ml-1m": ML_1M, "ml-1m-plain": ML_1M}


class Case(NamedTuple):
    """One row of a table.

    key: its name in the JSON. variant: suffix of its pipeline's config. ranker: "" for two towers. paper: the paper's
    AUC, if it has one. row: one of warm_up.ROWS, or "". over: key of the row that it is compared with, or "".
    """

    key: str
    label: str
    variant: str
    ranker: str
    knowledge: str
    paper: float | None = None
    row: str = ""
    over: str = ""

    @property
    def model(self) -> str:
        """The first part of the key, such as the ranker."""
        return self.key.partition("/")[0]


def table_4(dataset: str, rankers: Sequence[str]) -> list[Case]:
    """For each ranker: base, base with the LUM's tables (a control), and base + LUM."""
    cases = []
    for ranker in rankers:
        name = RANKER_NAMES[ranker]
        base, lum = PAPER_4.get(dataset, {}).get(ranker, (None, None))
        cases.append(Case(f"{ranker}/base", f"{name} base", "", ranker, "none", base))
        cases.append(Case(f"{ranker}/tables", f"{name} on the LUM's tables", "", ranker, "tables"))
        cases.append(Case(f"{ranker}/lum", f"{name} + LUM", "", ranker, "both", lum, over=f"{ranker}/base"))
    return cases


# LUM table 5, industrial data: the ranker of step 3 is the online DLRM (Embedding + MLP).
TABLE_5 = {
    "scratch": [
        Case("dlrm/scratch", "DLRM", "", "dlrm", "none", 0.7338),
        Case("lum/scratch", "LUM", "", "dlrm", "both", 0.7514, over="dlrm/scratch"),
    ],
    "utilization": [
        Case("lum/direct", "LUM (direct feature)", "", "dlrm", "direct", 0.7402, over="dlrm/scratch"),
        Case("lum/both", "LUM (direct feature + interest matching)", "", "dlrm", "both", 0.7514, over="dlrm/scratch"),
    ],
    "tokenization": [
        Case(f"lum/{key}", label, f"-{key.replace('_', '-')}", "dlrm", "both", paper, over="dlrm/scratch")
        for key, label, paper in (
            ("no_condition", "LUM (w/o condition token)", 0.7416),
            ("multi_conditions", "LUM (multi-conditions)", 0.7545),
        )
    ],
}

WARM_UP = [
    Case(f"{model}/{row}", f"{model.upper()} ({says})", "-warm-up", "dlrm", knowledge, paper, row, over and over + row)
    for model, knowledge, over, papers in (
        ("dlrm", "none", "", (0.7338, 0.7541, 0.7525, 0.7777)),
        ("lum", "both", "dlrm/", (0.7514, 0.7659, 0.7620, 0.7794)),
    )
    for row, says, paper in zip(warm_up.ROWS, ("scratch", "feature", "param", "param + feature"), papers, strict=True)
]

# Ours: three ways to separate the LUM's training data from the ranker's rows; the base trains on all rows.
HAZARD = [
    Case("base", "base", "", "", "none"),
    Case("cross_fit", "+ LUM, cross-fitted over users", "", "", "both", over="base"),
    Case("in_sample", "+ LUM, in-sample", "-in-sample", "", "both", over="base"),
    Case("time_split", "+ LUM, split in time", "-time-split", "", "both", over="base"),
]

RETRIEVAL = [
    Case("edb/base", "EDB", "-retrieval", "", "none"),
    Case("edb/lum", "EDB + LUM", "-retrieval", "", "direct", over="edb/base"),
    Case("lum", "the LUM by itself, asked without a condition", "-retrieval", "", "lum"),
]


def run(
    overrides: Sequence[str], *, table: str = "4", dataset: str = "ml-1m", rows: str = "", out: str = OUT
) -> dict[str, float | str]:
    """Runs what is missing and writes <out>/table4-<dataset>.json, .md and .svg (or table5-…, hazard-…).

    overrides: settings for all rows; pipeline.rankers chooses the rankers of table 4 (default: all) and of hazard.
    rows: for table 5, some of scratch, utilization, tokenization, separated by commas ("" = all three), or warm-up.

    Returns the contents of the JSON, which is flat: "<row>/auc" (retrieval: "<row>/hr@10", …), its "_sd" over the
    seeds, "…/paper_auc", and as text `protocol`, `dataset`, "<ranker>/command" and "<ranker>/commit" (of its runs).
    With a base also "<ranker>/gain/auc" and "average/gain/auc"; for warm-up also "online/auc". For each row that is
    compared with another, "<row>/auc_gain", "…_gain_low", "…_gain_high", "…_gain_sd", "…_verdict", and once
    "test_rows" and "test_users". Rows of other rankers that an earlier call wrote to the file are kept, with their
    command.

    Raises UserError for an unknown table, row or data set, for a file whose rows have another protocol, and like the
    pipeline.
    """
    config = table_config(table, dataset, rows, overrides)
    cases = choose(table, dataset, rows, config)
    metrics = RETRIEVED if table == "retrieval" else METRICS
    kind = f"{'table' if table.isdecimal() else ''}{table}{f'-{rows}' if rows else ''}".replace(",", "-")
    stem = Path(out) / f"{kind}-{dataset}"
    result: dict[str, float | str] = {
        "protocol": protocol(config, "tower" if table == "retrieval" else "ranker", is_warm_up=rows == "warm-up")
    }
    if table in BY_RANKER:
        result |= others(stem.with_suffix(".json"), config.pipeline.rankers, result["protocol"])
    commits: dict[str, set[str]] = {}
    folders: dict[str, list[Path]] = {}
    by_variant: dict[str, list[Case]] = {}
    for case in cases:
        by_variant.setdefault(case.variant, []).append(case)
    for variant, of_variant in by_variant.items():
        settings = read_config(dataset, variant, overrides)
        if table == "retrieval":
            figures, stages = towers.run(settings, list(metrics)), towers.plan(settings)
        else:
            settings = only(settings, of_variant)
            study = warm_up if rows == "warm-up" else pipeline
            figures, stages = study.run(settings), study.plan(settings)
        of_row = by_row(stages)
        result |= {key: value for key, value in figures.items() if key == "dataset" or key.startswith("online/")}
        for case in of_variant:
            result |= _figures(case, figures, metrics)
            runs = of_row.get((case.ranker, case.knowledge, case.row), [])
            folders[case.key] = [stage.path for stage in runs]
            lum = [stage for stage in stages if case.knowledge != "none" and stage.app in ("pretrain", "query")]
            commits.setdefault(case.model, set()).update(map(_commit, [*runs, *lum]))
    options = ["--table", table, "--dataset", dataset, *(["--rows", rows] if rows else [])]
    options += ["--out", out] if out != OUT else []
    command = shlex.join(["torchx", "run", "apps/reproduce.py", *options, *overrides])
    for model, of_model in commits.items():
        result |= {f"{model}/command": command, f"{model}/commit": ", ".join(sorted(of_model))}
    if table in BY_RANKER:
        rankers = [model for model in models_of(result) if model in RANKER_NAMES]
        cases = choose(
            table, dataset, rows, with_overrides(config, [f"pipeline.rankers={json.dumps(rankers)}"], origin=out)
        )
    result |= paired_gains(cases, folders, list(metrics)) | gains(cases, result, metrics)
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(stem.with_suffix(".json"), result)
    write_atomically(stem.with_suffix(".md"), markdown(table, cases, result, stem.name, metrics))
    plot = result_plot([(case.label, case.key) for case in cases], result, *next(iter(metrics.items())))
    write_atomically(stem.with_suffix(".svg"), plot)
    say(f"\n{stem.with_suffix('.md').read_text(encoding='utf-8')}\n{stem}.json, .md, .svg")
    return result


def others(path: Path, rankers: Sequence[str], protocol: str | float) -> dict[str, float | str]:
    """The rows of other rankers in an earlier call's file. Raises UserError if they have another protocol."""
    if not path.exists():
        return {}
    found = read_json(path, again="remove it, or give another folder as --out")
    kept = {key: value for key, value in found.items() if key.partition("/")[0] in set(RANKER_NAMES) - set(rankers)}
    if kept and found["protocol"] != protocol:
        raise UserError(
            f"{path} has rows of {', '.join(models_of(kept))} with another protocol ({found['protocol']}) than this "
            f"call ({protocol}): give another folder as --out, or remove the file"
        )
    return kept


def models_of(keys: Iterable[Case | str]) -> list[str]:
    """The first part of each row's key, or of each key of a result; each once, in order."""
    return list(dict.fromkeys(key.model if isinstance(key, Case) else key.partition("/")[0] for key in keys))


def choose(table: str, dataset: str, rows: str, config: Config) -> list[Case]:
    """The rows of the requested table. Raises UserError for an unknown table or unknown rows."""
    if rows and table != "5":
        raise UserError(f"--rows {rows}: the rows of table {table} are pipeline.rankers; --rows is for table 5")
    if table == "4":
        return table_4(dataset, config.pipeline.rankers)
    if table == "hazard":
        return [
            case._replace(
                key=f"{ranker}/{case.key}",
                label=f"{RANKER_NAMES[ranker]} {case.label}",
                ranker=ranker,
                over=case.over and f"{ranker}/{case.over}",
            )
            for ranker in config.pipeline.rankers
            for case in HAZARD
        ]
    if table == "retrieval":
        return RETRIEVAL
    if table != "5":
        raise UserError(f"--table {table}: expected 4, 5, retrieval or hazard")
    if rows == "warm-up":
        return WARM_UP
    chosen = rows.split(",") if rows else list(TABLE_5)
    unknown = [row for row in chosen if row not in TABLE_5]
    if unknown:
        raise UserError(f"--rows {rows}: {unknown[0]!r} is none of {', '.join(TABLE_5)}; or warm-up by itself")
    return [case for row in chosen for case in TABLE_5[row]]


def table_config(table: str, dataset: str, rows: str, overrides: Sequence[str]) -> Config:
    """The config that determines a table's protocol and, by pipeline.rankers, its rows."""
    own = "warm-up" if rows == "warm-up" else table if table == "retrieval" else ""
    every = [f"pipeline.rankers={json.dumps(list(RANKER_NAMES))}"] if table == "4" else []
    return read_config(dataset, f"-{own}" if own else "", [*every, *overrides])


def read_config(dataset: str, variant: str, overrides: Sequence[str]) -> Config:
    """The config of one of the table's pipelines, with its own run folder. Raises UserError where there is none."""
    path = CONFIGS / f"{dataset}{variant}.yaml"
    if not path.is_file():
        known = sorted({file.stem for file in CONFIGS.glob("*.yaml") if "-no-" not in file.stem})
        raise UserError(f"there is no config {path}; the data sets and variants are {', '.join(known)}")
    return with_overrides(
        load(path), [f"run=reproduce-{dataset}{variant}", "overwrite=true", *overrides], origin="the command line"
    )


def only(config: Config, cases: Sequence[Case]) -> Config:
    """The config with only the rankers and kinds of knowledge that the rows need."""
    rankers = list(dict.fromkeys(case.ranker for case in cases))
    kinds = [kind for kind in KNOWLEDGE if any(case.knowledge == kind for case in cases)]
    overrides = [f"pipeline.rankers={json.dumps(rankers)}", f"pipeline.knowledge={json.dumps(kinds)}"]
    return with_overrides(config, overrides, origin="the rows of the table")


def paired_gains(
    cases: Sequence[Case], folders: Mapping[str, Sequence[Path]], metrics: Sequence[str]
) -> dict[str, float | str]:
    """ "<row>/<metric>_gain", … of each row of this call that is compared with another; see report_gains.py.

    "average/lum/…": the gain of the mean over several models, if this call made the rows of all of them.
    """
    found: dict[str, float | str] = {}
    pairs = [(case.over, case.key) for case in cases if case.over in folders and case.key in folders]
    for over, key in pairs:
        of_row = report_gains.gains(folders[over], folders[key], metrics)
        found |= {name: of_row.pop(name) for name in ("test_rows", "test_users") if name in of_row}
        found |= {f"{key}/{name}": value for name, value in of_row.items()}
    averaged = [case for case in cases if case.key.endswith("/lum") and case.over]
    if 1 < len(averaged) == len([case for case in averaged if (case.over, case.key) in pairs]):
        base = [folder for case in averaged for folder in folders[case.over]]
        other = [folder for case in averaged for folder in folders[case.key]]
        of_all = report_gains.gains(base, other, metrics, num_seeds=len(folders[averaged[0].key]))
        found |= {f"average/lum/{name}": value for name, value in of_all.items() if not name.startswith("test_")}
    elif len(averaged) > 1:
        found |= {f"average/lum/{metric}_verdict": EARLIER for metric in metrics}
    return found


def gains(
    cases: Sequence[Case], result: Mapping[str, float | str], metrics: Mapping[str, str] = METRICS
) -> dict[str, float]:
    """The gain of LUM knowledge in the first metric, for each model and on average; also in the paper's AUC."""
    gained: dict[str, float] = {}
    for name in (next(iter(metrics)), "paper_auc"):
        found = []
        for model in models_of(cases):
            base, lum = result.get(f"{model}/base/{name}"), result.get(f"{model}/lum/{name}")
            if isinstance(base, float) and isinstance(lum, float):
                found.append(lum - base)
                gained[f"{model}/gain/{name}"] = lum - base
        if found:
            gained[f"average/gain/{name}"] = sum(found) / len(found)
    return gained


def protocol(config: Config, trained: str = "ranker", *, is_warm_up: bool = False) -> str:
    """How the figures were measured, in a sentence."""
    settings, share = config.pipeline, config.warm_up.share
    folds = f"cross-fitted over {settings.folds} folds of users" if settings.folds > 1 else "in-sample"
    if is_warm_up:
        folds = (
            f"split in time: the online model and the LUM learn from the earliest {share:.0%} of the training events, "
            f"the rankers from the rest; engineered features are the statistics{_named(config.warm_up.engineered)}; "
            "param rows start from the online model, which was trained on the earlier events, LUM rows without param "
            f"from {'the tables of the LUM' if config.rank.tables == 'lum' else 'fresh tables'}"
        )
    drawn, rows = config.data.negatives, ""
    if drawn is not None:
        rows = f" (positives, and {drawn.per_positive} drawn beside each, {drawn.sampling})"
    contrast = config.pretrain.contrast.feature
    extension = f"; with counterfactual contrast of {contrast}, which the paper does not have" if contrast else ""
    if config.rank.statistics == "none":
        extension += "; rankers read no statistics of users and items"
    return (
        f"{split_text(config.data.split)}, test part{rows}, mean over the {trained} seeds "
        f"{settings.seeds}, LUM seed {config.seed}, rows see strictly earlier moments, knowledge {folds}{extension}"
    )


def markdown(
    table: str,
    cases: Sequence[Case],
    result: Mapping[str, float | str],
    title: str,
    metrics: Mapping[str, str] = METRICS,
) -> str:
    """The table in Markdown: our figures ± one standard deviation over the seeds, the gains, the paper's figures."""
    main = next(iter(metrics))
    labels = {case.key: case.label for case in cases}
    heads = [*metrics.values(), *(["the paper's AUC"] if any(case.paper is not None for case in cases) else [])]

    def line(label: str, *cells: str) -> str:
        return f"| {' | '.join([label, *cells, *[''] * (len(heads) - len(cells))])} |"

    def gain(label: str, key: str, over: str = "") -> str:
        """A line with the gains of a row over another; the average has no rows, so it has no `over`."""
        model = key.partition("/")[0]
        paper = [_spoken(result, f"{model}/gain", "paper_auc", "+.4f")] if f"{model}/gain/paper_auc" in result else []
        differences = {f"{key}/{main}_gain": result.get(f"{model}/gain/{main}")}
        for metric in metrics:
            ours, base = result.get(f"{key}/{metric}"), result.get(f"{over}/{metric}")
            if isinstance(ours, float) and isinstance(base, float):
                differences[f"{key}/{metric}_gain"] = ours - base
        known = {name: value for name, value in differences.items() if value is not None} | dict(result)
        return line(label, *(report_gains.gain_text(known, f"{key}/{metric}") for metric in metrics), *paper)

    lines = [
        f"# {TITLES[table]}: {result['dataset']}",
        "",
        f"{str(result['protocol'])[:1].upper()}{str(result['protocol'])[1:]}.{report_gains.measured(result)}",
        "",
        *_commands(cases, result),
        line("", *heads),
        "|---" * (1 + len(heads)) + "|",
    ]
    for case in cases:
        paper = [] if case.paper is None else [f"{case.paper:.4f}"]
        lines.append(line(case.label, *(_spoken(result, case.key, metric) for metric in metrics), *paper))
        if case.over in labels:
            label = "Imp." if case.over.endswith("base") else f"Imp. over {labels[case.over]}"
            lines.append(gain(label, case.key, case.over))
    if f"average/gain/{main}" in result and len(models_of(case for case in cases if case.key.endswith("/lum"))) > 1:
        lines.append(gain("average Imp.", "average/lum"))
    if f"online/{main}" in result:
        lines.append(line("the online model itself", *(_spoken(result, "online", metric) for metric in metrics)))
    return "\n".join([*lines, "", f"![]({title}.svg)", ""])


def _figures(
    case: Case, figures: Mapping[str, float | str], metrics: Mapping[str, str] = METRICS
) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for metric in metrics:
        for name in (metric, f"{metric}_sd"):
            parts = (*(("rank", case.ranker) if case.ranker else ("retrieve",)), case.knowledge, case.row, name)
            value = figures.get("/".join(filter(None, parts)))
            if value is not None:
                found[f"{case.key}/{name}"] = value
    return found | ({} if case.paper is None else {f"{case.key}/paper_auc": case.paper})


def _commands(cases: Sequence[Case], result: Mapping[str, float | str]) -> list[str]:
    """The command and commit of the rows, once for each group of models that share them."""
    groups: dict[tuple[float | str, float | str], list[str]] = {}
    for model in models_of(cases):
        groups.setdefault((result[f"{model}/commit"], result[f"{model}/command"]), []).append(model)
    lines = []
    for (version, command), models in groups.items():
        names = ", ".join(RANKER_NAMES.get(model, model) for model in models)
        lines += [f"{f'{names}: c' if len(groups) > 1 else 'C'}ommit {version}", "", f"    {command}", ""]
    return lines


def _commit(stage: PlannedStage) -> str:
    """The commit that made the stage's run, which may have been finished before this call."""
    versions = read_json(stage.path / "versions.json", again="make its run again with overwrite=true")
    return versions.get("commit") or "unknown"


def _named(features: Sequence[str]) -> str:
    return f" and {', '.join(features)}" if features else ""


def _spoken(result: Mapping[str, float | str], key: str, metric: str, form: str = ".4f") -> str:
    value, sd = result.get(f"{key}/{metric}"), result.get(f"{key}/{metric}_sd")
    if not isinstance(value, float):
        return "–"
    return f"{value:{form}}" + (f" ± {sd:.4f}" if isinstance(sd, float) else "")
