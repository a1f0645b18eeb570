"""Exported rankers give the scores of the rankers themselves, for any sizes, and run where lumrec is not."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from elsewhere import run_elsewhere
from tiny_rankers import MODELS, make_batch, make_ranker, make_rows, random_knowledge

from lumrec.modules.kernels.recurrence import scanned_recurrence
from lumrec.modules.knowledge import KnowledgeFusion
from lumrec.modules.rankers.base import RankBatch, Ranker
from lumrec.run.errors import MissingFileError, UserError
from lumrec.serving.graph import Graph, GraphSpec, RankerGraph, export_graph, export_module, graph_inputs, load_graph
from lumrec.serving.tables import Tables, open_tables, table_weights, write_tables

SIZES = [[5, 0, 2], [0], [1], [40], [0, 0, 30, 1, 9, 17, 8, 8, 3]]


def exported(ranker: Ranker, folder, *, dtype="float32", compile="none") -> Graph:
    write_tables(folder / "tables", ranker.tables, dtype=dtype)
    export_graph(ranker, folder / "graph.pt2", dtype=dtype, compile=compile)
    return load_graph(folder / "graph.pt2", open_tables(folder / "tables"))


def trained(name: str, **keywords) -> Ranker:
    """With moments and weights that are none of those it began with."""
    ranker = make_ranker(name, **keywords)
    for seed in range(3):
        rows = make_rows([9, 0, 30, 12], seed)
        ranker(make_batch(rows, knowledge=random_knowledge(4) if ranker.knowledge else None))
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return ranker.eval()


def batch_of(lengths: list[int], ranker: Ranker, seed: int = 0) -> RankBatch:
    knowledge = random_knowledge(len(lengths)) if ranker.knowledge else None
    if knowledge and len(lengths) > 1:
        knowledge.present_BN[0], knowledge.present_BN[1, 0] = False, False
        knowledge.o_BND[0] = torch.nan
    return make_batch(make_rows(lengths, seed), knowledge=knowledge)


def shared(batch: RankBatch, num: int) -> RankBatch:
    """`batch`, whose rows are `num` candidates of each user, with each history once."""
    first_G = torch.arange(0, len(batch), num)
    ends = batch.offsets_B1[first_G + 1]
    begins = batch.offsets_B1[first_G]
    event_T = torch.cat([torch.arange(a, b) for a, b in zip(begins.tolist(), ends.tolist())])
    fields = {name: getattr(batch, name)[event_T] for name in ("history_T", "age_T", "category_count_T")}
    offsets_B1 = torch.nn.functional.pad((ends - begins).cumsum(0), (1, 0))
    return dataclasses.replace(batch, offsets_B1=offsets_B1, history_of_B=torch.arange(len(batch)) // num, **fields)


@torch.no_grad()
def assert_same(graph: Graph, ranker: Ranker, batch: RankBatch, atol: float = 1e-6) -> None:
    torch.testing.assert_close(graph(batch), torch.sigmoid(ranker(batch)), atol=atol, rtol=0)


def assert_same_for_all_sizes(graph: Graph, ranker: Ranker) -> None:
    for lengths in SIZES:
        assert_same(graph, ranker, batch_of(lengths, ranker))
    # Candidates of two users, and of one, who share their history.
    rows = make_rows([40, 3])
    for users in (rows, rows[:1], rows[1:]):
        candidates = [type(row)(target, row.history, row.user) for row in users for target in (3, 7, 7, 30, 11)]
        plain = make_batch(candidates, knowledge=random_knowledge(len(candidates)) if ranker.knowledge else None)
        assert torch.equal(shared(plain, 5).expanded().history_T, plain.history_T)
        assert_same(graph, ranker, shared(plain, 5))
        torch.testing.assert_close(graph(plain), graph(shared(plain, 5)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("with_knowledge", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_scores_as_the_ranker(name, with_knowledge):
    """Before torch.export, which is slow."""
    ranker = trained(name, knowledge=KnowledgeFusion("both", 2, 4, 2, 3, attention=True) if with_knowledge else None)
    spec = GraphSpec.of(ranker)
    graph = Graph(RankerGraph(ranker, spec), spec, Tables(table_weights(ranker.tables), {}))
    assert_same_for_all_sizes(graph, ranker)


EXPORTED = ("din", "dlrm", "dien", "sim", "twin")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> dict[str, tuple[Ranker, Graph, Path]]:
    """Ranker, exported graph and its folder, by name of the ranker; with knowledge but for the DLRM."""
    found = {}
    for name in EXPORTED:
        knowledge = None if name == "dlrm" else KnowledgeFusion("both", 2, 4, 2, 3, attention=True)
        ranker, folder = trained(name, knowledge=knowledge), tmp_path_factory.mktemp(name)
        found[name] = ranker, exported(ranker, folder), folder
    return found


@pytest.mark.parametrize("name", EXPORTED)
def test_a_graph_scores_as_its_ranker(name, graphs):
    ranker, graph, _ = graphs[name]
    assert_same_for_all_sizes(graph, ranker)


def test_a_graph_gives_the_same_scores_where_only_torch_is(graphs):
    batches = [batch_of([4, 0, 9], ranker) for ranker, _, _ in graphs.values()]
    calls = [
        (folder / "graph.pt2", (graph_inputs(batch, graph.spec), *graph.tables))
        for batch, (_, graph, folder) in zip(batches, graphs.values(), strict=True)
    ]
    for name, batch, scores in zip(graphs, batches, run_elsewhere(calls), strict=True):
        assert torch.equal(scores, graphs[name][1](batch)), name


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 1e-3), ("int8", 2e-2)])
def test_smaller_tables_give_nearly_the_same_scores(dtype, atol, tmp_path):
    ranker = trained("din")
    graph, batch = exported(ranker, tmp_path, dtype=dtype), batch_of(SIZES[-1], ranker)
    assert graph.tables.rows["item"].dtype == getattr(torch, dtype)
    assert_same(graph, ranker, batch, atol=atol)
    assert not torch.equal(graph(batch), torch.sigmoid(ranker(batch)))


class Sum(torch.nn.Module):
    def forward(self, inputs, tables):
        return inputs["x_BD"].sin().sum(1) * tables["t"].sum()


class Recurrence(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight_XH = torch.nn.Parameter(torch.randn(12, 4))

    def forward(self, inputs, tables):
        gate_GLX = inputs["dense_BF"]
        ones_GL = gate_GLX.new_ones(gate_GLX.shape[:2])
        return scanned_recurrence(gate_GLX, self.weight_XH, torch.arange(gate_GLX.shape[0]), ones_GL)


def test_what_aotinductor_cannot_compile_is_one_sentence(tmp_path):
    """Where a newer torch can, DIEN can be compiled, and docs/how-to/serve.md has to say so."""
    with pytest.raises(UserError, match="cannot compile this graph .*export with compile=none"):
        export_module(Recurrence(), ({"dense_BF": torch.randn(13, 5, 12)}, {}), tmp_path / "x.pt2", compile="aoti")


def test_a_compiled_graph_gives_the_same_and_needs_a_compiler(tmp_path):
    arguments = {"x_BD": torch.randn(13, 17)}, {"t": torch.randn(11)}
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(UserError, match="needs a C.. compiler: install g.."):
            export_module(Sum(), arguments, tmp_path / "sum.pt2", compile="aoti")
    assert not (tmp_path / "sum.pt2").exists()
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    export_module(Sum(), arguments, tmp_path / "sum.pt2", compile="aoti")
    others = {"x_BD": torch.randn(5, 3)}, {"t": torch.randn(2)}
    torch.testing.assert_close(torch._inductor.aoti_load_package(str(tmp_path / "sum.pt2"))(*others), Sum()(*others))


def test_what_cannot_be_loaded(tmp_path):
    ranker = trained("dlrm")
    graph = exported(ranker, tmp_path)
    with pytest.raises(ValueError, match="call eval"):
        export_graph(make_ranker("dlrm"), tmp_path / "other.pt2")
    write_tables(tmp_path / "half", ranker.tables, dtype="float16")
    with pytest.raises(UserError, match="is float16, and .* was exported for float32"):
        load_graph(tmp_path / "graph.pt2", open_tables(tmp_path / "half"))
    with pytest.raises(MissingFileError, match="other.json is missing"):
        load_graph(tmp_path / "other.pt2", graph.tables)
    (tmp_path / "half" / "0.npy").write_bytes(b"cut")
    with pytest.raises(UserError, match="0.npy cannot be read"):
        open_tables(tmp_path / "half")
    with torch.no_grad():
        ranker.tables.embedding_bags["user"].weight[3, 1] = 1e6
    with pytest.raises(UserError, match="'user' has values that float16 cannot hold"):
        write_tables(tmp_path / "half", ranker.tables, dtype="float16")
