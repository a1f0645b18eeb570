"""Commands that wait for one another: order, threads, failures, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lumrec.experiments.jobs import TORCHX, Job, JobFailed, as_typed, check_job, run_jobs, tail, torchx_command
from lumrec.run.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def python(name, code, **fields):
    return Job(name, [sys.executable, "-c", code], **fields)


def run(jobs, folder, **settings):
    told = []
    seconds = run_jobs(jobs, **{"parallel": 2, "cores": 4, "logs": folder, "say": told.append, **settings})
    return seconds, told


def test_a_job_waits_for_what_it_needs(tmp_path):
    mark = f"open({str(tmp_path / 'order')!r}, 'a').write"
    jobs = [
        python("last", f"{mark}('c')", needs=("first", "second")),
        python("first", f"import time; time.sleep(.3); {mark}('a')"),
        python("second", f"import time; time.sleep(.8); {mark}('b')", needs=("first",)),
    ]
    seconds, told = run(jobs, tmp_path)
    assert (tmp_path / "order").read_text() == "abc"
    assert list(seconds) == ["first", "second", "last"]
    assert sum("done in" in line for line in told) == 3


def test_two_at_a_time(tmp_path):
    met = (
        "import pathlib, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / 'NAME.here').touch()\n"
        "until = time.time() + 200\n"
        "while len(list(here.glob('*.here'))) < 2 and time.time() < until: time.sleep(.05)\n"
        "assert time.time() < until, 'the other one never came'\n"
    )
    run([python(name, met.replace("NAME", name)) for name in ("a", "b")], tmp_path / "logs")


def test_threads_are_shared_and_torchruns_variables_kept_out(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "1234")
    show = "import os; print(os.environ['OMP_NUM_THREADS'], 'RANK' in os.environ, 'MASTER_PORT' in os.environ)"
    run([python("shared", show), python("alone", show, exclusive=True)], tmp_path)
    assert tail(tmp_path / "shared.log", 1) == ["2 False False"]
    assert tail(tmp_path / "alone.log", 1) == ["4 False False"]


def test_failure_shows_the_end_of_the_log_and_ends_the_others(tmp_path):
    pid = tmp_path / "pid"
    wait = f"import pathlib, sys, time\npid = pathlib.Path({str(pid)!r})\n"
    wait += "while not (pid.exists() and pid.read_text()): time.sleep(.05)\npass"
    jobs = [
        python("long", f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(500)"),
        python("wrong", f"{wait}; print('lumrec: no such thing'); sys.exit(2)"),
        python("never", "1", needs=("wrong",)),
    ]
    with pytest.raises(JobFailed) as failure:
        run(jobs, tmp_path)
    assert "stage wrong failed" in str(failure.value)
    assert "    lumrec: no such thing" in str(failure.value)
    assert str(tmp_path / "wrong.log") in str(failure.value)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not (tmp_path / "never.log").exists()


def test_sigterm_ends_the_jobs(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(500)"
    code = (
        "import sys, pathlib\nfrom lumrec.experiments.jobs import Job, run_jobs\n"
        f"run_jobs([Job('long', [sys.executable, '-c', {child!r}])], parallel=1, cores=1, "
        f"logs=pathlib.Path({str(tmp_path)!r}))"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    until = time.monotonic() + 200
    while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    runner.send_signal(signal.SIGTERM)
    runner.communicate(timeout=200)
    assert runner.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


SACCT = """#!/bin/sh
printf 'JobID|JobName|Partition|Account|AllocCPUS|State|ExitCode\\n7|rank-0|main|root|1|RUNNING|0:0\\n'
"""


def test_the_jobs_of_a_cluster_end_with_us(tmp_path, monkeypatch):
    for name, script in {"sacct": SACCT, "scancel": f"#!/bin/sh\necho $@ >> {tmp_path}/cancelled\n"}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    ready = tmp_path / "ready"
    wait = f"import os, sys, time\nwhile not os.path.exists({str(ready)!r}): time.sleep(.05)\nsys.exit(1)"
    waits = f"import time; print('slurm://torchx/7', flush=True); open({str(ready)!r}, 'w'); time.sleep(500)"
    with pytest.raises(JobFailed):
        run([python("on_cluster", waits), python("wrong", wait)], tmp_path / "logs")
    assert (tmp_path / "cancelled").read_text() == "7\n"


def test_a_stage_is_sent_where_the_settings_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    where = {"scheduler": "slurm", "scheduler_args": "partition=gpu", "options": ["gpu=8", "j=2x8", "gpu=4"]}
    command = torchx_command("pretrain", ["a=b"], config=Path("c.yaml"), **where)
    assert command[len(TORCHX) :] == (
        "run --scheduler_args partition=gpu --wait --log --scheduler slurm apps/pretrain.py:pretrain "
        "-j 2x8 --gpu 4 --config c.yaml a=b"
    ).split(" ")
    check_job(command, "pipeline.scheduler", "pretrain")
    for wrong, says in (
        ({"scheduler": "slurmm"}, "pipeline.scheduler: TorchX does not take the job of pretrain: .*'slurmm'"),
        ({"options": ["gpus=8"]}, "unrecognized arguments: --gpus"),
        ({"scheduler_args": "partitio=gpu"}, "has no setting 'partitio' .did you mean 'partition'"),
    ):
        with pytest.raises(UserError, match=says):
            check_job(
                torchx_command("pretrain", [], config=Path("c.yaml"), **where | wrong), "pipeline.scheduler", "pretrain"
            )


def test_tail_leaves_torchxs_marks_out(tmp_path):
    log = tmp_path / "log"
    log.write_text("local_cwd://torchx/rank-x1\n\x1b[32mrank/0\x1b[0m step 1\rrank/0 step 2\n\nrank/0 auc 0.7\n")
    assert tail(log, 2) == ["step 2", "auc 0.7"]


def test_command_as_typed(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = torchx_command("rank", ["run=a/b", "inputs.lums=[x, y]"], config=Path("c.yaml"))
    assert command[0] == sys.executable
    assert as_typed(command) == "torchx run apps/rank.py --config c.yaml run=a/b 'inputs.lums=[x, y]'"
