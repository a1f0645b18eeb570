"""Plan files: what they may say, and in which words they are refused. Training by them: test_many_ranks.py."""

import json

import pytest
import torch
from tiny_training import TinyModel
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from lumrec.run.distributed import init_distributed
from lumrec.run.errors import UserError
from lumrec.train.footprint import dense_elements
from lumrec.train.parallel import shard
from lumrec.train.plan import SHARDING_TYPES, TableSharding, plan_json, read_sharding


def read(tmp_path, text: str, *, world_size: int = 2):
    (tmp_path / "plan.yaml").write_text(text)
    return read_sharding(str(tmp_path / "plan.yaml"), TinyModel(), world_size=world_size)


def test_a_type_is_for_all_tables_and_nothing_for_none():
    assert read_sharding("", TinyModel(), world_size=2) == {}
    for kind in SHARDING_TYPES:
        assert read_sharding(kind, TinyModel(), world_size=2) == {"t0": TableSharding(kind), "t1": TableSharding(kind)}


def test_a_table_is_not_cut_into_more_parts_than_it_has_rows(tmp_path):
    tables = [
        EmbeddingBagConfig(name=f"t{rows}", num_embeddings=rows, embedding_dim=8, feature_names=[f"f{rows}"])
        for rows in (3, 4, 5, 8)  # over 4 ranks, 5 rows make 2, 2, 1, 0
    ]
    model = EmbeddingBagCollection(tables=tables)
    assert {name: table.sharding for name, table in read_sharding("row_wise", model, world_size=4).items()} == {
        "t3": "table_wise",
        "t4": "row_wise",
        "t5": "table_wise",
        "t8": "row_wise",
    }
    (tmp_path / "plan.yaml").write_text("t5: row_wise")
    with pytest.raises(ValueError, match="row_wise over 4 ranks would leave one without any of its 5 rows"):
        read_sharding(str(tmp_path / "plan.yaml"), model, world_size=4)


def test_a_plan_file_in_yaml_and_json(tmp_path):
    expected = {"t0": TableSharding("row_wise"), "t1": TableSharding("column_wise", (1, 0))}
    assert read(tmp_path, "t0: row_wise\nt1: {sharding: column_wise, ranks: [1, 0]}\n") == expected
    plan = {"t0": "row_wise", "t1": {"sharding": "column_wise", "ranks": [1, 0]}}
    assert read(tmp_path, json.dumps(plan)) == expected
    assert read(tmp_path, "t1: table_wise\n") == {"t1": TableSharding("table_wise")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t2: row_wise", "no table 't2' .did you mean 't[01]'"),
        ("t0: row_wize", "'row_wize' is not one of .* .did you mean 'row_wise'"),
        ("t0: {sharding: table_wise, rank: 1}", "expected a sharding type, or {sharding: <type>, ranks:"),
        ("t0: [row_wise]", "expected a sharding type"),
        ("t0: {sharding: table_wise, ranks: 1}", "expected a list of ranks"),
        ("t0: {sharding: table_wise, ranks: [2]}", r"rank 2 does not exist, this run has 2 process\(es\), 0…1"),
        ("t0: {sharding: table_wise, ranks: [0, 1]}", "table_wise puts the whole table on one rank"),
        ("t0: {sharding: row_wise, ranks: [1]}", "row_wise uses all ranks"),
        ("t0: {sharding: column_wise, ranks: [0, 1, 0]}", "width 8 does not divide into 3 parts"),
        ("- row_wise", "holds a list; expected table → sharding type"),
        ("t0: [", "is not valid YAML"),
    ],
)
def test_plans_that_do_not_fit_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_what_is_neither_a_type_nor_a_file_is_refused():
    with pytest.raises(ValueError, match="did you mean 'row_wise'.*nor a plan file"):
        read_sharding("rowwise", TinyModel(), world_size=1)


def test_a_plan_comes_back_from_the_sharded_model(tmp_path):
    init_distributed("cpu")
    (tmp_path / "plan.json").write_text('{"t1": "data_parallel"}')
    model = shard(TinyModel(), device="cpu", sharding=str(tmp_path / "plan.json"))
    saved = json.loads(plan_json(model.plan))
    assert saved == {
        "t0": {"sharding": "table_wise", "ranks": [0]},
        "t1": {"sharding": "data_parallel", "ranks": [0]},
    }
    (tmp_path / "plan.json").write_text(json.dumps(saved))
    again = shard(TinyModel(), device="cpu", sharding=str(tmp_path / "plan.json"))
    assert json.loads(plan_json(again.plan)) == saved


def test_dense_parameters_are_counted_as_fsdp_cuts_them():
    encoder, output = torch.nn.Module(), torch.nn.Linear(2, 2)
    encoder.blocks = torch.nn.ModuleList([torch.nn.Linear(3, 5)])
    encoder.scale, encoder.none = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(0, 3))
    model = torch.nn.ModuleDict({"encoder": encoder, "output": output, "tables": TinyModel()})
    others = sum(p.numel() for name, p in model.named_parameters() if "embedding_bags" not in name) - 3 * 5 - 5 - 1
    assert dense_elements(model) == (3 * 5 + 5 + 1, others)
    assert dense_elements(model, shards=4) == (3 * 2 + 2 + 1, others)  # the last rank of four has none of five rows


def test_tables_that_no_rank_can_hold_are_refused():
    init_distributed("cpu")
    tables = [EmbeddingBagConfig(name="t", num_embeddings=2**30, embedding_dim=64, feature_names=["f"])]
    with pytest.raises(UserError, match=r"do not fit into 1 process.*insufficient storage.*apps/plan.py"):
        shard(EmbeddingBagCollection(tables=tables, device=torch.device("meta")), device="cpu")


def test_fsdp_without_transformer_blocks_is_refused():
    init_distributed("cpu")
    with pytest.raises(ValueError, match="fsdp=true shards transformer blocks"):
        shard(TinyModel(), device="cpu", fsdp=True)
