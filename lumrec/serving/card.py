"""The model card of a bundle, in Markdown: what the ranker was trained on, how good it is, and its limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import numpy as np

from lumrec.data.prepared import PreparedData
from lumrec.data.splits import TEST, TRAIN, VALID
from lumrec.models.ranker_config import RankerConfig
from lumrec.query.conditions import spoken

SCORES = (
    "Scores the probability that a user gives an item a positive label, from the user's events before the request, the "
    "item's features and the request's context."
)
PARTS = {"training": TRAIN, "validation": VALID, "test": TEST}
METRICS = {
    "auc": "AUC",
    "gauc": "AUC within users, averaged (gAUC)",
    "log_loss": "log loss",
    "ne": "normalized entropy",
    "calibration": "calibration (mean prediction / mean label)",
    "ece": "expected calibration error",
}
PROTOCOLS = {
    "user": "each user is in one part only: the test users were not trained on",
    "time": "by time: the test events come after the training events",
    "leave_one_out": "the last event of each user is tested, the one before it validates",
}
HAZARDS = {
    "in_sample": "one LUM, trained on the rows that the ranker learnt from: its answers may know their labels, so that "
    "the ranker may trust them too much",
    "cross_fit": "each user was answered by a LUM that was not trained on that user",
    "time_split": "one LUM of the earlier training events; the ranker was trained on the later ones",
}


def model_card(
    *,
    ranker: str,
    config: RankerConfig,
    data: PreparedData,
    result: Mapping[str, Any],
    manifest: Mapping[str, Any],
    tested: Mapping[str, float],
) -> str:
    """The card as text. ranker: name of its run. result: its result.json. manifest: the bundle's, unpublished.
    tested: what export.test_rows found, or nothing.
    """
    split = data.manifest["split"]
    kind = str(split.get("kind"))
    graph = "exported" if manifest["compile"] == "none" else "compiled"
    sections = {
        "Data": [
            f"- Source: {data.manifest['dataset']}, fingerprint {data.fingerprint}",
            f"- Users: {data.num_users:,}; items: {data.num_items:,}; events: {data.num_events:,}",
            *_parts(data),
            f"- Split: {kind}{': ' * (kind in PROTOCOLS)}{PROTOCOLS.get(kind, '')} (`{json.dumps(split)}`)",
        ],
        "Features": [
            "| feature | role | kind |",
            "|---|---|---|",
            *(f"| {name} | {feature.role} | {feature.kind} |" for name, feature in data.schema.features.items()),
            *(["", f"Not read: {', '.join(config.leave_out)}."] if config.leave_out else []),
            "",
            f"Statistics of the history: {config.statistics}. Events of the history: {config.max_history}.",
        ],
        "Metrics of the test part": _metrics(result),
        "Knowledge of a LUM": _knowledge(config, result, manifest["needs"]),
        "This bundle": [
            f"- Tables: {manifest['dtype']}; graph: {graph} by torch {manifest['torch']}",
            f"- Largest difference to the trained ranker over {manifest['golden_rows']} golden rows: "
            f"{manifest['golden_difference']:.2g} (a bundle opens up to {manifest['tolerance']:g})",
            *_tested(tested),
        ],
        "Limits": _limits(data, config, result),
    }
    lines = [f"# {ranker}: {config.model}", "", SCORES]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section]
    return "\n".join(lines) + "\n"


def _parts(data: PreparedData) -> list[str]:
    lines = []
    for name, part in PARTS.items():
        rows = np.flatnonzero(data.split == part)
        if not len(rows):
            lines.append(f"- {name.capitalize()} part: empty")
            continue
        first, last = int(data.timestamp[rows].min()), int(data.timestamp[rows].max())
        when = f", {_date(first)} to {_date(last)}" if data.absolute_time else ""
        positive = float(data.label[rows].mean())
        lines.append(f"- {name.capitalize()} part: {len(rows):,} events, {positive:.1%} positive{when}")
    return lines


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).date().isoformat()


def _metrics(result: Mapping[str, Any]) -> list[str]:
    """A table; a null in result.json is shown as undefined."""
    tested = [name for name in METRICS if name in result]
    if not tested:
        return ["The ranker was not tested (rank.test=false)."]
    lines = ["| metric | value | 95 % interval over users |", "|---|---|---|"]
    for name in tested:
        low, high = result.get(f"{name}_low"), result.get(f"{name}_high")
        interval = f"{low:.4f} to {high:.4f}" if low is not None and high is not None else ""
        value = "undefined" if result[name] is None else f"{result[name]:.4f}"
        lines.append(f"| {METRICS[name]} | {value} | {interval} |")
    counts = [f"{result[f'num_{of}']:,.0f} {of}" for of in ("rows", "users") if f"num_{of}" in result]
    return [*lines, "", f"Over {' of '.join(counts)}."]


def _tested(tested: Mapping[str, float]) -> list[str]:
    """What export.test_rows found, in one line for each metric."""
    if not tested:
        return []
    rows = f"- Over {tested['test_rows']:,} test rows a score differs by up to {tested['test_difference']:.2g}"
    changes = [
        f"- {METRICS[name]} changes by {tested[f'{name}_change']:+.6f} (95 % interval over users: "
        f"{tested[f'{name}_change_low']:+.6f} to {tested[f'{name}_change_high']:+.6f})"
        for name in ("auc", "gauc", "log_loss")
    ]
    return [rows, *changes]


def _knowledge(config: RankerConfig, result: Mapping[str, Any], needs: Mapping[str, Any] | None) -> list[str]:
    if needs is None:
        return ["None is read."]
    hazard = str(result.get("knowledge_hazard", ""))
    asked = "; ".join(spoken(condition) for condition in needs["conditions"])
    return [
        f"- Mode: {config.knowledge}; conditions: {asked}; width: {needs['dim']}; LUMs: {len(needs['lums'])}",
        f"- Hazard: {hazard}: {HAZARDS.get(hazard, 'not recorded')}",
        "- For a user without an answer, the ranker reads that there is none.",
    ]


def _limits(data: PreparedData, config: RankerConfig, result: Mapping[str, Any]) -> list[str]:
    lines = [
        "- Users, items and values that were not in the training part are scored as unknown, by their other features.",
        f"- A history is cut to its last {config.max_history} events; statistics count all events before the request.",
        "- Scores are probabilities for items as the log showed them; little was learnt about items seldom shown.",
    ]
    if data.absolute_time:
        last = _date(int(data.timestamp[data.split == TRAIN].max()))
        lines.append(f"- Nothing after {last} was learnt: tastes and items change, so train again.")
    if "note" in result:
        lines.append(f"- {result['note']}")
    return lines
