"""Golden rows of a bundle: the inputs of some rows, as requests have them, and their scores by the trained ranker.

A bundle that does not reproduce these scores is not opened. Otherwise a different version of torch, a different kind of
processor, or a file that belongs to another bundle would show only in what is served.

    golden.parquet   item, time, context (JSON), history (bytes of a UserHistory), score,
                     and with knowledge o, log_z, e, present, fold: the LUM's answers for the row

They name no users.

Shape suffixes: Q rows (each a request of one item), N conditions, D width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lumrec.batches.rows import RowBuilder
from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import features_by_role
from lumrec.data.splits import TEST
from lumrec.features.history import SECOND, EventRows, UserHistory, log_events
from lumrec.features.statistics import Scale
from lumrec.modules.knowledge import KnowledgeBatch
from lumrec.modules.rankers.base import Ranker
from lumrec.run.errors import UserError
from lumrec.serving.bundle import AGAIN, Bundle
from lumrec.serving.requests import RequestBuilder, ScoreRequest

FILE = "golden.parquet"
NUM_ROWS = 200
UNKNOWN_VALUE = "\0"  # text that occurs in no log
KNOWLEDGE = ("o", "log_z", "e", "present", "fold")


def golden_rows(data: PreparedData, *, num_rows: int = NUM_ROWS, seed: int = 0) -> np.ndarray:
    """Rows to keep (int64, ascending): of the test part where it suffices, else of all; among them the rows with the
    longest and the shortest histories."""
    rows = data.with_negatives(np.flatnonzero(data.split == TEST))
    if len(rows) < num_rows:
        rows = np.arange(data.num_rows)
    event = data.rows(rows).event
    by_history = rows[np.argsort(data.before[event] - data.user_offsets[data.user[event]], kind="stable")]
    extremes = num_rows // 20
    chosen = np.concatenate([by_history[:extremes], by_history[-extremes:]])
    others = np.setdiff1d(rows, chosen)
    drawn = np.random.default_rng(seed).permutation(others)[: num_rows - len(chosen)]
    return np.unique(np.concatenate([chosen, drawn]))[:num_rows]


def write_golden(
    folder: Path, rows: np.ndarray, ranker: Ranker, row_builder: RowBuilder, builder: RequestBuilder
) -> None:
    """Writes the golden rows `rows` of the ranker's data into the folder of a bundle."""
    batch = row_builder.batch(rows)
    with torch.no_grad():
        logit_Q = ranker.eval()(batch)
    assert isinstance(logit_Q, torch.Tensor)
    events = _log_events(row_builder.data, builder)
    requests = row_requests(row_builder, builder, rows, events)
    histories = _histories(row_builder, builder, rows, events)
    columns: dict[str, Any] = {
        "item": [request.items[0] for request in requests],
        "time": [request.time for request in requests],
        "context": [json.dumps(request.context) for request in requests],
        "history": pa.array([history.to_bytes() for history in histories], pa.binary()),
        "score": torch.sigmoid(logit_Q).numpy(),
    }
    if (knowledge := batch.knowledge) is not None:
        for name, values in zip(KNOWLEDGE, (knowledge.o_BND, knowledge.log_z_BN, knowledge.e_BD, knowledge.present_BN)):
            if values is not None:
                columns[name] = list(values.reshape(len(rows), -1).numpy())
        columns["fold"] = knowledge.fold_B.numpy()
    pq.write_table(pa.table(columns), folder / FILE, write_page_checksum=True)


def check_golden(bundle: Bundle) -> float:
    """The largest difference of a golden row's score. Raises UserError if it exceeds the manifest's tolerance."""
    table = pq.read_table(bundle.folder / FILE, page_checksum_verification=True)
    inputs = (table[name].to_pylist() for name in ("item", "context", "time"))
    requests = [ScoreRequest("", [item], json.loads(context), at) for item, context, at in zip(*inputs, strict=True)]
    histories = [UserHistory.from_bytes(each, bundle.builder.layout) for each in table["history"].to_pylist()]
    batch = bundle.builder.batch(requests, histories).rank
    batch.knowledge = _knowledge(table, bundle.manifest["needs"])
    difference = np.abs(bundle.graph(batch).numpy() - table["score"].to_numpy())
    largest = float(difference.max(initial=0.0))
    if not largest <= bundle.manifest["tolerance"]:
        worst = int(np.argmax(np.nan_to_num(difference, nan=np.inf)))
        raise UserError(
            f"the bundle in {bundle.folder} does not give the scores of its ranker: golden row {worst} differs by "
            f"{difference[worst]:.3g} (allowed: {bundle.manifest['tolerance']:g}). It was exported with torch "
            f"{bundle.manifest['torch']}, this is torch {torch.__version__}; {AGAIN}"
        )
    return largest


def _knowledge(table: pa.Table, needs: dict[str, Any] | None) -> KnowledgeBatch | None:
    if needs is None:
        return None
    num_rows, num_conditions = len(table), len(needs["conditions"])

    def read(name: str, *shape: int) -> torch.Tensor:
        values = table[name].combine_chunks()
        flat = values.flatten() if pa.types.is_list(values.type) else values
        return torch.from_numpy(np.array(flat.to_numpy(zero_copy_only=False)).reshape(num_rows, *shape))

    return KnowledgeBatch(
        read("o", num_conditions, needs["dim"]),
        read("e", needs["dim"]),
        read("log_z", num_conditions) if needs["log_normalizer"] else None,
        read("present", num_conditions),
        read("fold"),
    )


def row_requests(
    row_builder: RowBuilder, builder: RequestBuilder, rows: np.ndarray, events: EventRows | None = None
) -> list[ScoreRequest]:
    """A request that asks for what each of these rows (int64 [Q]) was: its user, item and context, at its moment.

    events: those of the log, where they have been made already.
    """
    data, spec = row_builder.data, builder.spec
    event_Q, item_Q, _ = data.rows(rows)
    users, items = data.user_keys(), data.item_keys()
    if events is None:
        events = _log_events(data, builder)
    moment_Q = events.moment[event_Q]
    time_Q = moment_Q / SECOND if spec.has_clock else moment_Q.astype(np.float64)
    contexts: list[dict[str, Any]] = [{} for _ in rows]
    for name in row_builder.row_features:
        feature = data.schema.features[name]
        if name in data.user_columns or feature.column in spec.derived:  # of the state, and of the time
            continue
        raw = {row: value for value, row in data.vocabulary(feature.table).items()}
        values, lengths = data.event_columns[name].take(torch.from_numpy(event_Q))
        texts = iter([raw.get(row, UNKNOWN_VALUE) for row in values.tolist()])
        for context, length in zip(contexts, lengths.tolist()):
            context[name] = [next(texts) for _ in range(length)] if feature.kind == "multi" else next(texts)
    for name in features_by_role(data.schema, "context", dense=True):
        for context, value in zip(contexts, _unscaled(data.dense[name][event_Q], spec.statistics.dense[name])):
            context[name] = value
    return [
        ScoreRequest(users[user], [items[item]], context, at)
        for user, item, context, at in zip(data.user[event_Q], item_Q, contexts, time_Q.tolist(), strict=True)
    ]


def _unscaled(scaled_Q: np.ndarray, scale: Scale) -> list[float]:
    x_Q = scaled_Q.astype(np.float64)
    if scale.scale != "none":
        x_Q = x_Q * scale.deviation + scale.mean
    return (np.sign(x_Q) * np.expm1(np.abs(x_Q)) if scale.scale == "log" else x_Q).tolist()


def _log_events(data: PreparedData, builder: RequestBuilder) -> EventRows:
    return log_events(data, builder.layout, builder.known(builder.layout))


def _histories(
    row_builder: RowBuilder, builder: RequestBuilder, rows: np.ndarray, events: EventRows
) -> list[UserHistory]:
    """The state of each row's user before the row's moment, with as many events as the ranker reads."""
    data, layout = row_builder.data, builder.layout
    known = builder.known(layout)
    histories = []
    for event in data.rows(rows).event.tolist():
        history, user = UserHistory.empty(layout), int(data.user[event])
        history.append(events.take(np.arange(data.user_offsets[user], data.before[event])), known)
        for name in layout.users:
            values, lengths = data.user_columns[name].take(torch.tensor([user]))
            history.users[name] = Column(values, torch.tensor([0, int(lengths[0])]) if layout.users[name] else None)
        history.dense = {name: float(data.dense[name][user]) for name in layout.user_dense}
        histories.append(history)
    return histories
