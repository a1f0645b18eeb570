"""Two towers as files that torch runs without lumrec: one graph for users, one for items, with their tables as inputs.

    users.pt2, items.pt2    operators and dense weights (see graph.py)
    towers.json             what they read
    tables/                 see tables.py
    items.npy               vectors of all items
    golden.npz              inputs and vectors of some rows and items, checked when the files are opened

Shape suffixes: see retrievers/edb.py.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.batches.tower_rows import TowerBuilder
from lumrec.modules.retrievers.edb import TowerBatch, TwoTower
from lumrec.modules.tokens import kjt_from_lists
from lumrec.run.files import write_atomically
from lumrec.serving.bundle import MANIFEST, version_of
from lumrec.serving.golden_vectors import check_golden_vectors, write_golden_vectors
from lumrec.serving.graph import Inputs, export_module, padded, read_spec, without
from lumrec.serving.graph_file import read_graph
from lumrec.serving.tables import TableDtype, bags, embedded, open_tables, write_tables

Side = Literal["users", "items"]
SIDES: tuple[Side, Side] = ("users", "items")
GOLDEN = 20  # rows and items


@dataclass(frozen=True)
class TowerSpec:
    """What exported towers read; see GraphSpec. knowledge: (conditions, width, folds) of the LUM, or None."""

    features: list[str]
    token_features: list[str]
    item_features: list[str]
    row_features: list[str]
    tables: dict[str, str]
    knowledge: list[int] | None
    dtype: TableDtype

    @classmethod
    def of(cls, towers: TwoTower, dtype: TableDtype = "float32") -> "TowerSpec":
        """The spec of towers whose tables will have this dtype."""
        knowledge = None
        if towers.has_knowledge:
            num_folds, in_dim, out_dim = towers.answers.weight_KXF.shape
            num_conditions = towers.answers.num_features - out_dim
            knowledge = [num_conditions, in_dim // num_conditions, num_folds]
        return cls(
            features=towers.features,
            token_features=towers.token_features,
            item_features=towers.item_features,
            row_features=towers.row_features,
            tables=towers.table_of,
            knowledge=knowledge,
            dtype=dtype,
        )


class TowerGraph(nn.Module):
    """One tower over plain tensors, with its tables as inputs: vectors [B, V] or [C, V], float32."""

    def __init__(self, towers: TwoTower, spec: TowerSpec, side: Side) -> None:
        super().__init__()
        if towers.training:
            raise ValueError("the towers are in training mode, and what is served is not: call eval() first")
        self.towers, self.spec, self.side = without(towers, "tables"), spec, side

    def forward(self, inputs: Inputs, tables: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> Tensor:
        sources = inputs, self.spec.tables, tables, scales
        if self.side == "items":
            item_UI = embedded(self.spec.item_features, *sources)
            return self.towers.item_vectors(F.embedding(inputs["candidate_C"], item_UI), inputs.get("e_CKW"))
        token_ZD = F.pad(embedded(self.spec.token_features, *sources), (0, 0, 0, 1))
        user = [embedded(self.spec.row_features, *sources)] if self.spec.row_features else []
        user.append(self.towers.padded_pool(token_ZD, inputs["history_BL"]))
        return self.towers.user_vectors(user, inputs.get("o_BNW"), inputs.get("present_BN"), inputs.get("fold_B"))


def tower_inputs(batch: TowerBatch, spec: TowerSpec, side: Side) -> Inputs:
    """The tensors that an exported tower reads for `batch`, by name, on the CPU.

    Raises ValueError for a batch with other features, or without the knowledge that the towers read.
    """
    if batch.tokens.keys() != spec.features:
        raise ValueError(f"the batch has the keys {batch.tokens.keys()}; these towers are called with {spec.features}")
    if side == "items":
        inputs = bags(batch.tokens, batch.num_tokens, spec.item_features, [])
        own = {"candidate_C": batch.candidate_C, "e_CKW": batch.e_CKW}
    else:
        inputs = bags(batch.tokens, batch.num_tokens, spec.token_features, spec.row_features)
        history_BL = padded(batch.history_T, np.diff(batch.offsets_B1.numpy()), batch.num_tokens)
        own = {"history_BL": history_BL, "o_BNW": batch.o_BNW, "present_BN": batch.present_BN, "fold_B": batch.fold_B}
    if spec.knowledge is not None and None in own.values():
        raise ValueError("these towers read a LUM's knowledge and the batch has none: give it to the builder")
    of_knowledge = () if spec.knowledge is not None else ("e_CKW", "o_BNW", "present_BN", "fold_B")
    return inputs | {name: x for name, x in own.items() if x is not None and name not in of_knowledge}


@torch.no_grad()
def export_towers(
    towers: TwoTower, builder: TowerBuilder, folder: str | Path, *, dtype: TableDtype = "float32"
) -> TowerSpec:
    """Writes two towers, with some of their vectors, into a folder; every size may differ from call to call.

    builder: that came with them. dtype: of the tables. Raises UserError where the files do not give the vectors.
    """
    folder, spec, data = Path(folder), TowerSpec.of(towers, dtype), builder.data
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder / "tables", towers.tables, dtype=dtype)
    batch, tables, scales = _example(towers, spec)
    for side in SIDES:
        arguments = tower_inputs(batch, spec, side), tables, scales
        export_module(TowerGraph(towers, spec, side), arguments, folder / f"{side}.pt2")
    write_atomically(folder / "towers.json", json.dumps(dataclasses.asdict(spec), indent=2) + "\n")
    drawn = [np.unique(np.linspace(0, num - 1, GOLDEN).astype(np.int64)) for num in (data.num_events, data.num_items)]
    golden = builder.towers(*drawn)
    inputs = {f"{side}:{name}": x for side in SIDES for name, x in tower_inputs(golden, spec, side).items()}
    expected = dict(zip(("o_BV", "e_CV"), towers(golden), strict=True))
    items_IV = torch.cat([towers(items)[1] for items in builder.catalogue()])
    write_golden_vectors(folder, inputs, expected, items_IV)
    Towers(folder)
    return spec


def _names(golden: Inputs, side: Side) -> list[str]:
    return [name.removeprefix(f"{side}:") for name in golden if name.startswith(f"{side}:")]


def _example(towers: TwoTower, spec: TowerSpec) -> tuple[TowerBatch, dict[str, Tensor], dict[str, Tensor]]:
    """Example arguments for the export, whose sizes are primes that nobody chooses (see graph.py)."""
    num_rows, num_tokens, num_items, longest = 109, 113, 103, 127
    tables = {
        table: torch.zeros(139, towers.width_of[feature], dtype=getattr(torch, spec.dtype))
        for feature, table in spec.tables.items()
    }
    batch = TowerBatch(
        tokens=kjt_from_lists(spec.features, [dict.fromkeys(spec.features, 1)] * (num_tokens + num_rows)),
        num_tokens=num_tokens,
        history_T=torch.zeros(longest, dtype=torch.int64),
        offsets_B1=torch.tensor([0, *[longest] * num_rows]),
        candidate_C=torch.zeros(num_items, dtype=torch.int64),
        candidate_item_C=torch.zeros(num_items, dtype=torch.int64),
        positive_B=torch.zeros(0, dtype=torch.int64),
        log_weight_C=torch.zeros(0),
        log_positive_weight_B=torch.zeros(0),
    )
    if spec.knowledge is not None:
        num_conditions, width, num_folds = spec.knowledge
        batch.o_BNW = torch.zeros(num_rows, num_conditions, width)
        batch.present_BN = torch.ones(num_rows, num_conditions, dtype=torch.bool)
        batch.fold_B = torch.zeros(num_rows, dtype=torch.int64)
        batch.e_CKW = torch.zeros(num_items, num_folds, width)
    return batch, tables, {name: torch.ones(139) for name in tables} if spec.dtype == "int8" else {}


class Towers:
    """Exported towers, opened: `users(batch)` [B, V] and `items(batch)` [C, V], float32, on the CPU.

    folder: a bundle that lumrec export wrote, or what `export_towers` did. items_IV: vectors of all items. Raises
    MissingFileError or UserError where a file is missing or damaged, or the golden vectors do not come out.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            folder = version_of(folder, "towers")
        self.tables = open_tables(folder / "tables")
        self.spec = read_spec(folder / "towers.json", TowerSpec, self.tables)
        self._users, self._items = (read_graph(folder / f"{side}.pt2") for side in SIDES)
        self.items_IV, self.golden_difference = check_golden_vectors(
            folder, "the pair of towers", self.spec.dtype, self._vectors
        )

    @torch.inference_mode()
    def _vectors(self, golden: Inputs) -> Inputs:
        users, items = ({name: golden[f"{side}:{name}"] for name in _names(golden, side)} for side in SIDES)
        return {"o_BV": self._users(users, *self.tables), "e_CV": self._items(items, *self.tables)}

    @torch.inference_mode()
    def users(self, batch: TowerBatch) -> Tensor:
        """The vectors of the batch's users, [B, V]; expects at least one."""
        vectors: Tensor = self._users(tower_inputs(batch, self.spec, "users"), *self.tables)
        return vectors

    @torch.inference_mode()
    def items(self, batch: TowerBatch) -> Tensor:
        """The vectors of the batch's candidates, [C, V]; expects at least one."""
        vectors: Tensor = self._items(tower_inputs(batch, self.spec, "items"), *self.tables)
        return vectors
