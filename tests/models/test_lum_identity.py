"""A LUM's checkpoint knows what it was trained as; a run folder that says something else is refused by all readers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lumrec.data.prepare import open_or_prepare
from lumrec.experiments.config import Config
from lumrec.models.lum import ModelConfig, load_lum
from lumrec.run.errors import UserError
from lumrec.run.files import sha256
from lumrec.stages.registry import STAGES
from lumrec.train.checkpoint_meta import read_meta
from lumrec.train.identity import Settings
from lumrec.warm_start.continual import find_earlier

WORDS = ["name=tiny", "show_user.user=u0"]


def edit(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert text.count(old) >= 1
    (run / "config.yaml").write_text(text.replace(old, new, 1))


def checkpoint_of(run: Path) -> Path:
    (path,) = (run / "checkpoints").glob("step-*")
    return path


def rewrite(checkpoint: Path, **fingerprint: str | None) -> None:
    """Another fingerprint in meta.json, with checksums that are right; None takes a name out."""
    meta = json.loads((checkpoint / "meta.json").read_text())
    changed = {**meta["fingerprint"], **fingerprint}
    meta["fingerprint"] = {name: value for name, value in changed.items() if value is not None}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    (checkpoint / "COMPLETE").write_text(sha256(checkpoint / "meta.json"))


READERS: dict[str, Callable[[Config], object]] = {
    "query": STAGES["query"].run,
    "inspect": lambda config: STAGES["show_user"].run(config),
    "rank": lambda config: STAGES["rank"].run(config),
    "load_lum": lambda config: load_lum(
        config.runs / "tiny-pretrain", open_or_prepare(config), device=torch.device("cpu")
    ),
    "start_from": lambda config: find_earlier(
        config, config.model, config.pretrain.start_from, open_or_prepare(config)
    ),
}
CHANGES = [
    ("num_heads: 2", "num_heads: 4", "model.*num_heads is 2 there, 4 here"),
    ("similarity: cosine", "similarity: dot", "model.*similarity is 'cosine' there, 'dot' here"),
    ("temperature: 0.05", "temperature: 0.5", "model.*temperature is 0.05 there, 0.5 here"),
    ("max_events: 16", "max_events: 17", "model.*max_events is 16 there, 17 here"),
    ("encoder: gpt", "encoder: hstu", "model.*encoder is 'gpt' there, 'hstu' here"),
    ("tokens: interleaved", "tokens: merged", "model.*tokens"),
    ("fold: ''", "fold: 0/2", "another fold: it was made with '', .*says has '0/2'"),
    ("time_share: 1.0", "time_share: 0.5", "another time_share: it was made with '1.0'"),
]


@pytest.mark.parametrize(("old", "new", "said"), CHANGES)
def test_a_config_that_the_checkpoint_contradicts(experiment, old, new, said):
    config = experiment("pretrain.start_from=tiny-pretrain", "run=other", "rank.tables=lum", "show_user.user=0")
    edit(Path(config.runs_dir) / "tiny-pretrain", old, new)
    with pytest.raises(UserError, match=said):
        READERS["query"](config)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_compares(experiment, reader):
    words = ["pretrain.start_from=tiny-pretrain", "run=other", "rank.tables=lum", "show_user.user=0"]
    config = experiment(*words)
    edit(Path(config.runs_dir) / "tiny-pretrain", "num_heads: 2", "num_heads: 4")
    with pytest.raises(UserError, match=r"tiny-pretrain/config.yaml says.*num_heads is 2 there, 4 here"):
        READERS[reader](config)
    assert not (Path(config.runs_dir) / "other").exists()


def test_what_does_not_decide_may_differ(experiment):
    config = experiment()
    edit(Path(config.runs_dir) / "tiny-pretrain", "checkpoint_activations: false", "checkpoint_activations: true")
    READERS["load_lum"](config)


def test_the_checkpoint_of_another_run_is_refused(experiment):
    """A fold's weights in the folder of the LUM of all users: its answers would pass for in-sample ones."""
    config = experiment()
    runs = Path(config.runs_dir)
    (runs / "tiny-pretrain" / "checkpoints").rename(runs / "away")
    (runs / "tiny-pretrain-0of2" / "checkpoints").rename(runs / "tiny-pretrain" / "checkpoints")
    with pytest.raises(UserError, match="another fold: it was made with '0/2'"):
        READERS["query"](config)


def test_checkpoints_of_earlier_versions_are_read(experiment):
    """They hold the repr of the config, of fewer settings, and neither fold nor share."""
    config = experiment()
    run = Path(config.runs_dir) / "tiny-pretrain"
    old = "ModelConfig(encoder='gpt', dim=16, num_layers=2, num_heads=2, ffn_dim=0, max_events=16, conditions=None)"
    rewrite(checkpoint_of(run), model=old, fold=None, time_share=None)
    READERS["load_lum"](config)
    edit(run, "num_heads: 2", "num_heads: 4")
    with pytest.raises(UserError, match="num_heads is 2 there, 4 here"):
        READERS["load_lum"](config)
    rewrite(checkpoint_of(run), model=None)  # not recorded: nothing to compare with
    READERS["load_lum"](config)


TEXTS = [
    "",
    "{",
    "[]",
    "5",
    "{1: 2}",
    "__import__('os').system('true')",
    "ModelConfig(dim=__import__('os'))",
    "(" * 5000,
]


@pytest.mark.parametrize("text", [*TEXTS, "{" * 200_000, '{"dim": ' * 50_000, "ModelConfig(1)", "lambda: 0"])
def test_settings_that_cannot_be_read(experiment, text):
    config = experiment()
    rewrite(checkpoint_of(Path(config.runs_dir) / "tiny-pretrain"), model=text)
    with pytest.raises(UserError, match="is damaged: model: its settings cannot be read"):
        READERS["load_lum"](config)


def test_only_what_differs_from_the_defaults_is_stored(experiment):
    config = experiment()
    stored = read_meta(checkpoint_of(Path(config.runs_dir) / "tiny-pretrain"))["fingerprint"]
    assert json.loads(stored["model"]) == {"dim": 16, "max_events": 16}
    assert (stored["fold"], stored["time_share"]) == ("", "1.0")
    assert Settings.of(ModelConfig(dim=16, max_events=16)).differences(stored["model"]) == []
