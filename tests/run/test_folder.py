"""The run folder: what is written, what continues, what is refused."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from typing import Any

import pytest
import yaml
from runs import create_run, settings_of

from lumrec.data.common import Common
from lumrec.experiments.config import load
from lumrec.experiments.report_plots import read_series
from lumrec.run import versions as versions_module
from lumrec.run.changes import config_differences
from lumrec.run.errors import UserError
from lumrec.run.folder import RunFolder
from lumrec.stages.registry import STAGES
from lumrec.train.config import TrainConfig


@dataclass(frozen=True)
class Inner:
    names: tuple[str, ...] = ("a", "b")
    nothing: str | None = None
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Root(Common):
    pretrain: Inner = field(default_factory=Inner)
    rank: Inner = field(default_factory=Inner)


def root(runs_dir: str, *, name: str = "ml-1m", **settings: object) -> Root:
    return Root(runs_dir=runs_dir, name=name, **settings)


def test_names():
    assert root("runs").run_name("rank") == "ml-1m-rank"
    assert root("runs", fold="0/2").run_name("pretrain") == "ml-1m-pretrain-0of2"
    assert root("runs", fold="0/2", run="mine").run_name("pretrain") == "mine"


def test_a_new_folder_holds_config_and_versions(tmp_path):
    run = create_run(root(str(tmp_path), seed=3), "pretrain", inputs={"prepared": "abc"})
    assert (run.path, run.finished, run.resumed) == (tmp_path / "ml-1m-pretrain", False, False)
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config["seed"] == 3 and config["pretrain"]["names"] == ["a", "b"] and "rank" not in config
    assert config["pretrain"]["train"]["optimizer"]["dense_lr"] == 1e-3
    versions = json.loads((run.path / "versions.json").read_text())
    assert {"torch", "torchrec", "python", "commit", "cpu_count", "processes"} <= versions.keys()
    assert json.loads((run.path / "inputs.json").read_text()) == {"prepared": "abc"}


def test_the_commit_is_dirty_by_code_and_not_by_results(tmp_path):
    code = tmp_path / "lumrec" / "run" / "versions.py"
    code.parent.mkdir(parents=True)
    shutil.copy(versions_module.__file__, code)
    spec = importlib.util.spec_from_file_location("copied_run", code)
    assert spec is not None and spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    result = tmp_path / "docs" / "results" / "table4.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    head = git("rev-parse", "HEAD").strip()
    assert copied.commit() == head
    result.write_text("{1}")
    assert copied.commit() == head
    code.write_text(code.read_text() + "\n")
    assert copied.commit() == f"{head}-dirty"


def test_an_unfinished_run_of_the_same_config_continues(tmp_path):
    create_run(root(str(tmp_path)), "pretrain").close()
    # What belongs to another stage, or says only where to run, does not make it another run.
    same = root(
        str(tmp_path),
        threads=2,
        overwrite=True,
        pretrain=Inner(train=TrainConfig(optimizer_state="drop")),
        rank=Inner(names=("c",)),
    )
    again = create_run(same, "pretrain")
    assert again.resumed and not again.finished


def with_a_new_field(section: Any) -> Any:
    """The settings as a later version declares them: one more field, with a default, in each section."""
    kind = type(section)
    later = make_dataclass(kind.__name__, [("added_later", int, 3)], bases=(kind,), frozen=True)
    inner = {each.name: getattr(section, each.name) for each in fields(section)}
    return later(**{name: with_a_new_field(value) if is_dataclass(value) else value for name, value in inner.items()})


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_run_goes_on_under_a_version_with_a_new_field_in_each_section(tmp_path, stage):
    config = load(None, [f"runs_dir={tmp_path}", "name=old"])
    settings = STAGES[stage].settings(config)
    RunFolder.create(config.folder(stage), stage, settings).close()
    later = with_a_new_field(settings)
    assert config_differences(config.folder(stage), later) == {}
    assert RunFolder.create(config.folder(stage), stage, later).resumed
    other = replace(later, added_later=4, data=replace(later.data, added_later=5))
    assert list(config_differences(config.folder(stage), other)) == ["added_later", "data.added_later"]


def test_another_config_is_refused_naming_the_keys(tmp_path):
    config = root(str(tmp_path))
    first = create_run(config, "pretrain", inputs={"prepared": "abc"})
    first.log(1, loss=0.5)
    first.close()
    (first.path / "checkpoints" / "step-00000001").mkdir(parents=True)
    other = replace(config, seed=1, pretrain=Inner(train=TrainConfig(epochs=9)))
    with pytest.raises(ValueError) as raised:
        create_run(other, "pretrain", inputs={"prepared": "xyz"})
    for part in (
        "an unfinished run with another config",
        "pretrain.train.epochs: 1 → 9",
        "seed: 0 → 1",
        "input prepared: 'abc' → 'xyz'",
        "overwrite=true",
        "run=<name>",
    ):
        assert part in str(raised.value)
    run = create_run(replace(other, overwrite=True), "pretrain")
    assert not run.resumed and yaml.safe_load((run.path / "config.yaml").read_text())["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ml-1m-pretrain"]


def test_a_run_without_a_checkpoint_does_not_stop_a_corrected_command(tmp_path):
    config = root(str(tmp_path))
    first = create_run(config, "pretrain")
    first.log(1, loss=0.5)
    (first.path / "plan.json").write_text("{}")
    (first.path / "non-finite-step-1-rank-0.pt").write_bytes(b"")
    first.close()
    run = create_run(replace(config, seed=1), "pretrain")
    assert not run.resumed and yaml.safe_load((run.path / "config.yaml").read_text())["seed"] == 1
    assert not (run.path / "metrics.jsonl").exists()


def test_a_folder_of_an_earlier_version_counts_with_the_defaults_of_what_it_did_not_know(tmp_path):
    run = create_run(root(str(tmp_path), seed=3), "pretrain")
    run.log(1, loss=0.5)
    run.close()
    stored = yaml.safe_load((run.path / "config.yaml").read_text())
    del stored["fold"], stored["pretrain"]["train"]["epochs"]
    (run.path / "config.yaml").write_text(yaml.safe_dump(stored))
    assert config_differences(run.path, settings_of(root(str(tmp_path), seed=3), "pretrain")) == {}
    assert create_run(root(str(tmp_path), seed=3), "pretrain").resumed
    stored["pretrain"]["gone"] = {"a": 1}
    stored["seed"] = "three"
    (run.path / "config.yaml").write_text(yaml.safe_dump(stored))
    assert list(
        config_differences(run.path, settings_of(root(str(tmp_path), seed=3, fold="0/2"), "pretrain")).values()
    ) == [
        "fold: '' → '0/2'",
        "pretrain.gone: {'a': '1'} → '(absent)'",
        "seed: 'three' → 3",
    ]


def test_a_run_that_did_nothing_yet_gives_way_to_another_config(tmp_path):
    """An error between the folder and the first step, such as a table that the model has not."""
    config = root(str(tmp_path))
    create_run(config, "pretrain").close()
    run = create_run(replace(config, seed=1), "pretrain")
    assert not run.resumed and yaml.safe_load((run.path / "config.yaml").read_text())["seed"] == 1


def test_a_finished_run_keeps_its_result(tmp_path, caplog):
    config = root(str(tmp_path))
    run = create_run(config, "pretrain")
    run.log(1, loss=0.5)
    run.finish({"auc": 0.75, "gauc": math.nan, "dataset": "ml-1m"})
    assert json.loads((run.path / "result.json").read_text()) == {"auc": 0.75, "gauc": None, "dataset": "ml-1m"}
    with caplog.at_level("INFO", logger="lumrec"):
        again = create_run(config, "pretrain")
    assert again.finished and "its result is kept" in caplog.text
    result = again.result()
    assert result["auc"] == 0.75 and math.isnan(result["gauc"])
    with pytest.raises(ValueError, match="a finished run with another config: seed"):
        create_run(replace(config, seed=1), "pretrain")
    anew = create_run(replace(config, overwrite=True), "pretrain")
    assert not anew.finished and not (anew.path / "result.json").exists() and "replacing a finished run" in caplog.text


def test_results_are_flat(tmp_path):
    run = create_run(root(str(tmp_path)), "pretrain")
    with pytest.raises(ValueError, match="'auc' is a dict"):
        run.finish({"auc": {"valid": 0.5}})
    assert not (run.path / "result.json").exists()


def test_a_folder_of_something_else_is_never_touched(tmp_path):
    folder = tmp_path / "ml-1m-pretrain"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a run folder"):
        create_run(root(str(tmp_path), overwrite=True), "pretrain")
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_a_folder_whose_making_was_interrupted_is_made_whole(tmp_path):
    run = create_run(root(str(tmp_path)), "pretrain")
    run.close()
    (run.path / "config.yaml").unlink()
    again = create_run(root(str(tmp_path), seed=8), "pretrain")
    assert not again.resumed and yaml.safe_load((again.path / "config.yaml").read_text())["seed"] == 8


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path):
    folder = tmp_path / "ml-1m-pretrain"
    folder.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, os, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
            "f.write(f'{os.getpid()} x'); f.flush(); print('held', flush=True); sys.stdin.read()",
            str(folder / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"being written by process {holder.pid}"):
            create_run(root(str(tmp_path)), "pretrain")
    finally:
        holder.kill()
        holder.wait()
    assert not create_run(root(str(tmp_path)), "pretrain").resumed
    assert (folder / ".lock").read_text().startswith(f"{os.getpid()} ")


def test_metrics_are_rewound_to_the_checkpoint(tmp_path):
    run = create_run(root(str(tmp_path)), "pretrain")
    for step in range(1, 5):
        run.log(step, loss=1.0 / step, **({"valid/auc": math.inf} if step == 2 else {}))
    run.close()
    path = run.path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 2, "los')
    run.rewind(2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "valid/auc": None}]
    assert list((run.path / "tensorboard").glob("events.*"))


DAMAGE = {"empty": b"", "cut": b'{"a": [1, ', "not UTF-8": b"\xff\xfe{}", "a list": b"[1]", "missing": None}


@pytest.mark.parametrize("name", ["config.yaml", "inputs.json", "versions.json", "result.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, damage):
    config = root(str(tmp_path))
    run = create_run(config, "pretrain")
    run.finish({"auc": 0.75})
    path = run.path / name
    path.unlink() if DAMAGE[damage] is None else path.write_bytes(DAMAGE[damage])
    if (name, damage) == ("result.json", "missing"):  # an unfinished run
        assert create_run(config, "pretrain").resumed
        return
    with pytest.raises(UserError, match=name):
        create_run(config, "pretrain").result()
    # What says whose folder it is has to be whole; all else is made again.
    if name in ("inputs.json", "result.json") or (name == "config.yaml" and damage != "missing"):
        assert not create_run(replace(config, overwrite=True), "pretrain").finished


def test_metrics_with_a_damaged_line_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2}\n{"step": 2, "lo\xff\n')
    with pytest.raises(UserError, match="metrics.jsonl is damaged: line 2"):
        read_series(tmp_path / "metrics.jsonl", "loss", "")


def test_a_folder_of_another_stage_a_stranger_or_with_runs_inside_is_never_replaced(tmp_path):
    def kept(message, stage, **changes):
        with pytest.raises(UserError, match=message):
            create_run(root(str(tmp_path), overwrite=True, **changes), stage)

    create_run(root(str(tmp_path), run="x"), "query").close()
    kept("is a run of query and is never replaced by one of rank", "rank", run="x")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "config.yaml").write_text("years: of work")
    kept(r"not a run folder of rank \(no versions.json\)", "rank", run="y")
    (tmp_path / "y" / "versions.json").write_text('{"app": "2.0"}')
    kept("its versions.json was not written by lumrec", "rank", run="y")
    create_run(root(str(tmp_path), run="z"), "rank").close()
    create_run(root(str(tmp_path), run="z/inner"), "rank").close()
    kept("contains another run, .*z/inner", "rank", run="z", seed=1)
    assert create_run(root(str(tmp_path), run="z"), "rank").resumed
    (tmp_path / "file").write_text("")
    kept("is a file; expected a folder", "rank", run="file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    kept("is a link to .*nowhere, which does not exist", "rank", run="link")
    assert (tmp_path / "y" / "config.yaml").read_text() == "years: of work"


@pytest.mark.parametrize("place", ["link", "mount"])
def test_a_link_or_a_mount_stays_what_it_is(tmp_path, place):
    folder = tmp_path / "ml-1m-pretrain"
    if place == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True).returncode:
            pytest.skip("mounting needs the rights of root")
    try:
        run = create_run(root(str(tmp_path)), "pretrain")
        run.log(1, loss=0.5)
        run.finish({"auc": 0.75})
        again = create_run(root(str(tmp_path), seed=1, overwrite=True), "pretrain")
        assert not again.finished and not (folder / "metrics.jsonl").exists()
        assert folder.is_symlink() if place == "link" else folder.is_mount()
        again.close()
    finally:
        if place == "mount":
            subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="is a file; expected a folder|cannot be written"):
        create_run(root(str(tmp_path / "runs")), "pretrain")


def test_an_emptied_folder_is_never_taken_for_a_run(tmp_path, monkeypatch):
    """Killed while overwrite=true empties the folder: the next call goes on, and keeps what is served meanwhile."""
    config = root(str(tmp_path))
    run = create_run(config, "query")
    run.log(1, loss=0.5)
    (run.path / "manifest.json").write_text("served")
    run.finish({"auc": 0.75})
    before = run.id

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            create_run(replace(config, overwrite=True), "query", keep=("manifest.json",))
    again = create_run(config, "query", keep=("manifest.json",))
    assert not again.resumed and not again.finished and again.id != before
    assert (again.path / "manifest.json").read_text() == "served" and not (again.path / "metrics.jsonl").exists()
