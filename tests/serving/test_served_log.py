"""What was served is what is trained on: rows of the log's files hold the same bits as the batch that was scored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from drawn_requests import RichLog, builders, live_events, request_of, rich_log, rows_of_events, said

from lumrec.batches.served_rows import ServedKnowledge, ServedRows
from lumrec.data.common import Common, InputsConfig
from lumrec.data.config import DataConfig
from lumrec.data.prepare import open_or_prepare, prepare
from lumrec.data.served import ServedData
from lumrec.data.served_config import ServedConfig
from lumrec.features.history import UserHistory
from lumrec.models.ranker_config import RANKERS
from lumrec.modules.knowledge import KnowledgeBatch
from lumrec.run.errors import MissingFileError, UserError
from lumrec.serving.metrics import Metrics
from lumrec.serving.requests import Event, RequestBuilder
from lumrec.serving.served_log import ServedLog

READS = sorted({name for ranker in RANKERS.values() for name in ranker.reads} | {"item_U", "category_U"})
START_US = 1_600_000_000_000_000
NEEDS = {"conditions": [{"feedback": "like"}, {}], "dim": 4, "lums": [{}, {}], "log_normalizer": True}


class Served:
    """Requests for all events of a drawn log, several in a call, scored and logged; then the events come in."""

    def __init__(self, folder: Path, *, needs: dict[str, Any] | None = None, max_rows: int = 7) -> None:
        random = np.random.default_rng(1)
        events = [(int(u), int(i), START_US + 500_000 * t, None, int(u > 2)) for t, (u, i) in enumerate(
            zip(random.integers(1, 5, 40), random.integers(1, 9, 40)))]  # fmt: skip
        (folder / "prepared").mkdir()
        self.log = rich_log(events, "temporal", folder / "prepared")
        _, self.builder = builders(self.log.data, "all", 5, READS)
        states = _states(self.log, self.builder)
        self.requests = [request_of(self.log, event, rows) for event, rows in rows_of_events(self.log.data).items()]
        self.requests = [r._replace(items=[*r.items, "3", "no such"], per_item={}) for r in self.requests]
        bundle = SimpleNamespace(manifest={"needs": needs}, builder=self.builder)
        scorer = SimpleNamespace(version="bundle-0123", bundle=bundle)
        self.metrics = Metrics()
        self.served_log = ServedLog(folder / "served", self.metrics, max_rows=max_rows, max_age_s=60)
        self.batches = []
        for first in range(0, len(self.requests), 8):
            asked = self.requests[first : first + 8]
            made = self.builder.batch(asked, [states[request.user] for request in asked])
            if needs is not None:
                made.rank.knowledge = _drawn_knowledge(made, first)
            self.batches.append(made.rank.expanded())
            for q, request in enumerate(asked):
                rows = slice(int(made.offsets_Q1[q]), int(made.offsets_Q1[q + 1]))
                scored = SimpleNamespace(scores=np.zeros(3, np.float32), batch=made, rows=rows)
                self.served_log.scored(scorer, request, f"r{first + q}", scored)
        self.served_log.events([Event("u", "3", 1.6e9, q % 2, {}, "", f"r{q}") for q in range(len(self.requests))])
        self.served_log.events([Event("u", "3", 1.6e9, 0, {}, "", "r1"), Event("u", "9", None, 1, {}, "", "other")])
        self.served_log.close()
        self.common = Common(
            name="s",
            runs_dir=str(folder),
            inputs=InputsConfig(),
            data=DataConfig(source="served", served=ServedConfig("served", "prepared")),
        )


def _states(log: RichLog, builder: RequestBuilder) -> dict[str, UserHistory]:
    layout = builder.spec.layout(keep=60)
    states = {}
    for user, key in enumerate(log.data.user_keys()):
        states[key] = UserHistory.empty(layout)
        rows = np.arange(*log.data.user_offsets[user : user + 2])
        states[key].append(builder.encode(live_events(log, rows)), builder.known(layout))
    return states


def _drawn_knowledge(made: Any, seed: int) -> KnowledgeBatch:
    """One answer for each request, an embedding for each candidate; some absent, and NaN there."""
    generator = torch.Generator().manual_seed(seed)
    request_B = torch.from_numpy(np.repeat(np.arange(len(made.offsets_Q1) - 1), np.diff(made.offsets_Q1)))
    num = len(made.offsets_Q1) - 1
    o_QND = torch.randn(num, 2, 4, generator=generator)
    o_QND[0] = torch.nan
    present_BN = torch.rand(len(request_B), 2, generator=generator) < 0.8
    e_BD = torch.randn(len(request_B), 4, generator=generator)
    log_z_BN = torch.randn(num, 2, generator=generator)[request_B]
    return KnowledgeBatch(o_QND[request_B], e_BD, log_z_BN, present_BN, (request_B % 2).long())


def rows_of(data: ServedData, knowledge: bool) -> ServedRows:
    features = data.served["spec"]["features"]
    made = ServedKnowledge(data, data.served["knowledge"]) if knowledge else None
    return ServedRows(data, features=features, max_history=5, reads=READS, knowledge=made)


@pytest.mark.parametrize("needs", [None, NEEDS])
def test_rows_hold_the_bits_that_were_scored(tmp_path: Path, needs: dict[str, Any] | None) -> None:
    served = Served(tmp_path, needs=needs)
    common = Common(
        **{**vars(served.common), "data": DataConfig(
            source="served", served=ServedConfig("served", "prepared", without_event="negative"))}
    )  # fmt: skip
    prepare(common, tmp_path / "s-prepare")
    data = open_or_prepare(common, served=True)
    assert isinstance(data, ServedData)
    assert data.num_rows == 3 * len(served.requests)
    rows = rows_of(data, needs is not None)
    # Of each served row its place among all that were scored, in the order of requests.
    scored_rows, scored_floats, scored_knowledge = [], [], []
    for batch in served.batches:
        content, floats = said(batch)
        scored_rows += content
        scored_floats.append(floats)
        if batch.knowledge is not None:
            scored_knowledge.append(batch.knowledge)
    request_of_number = _numbers(data, tmp_path)
    order = [3 * request_of_number[data.request[row]] + int(data.candidate[row]) for row in range(data.num_rows)]
    assert sorted(order) == list(range(data.num_rows))
    shuffled = np.random.default_rng(0).permutation(data.num_rows)
    made = rows.batch(shuffled)
    content, (dense, lengths, age) = said(made)
    assert content == [scored_rows[order[row]] for row in shuffled]
    dense_all = np.concatenate([floats[0] for floats in scored_floats])
    np.testing.assert_array_equal(dense, dense_all[[order[row] for row in shuffled]])
    ages = np.split(
        np.concatenate([floats[2] for floats in scored_floats]),
        np.cumsum(np.concatenate([floats[1] for floats in scored_floats]))[:-1],
    )
    np.testing.assert_array_equal(age, np.concatenate([ages[order[row]] for row in shuffled]))
    for name in KnowledgeBatch._fields if needs is not None else ():
        wanted = torch.cat([getattr(each, name) for each in scored_knowledge])[[order[row] for row in shuffled]]
        np.testing.assert_array_equal(getattr(made.knowledge, name).numpy(), wanted.numpy())
    items = [served.requests[request_of_number[data.request[row]]].items[data.candidate[row]] for row in shuffled]
    odd = [request_of_number[data.request[row]] % 2 for row in shuffled]
    assert made.label_B.tolist() == [float(item == "3" and is_odd) for item, is_odd in zip(items, odd)]


def _numbers(data: ServedData, folder: Path) -> dict[int, int]:
    """Which of the test's requests each request of the prepared folder is."""
    names = data.read_features()["request_id"].to_pylist()
    return {number: int(name[1:]) for number, name in enumerate(names)}


def test_only_candidates_with_events_are_rows_and_only_for_rankers(tmp_path: Path) -> None:
    served = Served(tmp_path)
    data = open_or_prepare(served.common, served=True)
    assert data.num_rows == sum(request.items.count("3") for request in served.requests)
    assert set(np.unique(data.split)) <= {0, 1, 2} and (data.split == 0).any()
    assert data.vocabulary("tags") == served.log.data.vocabulary("tags")
    with pytest.raises(UserError, match="only rankers train on them"):
        open_or_prepare(served.common)
    assert "already" in _said(lambda: prepare(served.common, tmp_path / "s-prepare"))
    with pytest.raises(UserError, match="served to a ranker that reads less: max_history 6"):
        ServedRows(data, features=[], max_history=6, reads=[], knowledge=None)
    with pytest.raises(MissingFileError, match="there are no served rows"):
        config = ServedConfig("prepared", "prepared")
        prepare(Common(**{**vars(served.common), "data": DataConfig(source="served", served=config)}), tmp_path / "x")


def _said(call: Any) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        call()
    return out.getvalue()


def test_rows_that_cannot_be_written_are_counted(tmp_path: Path) -> None:
    metrics = Metrics()
    log = ServedLog(tmp_path / "served", metrics, max_rows=1, max_age_s=60)
    (tmp_path / "served").rmdir()
    log.events([Event("u", "i", 1.0, 1)])
    log.close()
    assert b'lumrec_log_rows_total{outcome="lost"} 1.0' in metrics.text()
