"""Optimizers: one schedule for tables and dense parameters, every parameter in exactly one part."""

from typing import get_args

import pytest
import torch
from tiny_training import TinyModel, loss_sum, make_batch

from lumrec.run.distributed import init_distributed
from lumrec.train.optimizers import (
    OptimizerConfig,
    Schedule,
    TableAndDenseOptimizer,
    build_optimizer,
    learning_rate_factor,
)
from lumrec.train.parallel import shard
from lumrec.warm_start.plan import shards_of


def prepare(config: OptimizerConfig) -> tuple[torch.nn.Module, TableAndDenseOptimizer]:
    init_distributed("cpu")
    model = shard(TinyModel(), device="cpu", optimizer=config)
    return model, build_optimizer(model, config)


def tables(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.split(".")[-2]: shards_of(weight)[0].values
        for name, weight in model.state_dict().items()
        if ".embedding_bags." in name
    }


def table(model: torch.nn.Module) -> torch.Tensor:
    return tables(model)["t0"]


def moves(factors: list[float]) -> list[tuple[float, float]]:
    """How far a table and the dense bias move in one plain SGD/AdamW step at each learning rate factor."""
    distances = []
    for factor in factors:
        model, optimizer = prepare(OptimizerConfig(table_optimizer="sgd"))
        table_before, bias_before = table(model).clone(), model.state_dict()["mlp.3.bias"].clone()
        optimizer.set_learning_rate(factor)
        loss_sum(model, make_batch(torch.arange(8))).backward()
        optimizer.step()
        distances.append(
            (
                float((table(model) - table_before).abs().max()),
                float((model.state_dict()["mlp.3.bias"] - bias_before).abs().max()),
            )
        )
    return distances


def test_the_schedule_moves_fused_tables_in_the_very_step():
    (table_0, dense_0), (table_half, dense_half), (table_1, dense_1) = moves([0.0, 0.5, 1.0])
    assert table_0 == dense_0 == 0.0
    assert table_1 > 0 and table_half == pytest.approx(table_1 / 2, rel=1e-4)
    assert dense_1 > 0 and dense_half == pytest.approx(dense_1 / 2, rel=1e-4)


@pytest.mark.parametrize("sharding", ["table_wise", "data_parallel"])
def test_a_table_with_a_rate_of_its_own(sharding):
    """Frozen, slowed and as all others, through the schedule too; the table learns as the ratio says."""
    init_distributed("cpu")
    moved = {}
    for rates in ({}, {"t0": 0.01}, {"t0": 0.0}):
        config = OptimizerConfig(table_optimizer="sgd", table_lr=0.1, table_lrs=rates)
        torch.manual_seed(0)
        model = shard(TinyModel(), device="cpu", optimizer=config, sharding=sharding)
        optimizer = build_optimizer(model, config)
        optimizer.set_learning_rate(0.5)
        before = {name: weight.clone() for name, weight in tables(model).items()}
        optimizer.zero_grad()
        loss_sum(model, make_batch(torch.arange(8))).backward()
        optimizer.step()
        moved[rates.get("t0", 0.1)] = {
            name: float((weight - before[name]).abs().max()) for name, weight in tables(model).items()
        }
    assert moved[0.0]["t0"] == 0.0
    assert moved[0.01]["t0"] == pytest.approx(moved[0.1]["t0"] / 10, rel=1e-3)
    others = set(moved[0.1]) - {"t0"}
    assert others and all(moved[0.0][name] == moved[0.1][name] > 0 for name in others)


def test_a_rate_for_a_table_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="table_lrs names 'item'; the model's tables are t0, t1"):
        prepare(OptimizerConfig(table_lrs={"item": 0.0}))


def test_the_rate_is_set_from_the_highest_not_from_the_last():
    _, optimizer = prepare(OptimizerConfig(table_lr=0.2, dense_lr=0.01))
    for factor in (0.5, 0.1, 1.0):
        optimizer.set_learning_rate(factor)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.01, 0.2])


def test_every_parameter_is_in_exactly_one_part():
    model, optimizer = prepare(OptimizerConfig())
    assert set(optimizer.params) == set(dict(model.named_parameters()))
    assert sum(len(part.params) for _, part in optimizer.optimizers) == len(optimizer.params)
    assert len(optimizer.dense_parameters) == 4


def test_weight_decay_is_for_matrices():
    _, optimizer = prepare(OptimizerConfig(weight_decay=0.1))
    decayed = {
        group["weight_decay"]: {p.dim() for p in group["params"]} for group in optimizer.optimizers[1][1].param_groups
    }
    assert decayed == {0.1: {2}, 0.0: {1}}


def test_schedules():
    def rates(**settings) -> list[float]:
        return [round(learning_rate_factor(OptimizerConfig(**settings), step, 5), 4) for step in range(5)]

    assert rates() == [1.0] * 5
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(schedule="linear") == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates(schedule="cosine", warmup_steps=1) == [1.0, 1.0, 0.8536, 0.5, 0.1464]
    assert learning_rate_factor(OptimizerConfig(schedule="cosine", warmup_steps=9), 9, 9) == 1.0
    assert rates(schedule="linear", min_lr_factor=0.5) == [1.0, 0.9, 0.8, 0.7, 0.6]
    assert rates(schedule="cosine", warmup_steps=1, min_lr_factor=0.5) == [1.0, 1.0, 0.9268, 0.75, 0.5732]
    assert rates(schedule="inverse_sqrt") == [1.0, 0.7071, 0.5774, 0.5, 0.4472]
    assert rates(schedule="inverse_sqrt", warmup_steps=2, min_lr_factor=0.7) == [0.5, 1.0, 0.8165, 0.7071, 0.7]
    assert rates(schedule="wsd", warmup_steps=1, decay_share=0.4) == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert rates(schedule="wsd", warmup_steps=4, decay_share=1.0, min_lr_factor=0.1) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(schedule="wsd", decay_share=0.0) == [1.0] * 5  # the fall would begin behind the last step
    # Behind the last step, where a changed number of ranks can lead, nothing falls below the lowest rate.
    for schedule in get_args(Schedule)[1:]:
        config = OptimizerConfig(schedule=schedule, min_lr_factor=0.3)
        assert learning_rate_factor(config, 500.5, 5) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"table_optimizer": "adam"}, "table_optimizer: got 'adam', expected one of rowwise_adagrad, adagrad, sgd"),
        ({"schedule": "exponential"}, "constant, linear, cosine"),
        ({"table_lr": -1.0}, "table_lr: got -1.0, expected at least 0"),
        ({"table_lrs": {"t0": -1.0}}, "table_lrs.t0: got -1.0, expected at least 0"),
        ({"min_lr_factor": 1.5}, "min_lr_factor: got 1.5, expected at least 0 and at most 1"),
        ({"decay_share": -0.1}, "decay_share: got -0.1, expected at least 0 and at most 1"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        prepare(OptimizerConfig(**settings))
