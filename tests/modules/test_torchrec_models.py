"""Knowledge in TorchRec's own models: scores unchanged at the start, names kept, and learnt under DMP on two ranks."""

import json

import pytest
import torch
from knowledge_training import IDS, MODELS, D, K, N, loss_of, make_batch, make_fusion, make_model
from torch import nn
from torchrec import KeyedJaggedTensor

from lumrec.modules.knowledge import KnowledgeBatch, KnowledgeFusion
from lumrec.modules.torchrec_models import KnowledgeModel, WidenedLinear


@pytest.fixture(scope="module")
def reports(forks, tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("knowledge-models")
    for name in MODELS:
        forks.run("knowledge_training:train", world_size=2, folder=str(folder), name=name)
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_knowledge_says_is_learnt_on_two_ranks(reports, name):
    for report in reports[name]:
        assert report["auc"] > 0.9 and report["auc_absent"] < 0.75, report


@pytest.mark.parametrize("name", MODELS)
def test_every_table_and_every_new_weight_moves(reports, name):
    moved = {key: is_moved for report in reports[name] for key, is_moved in report["moved"].items()}
    tables = [key for key in moved if "embedding_bags" in key]
    added = [key for key in moved if "added_weight" in key or key.startswith("fusion.") and "_KF" in key]
    assert (len(tables), len(added)) == (3, 3)
    assert [key for key in (*tables, *added) if not moved[key]] == []


def test_moments_are_the_mean_of_the_ranks_that_met_a_column(reports):
    one, two = (report["moments"] for report in reports["DLRM"])
    assert one["own"][1:] != two["own"][1:] and one["mean"] == two["mean"] and set(one["is_started"]) == {1.0}
    assert one["mean"][0] == two["own"][0]
    expected = [(a + b) / 2 for a, b in zip(one["own"][1:], two["own"][1:])]
    assert one["mean"][1:] == pytest.approx(expected, abs=1e-6)


def test_keys_in_another_order_are_refused_by_sharded_tables(reports):
    for report in reports["DLRM"]:
        assert (
            "was first called with the keys ['user', 'item', 'page'] and now with ['item', 'user', 'page']"
            in (report["refused"])
        )


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_same_to_the_bit_before_training_and_not_after_a_step(name):
    plain, wrapped = make_model(name), KnowledgeModel(make_model(name), make_fusion())
    dense, sparse, knowledge, label_B = make_batch(0, 501)
    assert torch.equal(wrapped(dense, sparse, knowledge), plain(dense, sparse))
    drawn = KnowledgeModel(make_model(name), make_fusion(), zero_start=False)
    assert not torch.equal(drawn(dense, sparse, knowledge), plain(dense, sparse))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(name, wrapped(dense, sparse, knowledge), label_B).backward()
        gradient = wrapped.fusion.direct_weight_KIF.grad.abs().sum()
        assert gradient > 0 if step else gradient == 0  # the new columns' weights pass nothing on while they are zero
        optimizer.step()
    assert not torch.equal(wrapped(dense, sparse, knowledge), plain(dense, sparse))


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_the_plain_model_fits(name):
    trained = make_model(name, seed=1)
    wrapped = KnowledgeModel(make_model(name), make_fusion())
    shapes = {key: value.shape for key, value in wrapped.state_dict().items()}
    assert all(shapes[f"model.{key}"] == value.shape for key, value in trained.state_dict().items())
    missing, unexpected = wrapped.model.load_state_dict(trained.state_dict(), strict=False)
    assert len(missing) == 1 and missing[0].endswith(".added_weight") and unexpected == []
    dense, sparse, knowledge, _ = make_batch(0, 64)
    assert torch.equal(wrapped(dense, sparse, knowledge), trained(dense, sparse))


def test_a_widened_layer_is_one_layer_over_all_columns():
    torch.manual_seed(0)
    for rows in (0, 1, 33):
        base, twin = nn.Linear(5, 7, dtype=torch.float64), nn.Linear(8, 7, dtype=torch.float64)
        widened = WidenedLinear(base, 3, zero_start=False)
        with torch.no_grad():
            twin.weight.copy_(torch.cat([widened.weight, widened.added_weight], dim=1))
            twin.bias.copy_(widened.bias)
        x_BI = torch.randn(rows, 8, dtype=torch.float64)
        inputs = [x_BI.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(x) for layer, x in zip((widened, twin), inputs)]
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(torch.cat([widened.weight.grad, widened.added_weight.grad], dim=1), twin.weight.grad)
        torch.testing.assert_close(widened.bias.grad, twin.bias.grad)


def test_a_layer_made_on_the_meta_device_starts_with_zeros_too():
    widened = WidenedLinear(nn.Linear(5, 7, device="meta"), 3, zero_start=True).to_empty(device="cpu")
    widened.reset_parameters()
    assert widened.added_weight.abs().max() == 0 and widened.weight.abs().max() > 0


def test_torchrecs_pipelines_can_trace_it():
    model = KnowledgeModel(make_model("DLRM"), make_fusion())

    class Tracer(torch.fx.Tracer):  # as theirs: what holds no tables is a leaf
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return name == "fusion" or not name.startswith("model") or "arch" in name

    graph = Tracer().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"][0] == "fusion"


class Flat(nn.Module):
    """A KnowledgeModel whose inputs are tensors, as an exported one's are."""

    def __init__(self, model: KnowledgeModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, dense, values, lengths, o_BND, e_BD, log_z_BN, present_BN, fold_B):
        sparse = KeyedJaggedTensor(list(IDS), values, lengths=lengths)
        log_z_BN = log_z_BN if self.model.fusion.has_log_z else None
        return self.model(dense, sparse, KnowledgeBatch(o_BND, e_BD, log_z_BN, present_BN, fold_B))


@pytest.mark.parametrize("has_log_z", [False, True])
@pytest.mark.parametrize("mode", ["direct", "matching", "both"])
def test_every_mode_is_exported_with_a_batch_of_any_size(mode, has_log_z):
    fusion = KnowledgeFusion(mode, N, D, K, 6, attention=has_log_z, has_log_z=has_log_z)
    model = Flat(KnowledgeModel(make_model("DLRM"), fusion, zero_start=False))

    def inputs(rows: int):
        dense, sparse, knowledge, _ = make_batch(rows, rows)
        return dense, sparse.values(), sparse.lengths(), *knowledge

    model(*inputs(50))  # moments of its own
    model.eval()
    batch = torch.export.Dim("batch", min=2)
    sizes = tuple({0: 3 * batch if place in (1, 2) else batch} for place in range(8))
    exported = torch.export.export(model, inputs(7), dynamic_shapes=sizes).module()
    for rows in (2, 7, 33):
        torch.testing.assert_close(exported(*inputs(rows)), model(*inputs(rows)))


def test_models_that_it_does_not_fit_are_refused():
    with pytest.raises(ValueError, match="has no submodule 'bottom'; .* one of sparse_arch, dense_arch"):
        KnowledgeModel(make_model("DLRM"), make_fusion(), dense_arch="bottom")
    with pytest.raises(ValueError, match="'inter_arch' of DLRM has no nn.Linear"):
        KnowledgeModel(make_model("DLRM"), make_fusion(), dense_arch="inter_arch")
    with pytest.raises(ValueError, match="reads knowledge already"):
        KnowledgeModel(KnowledgeModel(make_model("DLRM"), make_fusion()).model, make_fusion())


def test_one_linear_layer_may_be_the_dense_arch():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(3, 1)

        def forward(self, dense_features, sparse_features):
            return self.dense(dense_features) + sparse_features.values().view(3, -1)[0, :, None]

    dense, sparse, knowledge, _ = make_batch(0, 9)
    own = Own()
    expected = own(dense, sparse)
    assert torch.equal(KnowledgeModel(own, make_fusion(), dense_arch="dense")(dense, sparse, knowledge), expected)
