"""Plans against what really happens: bytes of two ranks, FLOPs and activations of a step; and what they refuse."""

import json
import re
from pathlib import Path

import pytest
import torch
from two_ranks_plan import first_pack

from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import Config, load
from lumrec.models.lum import build_lum
from lumrec.run.distributed import init_distributed
from lumrec.run.errors import UserError
from lumrec.stages.plan import PlanConfig, Training
from lumrec.stages.pretrain import make_step
from lumrec.stages.registry import STAGES
from lumrec.train.flops import MatrixFlops
from lumrec.train.hardware import GPUS
from lumrec.train.plan import make_plan, read_sharding, topology_here

SIZES = ["plan.users=1000", "plan.events=40000", "plan.items=500"]
ROWS = ["plan.rows={genres: 19, year: 82, feedback: 3, rating: 6}"]


@pytest.fixture
def words(tiny_words, tiny_prepared) -> list[str]:
    """A small LUM on the small simulated log."""
    return [*tiny_words, f"runs_dir={tiny_prepared.path.parent}"]


def training_of(config: Config) -> Training:
    return Training(config, config.model, config.pretrain, config.plan)


def plan(*words: str) -> dict[str, float | str]:
    return STAGES["plan"].run(load(None, ["run=planned", *words]))


def test_two_ranks_hold_what_was_planned(words, forks, tmp_path):
    script = Path(__file__).parents[1] / "helpers" / "two_ranks_plan.py"
    forks.run_script(script, str(tmp_path), *words, world_size=2)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert len(ranks[0]) == 3
    for cases in ranks:
        for case, found in cases.items():
            assert found["held"] == pytest.approx(found["planned"], rel=0.02), case


@pytest.mark.parametrize(
    ("encoder", "precision", "more"),
    [
        ("gpt", "float32", []),
        ("llama", "bfloat16", ["model.tokens=merged"]),
        ("hstu", "float32", ["pretrain.contrast.feature=feedback"]),
        ("llama", "bfloat16", ["model.checkpoint_activations=true", "pretrain.negatives.full=true"]),
    ],
)
def test_flops_and_activations_are_those_of_a_real_step(words, tiny_prepared, encoder, precision, more):
    init_distributed("cpu")
    config = load(
        None,
        [
            *words,
            f"model.encoder={encoder}",
            f"pretrain.precision={precision}",
            "model.dim=64",
            "model.num_layers=3",
            *more,
        ],
    )
    training = training_of(config)
    data = PreparedData.open(tiny_prepared.path)
    lum, builder = build_lum(config.model, data)
    pack, kept = first_pack(config, builder), {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with MatrixFlops() as flops, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = make_step(config.pretrain)(lum, pack)
    own = {parameter.untyped_storage().data_ptr() for parameter in lum.parameters()}
    kept_bytes = sum(x.untyped_storage().nbytes() for storage, x in kept.items() if storage not in own)
    with flops:
        output.loss_sum.backward()
    work, share = training.work(), pack.num_events / training.events
    assert (work["flops"] + work["recomputed_flops"]) * share == pytest.approx(flops.total, rel=0.06)
    assert training.dense_memory()["activations"] * share == pytest.approx(kept_bytes, rel=0.06)


def test_the_papers_setting_is_planned_without_data(tmp_path, capsys):
    config = load("paper-scale", [f"runs_dir={tmp_path}"])
    result = STAGES["plan"].run(config)
    out = capsys.readouterr().out
    assert "on 16 x 8 h200" in out and "100,000,000 users" in out
    assert result["ranks"] == 128 and result["parameters"] == pytest.approx(6.85e9, rel=0.01)
    # weight, gradient and two moments in float32, over 128 ranks
    assert result["gib/encoder"] * 2**30 == pytest.approx(16 * result["parameters"] / 128, rel=0.001)
    tokens = 2 * config.pretrain.packing.events_per_pack
    assert result["flops"] == pytest.approx(6 * result["parameters"] * tokens, rel=0.05)
    assert result["fits"] == "yes"
    # the mapped events once, and what each of 8 processes holds of users and items
    assert result["gib/machine"] * 2**30 == pytest.approx((45 + 4 * 8 + 2 * 8) * 4e9 + 8 * 100 * 2e8, rel=0.001)
    assert json.loads((tmp_path / "paper-scale-plan" / "result.json").read_text()) == result


def test_training_plans_tables_beside_a_7b_encoder():
    training = training_of(load("paper-scale"))
    topology = topology_here(torch.device("cpu"), world_size=2, dense_bytes=10**11)
    assert len(make_plan(training.lum, {}, topology).rank_s) == 2  # TorchRec counts 6 x 27 GB and gives up


def test_sizes_come_from_prepared_data_and_a_plan_is_one_to_train_by(words, tiny_prepared, capsys):
    result = plan(*words, "plan.gpus=4", "plan.json=true")
    assert json.loads(capsys.readouterr().out) == result
    assert result["fits"] == "yes" and result["steps"] == 1
    lists = [column for column in tiny_prepared.event_columns.values() if column.offsets is not None]
    mean = sum(len(column.values) for column in lists) / len(lists) / tiny_prepared.num_events
    training = training_of(load(None, [*words, f"plan.list_values={mean}"]))
    mapped = [file for file in (tiny_prepared.path / "mapped").iterdir() if file.stem != "probability"]
    assert training.log_bytes() == pytest.approx(sum(file.stat().st_size - 128 for file in mapped), rel=0.01)
    assert training.train_events == int((tiny_prepared.split == 0).sum())
    assert {name: rows for name, (rows, _) in training.sizes.items()}.items() <= tiny_prepared.table_rows.items()
    path = str(tiny_prepared.path.parent / "planned" / "plan.json")
    chosen = read_sharding(path, training.lum, world_size=4)
    assert chosen.keys() == training.sizes.keys()
    again = plan(*words, "plan.gpus=4", f"pretrain.train.sharding={path}")  # another config: the plan is made again
    assert again["gib/tables"] == result["gib/tables"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["model.dim=8192", "model.num_layers=24"], r"encoder [\d.]+ of them: set pretrain.train.fsdp=true"),
        (
            ["pretrain.packing.events_per_pack=2000000", "plan.gpu=a100-40g"],
            r"activations [\d.]+ of them: set model.checkpoint_activations=true",
        ),
        (["plan.items=1000000000", "pretrain.negatives.full=true"], "set pretrain.negatives.full=false"),
        (["model.dim=4096", "model.num_layers=8", "plan.items=500000000", "plan.gpu=l40s"], r"encoder [\d.]+ of them"),
        (["plan.items=2000000000"], r"tables [\d.]+ of them: narrow them"),
        (["plan.events=100000000000", "plan.users=1000000000"], "events of the log, which are read in random order"),
    ],
)
def test_what_does_not_fit_is_said_with_what_to_change(tmp_path, more, says):
    assert re.search(says, str(plan(f"runs_dir={tmp_path}", "plan.gpus=2", *SIZES, *ROWS, *more)["fits"]))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan.gpu=h2000"], "did you mean 'h200'.*expected one of a100-40g, a100-80g, h100, h200, b200, l40s, cpu"),
        (["plan.nodes=0"], "plan.nodes: got 0, expected at least 1"),
        (SIZES, "to read plan.rows.genres, plan.rows.year"),
        (["plan.events=10"], "to read plan.users, plan.items, plan.rows.item_id"),
        ([*SIZES, "plan.rows={gender: 3}"], "'gender' .*; the tables that this LUM reads: 'item_id'"),
        ([*SIZES, *ROWS, "pretrain.train.sharding=rowwise"], "did you mean 'row_wise'"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(tmp_path, words, says):
    with pytest.raises(UserError, match=says):
        plan(f"runs_dir={tmp_path / 'runs'}", *words)
    assert not (tmp_path / "runs").exists()


def test_every_gpu_can_be_named():
    for gpu in GPUS:
        assert load(None, [f"plan.gpu={gpu}"]).plan.gpu == gpu
    assert load(None).plan == PlanConfig()
