"""Settings as a checkpoint keeps them: only what decides, comparable with what earlier versions kept."""

import dataclasses
import json

import pytest

from lumrec.models.lum import ModelConfig
from lumrec.stages.rank import RankConfig
from lumrec.stages.retrieve import RetrieveConfig
from lumrec.train.config import TrainConfig
from lumrec.train.identity import Settings
from lumrec.train.optimizers import OptimizerConfig

CONFIGS = [
    (ModelConfig(dim=32, conditions=["a", 'b"c'], time_bias=True), ()),
    (RankConfig(model="sim", leave_out=["x"], hidden_dims=[], train=TrainConfig(epochs=9)), ("train",)),
    (RetrieveConfig(ks=[5], train=TrainConfig(optimizer=OptimizerConfig(table_lr=1e-9))), ("train", "ann")),
]


@pytest.mark.parametrize(("config", "ignored"), CONFIGS)
def test_the_repr_of_earlier_versions_says_the_same(config, ignored):
    settings = Settings.of(config, ignored=ignored)
    assert settings.differences(repr(config)) == settings.differences(str(settings)) == []
    other = Settings.of(type(config)(), ignored=ignored)
    assert other.differences(repr(config)) == other.differences(str(settings)) != []


def test_what_is_ignored_is_neither_kept_nor_compared():
    config = RankConfig(train=TrainConfig(epochs=9), batch_size=7)
    settings = Settings.of(config, ignored=["train"])
    assert json.loads(str(settings)) == {"batch_size": 7}
    assert settings.differences(repr(dataclasses.replace(config, train=TrainConfig(epochs=3)))) == []


def test_a_setting_that_is_new_counts_as_its_default():
    @dataclasses.dataclass(frozen=True)
    class Later:
        dim: int = 8
        added: float = 0.5

    stored = '{"dim": 4}'
    assert Settings.of(Later(dim=4)).differences(stored) == []
    assert Settings.of(Later(dim=4)).differences("Earlier(dim=4)") == []
    assert Settings.of(Later(dim=4, added=0.1)).differences(stored) == ["added is 0.5 there, 0.1 here"]
    assert Settings.of(Later()).differences('{"dim": 4, "gone": 1}') == [
        "dim is 4 there, 8 here",
        "gone is 1 there, '(absent)' here",
    ]
