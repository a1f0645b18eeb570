"""A LUM trains the same on 1, 2 and 4 gloo processes, whatever the sharding, FSDP too, however unequal the ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from many_ranks import PLAN, STEPS, WINDOWS_PER_STEP, WORLD_SIZES, make_lum, share

from lumrec.train.checkpoint import best_checkpoint, load_weights
from lumrec.train.plan import SHARDING_TYPES

REFERENCE = "table_wise-1"
OTHERS = [f"{sharding}-{size}" for sharding in SHARDING_TYPES for size in WORLD_SIZES] + ["mixed-2", "fsdp-2"]
OTHERS.remove(REFERENCE)


@pytest.fixture(scope="module")
def runs(tiny_prepared, tmp_path_factory) -> Path:
    """The folder of the runs that many_ranks.py made."""
    folder = tmp_path_factory.mktemp("many-ranks")
    script = Path(__file__).resolve().parents[1] / "helpers" / "many_ranks.py"
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(script), str(folder), str(tiny_prepared.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def lines(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows]


def weights(folder: Path, prepared: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a run, whole, in one process."""
    model, _ = make_lum(str(prepared))
    load_weights(best_checkpoint(folder), model)
    return model.state_dict()


@pytest.mark.parametrize("run", OTHERS)
def test_the_loss_curve_and_the_weights_are_those_of_one_rank(runs, tiny_prepared, run):
    assert len(lines(runs / run, "loss")) == STEPS
    assert lines(runs / run, "loss") == pytest.approx(lines(runs / REFERENCE, "loss"), rel=1e-5)
    # The norm over tables left out, replicated parameters and those that FSDP shards; it is clipped at every step.
    assert lines(runs / run, "grad_norm") == pytest.approx(lines(runs / REFERENCE, "grad_norm"), rel=1e-4)
    assert min(lines(runs / run, "grad_norm")) > 0.1
    ours, theirs = weights(runs / run, tiny_prepared.path), weights(runs / REFERENCE, tiny_prepared.path)
    for name, weight in theirs.items():
        if "qkv.bias" not in name:  # a bias of the keys has a gradient of zero, whose rounding Adam blows up
            torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-4, msg=f"{run}: {name}")


@pytest.mark.parametrize("run", [REFERENCE, *OTHERS])
def test_every_table_moves(runs, tiny_prepared, run):
    start = make_lum(str(tiny_prepared.path))[0].state_dict()
    trained = weights(runs / run, tiny_prepared.path)
    tables = [name for name in start if "embedding_bags" in name]
    assert len(tables) > 3
    assert [name for name in tables if torch.equal(start[name], trained[name])] == []


def test_the_ranks_had_unequal_shares_and_some_none():
    for world_size in (2, 4):
        steps = [[share(step, rank, world_size) for rank in range(world_size)] for step in range(STEPS)]
        sizes = [[end - start for start, end in shares] for shares in steps]
        assert all(sum(of_step) == WINDOWS_PER_STEP and len(set(of_step)) > 1 for of_step in sizes)
        assert any(0 in of_step for of_step in sizes)


def test_a_plan_file_is_followed_and_the_saved_plan_is_one(runs):
    plan = json.loads((runs / "mixed-2" / "plan.json").read_text())
    assert plan["item_id"] == {"sharding": "row_wise", "ranks": [0, 1]}
    assert plan["scenario"] == {"sharding": "data_parallel", "ranks": [0, 1]}
    for name in ("categories", "feedback"):
        assert plan[name] == PLAN[name]
    assert {plan[name]["sharding"] for name in plan.keys() - PLAN.keys()} == {"table_wise"}
    assert json.loads((runs / "mixed-again-2" / "plan.json").read_text()) == plan
    assert lines(runs / "mixed-again-2", "loss") == lines(runs / "mixed-2", "loss")


def test_fsdp_shards_the_encoder_and_resumes(runs):
    report = json.loads((runs / "fsdp-2.json").read_text())
    assert report["sharded"] == report["encoder"] > 0  # every parameter of the encoder, and none beside them
    assert report["held"] < 0.6 * report["whole"]
    assert lines(runs / "fsdp-resumed-2", "step") == list(range(1, STEPS + 1))
    assert lines(runs / "fsdp-resumed-2", "loss") == pytest.approx(lines(runs / "fsdp-2", "loss"), rel=1e-6)
