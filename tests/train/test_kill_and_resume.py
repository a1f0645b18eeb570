"""Runs that are killed, at any moment, and started again: equal to one that was not, to the bit."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from forks import ForkServer
from tiny_training import TinyModel

from lumrec.train.checkpoint import complete_checkpoints, load_weights

RUN = "tiny-pretrain"
EPOCHS = 20
STEPS = 9 * EPOCHS
KILLS = 20
TIMES = ("events_per_s", "data_wait", "memory_gib", "wall_s")


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
    """A run that nothing disturbed, the seconds until it trained, and those that it trained."""
    folder, started = tmp_path_factory.mktemp("whole"), time.monotonic()
    forks.run("tiny_training:train_noisily", runs_dir=str(folder), epochs=EPOCHS)
    train_s = json.loads((folder / RUN / "result.json").read_text())["wall_s"]
    return folder, time.monotonic() - started - train_s, train_s


def test_killed_twenty_times_at_random_moments(forks, whole, tmp_path):
    expected, start_s, train_s = whole
    moments = random.Random(20)
    in_save = in_training = reached = 0
    for kills_left in range(KILLS, 0, -1):
        run = forks.start("tiny_training:train_noisily", runs_dir=str(tmp_path), epochs=EPOCHS)
        # Each life has its share of what is left, so that the last kill comes late in the run, but before its end.
        share_s = (1 - reached / STEPS) * train_s * 2 / (kills_left + 2)
        time.sleep(moments.uniform(0, start_s + share_s))
        run.kill()
        assert run.wait() == [-9], run.text()
        in_save += any((tmp_path / RUN / "checkpoints").glob(".tmp-*"))
        if (tmp_path / RUN / "metrics.jsonl").exists():
            reached = json.loads((tmp_path / RUN / "metrics.jsonl").read_text().splitlines()[-1])["step"]
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
