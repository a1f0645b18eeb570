"""The training loop: best weights, early end, losses that are not finite. Exact resume is in test_kill_and_resume."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import create_run
from tiny_training import (
    TinyConfig,
    TinyLoader,
    TinyModel,
    make_batch,
    noisy_evaluation,
    noisy_step,
    plain_step,
    weights_of,
)
from torch import nn

from lumrec.run.distributed import init_distributed
from lumrec.train.checkpoint import best_checkpoint, load_weights
from lumrec.train.config import TrainConfig
from lumrec.train.flops import gemm_peak
from lumrec.train.loop import StepOutput, fit
from lumrec.train.non_finite import NonFiniteError
from lumrec.train.optimizers import OptimizerConfig
from lumrec.train.parallel import shard
from lumrec.train.prefetch import prefetch

CPU = torch.device("cpu")
TIMES = ("events_per_s", "tokens_per_s", "mfu", "data_wait", "memory_gib")


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def train(
    tmp_path: Path,
    config: TrainConfig,
    *,
    step=plain_step,
    evaluate=None,
    select="",
    run="run",
    loader=None,
    dropout=0.0,
):
    init_distributed("cpu")
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    model = shard(TinyModel(dropout=dropout), device="cpu", optimizer=config.optimizer)
    folder = create_run(TinyConfig(str(tmp_path), run=run, pretrain=config), "pretrain")
    result = fit(
        model=model,
        loader=loader or TinyLoader(),
        step=step,
        config=config,
        run=folder,
        evaluate=evaluate,
        select=select,
    )
    return model, folder, result


def test_evaluation_does_not_disturb_training(tmp_path):
    config = TrainConfig(max_steps=8, log_every=1, eval_every=2)
    _, without, _ = train(tmp_path, config, step=noisy_step, run="without", dropout=0.3)
    _, with_it, _ = train(tmp_path, config, step=noisy_step, run="with", dropout=0.3, evaluate=noisy_evaluation)
    assert [row for row in lines(with_it.path) if "loss" in row] == lines(without.path)
    assert sum("valid/chance" in row for row in lines(with_it.path)) == 4


def test_loss_and_metrics_are_means_over_the_window(tmp_path):
    _, folder, result = train(tmp_path, TrainConfig(epochs=2, log_every=4))
    rows = lines(folder.path)
    assert [(row["step"], row["epoch"]) for row in rows] == [(4, 0), (8, 0), (12, 1), (16, 1), (18, 2)]
    assert all(row["twice"] == pytest.approx(2 * row["loss"]) for row in rows)
    assert result["loss"] == rows[-1]["loss"] and result["steps"] == 18 and result["best_step"] == 18
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (folder.path / "plan.txt").read_text().count("fused") == 2


def test_speed_is_logged_in_events_tokens_and_share_of_the_peak(tmp_path):
    def step(model: nn.Module, batch) -> StepOutput:
        output = plain_step(model, batch)
        return StepOutput(output.loss_sum, output.count, tokens=3 * len(batch.label_B))

    _, folder, result = train(tmp_path, TrainConfig(max_steps=4, log_every=2), step=step)
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    peak = gemm_peak(CPU, torch.float32, num_threads=torch.get_num_threads())
    flops_per_event = 3 * 2 * (16 * 16 + 16)  # two linear layers, forward and, twice that, backward
    for row in (*rows, result):
        assert row["tokens_per_s"] == pytest.approx(3 * row["events_per_s"])
        assert row["mfu"] == pytest.approx(flops_per_event * row["events_per_s"] / peak)
    without = train(tmp_path, TrainConfig(max_steps=1), run="without")[2]
    assert "tokens_per_s" not in without and without["mfu"] > 0


def test_best_weights_are_kept_and_patience_ends(tmp_path):
    values = iter([1.0, 3.0, 2.0, math.nan, 9.0])
    seen = []

    def evaluate() -> dict[str, float]:
        seen.append(weights_of(model_of[0]))
        return {"error": -next(values)}

    model_of: list[nn.Module] = []

    def step(model: nn.Module, batch) -> StepOutput:
        model_of[:] = [model]
        return plain_step(model, batch)

    config = TrainConfig(epochs=9, eval_every=2, checkpoint_every=1, keep_checkpoints=1, patience=2)
    model, folder, result = train(tmp_path, config, step=step, evaluate=evaluate, select="-error")
    assert (result["best_step"], result["steps"], result["valid/error"]) == (4, 8, -3.0)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, seen[1][name])
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]
    assert best_checkpoint(folder.path).name == "step-00000004"
    plain = TinyModel(seed=1)
    load_weights(best_checkpoint(folder.path), plain)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, seen[1][name])


def test_a_loss_that_is_not_finite_stops_before_any_weight_moves(tmp_path):
    def step(model: nn.Module, batch) -> StepOutput:
        output = plain_step(model, batch)
        if len(before) == 3:
            return StepOutput(output.loss_sum * math.inf, output.count)
        before.append(weights_of(model))
        return output

    before: list[dict] = []
    with pytest.raises(NonFiniteError, match=r"loss is (inf|nan) at step 4 \(epoch 0\)") as raised:
        train(tmp_path, TrainConfig(log_every=1), step=step)
    path = tmp_path / "run" / "non-finite-step-4-rank-0.pt"
    assert str(path) in str(raised.value)
    saved = torch.load(path, weights_only=True)
    batch = make_batch(TinyLoader().rows(0, 3))
    assert torch.equal(saved["label_B"], batch.label_B)
    assert torch.equal(saved["features"]["values"], batch.features.values())
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3]


def test_clipping_leaves_tables_alone(tmp_path):
    moved = []
    for clip in (0.0, 1e-3):
        optimizer = OptimizerConfig(table_optimizer="sgd", clip_grad_norm=clip)
        model, folder, _ = train(
            tmp_path, TrainConfig(max_steps=1, log_every=1, optimizer=optimizer), run=f"clip-{clip}"
        )
        moved.append(weights_of(model)["ebc.embedding_bags.t0.weight"])
    assert torch.equal(*moved)
    assert lines(folder.path)[0]["grad_norm"] > 1e-3


@pytest.mark.parametrize(
    ("config", "evaluate", "select", "message"),
    [
        (TrainConfig(epochs=0), None, "", "epochs: got 0, expected at least 1"),
        (TrainConfig(checkpoint_every=-1), None, "", "checkpoint_every: got -1, expected at least 0"),
        (TrainConfig(patience=1), noisy_evaluation, "", "needs a metric"),
        (TrainConfig(), None, "auc", "need an evaluation"),
        (TrainConfig(), noisy_evaluation, "auc", "'auc', but the evaluation gives chance"),
        (TrainConfig(optimizer=OptimizerConfig(schedule="step")), None, "", "constant, linear, cosine"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, config, evaluate, select, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, config, evaluate=evaluate, select=select)


def test_prefetch_gives_the_state_behind_each_batch():
    loader = TinyLoader(24)
    fetched = list(prefetch(loader, CPU))
    assert [entry.loader_state for entry in fetched] == [
        {"epoch": 0, "position": 1},
        {"epoch": 0, "position": 2},
        {"epoch": 1, "position": 0},
    ]
    assert [entry.is_last for entry in fetched] == [False, False, True]
    loader.load_state_dict(fetched[0].loader_state)
    again = list(prefetch(loader, CPU))
    assert [torch.equal(a.batch.label_B, b.batch.label_B) for a, b in zip(again, fetched[1:])] == [True, True]


def test_prefetch_hands_over_errors_and_stops_when_closed():
    class Broken(TinyLoader):
        def __iter__(self):
            for position, batch in enumerate(super().__iter__()):
                if position == 2:
                    raise OSError("disk gone")
                yield batch

    batches = prefetch(Broken(), CPU)
    assert not next(batches).is_last
    with pytest.raises(OSError, match="disk gone"):
        list(batches)
    loader = TinyLoader(8000)
    batches = prefetch(loader, CPU)
    next(batches)
    batches.close()
    assert loader.position < 10
    empty = TinyLoader(0)
    with pytest.raises(ValueError, match="no batch"):
        list(prefetch(empty, CPU))
