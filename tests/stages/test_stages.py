"""The main of the apps: what an error of the user's looks like, and what a fault of ours does."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from lumrec.experiments.config import load
from lumrec.launch.commands import COMMANDS
from lumrec.launch.main import headline, run_command
from lumrec.run.errors import UserError
from lumrec.run.failures import sentence
from lumrec.run.files import write_atomically
from lumrec.run.interrupt import Interrupted
from lumrec.stages.registry import STAGES

ROOT = Path(__file__).resolve().parents[2]


def test_unknown_key_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("pretrain", ["model.dmi=3"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "lumrec: the command line: unknown key 'model.dmi'; the nearest valid key is 'model.dim'\n"
    )


PLANS = ("nowhere.yaml", "is not one of .* nor a plan file"), ("{plan}", "rank 7 does not exist")
MISSING = [
    *(
        (stage, [f"{stage}.train.sharding={plan}"], says)
        for stage in ("pretrain", "rank", "retrieve")
        for plan, says in PLANS
    ),
    ("pretrain", ["pretrain.start_from=nowhere"], "no finished LUM in .*nowhere"),
    ("pretrain", ["pretrain.warm_start={source: nowhere, rules: '{rules}'}"], "source: there is no nowhere"),
    ("pretrain", ["pretrain.warm_start={source: '{rules}', rules: nowhere}"], "rules: there is no nowhere"),
    ("rank", ["rank.warm_start={source: '{rules}', rules: '{rules}', scores: nowhere}"], "scores: there is no nowhere"),
    (
        "rank",
        ["rank.warm_start={source: '{rules}', rules: '{lacking}'}"],
        "lacking.yaml, rule 'a': source_vocabulary: there is no .*nowhere.csv",
    ),
    ("rank", ["rank.knowledge=both", "inputs.knowledge=nowhere"], "no knowledge in .*nowhere"),
    ("rank", ["rank.tables=lum", "inputs.lums=[nowhere]"], "no finished LUM in .*nowhere"),
    ("retrieve", ["retrieve.knowledge=direct", "inputs.knowledge=nowhere"], "no knowledge in .*nowhere"),
    ("query", ["query.refresh_from=nowhere"], "no knowledge in .*nowhere"),
    ("query", ["inputs.lums=[nowhere]"], "no finished LUM in .*nowhere"),
    ("show_user", ["inputs.lums=[nowhere]"], "no finished LUM in .*nowhere"),
    ("warm_start", ["rank.warm_start={source: nowhere, rules: '{rules}'}"], "source: there is no nowhere"),
    ("warm_start", ["rank.warm_start={source: '{rules}', rules: '{lacking}'}"], "there is no .*nowhere.csv"),
    ("prepare", ["data.source=movielens-1m", "data.path=nowhere"], "the folder nowhere .* does not exist"),
    ("prepare", ["data.source=log", "data.log.events={log}", "data.log.items=nowhere"], "data.log.items: 'nowhere'"),
    ("prepare", ["data.vocabulary_from=nowhere"], "nowhere"),
    ("pipeline", ["rank.train.sharding=nowhere.yaml"], "nor a plan file"),
    ("pipeline", ["rank.warm_start={source: nowhere, rules: '{rules}'}"], "source: there is no nowhere"),
    ("pipeline", ["pretrain.start_from=nowhere"], "no finished LUM in .*nowhere"),
    ("pipeline", ["query.refresh_from=nowhere"], "no knowledge in .*nowhere"),
    ("tune", ["rank.warm_start={source: nowhere, rules: '{rules}'}"], "source: there is no nowhere"),
]


@pytest.mark.parametrize(("stage", "words", "says"), MISSING)
def test_a_file_or_run_that_is_not_there_is_said_before_any_data_are_read(stage, words, says, tmp_path):
    """The default prepared data are missing in each case: a stage that looked at its inputs later would make them."""
    files = {name: tmp_path / f"{name}.yaml" for name in ("plan", "rules", "lacking")}
    files["plan"].write_text("item_id: {sharding: table_wise, ranks: [7]}")
    files["rules"].write_text("rules: []")
    rule = "{source: a, target: b, rows: remap, source_vocabulary: nowhere.csv, target_vocabulary: later.parquet}"
    files["lacking"].write_text(f"rules: [{rule}]")
    (files.setdefault("log", tmp_path / "log.csv")).write_text("user_id,item_id,timestamp,label\nu,i,1,1\n")
    for name, file in files.items():
        words = [word.replace(f"{{{name}}}", str(file)) for word in words]
    config = load(None, [f"runs_dir={tmp_path / 'runs'}", "name=x", "data.source=simulator", *words])
    with pytest.raises(UserError, match=says):
        COMMANDS[stage].run(config)
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


def test_trace_on_request(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LUMREC_TRACEBACK", "1")
    with pytest.raises(SystemExit) as ended:
        run_command("query", [f"runs_dir={tmp_path}", "data.source=simulator"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and "torchx run apps/pretrain.py" in said


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


def failing_like_polars():
    raise OSError("Too many open files (os error 24): /data/part-0.parquet")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda folder: load(None, ["x=1"]), "the command line: unknown key 'x'"),
        (lambda folder: load("nowhere.yaml"), "no config file nowhere.yaml"),
        (lambda folder: os.mkdir(folder / ("x" * 300)), "xxx: file name too long; choose a shorter name"),
        (lambda folder: (folder / "file").write_text("") or os.mkdir(folder / "file/x"), "file/x: not a directory"),
        (lambda folder: open("/dev/full", "w").write("x" * 10**6), "a file: no space left on device; free some space"),
        (lambda folder: write_atomically(Path("/dev/null/x"), ""), "/dev/null/.x.tmp: not a directory"),
        (lambda folder: np.empty(1 << 50), "out of memory (Unable to allocate 8.00 PiB"),
        (lambda folder: torch.empty(1 << 50), "out of memory ("),
        (lambda folder: pl.DataFrame({"x": [1]}).write_parquet("/dev/full"), "no space left on device"),
        # Polars raises OSErrors without an errno.
        (lambda folder: pl.DataFrame({"x": [1]}).write_ipc_stream(open("/dev/full", "wb")), "no space left on device"),
        (lambda folder: failing_like_polars(), "/data/part-0.parquet: too many open files; raise the limit"),
    ],
)
def test_what_the_user_or_the_machine_is_at_fault_for_is_one_sentence(fault, says, tmp_path):
    with pytest.raises(Exception) as error:
        fault(tmp_path)
    assert says in sentence(error.value), repr(error.value)
    assert "\n" not in sentence(error.value)


@pytest.mark.parametrize(
    "bug",
    [
        lambda: np.zeros(3).reshape(2),
        lambda: {}["key"],
        lambda: int("x"),
        lambda: list(zip([1], [], strict=True)),
        lambda: open("/nowhere/at/all"),
        lambda: torch.zeros(2) + torch.zeros(3),
        lambda: pl.DataFrame({"x": [1]})["y"],
    ],
)
def test_a_bug_has_no_sentence(bug):
    with pytest.raises(Exception) as error:
        bug()
    assert sentence(error.value) == ""


def test_a_reader_that_goes_away_and_a_terminal_without_letters(tmp_path):
    log = tmp_path / "log.csv"
    rows = [f"u{n},i{n % 7},{n + 10**9},1,é{n}" for n in range(40)]
    log.write_text("\n".join(["user_id,item_id,timestamp,label,title", *rows, ""]))
    command = [sys.executable, str(ROOT / "apps/prepare.py"), "--check", f"data.log.events={log}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(f"{shlex.join(command)} | head -n 1", shell=True, env=environment, capture_output=True)
    assert result.stdout.decode("ascii").startswith("files")
    assert result.stderr == b""


def test_headline_picks_the_figures_that_count():
    result = {"auc": 0.71234567, "valid/auc": 0.5, "num_rows": 3, "log_loss": 0.5, "note": "one class"}
    assert headline(STAGES["rank"].headline, result) == "auc 0.71235, log_loss 0.5, note one class"
    assert headline(STAGES["pretrain"].headline, {"hr@10": 0.25, "steps": 3}) == "hr@10 0.25"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_a_signal_ended_says_how_to_go_on(monkeypatch, capsys, number):
    def stopped(*settings):
        raise Interrupted(number, "saved in step-00000012")

    monkeypatch.setattr("lumrec.stages.pretrain.run", stopped)
    with pytest.raises(SystemExit) as ended:
        run_command("pretrain", [])
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err.endswith("lumrec: saved in step-00000012\n")
