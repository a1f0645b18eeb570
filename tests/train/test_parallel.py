"""Sharding: every table trains, and sharded equals unsharded, however unevenly a batch is spread over the ranks."""

import json
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_training import TinyLoader, TinyModel, loss_sum, make_batch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.optim import RowWiseAdagrad
from two_ranks import RUNS

from lumrec.run.distributed import init_distributed
from lumrec.train.checkpoint import best_checkpoint, load_weights
from lumrec.train.optimizers import TABLE_OPTIMIZERS, OptimizerConfig, build_optimizer
from lumrec.train.parallel import shard
from lumrec.train.plan import SHARDING_TYPES, plan_table

TABLES = ["ebc.embedding_bags.t0.weight", "ebc.embedding_bags.t1.weight"]


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights of a model that one process holds."""
    weights = {}
    for name, value in model.state_dict().items():
        if hasattr(value, "local_shards"):
            whole = torch.zeros(value.metadata().size)
            for part in value.local_shards():
                (row, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
                whole[row : row + rows, column : column + columns] = part.tensor
            value = whole
        weights[name] = value.detach().clone()
    return weights


def train_unsharded(table_optimizer: str) -> tuple[nn.Module, list[float]]:
    """The plain twin: torch's own EmbeddingBags and optimizers, whole batches, one process; loss of each step."""
    model = TinyModel()
    settings = OptimizerConfig()
    kinds = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad}
    tables = kinds[table_optimizer](model.ebc.parameters(), lr=settings.table_lr, eps=1e-8)
    dense = torch.optim.AdamW(model.mlp.parameters(), lr=settings.dense_lr, weight_decay=0.0)
    losses, loader = [], TinyLoader(64)
    for epoch in range(2):
        for position in range(len(loader)):
            batch = make_batch(loader.rows(epoch, position))
            loss = loss_sum(model, batch) / len(batch.label_B)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.mlp.parameters(), settings.clip_grad_norm)
            tables.step()
            dense.step()
            losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("table_optimizer", TABLE_OPTIMIZERS)
@pytest.mark.parametrize("sharding", ["", *SHARDING_TYPES])
def test_every_table_moves_and_keeps_the_weights_it_came_with(sharding, table_optimizer):
    init_distributed("cpu")
    config = OptimizerConfig(table_optimizer=table_optimizer)
    given = {name: value.clone() for name, value in TinyModel().state_dict().items()}
    model = shard(TinyModel(), device="cpu", optimizer=config, sharding=sharding)
    optimizer = build_optimizer(model, config)
    before = full(model)
    assert before.keys() == given.keys() and all(torch.equal(before[name], given[name]) for name in given)
    loss_sum(model, make_batch(torch.arange(8))).backward()
    optimizer.step()
    after = full(model)
    assert [name for name in after if torch.equal(after[name], before[name])] == []
    assert plan_table(model).count(sharding or "table_wise") == 2


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_unsharded_process(two_ranks, name):
    expected, losses = train_unsharded(RUNS[name][1])
    rows = [json.loads(line) for line in (two_ranks / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
    # One process reads what two wrote: the weights are whole, whatever the sharding was.
    model = TinyModel(seed=4)
    load_weights(best_checkpoint(two_ranks / name), model)
    for parameter, weight in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[parameter], weight, rtol=1e-3, atol=2e-5, msg=parameter)


def test_plans_on_two_ranks_are_as_asked_and_equal(two_ranks):
    reports = [json.loads((two_ranks / f"report-{rank}.json").read_text()) for rank in range(2)]
    assert reports[0]["plans"] == reports[1]["plans"]
    for name, plan in reports[0]["plans"].items():
        assert plan.count(name) == 2 and plan.count("dense" if name == "data_parallel" else "fused") == 2
    lines = {name: plan.splitlines()[1:] for name, plan in reports[0]["plans"].items()}
    assert sorted(line.split()[-1] for line in lines["table_wise"]) == ["0", "1"]
    assert all(line.split()[-1] == "0,1" for line in lines["row_wise"] + lines["column_wise"])


def test_two_ranks_resume(two_ranks):
    def rows(name: str) -> list[tuple[int, float]]:
        lines = (two_ranks / name / "metrics.jsonl").read_text().splitlines()
        return [(row["step"], row["loss"]) for row in map(json.loads, lines)]

    assert [step for step, _ in rows("resumed")] == list(range(1, 17))
    assert [loss for _, loss in rows("resumed")] == pytest.approx([loss for _, loss in rows("table_wise")], rel=1e-6)
    one, other = (json.loads((two_ranks / name / "result.json").read_text()) for name in ("resumed", "table_wise"))
    assert one["steps"] == other["steps"] == 16 and one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_errors_of_one_rank_are_raised_on_both(two_ranks):
    for rank in range(2):
        messages = json.loads((two_ranks / f"report-{rank}.json").read_text())["errors"]
        assert "pretrain.epochs: 2 → 7" in messages["other config"]
        assert "loss is nan at step 1" in messages["not finite"]
        assert ("saved in" in messages["not finite"]) == (rank == 1)
        assert "[5, 6]" in messages["uneven"]
    assert [path.name for path in (two_ranks / "not-finite").glob("*.pt")] == ["non-finite-step-1-rank-1.pt"]


def test_shards_of_one_table_are_not_copies_of_each_other(two_ranks):
    reports = [json.loads((two_ranks / f"report-{rank}.json").read_text()) for rank in range(2)]
    assert [report["rows"] for report in reports] == [500, 500]
    assert reports[0]["first_row"] != reports[1]["first_row"]


def test_tables_on_the_meta_device_are_drawn():
    init_distributed("cpu")
    tables = [EmbeddingBagConfig(name="t0", num_embeddings=50, embedding_dim=8, feature_names=["f0"])]
    model = shard(
        nn.ModuleDict({"ebc": EmbeddingBagCollection(tables=tables, device=torch.device("meta"))}), device="cpu"
    )
    weight = full(model)[TABLES[0]]
    assert weight.std() > 0 and len(weight.unique(dim=0)) == 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharding": "diagonal"}, "table_wise, row_wise, column_wise, data_parallel"),
        ({"optimizer": OptimizerConfig(table_optimizer="adam")}, "table_optimizer: got 'adam', expected one of"),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings, message):
    init_distributed("cpu")
    with pytest.raises(ValueError, match=message):
        shard(TinyModel(), device="cpu", **settings)


def test_widths_that_fbgemm_cannot_take_are_refused():
    init_distributed("cpu")
    tables = [EmbeddingBagConfig(name="genre", num_embeddings=5, embedding_dim=6, feature_names=["genre"])]
    with pytest.raises(ValueError, match="schema.tables.genre.width to 8"):
        shard(EmbeddingBagCollection(tables=tables), device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_cuda_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="sees no CUDA device"):
        init_distributed("cuda")


def test_the_process_group_of_one_process_is_made_once(tmp_path: Path):
    assert init_distributed("cpu") == init_distributed(torch.device("cpu")) == torch.device("cpu")
    assert torch.distributed.get_world_size() == 1


def test_a_sharded_collection_refuses_another_order_of_keys():
    """TorchRec keeps the order of the first call, and would read the rows of `a` for `b`."""
    init_distributed("cpu")
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=4, num_embeddings=9, feature_names=[name]) for name in ("a", "b")
    ]
    dmp = shard(nn.ModuleDict({"ebc": EmbeddingBagCollection(tables=tables)}), device="cpu")
    of_ab, of_ba = (
        KeyedJaggedTensor(list(keys), torch.arange(4), lengths=torch.ones(4, dtype=torch.int32))
        for keys in ("ab", "ba")
    )
    dmp.module.ebc(of_ab)
    with pytest.raises(ValueError, match=r"first called with the keys \['a', 'b'\] and now with \['b', 'a'\]"):
        dmp.module.ebc(of_ba)


def killed_in_its_group(folder: str) -> None:
    tempfile.tempdir = folder
    init_distributed("cpu", threads=1)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_leaves_nothing_in_the_temporary_folder(forks, tmp_path):
    assert forks.start("tests.train.test_parallel:killed_in_its_group", folder=str(tmp_path)).wait() == [
        -signal.SIGKILL
    ]
    assert not list(tmp_path.iterdir())
