"""A foreign checkpoint for real: TorchRec's own DLRM, trained and saved by a script without lumrec, is taken over."""

import json

import pytest
import torch
from digests import digests
from safetensors.torch import save_file
from takeover import FIRST, ROWS, TABLES, dlrm, rules, scores
from torchrec import KeyedJaggedTensor

from lumrec.warm_start import open_source, warm_start

THIS = "takeover"


@pytest.fixture(params=["dcp", "torch.save", "safetensors"])
def source(request, production, tmp_path):
    folder = production / "rowwise_adagrad"
    if request.param == "dcp":
        return folder / "dcp"
    if request.param == "torch.save":
        return folder / "model.pt"
    saved = torch.load(folder / "model.pt", weights_only=True)
    tensors = {f"model.{name}": value for name, value in saved["model"].items()}
    for name, entries in saved["optim"]["state"].items():
        tensors |= {f"optim.state.{name}.{entry}": value.contiguous() for entry, value in entries.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("num_new", [0, 6])
def test_scores_are_productions_before_any_training(production, source, num_new):
    batch = torch.load(production / "rowwise_adagrad" / "batch.pt")
    model = dlrm(num_dense=5 + num_new)
    assert not torch.allclose(scores(model, batch, num_new), batch["scores"], atol=1e-2)
    audit = warm_start(model, source, rules(num_new=num_new), block_bytes=100)
    torch.testing.assert_close(scores(model, batch, num_new), batch["scores"], rtol=0, atol=1e-6)
    assert audit.applied and audit.fresh == audit.unused == []
    first = next(row for row in audit.rows if row.target == FIRST)
    assert (first.columns_taken, first.columns_new) == (5, num_new)


def test_a_lum_in_front_of_productions_model_changes_no_score(production):
    """TorchRec's DLRM that reads knowledge: its own parameters are production's, the fusion is new."""
    from lumrec.modules.knowledge import KnowledgeBatch, KnowledgeFusion
    from lumrec.modules.torchrec_models import KnowledgeModel

    batch = torch.load(production / "rowwise_adagrad" / "batch.pt")
    model = KnowledgeModel(dlrm(), KnowledgeFusion("both", 2, 4, num_folds=1, out_dim=3, has_log_z=False))
    everything = {"source": "", "match": "prefix", "target": "model.", "exclude": []}
    given = {**rules(), "rules": [everything], "fresh": ["fusion.*", "*.added_weight"]}
    audit = warm_start(model, production / "rowwise_adagrad" / "dcp", given)
    assert any(name.endswith("added_weight") for name in audit.fresh)
    o_BND, e_BD = torch.randn(16, 2, 4), torch.randn(16, 4)
    known = KnowledgeBatch(o_BND, e_BD, None, torch.ones(16, 2, dtype=torch.bool), torch.zeros(16, dtype=torch.int64))
    kjt = KeyedJaggedTensor(list(ROWS), batch["values"], lengths=batch["lengths"])
    model.eval()
    with torch.no_grad():
        found = model(batch["dense"], kjt, known).squeeze(1)
    torch.testing.assert_close(found, batch["scores"], rtol=0, atol=1e-6)


def test_every_source_reads_alike_whatever_the_block(production, source):
    plain = torch.load(production / "rowwise_adagrad" / "model.pt", weights_only=True)["model"]
    opened = open_source(source)
    for name, value in plain.items():
        rows = value.shape[0]
        for first, last in ((0, rows), (0, 1), (rows - 1, rows), (rows // 3, rows // 2 + 1), (2, 2)):
            assert torch.equal(opened.read(f"model.{name}", first, last), value[first:last]), (name, first, last)


def test_new_inputs_learn(production):
    """Zero columns get gradients like any others."""
    batch, model = torch.load(production / "rowwise_adagrad" / "batch.pt"), dlrm(num_dense=8)
    warm_start(model, production / "rowwise_adagrad" / "dcp", rules(num_new=3))
    kjt = KeyedJaggedTensor(list(ROWS), batch["values"], lengths=batch["lengths"])
    model(torch.cat([batch["dense"], torch.ones(16, 3)], dim=1), kjt).sum().backward()
    assert model.get_parameter(FIRST).grad[:, 5:].abs().sum() > 0


# The source's tables lie table_wise (row-wise Adagrad) and column_wise over two ranks (Adagrad).
@pytest.mark.parametrize(
    ("made_with", "here", "sharding", "world_size"),
    [
        ("rowwise_adagrad", "rowwise_adagrad", "row_wise", 2),
        ("rowwise_adagrad", "rowwise_adagrad", "data_parallel", 2),
        ("rowwise_adagrad", "adagrad", "column_wise", 2),
        ("adagrad", "rowwise_adagrad", "table_wise", 2),
        ("adagrad", "adagrad", "row_wise", 2),
        ("adagrad", "rowwise_adagrad", "data_parallel", 1),
    ],
)
def test_any_plan_to_any_plan_with_the_optimizers_state(
    production, forks, tmp_path, made_with, here, sharding, world_size
):
    folder, out = production / made_with, tmp_path / "found.pt"
    arguments = {"folder": str(folder), "out": str(out), "sharding": sharding, "table_optimizer": here, "num_new": 2}
    forks.run(f"{THIS}:take_over", world_size=world_size, state="keep", **arguments)
    found, saved = torch.load(out), torch.load(folder / "model.pt", weights_only=True)
    expected = torch.load(folder / "batch.pt")["scores"]
    torch.testing.assert_close(found["scores"], expected, rtol=0, atol=1e-6)
    for table, rows in ROWS.items():
        theirs = saved["optim"]["state"][f"{TABLES}.{table}.weight"][f"{table}.momentum1"]
        ours = found["state"][f"{table}.momentum1"]
        if made_with == here:
            assert torch.equal(ours, theirs)
        elif here == "rowwise_adagrad":
            torch.testing.assert_close(ours, theirs.mean(1))
        else:
            assert torch.equal(ours, theirs[:, None].expand(rows, 8))
    exp_avg = saved["optim"]["state"][FIRST]["exp_avg"]
    assert torch.equal(found["exp_avg"], torch.cat([exp_avg, torch.zeros(16, 2)], dim=1))
    audit = {row["target"]: row for row in json.loads((tmp_path / "warm_start.json").read_text())["rows"]}
    assert audit[f"{TABLES}.item.weight"]["optimizer"].startswith("kept")


@pytest.mark.parametrize("new_rows", ["mean", "category_mean", "unknown"])
def test_rows_by_raw_id_on_two_ranks_equal_those_on_one(production, forks, tmp_path, new_rows):
    keys = ["item-007", *(f"new-{row}" for row in range(10)), *(f"item-{row:03d}" for row in range(49, 37, -1))]
    (tmp_path / "ours.csv").write_text("key,row\n" + "".join(f"{key},{row}\n" for row, key in enumerate(keys)))
    categories = "".join(f"{key},{row % 3}\n" for row, key in enumerate(keys[:-1]))
    (tmp_path / "categories.csv").write_text("key,category\n" + categories)
    folder = str(production / "adagrad")
    forks.run(f"{THIS}:remap", world_size=2, folder=folder, rules_folder=str(tmp_path), new_rows=new_rows)


def test_state_that_cannot_be_converted_is_refused_or_dropped_with_a_word(production, forks, tmp_path):
    """Row-wise sums of a column_wise table: one per row and shard."""
    folder = production / "rowwise_adagrad"
    arguments = {"folder": str(folder), "out": str(tmp_path / "out.pt"), "sharding": "column_wise"}
    arguments |= {"table_optimizer": "rowwise_adagrad"}
    refused = forks.start(f"{THIS}:take_over", world_size=2, state="keep", **arguments)
    assert refused.wait() == [1, 1]
    said = "the source's momentum1 [50] has one number per row, the model's [100] one per row and column shard"
    assert f"{said}; say optimizer=drop" in refused.text()
    forks.run(f"{THIS}:take_over", world_size=2, **arguments)
    found = torch.load(tmp_path / "out.pt")
    assert f"dropped: {said}" in found["audit"]
    assert not found["state"]["item.momentum1"].any()


def test_a_dry_run_touches_nothing(production, tmp_path):
    model, folder = dlrm(), production / "rowwise_adagrad"
    before, bytes_before = {name: value.clone() for name, value in model.state_dict().items()}, digests(folder)
    audit = warm_start(model, folder / "dcp", rules(), dry_run=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert digests(folder) == bytes_before
    assert "dry run, nothing is changed" in audit.text() and f"{TABLES}.item.weight" in audit.markdown()
    assert audit.others == ["step", "git"]


@pytest.mark.parametrize("after_reads", [1, 25])  # while it is looked through, and while it is copied
def test_killed_in_the_middle_leaves_nothing_behind(production, forks, tmp_path, after_reads):
    folder = production / "rowwise_adagrad"
    before = digests(folder)
    arguments = {"folder": str(folder), "out": str(tmp_path), "after_reads": after_reads}
    assert forks.start(f"{THIS}:be_killed", **arguments).wait() == [-9]
    assert digests(folder) == before and not list(tmp_path.iterdir())
    forks.run(f"{THIS}:be_killed", **(arguments | {"after_reads": 10**6}))
    assert json.loads((tmp_path / "warm_start.json").read_text())["applied"]
