"""Step 1 as a stage, on a small simulated log: it learns, resumes after kill -9 to the bit, and runs on two ranks."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import weights_of

from lumrec.data.prepared import PreparedData
from lumrec.data.splits import parse_fold
from lumrec.evaluation.retrieval import evaluate_retrieval
from lumrec.experiments.config import Config, load
from lumrec.models.lum import build_lum, load_lum
from lumrec.run import limits
from lumrec.run.distributed import init_distributed
from lumrec.run.folder import RunFolder
from lumrec.stages.pretrain import PretrainConfig
from lumrec.stages.registry import STAGES
from lumrec.train.checkpoint import best_checkpoint

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model": {"dim": 16, "num_layers": 1, "max_events": 16, "conditions": ["feedback", "scenario"]},
    "pretrain": {
        "packing": {"events_per_pack": 64},
        "negatives": {"sampled": 32},
        "contrast": {"feature": "feedback"},
        "train": {"epochs": 2, "log_every": 1, "checkpoint_every": 5, "eval_every": 10},
        "evaluate": {"oracle": True},
    },
}


@pytest.fixture(scope="module")
def settings(tiny_prepared: PreparedData, tmp_path_factory) -> tuple[Path, list[str]]:
    """A YAML file and words that name the shared prepared folder and a fresh runs folder."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "data").symlink_to(tiny_prepared.path, target_is_directory=True)
    file = runs / "tiny.yaml"
    file.write_text(json.dumps(SETTINGS))
    return file, [f"runs_dir={runs}", "inputs.prepared=data"]


def config_of(settings: tuple[Path, list[str]], *words: str) -> Config:
    return load(settings[0], [*settings[1], *words])


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def trained(settings) -> tuple[Config, dict]:
    config = config_of(settings, "run=uninterrupted")
    return config, STAGES["pretrain"].run(config)


def test_it_learns_and_reports_honest_and_oracle_retrieval(trained):
    config, result = trained
    folder = Path(config.runs_dir) / "uninterrupted"
    curve = [loss for _, loss in losses(folder)]
    assert np.mean(curve[-5:]) < np.mean(curve[:5])
    assert {"hr@10", "ndcg@10", "oracle/hr@10", "events_per_s", "best_step"} <= set(result)
    assert json.loads((folder / "result.json").read_text())["hr@10"] == result["hr@10"]
    assert any((folder / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["model.encoder=hstu", "model.tokens=merged", "pretrain.precision=bfloat16"],
        ["model.encoder=llama", "model.time_bias=true", "model.checkpoint_activations=true"],
        ["model.tokens=merged", "model.conditions=[]", "pretrain.contrast.feature=", "pretrain.evaluate.oracle=false"],
    ],
)
def test_other_encoders_and_tokens_learn_and_come_back(settings, tiny_prepared, words):
    """What was trained, its best weights loaded, gives the test figures again."""
    run = f"run=other-{'-'.join(words).replace('.', '-')}"
    config = config_of(settings, run, "pretrain.train.epochs=1", *words)
    result = STAGES["pretrain"].run(config)
    curve = [loss for _, loss in losses(Path(config.runs_dir) / config.run)]
    assert np.mean(curve[-5:]) < np.mean(curve[:5])
    model, builder, _ = load_lum(config.runs / config.run, tiny_prepared, device=init_distributed("cpu"))
    again = evaluate_retrieval(
        model, builder, part="test", config=config.pretrain.evaluate, max_events=config.model.max_events
    )
    assert again == {name: result[name] for name in again}


def test_every_table_and_matrix_has_moved(trained, tiny_prepared):
    config, _ = trained
    device = init_distributed("cpu")
    dmp, _, _ = load_lum(config.runs / "uninterrupted", tiny_prepared, device=device)
    torch.manual_seed(config.seed)
    fresh, after = build_lum(config.model, tiny_prepared)[0].state_dict(), weights_of(dmp)
    assert fresh.keys() == after.keys()
    for name, before in fresh.items():
        assert not torch.equal(before, after[name]), f"{name} has not been trained"


def run_until_killed(file: str, words: list[str], step: int) -> None:
    """Trains until `step`, where it is killed."""
    log = RunFolder.log

    def log_or_die(self: RunFolder, at: int, **metrics: float) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        log(self, at, **metrics)

    RunFolder.log = log_or_die  # type: ignore[method-assign]
    STAGES["pretrain"].run(load(file, words))


def test_killed_and_started_again_it_ends_as_if_it_had_not_been(trained, settings, forks):
    """kill -9 in mid-epoch: the same batches, the same losses and the same weights, to the bit."""
    config, _ = trained
    folder = Path(config.runs_dir) / "killed"
    words = [*settings[1], "run=killed"]
    killed = forks.start("tests.stages.test_pretrain:run_until_killed", file=str(settings[0]), words=words, step=13)
    assert killed.wait() == [-signal.SIGKILL], killed.text()
    assert (folder / "checkpoints" / "step-00000010" / "COMPLETE").exists()
    assert not (folder / "result.json").exists()
    forks.run_script(ROOT / "apps" / "pretrain.py", "--config", str(settings[0]), *words)
    reference = Path(config.runs_dir) / "uninterrupted"
    assert losses(folder) == losses(reference)
    weights = [_weights(best_checkpoint(path)) for path in (folder, reference)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith("model.")
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def test_two_ranks(settings, forks):
    words = [*settings[1], "run=two-ranks", "pretrain.train.epochs=1", "pretrain.negatives.across_ranks=true"]
    forks.run_script(ROOT / "apps" / "pretrain.py", "--config", str(settings[0]), *words, world_size=2)
    folder = Path(config_of(settings).runs_dir) / "two-ranks"
    result = json.loads((folder / "result.json").read_text())
    assert result["loss"] > 0 and result["hr@10"] >= 0
    assert "rank" in (folder / "plan.txt").read_text()


def test_without_any_condition(settings):
    """LUM's ablation: a constant token in place of the condition."""
    words = ["run=none", "model.conditions=[]", "pretrain.contrast.feature=", "pretrain.train.max_steps=5"]
    assert np.isfinite(STAGES["pretrain"].run(config_of(settings, *words))["loss"])


def test_a_checkpoint_of_another_schema_is_refused(trained, tiny_prepared, tmp_path):
    config, _ = trained
    other = PreparedData.open(tiny_prepared.path)
    other.fingerprint = other.vocabulary_fingerprint = "another"
    with pytest.raises(ValueError, match="another"):
        load_lum(config.runs / "uninterrupted", other, device=init_distributed("cpu"))


def test_a_missing_lum_names_the_command(settings, tiny_prepared):
    with pytest.raises(FileNotFoundError, match="torchx run apps/pretrain.py"):
        load_lum(config_of(settings).runs / "nowhere", tiny_prepared, device=init_distributed("cpu"))


@pytest.mark.parametrize("fold", ["2/2", "1", "a/b", "0/1", "-1/2"])
def test_a_fold_that_is_none_is_refused(fold):
    with pytest.raises(ValueError, match="fold is"):
        parse_fold(fold)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["data.split.fractions=[0.5, 0, 0.5]"],
            "the validation part has no event, but pretrain.select=ndcg@10 chooses",
        ),
        (["data.split.fractions=[0, 0.5, 0.5]", "pretrain.select="], "there are no training events for this LUM"),
    ],
)
def test_an_empty_part_is_found_before_the_first_step(tiny_words, tmp_path, words, says):
    config = load(None, [*tiny_words, *words, f"runs_dir={tmp_path}"])
    with pytest.raises(ValueError, match=says):
        STAGES["pretrain"].run(config)
    assert not (tmp_path / "tiny-pretrain").exists()


def test_without_validation_and_test_the_last_weights_are_kept(tiny_words, tmp_path):
    words = ["data.split.fractions=[1, 0, 0]", "pretrain.select=", "pretrain.train.max_steps=2", "model.tokens=merged"]
    result = STAGES["pretrain"].run(load(None, [*tiny_words, *words, f"runs_dir={tmp_path}"]))
    assert result["note"].endswith("the test part has no events")
    assert not any(name.startswith(("valid/", "hr@")) for name in result)
    assert result["tokens_per_s"] == result["events_per_s"]  # merged: one token an event


def test_label_smoothing_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match=r"label_smoothing: got 1\.0, expected at least 0 and less than 1"):
        limits.check(PretrainConfig(label_smoothing=1.0))
