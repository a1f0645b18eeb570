"""The components as `torchx run` takes them. Nothing is launched here: --dryrun shows the job."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from torchx.cli.main import get_sub_cmds, run_main

from lumrec.torchx_run import CmdRunFile, UsageError, single_app, stage_app

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
    assert "lumrec.launch" in out
    assert "--nproc_per_node 2" in out
    assert "apps/pretrain.py --config configs/ml-1m.yaml model.dim=32" in out
    assert (
        "torchrun --standalone --nproc-per-node 2 apps/pretrain.py --config configs/ml-1m.yaml model.dim=32 "
        "'query.conditions=[{a: b}]'" in err
    )


@pytest.mark.parametrize("stage", [*STAGES, "inspect", "pipeline"])
def test_help_teaches(stage, capsys):
    with pytest.raises(SystemExit) as stop:
        torchx_run(f"apps/{stage}.py", "--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"torchx run apps/{stage}.py" in out
    assert "--config" in out
    assert ("-j" in out) == (stage in STAGES)


def test_a_user_to_inspect_is_an_option(capsys):
    torchx_run("apps/inspect.py", "--user", "42", "inspect.top=3")
    assert "apps/inspect.py --config configs/ml-1m.yaml inspect.top=3 inspect.user=42" in capsys.readouterr().err


def test_builtin_components_stay(capsys):
    torchx_run("utils.echo", "--msg", "hello")
    assert "hello" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["apps/pretrian.py"], "there is no file apps/pretrian.py"),
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


def test_two_nodes_meet_at_the_first(capsys):
    app = stage_app("pretrain", [], config="c.yaml", j="2x4")
    assert app.roles[0].num_replicas == 2
    assert "--nnodes 2" in app.roles[0].args[1]
    assert "TORCHX_RANK0_HOST" in app.roles[0].args[1] or "rank0_env" in app.roles[0].args[1]
    with pytest.raises(UsageError):
        stage_app("pretrain", [], config="c.yaml", j="2")


def test_installed_command_is_ours():
    entries = importlib.metadata.entry_points(group="torchx.cli.cmds")
    if not any(entry.value.startswith("lumrec.") for entry in entries):
        pytest.skip("lumrec is on the path but not installed, so TorchX cannot know its command")
    assert type(get_sub_cmds()["run"]) is CmdRunFile
