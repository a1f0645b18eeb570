"""The main of the apps: what an error of the user's looks like, and what a fault of ours does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lumrec.config import load
from lumrec.stages import headline, is_for_the_user, run_stage
from lumrec.train.interrupt import Interrupted

ROOT = Path(__file__).resolve().parents[2]


def app(stage, *words, **environment):
    return subprocess.run(
        [sys.executable, f"apps/{stage}.py", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_unknown_key_is_one_line_and_exit_code_2():
    result = app("pretrain", "model.dmi=3")
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "lumrec: the command line: unknown key 'model.dmi'; the nearest valid key is 'model.dim'"
    )


def test_trace_on_request(tmp_path):
    words = (f"runs_dir={tmp_path}", "data.source=simulator")
    result = app("query", *words, LUMREC_TRACEBACK="1")
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert "torchx run apps/prepare.py" in result.stderr


def test_help_needs_no_torch():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "apps/rank.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0
    assert "key=value" in result.stdout
    assert " torch\n" not in result.stderr


def test_only_our_own_errors_are_for_the_user():
    def raised(call):
        with pytest.raises(Exception) as error:
            call()
        return error.value

    assert is_for_the_user(raised(lambda: load(None, ["x=1"])))
    assert is_for_the_user(raised(lambda: load("nowhere.yaml")))
    assert not is_for_the_user(raised(lambda: np.zeros(3).reshape(2)))
    assert not is_for_the_user(raised(lambda: {}["key"]))


def test_headline_picks_the_figures_that_count():
    result = {"auc": 0.71234567, "valid/auc": 0.5, "num_rows": 3, "log_loss": 0.5, "note": "one class"}
    assert headline("rank", result) == "auc 0.71235, log_loss 0.5, note one class"
    assert headline("pretrain", {"hr@10": 0.25, "steps": 3}) == "hr@10 0.25"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_a_signal_ended_says_how_to_go_on(monkeypatch, capsys, number):
    def stopped(config):
        raise Interrupted(number, "saved in step-00000012")

    monkeypatch.setattr("lumrec.train.pretrain.run", stopped)
    with pytest.raises(SystemExit) as ended:
        run_stage("pretrain", "", [])
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err.endswith("lumrec: saved in step-00000012\n")
