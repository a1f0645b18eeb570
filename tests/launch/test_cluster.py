"""Jobs of several nodes: what they ask of a cluster's scheduler, and a run folder that all nodes must share."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forks import free_port
from torchx.cli.argparse_util import torchxconfig
from torchx.cli.main import run_main
from torchx.specs import BindMount

from apps.pretrain import pretrain
from lumrec.launch.torchrun import nodes_and_processes
from lumrec.launch.torchx import CmdRunFile
from lumrec.run.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ASKED = ["--gpu", "8", "--cpu", "96", "--memory", "200000", "--max_restarts", "3", "--env", "NCCL_DEBUG=INFO,A=b"]


@pytest.fixture(autouse=True)
def _one_command(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torchxconfig, "called_args", set())  # a process runs one command as a rule


def dry_run(scheduler, *words, capsys):
    run_main({"run": CmdRunFile()}, ["run", "--dryrun", "-s", scheduler, "apps/pretrain.py", *words])
    return re.sub(r"'\s+'", "", capsys.readouterr().out)  # TorchX breaks long arguments into several literals


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("slurm", ["--gpus-per-task=8", "--cpus-per-task=96", "--mem=200000", "--ntasks-per-node=1"]),
        ("lsf", ["num=8:mode=shared:j_exclusive=yes", "rusage[mem=200000]", "-n 96"]),
    ],
)
def test_a_scheduler_is_asked_for_what_the_options_say(scheduler, expected, capsys):
    job = dry_run(scheduler, "-j", "2x8", *ASKED, "--config", "ml-1m", "seed=1", capsys=capsys)
    for text in [*expected, "NCCL_DEBUG=INFO", "A=b"]:
        assert text in job
    assert "lumrec.launch.torchrun --max_restarts 3 " in job
    assert re.search(r"--nnodes 2 --nproc_per_node 8 .*apps/pretrain.py --config ml-1m seed=1", job)


def test_nothing_is_asked_for_by_default(capsys):
    job = dry_run("slurm", "-j", "2x8", capsys=capsys)
    assert "--mem=" not in job and "gpus" not in job and "cpus" not in job and "max_restarts" not in job


def test_the_job_of_a_container():
    mounts = "type=bind,src=/data,dst=/data,readonly,type=bind,src=/runs,dst=/runs"
    role = pretrain("seed=1", j="1:2x8", gpu=8, memory=1000, image="lumrec:1", mounts=mounts).roles[0]
    assert role.image == "lumrec:1"
    assert role.mounts == [BindMount("/data", "/data", read_only=True), BindMount("/runs", "/runs")]
    assert (role.resource.gpu, role.resource.memMB, role.resource.cpu) == (8, 1000, -1)
    assert (role.min_replicas, role.num_replicas) == (1, 2)
    assert "--nnodes 1:2 " in role.args[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gpu": -1}, "--gpu is -1; expected 0 or more"),
        ({"h": "no-such"}, "--h is 'no-such', which TorchX does not know: .*aws_"),
        ({"mounts": "src=/data"}, "--mounts is 'src=/data' .*expected type=bind"),
        ({"mounts": "type=bind,src=/data"}, "--mounts is .*expected type=bind"),
        ({"env": "NAME"}, "--env has 'NAME'; expected NAME=value"),
        ({"j": "3:2x8"}, "-j is '3:2x8'; expected nodes x processes"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        pretrain(**options)


def test_nodes_and_processes():
    assert nodes_and_processes("1x2") == (1, 2) and nodes_and_processes("1:16x8") == (16, 8)


def two_nodes(folders, words):
    """Exit codes and output of apps/pretrain.py on two agents, each in a folder of its own."""
    launcher = [sys.executable, "-m", "lumrec.launch.torchrun", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "job"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    agents = [
        subprocess.Popen(
            [*launcher, str(ROOT / "apps" / "pretrain.py"), *words],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for folder in folders
    ]
    return [(agent.communicate(timeout=300)[0], agent.returncode) for agent in agents]


def test_a_folder_that_nodes_do_not_share_is_refused_before_any_work(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    words = ["data.source=simulator", "data.simulator.num_users=50", "name=small", "model.dim=8"]
    words += ["model.num_layers=1", "model.max_events=16", "pretrain.train.max_steps=2"]
    outcomes = two_nodes(folders, [*words, "runs_dir=runs"])
    # Whichever agent ends first, the other one may lose it, or stop its process before that has said why.
    assert any("runs is not shared by all nodes of this job" in output for output, _ in outcomes), outcomes
    assert all(code in (1, 2) and "Traceback" not in output for output, code in outcomes), outcomes
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    for output, code in two_nodes(folders, [*words, f"runs_dir={tmp_path}/runs"]):
        assert code == 0, output
    assert (tmp_path / "runs" / "small-pretrain" / "result.json").is_file()
