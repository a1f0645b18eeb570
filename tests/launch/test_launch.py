"""torchrun as the apps use it: exit codes, threads, and no second account of a failure."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
print("threads", os.environ["OMP_NUM_THREADS"], flush=True)
if sys.argv[1] == "fail":
    if rank == 0:
        print("lumrec: this is wrong", file=sys.stderr, flush=True)
        sys.exit(2)
    time.sleep(60)
if sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "one":
    import torch
    import lumrec.stages.pretrain
    from lumrec.launch.main import run_command

    def run(*settings):
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.all_reduce(torch.zeros(3))

    lumrec.stages.pretrain.run = run
    run_command("pretrain", [])
"""


@pytest.fixture
def launch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(what, processes):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        command = [sys.executable, "-m", "lumrec.launch.torchrun", "--standalone", "--nproc-per-node", str(processes)]
        return subprocess.run(
            [*command, str(script), what], env=environment, capture_output=True, text=True, timeout=600
        )

    return run


def test_failure_is_told_once_and_its_exit_code_kept(launch):
    result = launch("fail", 2)
    assert result.returncode == 2
    assert result.stderr.count("this is wrong") == 1
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 3, result.stderr


def test_a_killed_process_is_named(launch):
    result = launch("die", 1)
    assert result.returncode == 1
    assert result.stderr.startswith("lumrec: rank 0 was ended by SIGKILL (signal 9), usually by the system because")


def test_one_process_of_two_killed_is_one_line(launch):
    result = launch("one", 2)
    assert result.returncode == 1
    assert "lumrec: rank 1 was ended by SIGKILL" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_cores_are_shared_among_the_processes(launch):
    result = launch("fine", 1)
    assert result.returncode == 0, result.stderr
    assert f"threads {os.cpu_count()}" in result.stdout
