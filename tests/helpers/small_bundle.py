"""A ranker with knowledge and its bundle, small and made for real, and what asks a bundle about rows of the log."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lumrec.experiments.config import load
from lumrec.features.history import Layout, UserHistory, histories_of
from lumrec.knowledge.store import Knowledge, UserKnowledge
from lumrec.models.ranker import open_ranker_run, plain_ranker
from lumrec.serving.golden import row_requests
from lumrec.serving.scorer import Scored, Scorer
from lumrec.stages.registry import STAGES

WORDS = [
    "name=tiny",
    "data.source=simulator",
    "data.simulator.num_users=60",
    "data.split.kind=user",
    "data.simulator.num_items=120",
    "data.simulator.events_per_user=30",
    "model.dim=16",
    "model.max_events=16",
    "pretrain.train.max_steps=4",
    "pretrain.packing.events_per_pack=256",
    "query.tokens_per_pack=600",
    "rank.hidden_dims=[16]",
    "rank.max_history=20",
    "rank.train.max_steps=4",
    "rank.knowledge=both",
]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: tiny-prepare, tiny-pretrain, tiny-query, tiny-rank (DIN with knowledge) and tiny-rank-bundle;
    not to be changed."""
    runs = tmp_path_factory.mktemp("exported") / "runs"
    for stage in ("pretrain", "query", "rank", "export"):
        STAGES[stage].run(load(None, [*WORDS, f"runs_dir={runs}"]))
    return runs


@pytest.fixture
def served(exported: Path, tmp_path: Path) -> SimpleNamespace:
    """A copy of it that the test may change. runs: the folder. bundle, store: folders in it. words: of its config."""
    runs = tmp_path / "runs"
    shutil.copytree(exported, runs)
    words = [*WORDS, f"runs_dir={runs}"]
    return SimpleNamespace(runs=runs, bundle=runs / "tiny-rank-bundle", store=runs / "tiny-query", words=words)


def score_rows(scorer: Scorer, ranker: Path, rows: np.ndarray, *, at_once: int = 256) -> list[Scored]:
    """What a scorer says of rows of its ranker's data: each a request at the row's time, with the state that its user
    has after the whole log, and the knowledge of the row."""
    row_builder = plain_ranker(open_ranker_run(ranker))[1]
    data, builder = row_builder.data, scorer.bundle.builder
    layout = Layout.of(data.schema, keep=5000, has_clock=builder.spec.has_clock, category=builder.spec.category)
    states: list[UserHistory] = list(histories_of(data, layout, builder.known(layout)))
    requests = row_requests(row_builder, builder, rows)
    user_N = data.user[data.rows(rows).event]
    scored = []
    for first in range(0, len(rows), at_once):
        part = slice(first, first + at_once)
        answers = answers_of(row_builder.knowledge, data.rows(rows[part]).event) if row_builder.knowledge else None
        histories = [states[user] for user in user_N[part]]
        scored += scorer.score_many(requests[part], histories=histories, answers=answers)
    return scored


def answers_of(knowledge: Knowledge, events: np.ndarray) -> UserKnowledge:
    """What the LUM answered before these events, as if it were what a store holds of their users."""
    of = knowledge.for_rows(events)
    age_s = torch.zeros(len(events), dtype=torch.float64)
    return UserKnowledge(of.o_BND, of.present_BN, age_s, of.log_z_BN, of.fold_B)
