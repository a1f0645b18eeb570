"""A server over a small scorer of its own, for tests of HTTP that need no trained ranker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lumrec.knowledge.store import KnowledgeStore
from lumrec.run.errors import UserError
from lumrec.run.files import read_json
from lumrec.serving.live import Live, stamp_of
from lumrec.serving.metrics import Metrics
from lumrec.serving.requests import ScoreRequest

KNOWN_USERS = ("1", "2", "3")


@dataclass
class Scored:
    """As lumrec.serving.scorer gives it."""

    scores: np.ndarray
    unknown_user: bool
    unknown_items: list[str]
    knowledge_present: bool
    knowledge_age_s: float
    store_error: str = ""
    state_error: str = ""
    unknown_values: int = 0
    cut: bool = False


@dataclass
class SmallScorer:
    """Reads a factor from a JSON file; an item's score is the factor × its number / 1000, + 0.5 with knowledge."""

    path: Path
    store: Any = None
    state: Any = None
    delay_s: float = 0.0  # of each call, which also waits while a file "hold" lies beside the bundle
    needs_knowledge: bool = False
    calls: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        content = read_json(self.path)
        if not isinstance(content.get("factor"), (int, float)):
            raise UserError(f"{self.path} has no factor")
        self.version, self.factor = str(content["version"]), float(content["factor"])

    def check_store(self, store: KnowledgeStore) -> str:
        """As of a ranker that was trained with knowledge of width 8."""
        return "" if store.manifest["dim"] == 8 else f"the store's answers have width {store.manifest['dim']}, not 8"

    def score_many(self, requests: Sequence[ScoreRequest]) -> list[Scored]:
        """Raises UserError for a context feature "wrong"."""
        self.calls.append(len(requests))
        time.sleep(self.delay_s)
        while self.path.with_name("hold").exists():
            time.sleep(0.01)
        return [self._score(request) for request in requests]

    def _score(self, request: ScoreRequest) -> Scored:
        if "wrong" in request.context:
            raise UserError("context.wrong is no context feature of this ranker")
        present, age_s, store_error = False, float("nan"), ""
        if self.store is not None:
            answers, store_error = self.store.get_or_absent([request.user])
            present, age_s = bool(answers.present_BN[0, 0]), float(answers.age_s_B[0])
        numbers = [int(item) if item.isdecimal() else -1 for item in request.items]
        scores = np.array([self.factor * number / 1000 for number in numbers], np.float32) + np.float32(present) / 2
        unknown = [item for item, number in zip(request.items, numbers) if number < 0]
        return Scored(scores, request.user not in KNOWN_USERS, unknown, present, age_s, store_error)


def write_bundle(path: Path, *, version: str = "v1", factor: float = 1.0) -> Path:
    """The file that a SmallScorer reads."""
    new = path.with_suffix(".new")
    new.write_text(f'{{"version": "{version}", "factor": {factor}}}', encoding="utf-8")
    new.replace(path)
    return path


def small_live(
    folder: Path, *, store: Path | None = None, delay_s: float = 0.0, metrics: Metrics | None = None
) -> Live:
    """A scorer of folder/bundle.json (written if it is not there), with the knowledge store in `store`."""
    bundle = folder / "bundle.json"
    if not bundle.exists():
        write_bundle(bundle)
    openers = {"bundle": lambda: SmallScorer(bundle, delay_s=delay_s, needs_knowledge=store is not None)}
    versions = {"bundle": lambda: stamp_of(bundle)}
    if store is not None:
        openers["store"] = lambda _: KnowledgeStore.open(store)
        versions["store"] = lambda: stamp_of(store / "manifest.json")
    return Live(openers, versions, metrics=metrics)
