"""The components as `torchx run` takes them. Nothing is launched here: --dryrun shows the job."""

import argparse
import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
from torchx.cli.argparse_util import torchxconfig
from torchx.cli.main import get_sub_cmds, run_main
from torchx.specs import macros

from lumrec.experiments.jobs import torchx_command
from lumrec.launch.commands import COMMANDS
from lumrec.launch.torchx import CmdRunFile, single_app, stage_app
from lumrec.run.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("prepare", "pretrain", "query", "rank", "retrieve", "warm_start")


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def torchx_run(*words):
    run_main({"run": CmdRunFile()}, ["run", "--dryrun", *words])


@pytest.mark.parametrize("component", ["apps/pretrain.py", "apps/pretrain.py:pretrain"])
def test_a_file_alone_is_its_component(component, capsys):
    torchx_run(component, "-j", "1x2", "--config", "configs/ml-1m.yaml", "model.dim=32", "query.conditions=[{a: b}]")
    out, err = capsys.readouterr()
    out = re.sub(r"'\s+'", "", out)  # TorchX breaks long arguments into several literals
    assert "lumrec.launch.torchrun" in out
    assert "--nproc_per_node 2" in out
    assert "apps/pretrain.py --config configs/ml-1m.yaml model.dim=32" in out
    assert (
        "torchrun --standalone --nproc-per-node 2 apps/pretrain.py --config configs/ml-1m.yaml model.dim=32 "
        "'query.conditions=[{a: b}]'" in err
    )


@pytest.mark.parametrize("stage", COMMANDS)
def test_help_teaches(stage, capsys):
    with pytest.raises(SystemExit) as stop:
        torchx_run(f"apps/{stage}.py", "--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"torchx run apps/{stage}.py" in out
    assert ("--config" in out) == (stage != "reproduce")
    assert ("-j " in out) == (stage in STAGES)


def test_a_user_to_inspect_is_an_option(capsys):
    torchx_run("apps/show_user.py", "--user", "42", "show_user.top=3")
    assert "apps/show_user.py --config ml-1m show_user.top=3 show_user.user=42" in capsys.readouterr().err
    torchx_run("apps/refresh.py", "--follow")
    assert "apps/refresh.py --config ml-1m refresh.follow=true" in capsys.readouterr().err


def test_from_a_folder_without_apps_it_is_the_app_that_comes_with_lumrec(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torchx_run("apps/rank.py", "seed=1")
    assert f"{ROOT}/apps/rank.py --config ml-1m seed=1" in capsys.readouterr().err


def test_builtin_components_stay(capsys):
    torchx_run("utils.echo", "--msg", "hello")
    assert "hello" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["apps/pretrian.py"], f"there is no file apps/pretrian.py (from {ROOT}) (did you mean 'pretrain'?)"),
        (["apps/pretrain.py", "model.dim"], "got 'model.dim'; expected key=value"),
        (["apps/pretrain.py", "-j", "two"], "-j is 'two'; expected nodes x processes"),
        (["apps/rank.py", "-j", "0x1"], "-j is '0x1'"),
    ],
)
def test_wrong_arguments_end_with_2_and_one_line(words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        torchx_run(*words)
    lines = [line for line in capsys.readouterr().err.splitlines() if "torchx run:" in line]
    assert stop.value.code == 2
    assert len(lines) == 1
    assert says in lines[0]


def test_processes_write_their_rank_only_when_there_are_several(capsys):
    one, two = (stage_app("rank", [], config="c.yaml", j=j).roles[0].args[1] for j in ("1x1", "1x2"))
    assert "--tee 0" in one
    assert "--tee 3" in two
    assert (
        "python apps/pipeline.py --config c.yaml a=b"
        in (single_app("pipeline", ["a=b"], config="c.yaml"), capsys.readouterr().err)[1]
    )


WORDS = ["run=$$", "name=$HOME", "a=${app_id}", "b=100% 'x' \"y\" \\\\ `z`", "c=two\nlines", "d=é $replica_id"]


def test_words_reach_the_job_as_they_were_typed(tmp_path):
    values = macros.Values(img_root="I", app_id="A", replica_id="R", rank0_env="X")
    shell = stage_app("pretrain", WORDS, config="c.yaml", j="1x1").roles[0]
    args = values.apply(shell).args
    show = tmp_path / "python"
    show.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    show.chmod(0o755)
    command = args[1].partition(" exec ")[2]
    path = {"PATH": f"{tmp_path}:/bin:/usr/bin"}
    run = subprocess.run(["bash", "-c", command], env=path, capture_output=True, text=True)
    assert run.stdout.split("\0")[-len(WORDS) - 1 : -1] == WORDS
    single = values.apply(single_app("show_user", WORDS).roles[0])
    assert single.args[-len(WORDS) :] == WORDS


def test_the_apps_are_those_of_this_package(tmp_path, monkeypatch):
    (tmp_path / "apps").mkdir()
    for stage in ("prepare", "pipeline"):
        (tmp_path / f"apps/{stage}.py").write_text("raise SystemExit('a stranger')\n")
    monkeypatch.chdir(tmp_path)
    assert str(ROOT / "apps/prepare.py") in stage_app("prepare", [], config="", j="1x1").roles[0].args[1]
    assert single_app("pipeline", []).roles[0].args[0] == str(ROOT / "apps/pipeline.py")
    assert f"{ROOT}/apps/prepare.py:prepare" in torchx_command("prepare", [], config=tmp_path / "c.yaml")


def test_this_machine_is_the_scheduler_from_any_folder(tmp_path, monkeypatch):
    given = tmp_path / ".torchxconfig"
    monkeypatch.setenv("TORCHXCONFIG", str(given))
    given.write_text("")
    assert _scheduler(monkeypatch) == "local_cwd"
    given.write_text("[cli:run]\nscheduler = kubernetes\n")
    assert _scheduler(monkeypatch) == "kubernetes"


def _scheduler(monkeypatch):
    monkeypatch.setattr(torchxconfig, "_subcmd_configs", {})
    parser = argparse.ArgumentParser()
    CmdRunFile().add_arguments(parser)
    return parser.parse_args(["apps/x.py"]).scheduler


def test_two_nodes_meet_at_the_first(capsys):
    app = stage_app("pretrain", [], config="c.yaml", j="2x4")
    assert app.roles[0].num_replicas == 2
    assert "--nnodes 2" in app.roles[0].args[1]
    assert "TORCHX_RANK0_HOST" in app.roles[0].args[1] or "rank0_env" in app.roles[0].args[1]
    with pytest.raises(UserError):
        stage_app("pretrain", [], config="c.yaml", j="2")


def test_installed_command_is_ours():
    entries = importlib.metadata.entry_points(group="torchx.cli.cmds")
    if not any(entry.value.startswith("lumrec.") for entry in entries):
        pytest.skip("lumrec is on the path but not installed, so TorchX cannot know its command")
    assert type(get_sub_cmds()["run"]) is CmdRunFile
