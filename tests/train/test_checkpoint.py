"""Checkpoints: whole or not there, refused where they do not fit, weights loaded by name."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tiny_training import TinyModel, loss_sum, make_batch, weights_of
from torch import nn

from lumrec.run.distributed import init_distributed
from lumrec.run.errors import UserError
from lumrec.run.files import sha256
from lumrec.train.checkpoint import Checkpointer, load_weights
from lumrec.train.optimizers import OptimizerConfig, build_optimizer
from lumrec.train.parallel import shard
from lumrec.train.randomness import random_state, set_random_state

FINGERPRINT = {"data": "aaa"}


class Session:
    """A model, its optimizer and their checkpoints, as one process of a run has them."""

    def __init__(
        self, folder: Path, *, rows=(40, 12), fingerprint=FINGERPRINT, keep=3, weight_decay=0.1, seed=0
    ) -> None:
        init_distributed("cpu")
        config = OptimizerConfig(weight_decay=weight_decay)
        self.model = shard(TinyModel(rows=rows, seed=seed), device="cpu", optimizer=config)
        self.optimizer = build_optimizer(self.model, config)
        self.checkpointer = Checkpointer(
            folder, model=self.model, optimizer=self.optimizer, fingerprint=fingerprint, keep=keep
        )

    def train(self, step: int) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_sum(self.model, make_batch(torch.arange(8) + step))
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def save(self, step: int, best_step: int = 1) -> Path:
        return self.checkpointer.save(step, state={"at": step}, local={"loader": step}, best_step=best_step)


def trained(folder: Path, steps: int = 3) -> tuple[Session, list[dict[str, torch.Tensor]]]:
    session, snapshots = Session(folder), []
    for step in range(1, steps + 1):
        session.train(step)
        session.save(step)
        snapshots.append(weights_of(session.model))
    return session, snapshots


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def break_file(path: Path, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= bit
    path.write_bytes(bytes(content))


def test_a_loaded_run_goes_on_to_the_bit(tmp_path):
    first, snapshots = trained(tmp_path, 2)
    second = Session(tmp_path, seed=9)
    loaded = second.checkpointer.load_latest()
    assert loaded == (2, {"at": 2}, {"loader": 2}, True)
    assert same(weights_of(second.model), snapshots[-1])
    assert [first.train(step) for step in range(5, 9)] == [second.train(step) for step in range(5, 9)]
    assert same(weights_of(first.model), weights_of(second.model))


def test_a_parameter_without_a_gradient_has_no_state_after_loading(tmp_path):
    def session(folder: Path) -> Session:
        made = Session(folder)
        made.model.module.mlp[3].bias.requires_grad_(True)
        return made

    first = session(tmp_path)
    first.model.module.mlp[0].weight.grad = torch.ones(16, 16)
    first.optimizer.step()
    first.save(1)
    second = session(tmp_path)
    second.checkpointer.load_latest()
    dense = second.optimizer.optimizers[1][1]
    assert [name for name, entries in dense.state_dict()["state"].items() if entries] == ["mlp.0.weight"]


FILES = ["__0_0.distcp", ".metadata", "rank-0.json", "meta.json", "COMPLETE"]


def flip_a_bit(path: Path) -> None:
    break_file(path)


def flip_the_highest_bit(path: Path) -> None:
    break_file(path, bit=0x80)  # no longer UTF-8


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    """Another content, and checksums that agree with it, where there are any."""
    path.write_bytes(b'{"format": [')
    meta = path.with_name("meta.json")
    if path.name == "COMPLETE":
        return
    if path != meta:
        content = json.loads(meta.read_text())
        content["files"][path.name] = "0"
        meta.write_text(json.dumps(content))
    path.with_name("COMPLETE").write_text(sha256(meta))


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("three")
    return folder, trained(folder)[1]


@pytest.mark.parametrize("damage", [flip_a_bit, flip_the_highest_bit, truncate, empty, garble, Path.unlink])
@pytest.mark.parametrize("broken", FILES)
def test_a_corrupt_checkpoint_is_set_aside_and_the_one_before_taken(
    tmp_path, three_checkpoints, caplog, broken, damage
):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_checkpoints[0], folder)
    damage(folder / "step-00000003" / broken)
    session = Session(folder)
    assert session.checkpointer.load_latest().step == 2
    assert same(weights_of(session.model), three_checkpoints[1][1])
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "lumrec.train.checkpoint")
    assert "step-00000003 is skipped: " in warning and "It is kept as corrupt-step-00000003" in warning
    assert (folder / "corrupt-step-00000003").is_dir() and not (folder / "step-00000003").exists()


def test_a_checkpoint_of_another_format_is_skipped_and_incomplete_words_too(tmp_path, caplog):
    trained(tmp_path)
    for step, change in ((3, {"format": 99}), (2, {"files": None})):
        meta = tmp_path / f"step-0000000{step}" / "meta.json"
        content = {**json.loads(meta.read_text()), **change}
        meta.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
        (meta.parent / "COMPLETE").write_text(sha256(meta))
    assert Session(tmp_path).checkpointer.load_latest().step == 1
    assert "its format is 99, this lumrec reads format 1" in caplog.text and "meta.json lacks files" in caplog.text


def test_a_damaged_older_checkpoint_does_not_stop_the_run(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    session, _ = trained(folder)
    empty(folder / "step-00000002" / "meta.json")
    session.save(4)
    assert "step-00000002 cannot be read" in caplog.text


def test_a_run_does_not_go_on_without_its_best_checkpoint(tmp_path):
    """Found when it resumes, not when it ends."""
    trained(tmp_path)
    empty(tmp_path / "step-00000001" / "meta.json")
    with pytest.raises(UserError, match="step-00000003 names step-00000001 as the best checkpoint so far, but"):
        Session(tmp_path).checkpointer.load_latest()


def test_half_written_checkpoints_do_not_count(tmp_path, caplog):
    trained(tmp_path)
    (tmp_path / "step-00000003" / "COMPLETE").unlink()
    (tmp_path / "step-00000002" / "__0_0.distcp").unlink()
    (tmp_path / ".tmp-step-00000004").mkdir()
    session = Session(tmp_path)
    assert session.checkpointer.load_latest().step == 1
    for step in (2, 3):
        assert f"step-0000000{step} is skipped" in caplog.text
    assert ".tmp-step-00000004 was not finished when its process ended" in caplog.text
    for path in tmp_path.glob("step-*"):
        break_file(path / "meta.json")
    assert session.checkpointer.load_latest() is None


def test_newest_and_best_stay(tmp_path):
    session = Session(tmp_path, keep=2)
    for step in range(1, 7):
        session.train(step)
        session.save(step, best_step=min(step, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000005", "step-00000006"]
    session.checkpointer.load_model(2)
    again = Session(tmp_path)
    load_weights(tmp_path / "step-00000002", again.model)
    assert same(weights_of(again.model), weights_of(session.model))
    session.save(6)  # the same step again replaces it
    assert json.loads((tmp_path / "step-00000006" / "meta.json").read_text())["best_step"] == 1


def test_another_schema_or_model_is_refused_naming_both(tmp_path):
    trained(tmp_path, 1)
    with pytest.raises(ValueError, match=r"another data: it was made with 'aaa', this run has 'bbb'"):
        Session(tmp_path, fingerprint={"data": "bbb"}).checkpointer.load_latest()
    with pytest.raises(ValueError, match=r"t1.weight' is \[12, 8\] in the checkpoint, .*t1.weight' is \[13, 8\] here"):
        Session(tmp_path, rows=(40, 13)).checkpointer.load_latest()
    with pytest.raises(ValueError, match=r"t1.weight' \(from .*\) is not in this model"):
        Session(tmp_path, rows=(40,)).checkpointer.load_latest()


def test_weights_load_into_plain_and_sharded_modules_under_other_names(tmp_path):
    _, snapshots = trained(tmp_path, 1)
    path = tmp_path / "step-00000001"
    plain = TinyModel(seed=3)
    load_weights(path, plain, fingerprint=FINGERPRINT)
    assert same(dict(plain.state_dict()), snapshots[0])

    holder = nn.ModuleDict({"lum": TinyModel(seed=3), "own": nn.Linear(2, 2)})
    own = holder["own"].weight.detach().clone()
    load_weights(path, holder, {name: f"lum.{name}" for name in snapshots[0]})
    assert same(dict(holder["lum"].state_dict()), snapshots[0]) and torch.equal(holder["own"].weight, own)

    sharded = shard(TinyModel(seed=3), device="cpu", sharding="row_wise")
    load_weights(path, sharded, {"ebc.embedding_bags.t0.weight": "ebc.embedding_bags.t0.weight"})
    loaded, fresh = weights_of(sharded), dict(TinyModel(seed=3).state_dict())
    assert [name for name in loaded if torch.equal(loaded[name], snapshots[0][name])] == [
        "ebc.embedding_bags.t0.weight"
    ]
    assert [name for name in loaded if not torch.equal(loaded[name], fresh[name])] == ["ebc.embedding_bags.t0.weight"]


def test_weights_that_do_not_fit_load_nothing(tmp_path):
    trained(tmp_path, 1)
    path = tmp_path / "step-00000001"
    target = TinyModel(seed=3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"'t9' \(for 'mlp.3.bias'\) is not in the checkpoint"):
        load_weights(path, target, {"mlp.0.bias": "mlp.0.bias", "t9": "mlp.3.bias"})
    with pytest.raises(ValueError, match=r"'mlp.0.bias' is \[16\] in the checkpoint, 'mlp.3.bias' is \[1\] here"):
        load_weights(path, target, {"mlp.3.weight": "mlp.3.weight", "mlp.0.bias": "mlp.3.bias"})
    with pytest.raises(ValueError, match=r"'mlp.9' \(from 'mlp.0.bias'\) is not in this model"):
        load_weights(path, target, {"mlp.0.bias": "mlp.9"})
    with pytest.raises(ValueError, match="another data"):
        load_weights(path, target, fingerprint={"data": "bbb"})
    with pytest.raises(FileNotFoundError, match="no COMPLETE"):
        load_weights(tmp_path / "step-00000009", target)
    break_file(path / "__0_0.distcp")
    with pytest.raises(ValueError, match="corrupt: __0_0.distcp"):
        load_weights(path, target)
    assert same(dict(target.state_dict()), before)


def evil(code: str, tmp_path: Path) -> bytes:
    """A pickle that creates tmp_path / "ran"; with "os", by a name that DCP's own module leads to."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    if code == "pathlib":
        return pickle.dumps(Evil())
    command = f"touch {tmp_path / 'ran'}".encode()
    name = b"ctorch.distributed.checkpoint.filesystem\nos.system\n"
    return b"\x80\x04" + name + b"U" + bytes([len(command)]) + command + b"\x85R."


@pytest.mark.parametrize("code", ["pathlib", "os"])
def test_a_checkpoint_cannot_run_code(tmp_path, code):
    trained(tmp_path / "run", 1)
    path = tmp_path / "run" / "step-00000001"
    (path / ".metadata").write_bytes(evil(code, tmp_path))
    meta = json.loads((path / "meta.json").read_text())
    meta["files"][".metadata"] = sha256(path / ".metadata")
    (path / "meta.json").write_text(json.dumps(meta))
    (path / "COMPLETE").write_text(sha256(path / "meta.json"))
    with pytest.raises(ValueError, match="was not written by lumrec"):
        load_weights(path, TinyModel())
    with pytest.raises(ValueError, match="was not written by lumrec"):
        Session(tmp_path / "run").checkpointer.load_latest()
    assert not (tmp_path / "ran").exists()


def test_random_states_survive_json():
    import random

    import numpy as np

    np.random.standard_normal()  # leaves a second value waiting
    state = json.loads(json.dumps(random_state()))

    def draw() -> list[float]:
        return [random.gauss(0, 1), np.random.standard_normal(), np.random.rand(), *torch.randn(3).tolist()]

    first = draw()
    set_random_state(state)
    assert draw() == first
