"""A trained ranker as one file that torch runs without lumrec: the whole graph, exported, with its tables as inputs.

    graph.pt2     operators and dense weights (torch.export, or a package compiled by AOTInductor)
    graph.json    what the graph reads: features, fields, the dtype of its tables
    tables/       one .npy file for each table, memory-mapped, so that workers share them (tables.py)

Rows that share a history, such as the candidates of a request, are computed together: see Histories in rankers/base.py.

Shape suffixes: see rankers/base.py; G groups of rows that share a history, R rows of the largest group, L events of the
longest history, U unique tokens.
"""

import copy
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.modules.knowledge import KnowledgeBatch
from lumrec.modules.rankers.base import Histories, Looked, RankBatch, Ranker
from lumrec.modules.tokens import kjt_from_lists
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import read_json, sync_file, write_atomically
from lumrec.serving.graph_file import read_graph, save_graph
from lumrec.serving.tables import TableDtype, Tables, bags, embedded

Module = TypeVar("Module", bound=nn.Module)
Spec = TypeVar("Spec")
Compile = Literal["none", "aoti"]
Inputs = dict[str, Tensor]
FIXED_COLUMNS = ("dense_BF", "o_BND", "e_BD", "log_z_BN", "present_BN", "o_BNW", "e_CKW")
LEAST_EVENTS = 2  # places of a padded history: AOTInductor's code fails for 0, and torch.export's scan refuses 1


@dataclass(frozen=True)
class GraphSpec:
    """What an exported ranker reads.

    features: the order of a batch's keys. token_features, row_features: those of them that it reads. tables: feature →
    table. reads: see Ranker.reads. num_statistics: columns of dense_BF. knowledge: (conditions, width) or None.
    dtype: of the tables. compiled: by AOTInductor.
    """

    features: list[str]
    token_features: list[str]
    row_features: list[str]
    tables: dict[str, str]
    reads: list[str]
    num_statistics: int
    knowledge: list[int] | None
    has_log_z: bool
    dtype: TableDtype
    compiled: bool

    @classmethod
    def of(cls, ranker: Ranker, dtype: TableDtype = "float32", compile: Compile = "none") -> "GraphSpec":
        """The spec of a ranker whose tables will have this dtype."""
        fusion = ranker.knowledge
        return cls(
            features=ranker.features,
            token_features=ranker.token_features,
            row_features=ranker.row_features,
            tables=ranker.table_of,
            reads=list(ranker.reads),
            num_statistics=ranker.num_statistics,
            knowledge=None if fusion is None else [fusion.num_conditions, fusion.knowledge_dim],
            has_log_z=fusion is not None and fusion.has_log_z,
            dtype=dtype,
            compiled=compile == "aoti",
        )


def without(module: Module, name: str) -> Module:
    """A copy of a module that lacks one of its parts, such as its tables, and shares the others with it."""
    other = copy.copy(module)
    other._modules = {each: part for each, part in module._modules.items() if each != name}
    return other


class RankerGraph(nn.Module):
    """A ranker over plain tensors, with its tables as inputs: probabilities [B], float32.

    inputs: as `graph_inputs` makes them. tables: by name, [rows, width]; scales: of int8 tables, [rows].
    """

    def __init__(self, ranker: Ranker, spec: GraphSpec) -> None:
        super().__init__()
        if ranker.training:
            raise ValueError("the ranker is in training mode, and what is served is not: call eval() first")
        self.ranker, self.spec = without(ranker, "tables"), spec

    def forward(self, inputs: Inputs, tables: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> Tensor:
        def of(names: Sequence[str]) -> Tensor:
            return embedded(names, inputs, self.spec.tables, tables, scales)

        token_UD, dense_BF = of(self.spec.token_features), inputs["dense_BF"]
        row_BR = of(self.spec.row_features) if self.spec.row_features else dense_BF[:, :0]
        token_ZD = F.pad(token_UD, (0, 0, 0, 1))
        target_BI = F.embedding(inputs["target_B"], token_UD[:, : self.ranker.item_dim])
        histories = Histories(
            token_ZD,
            *(inputs[name] for name in ("history_GL", "target_GR", "place_B")),
            *(inputs.get(name) for name in ("age_GL", "count_GL", "category_Z")),
        )
        looked = Looked(token_UD, target_BI, row_BR)
        knowledge = None
        if self.spec.knowledge is not None:
            knowledge = KnowledgeBatch(
                inputs["o_BND"], inputs["e_BD"], inputs.get("log_z_BN"), inputs["present_BN"], inputs["fold_B"]
            )
        interest_BX = self.ranker.shared_interest(looked, histories, dense_BF)
        return torch.sigmoid(self.ranker.logit(looked, interest_BX, dense_BF, knowledge))


def graph_inputs(batch: RankBatch, spec: GraphSpec) -> Inputs:
    """The tensors that an exported ranker reads for `batch`, by name, on the CPU.

    Raises ValueError for a batch with other features, or without a field that the ranker reads.
    """
    if batch.tokens.keys() != spec.features:
        raise ValueError(f"the batch has the keys {batch.tokens.keys()}; this graph is called with {spec.features}")
    missing = [name for name in spec.reads if getattr(batch, name) is None]
    missing += ["knowledge"] if spec.knowledge is not None and batch.knowledge is None else []
    if missing:
        raise ValueError(f"this ranker reads {', '.join(missing)} and the batch has none")
    inputs = bags(batch.tokens, batch.num_tokens, spec.token_features, spec.row_features)
    inputs |= _history_inputs(batch, spec)
    inputs |= {"target_B": batch.target_B, "dense_BF": batch.dense_BF}
    if spec.knowledge is not None:
        assert batch.knowledge is not None
        inputs |= {name: value for name, value in batch.knowledge._asdict().items() if value is not None}
        if not spec.has_log_z:
            inputs.pop("log_z_BN", None)
    return inputs


def _history_inputs(batch: RankBatch, spec: GraphSpec) -> Inputs:
    """The padded histories and rows of each group."""
    offsets, num_rows = batch.offsets_B1.numpy(), len(batch)
    group_B = np.arange(num_rows) if batch.history_of_B is None else batch.history_of_B.numpy()
    length_G = np.diff(offsets)
    count_G = np.bincount(group_B, minlength=len(length_G))
    most_rows = max(1, count_G.max(initial=0))
    place_B = np.arange(num_rows) + (np.arange(len(length_G)) * most_rows - (count_G.cumsum() - count_G))[group_B]
    target_GR = np.full(len(length_G) * most_rows, batch.num_tokens)
    target_GR[place_B] = batch.target_B.numpy()

    inputs = {
        "history_GL": padded(batch.history_T, length_G, batch.num_tokens),
        "target_GR": torch.from_numpy(target_GR.reshape(-1, most_rows)),
        "place_B": torch.from_numpy(place_B),
    }
    if "age_T" in spec.reads:
        assert batch.age_T is not None
        inputs["age_GL"] = padded(batch.age_T, length_G, -1)
    if "category_count_T" in spec.reads:
        assert batch.category_count_T is not None
        inputs["count_GL"] = padded(batch.category_count_T, length_G, -1)
    if "category_U" in spec.reads:
        assert batch.category_U is not None
        inputs["category_Z"] = F.pad(batch.category_U, (0, 1), value=-1)
    return inputs


def padded(values_T: Tensor, length_G: np.ndarray, fill: int) -> Tensor:
    """The values of each history, then `fill`, [G, L]."""
    is_event_GL = np.arange(max(LEAST_EVENTS, length_G.max(initial=0))) < length_G[:, None]
    values_GL = np.full(is_event_GL.shape, fill, values_T.numpy().dtype)
    values_GL[is_event_GL] = values_T.numpy()
    return torch.from_numpy(values_GL)


def export_graph(
    ranker: Ranker, path: str | Path, *, dtype: TableDtype = "float32", compile: Compile = "none"
) -> GraphSpec:
    """Writes the graph of `ranker` to `path` (.pt2) and what it reads beside it (.json).

    Every size may differ from call to call: rows, histories, events, tokens, values. dtype: of the tables it will be
    given (write_tables). compile: "aoti" compiles it for this kind of machine by AOTInductor.
    Raises UserError for "aoti" without a C++ compiler.
    """
    path, spec = Path(path), GraphSpec.of(ranker, dtype, compile)
    export_module(RankerGraph(ranker, spec), _example(ranker, spec), path, compile=compile)
    write_atomically(path.with_suffix(".json"), json.dumps(dataclasses.asdict(spec), indent=2) + "\n")
    return spec


def export_module(
    module: nn.Module, arguments: tuple[dict[str, Tensor], ...], path: Path, *, compile: Compile = "none"
) -> None:
    """Writes `module`, called with dicts of tensors, to `path` (.pt2).

    The first size of each tensor is dynamic, and in the first dict every size, but for the columns of FIXED_COLUMNS.
    """
    every_size = torch.export.Dim.DYNAMIC
    shapes = [
        {
            name: dict.fromkeys(range(1 if at or name in FIXED_COLUMNS else x.ndim), every_size)
            for name, x in named.items()
        }
        for at, named in enumerate(arguments)
    ]
    # Without this option an exported graph is only right for sizes of at least 2.
    general_sizes = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with general_sizes, torch.no_grad():
        exported = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".graph-") as scratch:
            made = Path(scratch) / "graph.pt2"  # torch wants this ending
            if compile == "aoti":
                _compile(exported, made)
            else:
                save_graph(exported, made)
            sync_file(made)
            os.replace(made, path)


def _compile(exported: torch.export.ExportedProgram, path: Path) -> None:
    exceptions = torch._inductor.exc
    try:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    except (exceptions.InvalidCxxCompiler, exceptions.InductorError) as error:
        if isinstance(getattr(error, "inner_exception", error), exceptions.InvalidCxxCompiler):
            why = f"compile=aoti needs a C++ compiler: install g++, or export with compile=none ({error})"
        else:  # such as DIEN's recurrence, by torch 2.13
            why = (
                f"AOTInductor of torch {torch.__version__} cannot compile this graph ({' '.join(str(error).split())}): "
                "export with compile=none"
            )
        raise UserError(why) from error


def _example(ranker: Ranker, spec: GraphSpec) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
    """Example arguments for the export. All sizes are primes that nobody chooses, because torch.export may take two
    equal sizes, or a size that equals a width of the ranker, for one and the same.
    """
    tables = {
        table: torch.zeros(139, ranker.width_of[feature], dtype=getattr(torch, spec.dtype))
        for feature, table in spec.tables.items()
    }
    scales = {name: torch.ones(139) for name in tables} if spec.dtype == "int8" else {}
    num_rows, num_tokens, lengths = 109, 113, [127, *[0] * 12]
    stride, num_events = num_tokens + num_rows, sum(lengths)
    knowledge = None
    if spec.knowledge is not None:
        conditions, width = spec.knowledge
        log_z_BN = torch.zeros(num_rows, conditions) if spec.has_log_z else None
        present_BN, fold_B = (
            torch.ones(num_rows, conditions, dtype=torch.bool),
            torch.zeros(num_rows, dtype=torch.int64),
        )
        o_BND, e_BD = torch.zeros(num_rows, conditions, width), torch.zeros(num_rows, width)
        knowledge = KnowledgeBatch(o_BND, e_BD, log_z_BN, present_BN, fold_B)
    batch = RankBatch(
        tokens=kjt_from_lists(spec.features, [dict.fromkeys(spec.features, 1)] * stride),
        num_tokens=num_tokens,
        target_B=torch.arange(num_rows),
        history_T=torch.arange(num_events) % num_tokens,
        offsets_B1=torch.tensor([0, *lengths]).cumsum(0),
        dense_BF=torch.zeros(num_rows, spec.num_statistics),
        label_B=torch.zeros(num_rows),
        row_B=torch.arange(num_rows),
        knowledge=knowledge,
        item_U=torch.zeros(num_tokens, dtype=torch.int64),
        category_U=torch.zeros(num_tokens, dtype=torch.int64),
        age_T=torch.ones(num_events),
        category_count_T=torch.zeros(num_events, dtype=torch.int64),
        history_of_B=torch.tensor([*[0] * 97, *range(1, 13)]),
    )
    return graph_inputs(batch, spec), tables, scales


class Graph:
    """An exported ranker with its tables: `graph(batch)` gives the probability of each row, float32 [B], on the CPU."""

    def __init__(self, run: Callable[..., Tensor], spec: GraphSpec, tables: Tables) -> None:
        self.run, self.spec, self.tables = run, spec, tables

    def __call__(self, batch: RankBatch) -> Tensor:
        with torch.inference_mode():
            return self.run(graph_inputs(batch, self.spec), *self.tables)


def read_spec(path: Path, kind: type[Spec], tables: Tables) -> Spec:
    """What an exported model reads, as a file beside it says; `kind` has fields `tables` and `dtype`.

    Raises MissingFileError without the file, UserError where it has other fields, or these are not its tables.
    """
    stored: dict[str, Any] = read_json(path, again="export the model again")
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if sorted(stored) != sorted(names):
        raise UserError(f"{path} has the keys {sorted(stored)}, expected {sorted(names)}")
    for name in set(stored["tables"].values()):
        dtype = str(tables.rows[name].dtype).removeprefix("torch.") if name in tables.rows else "missing"
        if dtype != stored["dtype"]:
            raise UserError(f"table {name!r} is {dtype}, and {path} was exported for {stored['dtype']}")
    return kind(**stored)


def load_graph(path: str | Path, tables: Tables, *, trust_compiled: bool = True) -> Graph:
    """The graph that `export_graph` wrote to `path`, ready to run. tables: of open_tables.

    A compiled graph is code: where not `trust_compiled`, it is refused; an exported one is checked (graph_file.py).
    Raises MissingFileError where there is none, UserError where its spec is damaged or the tables are not its own.
    """
    path = Path(path)
    spec = read_spec(path.with_suffix(".json"), GraphSpec, tables)
    if not path.is_file():
        raise MissingFileError(f"{path} is missing; export the ranker again")
    if spec.compiled:
        if not trust_compiled:
            raise UserError(f"{path} was compiled: it is machine code, and is not loaded")
        return Graph(torch._inductor.aoti_load_package(str(path)), spec, tables)
    return Graph(read_graph(path), spec, tables)
