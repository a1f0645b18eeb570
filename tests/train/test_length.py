"""How long a run trains: fitted to a small log on request, and reported where it is too short."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumrec.experiments.config import load
from lumrec.stages.registry import STAGES
from lumrec.train.config import TrainConfig
from lumrec.train.length import MOST_EPOCHS, SMALLEST_BATCH, fit_length, too_short
from lumrec.train.optimizers import OptimizerConfig


@given(st.integers(1, 200_000), st.integers(1, 4096), st.integers(1, 8), st.integers(0, 500), st.integers(0, 300))
def test_a_small_log_gets_smaller_batches_then_more_epochs(num_rows, batch, epochs, min_steps, warm_up):
    config = TrainConfig(epochs=epochs, min_steps=min_steps, optimizer=OptimizerConfig(warmup_steps=warm_up))
    train, fitted = fit_length("rank", config, batch, num_rows)
    before, steps = epochs * -(-num_rows // batch), train.epochs * -(-num_rows // fitted)
    if before >= min_steps:
        assert (train, fitted) == (config, batch)
        return
    assert before <= steps and epochs <= train.epochs <= max(epochs, MOST_EPOCHS)
    assert min(batch, SMALLEST_BATCH) <= fitted <= batch
    assert steps >= min_steps or (train.epochs >= MOST_EPOCHS and (fitted < 2 * SMALLEST_BATCH or fitted == batch))
    assert train.optimizer.warmup_steps <= max(0.1 * steps, 0) and train.optimizer.warmup_steps <= warm_up


def test_a_short_run_is_named():
    assert too_short(TrainConfig(epochs=4), 25) == ""
    assert "99 steps of training are too few to learn from" in too_short(TrainConfig(epochs=3), 33)
    assert "1 step of training is too few to learn from" in too_short(TrainConfig(epochs=1), 1)
    assert "min_steps: 300 cannot make more of so small a log" in too_short(TrainConfig(epochs=20, min_steps=300), 2)
    assert "12 steps" in too_short(TrainConfig(epochs=3, max_steps=12), 100)
    told = too_short(TrainConfig(epochs=2, optimizer=OptimizerConfig(warmup_steps=100)), 70)
    assert "140 steps of training with a warm-up of 100 are too few" in told and "min_steps: 300" in told


@pytest.mark.parametrize("name", ["rank", "pretrain", "retrieve"])
def test_a_run_is_fitted_and_says_so_in_the_log_and_in_its_result(name, tiny_words, tiny_prepared, tmp_path, caplog):
    words = [*tiny_words, f"runs_dir={tmp_path}", f"{name}.train.epochs=1", "retrieve.batch_size=512"]
    (tmp_path / tiny_prepared.path.name).symlink_to(tiny_prepared.path)
    with caplog.at_level(logging.INFO):
        short = STAGES[name].run(load(None, [*words, "run=short"]))
        assert short["steps"] < 10
        assert f"{short['steps']} step{'s' * (short['steps'] > 1)} of training" in short["note"]
        assert f"{name}: {short['note']}" in caplog.text
        fitted = STAGES[name].run(load(None, [*words, "run=fitted", f"{name}.train.min_steps=20"]))
    assert fitted["steps"] >= 20
    assert "fewer than min_steps 20" in caplog.text
