"""Runs that are killed, or ended by a signal, at any moment and started again: equal to the bit to one that was not."""

import json
import os
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from forks import ForkServer
from tiny_training import TinyModel

from lumrec.run.interrupt import Interrupts
from lumrec.train.checkpoint import complete_checkpoints, load_weights

RUN = "tiny-pretrain"
EPOCHS = 12
STEPS = 9 * EPOCHS
KILLS = 20
TIMES = ("events_per_s", "mfu", "data_wait", "memory_gib", "wall_s")


def timeless(row: dict) -> dict:
    """A line of metrics.jsonl or result.json without what a clock measured."""
    return {name: value for name, value in row.items() if name not in TIMES}


def lines(folder: Path) -> list[dict]:
    return [timeless(json.loads(line)) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]


def end_state(folder: Path) -> tuple:
    """What a finished run leaves: its result, and loader position and random states after the last step."""
    last = complete_checkpoints(folder / RUN / "checkpoints")[-1]
    result = json.loads((folder / RUN / "result.json").read_text())
    return timeless(result), last.name, json.loads((last / "rank-0.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = TinyModel(seed=8)
    load_weights(complete_checkpoints(folder / RUN / "checkpoints")[-1], model)
    return dict(model.state_dict())


def assert_equal_to_the_bit(folder: Path, whole: Path) -> None:
    assert lines(folder) == lines(whole)
    assert end_state(folder) == end_state(whole)
    expected = weights(whole)
    for name, weight in weights(folder).items():
        assert torch.equal(weight, expected[name]), name
    assert not list((folder / RUN / "checkpoints").glob(".t*"))


@pytest.fixture(scope="module")
def whole(forks: ForkServer, tmp_path_factory) -> tuple[Path, float, float]:
    """A run that nothing disturbed, the seconds of processor time until it trained, and those that it trained."""
    folder = tmp_path_factory.mktemp("whole")
    text = forks.run("tiny_training:train_noisily", runs_dir=str(folder), epochs=EPOCHS).text()
    begins_s, ends_s = (float(re.search(rf"{word} after ([0-9.e-]+) s", text)[1]) for word in ("begins", "ends"))
    return folder, begins_s, ends_s - begins_s


def test_killed_twenty_times_at_random_moments(forks, whole, tmp_path):
    expected, start_s, train_s = whole
    moments = random.Random(20)
    in_save = in_training = reached = 0
    for kills_left in range(KILLS, 0, -1):
        # Each life has its share of what is left, so that the last kill comes late in the run, but before its end even
        # where it takes half as long as the whole run did.
        share_s = (1 - reached / STEPS) * train_s * 2 / (kills_left + 6)
        end_after_s = moments.uniform(0.001, start_s + share_s)
        run = forks.start("tiny_training:train_noisily", runs_dir=str(tmp_path), epochs=EPOCHS, end_after_s=end_after_s)
        assert run.wait() == [-signal.SIGPROF], run.text()
        in_save += any((tmp_path / RUN / "checkpoints").glob(".tmp-*"))
        metrics = tmp_path / RUN / "metrics.jsonl"
        if metrics.exists():
            # Empty after a life that resumed before the first line, and ended before it wrote that again.
            reached = max((json.loads(line)["step"] for line in metrics.read_text().splitlines()), default=0)
            in_training += "step" in run.text()
    print(f"{in_training} kills in training, of these {in_save} while a checkpoint was written; at step {reached} last")
    assert in_save >= 1 and in_training >= 5
    assert "resumed at step" in forks.run("tiny_training:train_noisily", runs_dir=str(tmp_path), epochs=EPOCHS).text()
    assert_equal_to_the_bit(tmp_path, expected)


def test_killed_between_the_data_of_a_checkpoint_and_its_completion(forks, whole, tmp_path):
    for which, code in ((3, -9), (2, -9), (99, 0)):
        run = forks.start(
            "tiny_training:train_until_killed_in_save", runs_dir=str(tmp_path), epochs=EPOCHS, which=which
        )
        assert run.wait() == [code], run.text()
        if code:
            assert len(list((tmp_path / RUN / "checkpoints").glob(".tmp-*"))) == 1
        else:
            assert "was not finished when its process ended: it is skipped" in run.text()
    assert_equal_to_the_bit(tmp_path, whole[0])


def test_a_signal_ends_the_run_with_a_checkpoint(forks, whole, tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        run = forks.start(
            "tiny_training:train_noisily", runs_dir=str(tmp_path), epochs=EPOCHS, signal_at=7, number=number
        )
        assert run.wait() == [128 + number], run.text()
        assert f"{number.name}: training ends after this step" in run.text()
        step = lines(tmp_path)[-1]["step"]
        newest = complete_checkpoints(tmp_path / RUN / "checkpoints")[-1]
        assert newest.name in (f"step-{step:08d}", f"step-{step + 1:08d}")  # every second step is logged
        assert f"{newest}, and the same command continues from there" in run.text()
    forks.run("tiny_training:train_noisily", runs_dir=str(tmp_path), epochs=EPOCHS)
    assert_equal_to_the_bit(tmp_path, whole[0])


def test_the_same_signal_again_ends_the_run_at_once(forks, tmp_path):
    for number, code in ((signal.SIGINT, 1), (signal.SIGTERM, -signal.SIGTERM)):
        folder = tmp_path / number.name
        run = forks.start("tiny_training:train_slowly", runs_dir=str(folder), step_s=60.0)
        run.wait_for_text("begins")
        run.kill(number)
        run.wait_for_text("again ends it immediately")
        run.kill(number)
        assert run.wait() == [code], run.text()
        assert ("KeyboardInterrupt" in run.text()) == (number == signal.SIGINT)
        assert not complete_checkpoints(folder / "slow" / "checkpoints")


def test_a_signal_to_one_rank_ends_all_at_the_same_step(forks, tmp_path):
    run = forks.start("tiny_training:train_slowly", world_size=2, runs_dir=str(tmp_path), step_s=0.5)
    run.wait_for_text("begins")
    run.kill(signal.SIGTERM, rank=1)
    run.kill(signal.SIGINT, rank=0)
    assert run.wait() in ([130, 130], [143, 143]), run.text()
    (path,) = complete_checkpoints(tmp_path / "slow" / "checkpoints")
    meta = json.loads((path / "meta.json").read_text())
    assert meta["world_size"] == 2 and meta["state"]["step"] == meta["step"] < 30


def test_a_signal_that_came_too_late_is_not_lost():
    # A shell starts what it puts into the background with SIGINT ignored, the tests too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.received == {signal.SIGINT}
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Interrupts():
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError  # the error is what ends the run
    assert signal.getsignal(signal.SIGTERM) is before
