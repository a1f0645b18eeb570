"""What a ranker read of each request that a server scored: as columns of a Parquet file, and as batches to train on.

One row of the file is one request with L events of history and C candidates. Of each feature, its bags::

    history event 0 … L-1 | candidate 0 … C-1 | row of candidate 0 … C-1      lengths.<feature>, values.<feature>

and beside them what a batch holds for each candidate (dense [C, F], knowledge e [C, D] and present [C, N]), each
history event (age, category_count), both (item, category), or once (knowledge o [N, D], log_z [N], fold). A batch made
of them holds the same bits as the one that was scored.

Shape suffixes: B rows (candidates), T history events of all rows, L, C of a request, X bags, N conditions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lumrec.batches.rows import RowBuilder
from lumrec.data.columns import Column, expand_ranges
from lumrec.data.served import ServedData
from lumrec.knowledge.store import Knowledge
from lumrec.modules.knowledge import KnowledgeBatch
from lumrec.modules.rankers.base import RankBatch
from lumrec.modules.tokens import make_kjt
from lumrec.run.errors import UserError

OF_TOKENS = {"item": "item_U", "category": "category_U"}
OF_EVENTS = {"age": "age_T", "category_count": "category_count_T"}


def served_columns(batch: RankBatch, rows: slice) -> dict[str, Any]:
    """What the batch holds of one request, whose candidates are these rows: column → its value."""
    first, last = rows.start, rows.stop
    of = first if batch.history_of_B is None else int(batch.history_of_B[first])
    events = slice(int(batch.offsets_B1[of]), int(batch.offsets_B1[of + 1]))
    token_X = torch.cat([batch.history_T[events], batch.target_B[rows]])
    bag_X = torch.cat([token_X, torch.arange(batch.num_tokens + first, batch.num_tokens + last)])
    found: dict[str, Any] = {"num_events": events.stop - events.start, "num_candidates": last - first}
    for name in batch.tokens.keys():
        bags = batch.tokens[name]
        values, lengths = Column(bags.values(), bags.offsets()).take(bag_X)
        found |= {f"values.{name}": values.numpy(), f"lengths.{name}": lengths.numpy().astype(np.int32)}
    found["dense"] = batch.dense_BF[rows].flatten().numpy()
    found |= {to: x[token_X].numpy() for to, name in OF_TOKENS.items() if (x := getattr(batch, name)) is not None}
    found |= {to: x[events].numpy() for to, name in OF_EVENTS.items() if (x := getattr(batch, name)) is not None}
    if (knowledge := batch.knowledge) is not None:
        found |= {"o": knowledge.o_BND[first].flatten().numpy(), "e": knowledge.e_BD[rows].flatten().numpy()}
        found |= {"present": knowledge.present_BN[rows].flatten().numpy(), "fold": int(knowledge.fold_B[first])}
        if knowledge.log_z_BN is not None:
            found["log_z"] = knowledge.log_z_BN[first].numpy()
    return found


def column_types(columns: Mapping[str, Any]) -> list[tuple[str, pa.DataType]]:
    """The Arrow type of each of `served_columns`."""
    return [
        (name, pa.large_list(pa.from_numpy_dtype(value.dtype)) if isinstance(value, np.ndarray) else pa.int64())
        for name, value in columns.items()
    ]


class ServedKnowledge(Knowledge):
    """What rankers are told of the knowledge in served rows; each row holds its own answers."""

    def __init__(self, data: ServedData, facts: Mapping[str, Any]) -> None:
        self.path, self.manifest, self.learnt_until = data.path, {}, None
        self.conditions, self.hazard = facts["conditions"], "as_served"
        self.num_conditions, self.dim, self.num_folds = len(self.conditions), facts["dim"], facts["num_folds"]
        self.log_z = np.zeros(0) if facts["log_z"] else None


class ServedRows(RowBuilder):
    """Makes batches of served rows, as RowBuilder does of a log's.

    features: the tables' KJT order. max_history: as served, or fewer. Raises UserError for a ranker that reads what was
    not served.
    """

    data: ServedData

    def __init__(
        self,
        data: ServedData,
        *,
        features: Sequence[str],
        max_history: int,
        reads: Sequence[str],
        knowledge: Knowledge | None,
    ) -> None:
        self.data, self.features, self.max_history, self.knowledge = data, list(features), max_history, knowledge
        table = self._table = data.read_features()
        extras = {name: to for to, name in (OF_TOKENS | OF_EVENTS).items() if name in reads}
        missing = {*(f"values.{name}" for name in features), *extras.values()}.difference(table.column_names)
        if missing or max_history > data.served["spec"]["max_history"]:
            raise UserError(
                f"{data.path} was served to a ranker that reads less: "
                + (f"there is no {min(missing).removeprefix('values.')}" if missing else f"max_history {max_history}")
                + "; train a ranker with the features and settings of the one that was served"
            )
        self.columns = {
            name: Column(self._flat(f"values.{name}"), _offsets(self._flat(f"lengths.{name}"))) for name in features
        }
        self.extras = {name: self._flat(to) for name, to in extras.items()}
        self.num_events_Q, self.num_candidates_Q = self._flat("num_events"), self._flat("num_candidates")
        self.events_Q1, self.candidates_Q1 = _offsets(self.num_events_Q), _offsets(self.num_candidates_Q)
        num_candidates = int(self.candidates_Q1[-1])
        self.dense_CF = self._flat("dense").view(num_candidates, -1) if num_candidates else torch.zeros(0, 0)
        if knowledge is not None:
            num, dim = knowledge.num_conditions, knowledge.dim
            self.o_QND, self.e_CD = self._flat("o").view(-1, num, dim), self._flat("e").view(-1, dim)
            self.present_CN, self.fold_Q = self._flat("present").view(-1, num), self._flat("fold")
            self.log_z_QN = None if knowledge.log_z is None else self._flat("log_z").view(-1, num)

    def batch(self, rows: np.ndarray) -> RankBatch:
        """The batch of `rows` (int64, any order, repeats allowed, at least one)."""
        request_B, place_B = (torch.from_numpy(x[rows]) for x in (self.data.request, self.data.candidate))
        events_B, candidates_B = self.events_Q1[request_B], self.candidates_Q1[request_B]
        all_B, of_request_B = self.num_events_Q[request_B], self.num_candidates_Q[request_B]
        length_B = all_B.clamp(max=self.max_history)

        def places(begin_B: Tensor) -> Tensor:
            """The history events that are read, of what begins at these places with all events."""
            return expand_ranges(begin_B + all_B - length_B, length_B)

        bag_B, token_B = events_B + 2 * candidates_B, events_B + candidates_B  # a request's first bag and token
        target_B = bag_B + all_B + place_B
        bag_X = torch.cat([places(bag_B), target_B, target_B + of_request_B])
        token_X = torch.cat([places(token_B), token_B + all_B + place_B])
        event_T = places(events_B)
        num_events, num_rows = len(event_T), len(rows)
        extras: dict[str, Any] = {
            name: values[event_T if name in OF_EVENTS.values() else token_X] for name, values in self.extras.items()
        }
        return RankBatch(
            tokens=make_kjt(
                self.features,
                {name: self.columns[name].take(bag_X) for name in self.features},
                stride=num_events + 2 * num_rows,
            ),
            num_tokens=num_events + num_rows,
            target_B=torch.arange(num_events, num_events + num_rows),
            history_T=torch.arange(num_events),
            offsets_B1=_offsets(length_B),
            dense_BF=self.dense_CF[candidates_B + place_B],
            label_B=torch.from_numpy(self.data.label[rows]),
            row_B=torch.from_numpy(rows),
            knowledge=None if self.knowledge is None else self._of_knowledge(request_B, candidates_B + place_B),
            **extras,
        )

    def _of_knowledge(self, request_B: Tensor, candidate_B: Tensor) -> KnowledgeBatch:
        log_z_BN = None if self.log_z_QN is None else self.log_z_QN[request_B]
        present_BN, fold_B = self.present_CN[candidate_B], self.fold_Q[request_B]
        return KnowledgeBatch(self.o_QND[request_B], self.e_CD[candidate_B], log_z_BN, present_BN, fold_B)

    def _flat(self, name: str) -> Tensor:
        """All values of a column of numbers or lists, one after the other."""
        column = self._table[name].combine_chunks()
        values = column.flatten() if pa.types.is_large_list(column.type) else column
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0))
