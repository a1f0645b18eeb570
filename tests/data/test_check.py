"""`apps/prepare.py --check`: what it tells of a log, that it writes nothing, that its config can be used as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lumrec.config import load
from lumrec.data import check
from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData

ROOT = Path(__file__).resolve().parents[2]
SHOP = Path(__file__).parent / "own_log"


def suggested(text: str) -> str:
    """The config between the two lines."""
    _, _, behind = text.partition("save from here as my-log.yaml")
    return behind.partition("\n")[2].partition("# ----")[0]


def test_a_first_look_without_a_config_ends_with_one_that_prepares(tmp_path: Path):
    words = [f"data.log.events={SHOP / 'clicks.csv'}", f"data.log.items={SHOP / 'products.csv'}"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "apps/prepare.py", "--check", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert os.listdir(tmp_path) == []  # nothing stays, not even the temporary folder
    for expected in (
        "events clicks.csv (300 rows)",
        "user: user",
        "item: product",
        "timestamp: time",
        "values: [buy, cart]",
        "duplicate row",
        "8 fields, expected 7",
        "unknown item",
    ):
        assert expected in text, text
    assert "known only after the item was shown: dwell_s" in text
    (config := tmp_path / "my-log.yaml").write_text(suggested(text))
    result = prepare(load(config, [f"runs_dir={tmp_path}"]), tmp_path / "prepared")
    assert (result["events"], result["events_quarantined"]) == (295, 5)
    data = PreparedData.open(tmp_path / "prepared")
    assert "feedback" in data.event_columns
    assert "dwell_s" not in data.schema.features


def test_a_config_is_checked_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(ROOT)
    runs = tmp_path / "runs"
    check.run(load(SHOP / "shop.yaml", [f"runs_dir={runs}"]))
    text = capsys.readouterr().out
    assert "295 of 300 events" in text
    assert not runs.exists()


def test_other_sources_are_checked_too(capsys: pytest.CaptureFixture):
    check.run(load(None, ["data.source=simulator", "data.simulator.num_users=50", "data.simulator.events_per_user=20"]))
    text = capsys.readouterr().out
    assert "of 50 users" in text
    assert "% positive" in text


def test_errors_are_those_of_prepare(tmp_path: Path):
    command = [sys.executable, "apps/prepare.py", "--check", f"data.log.events={tmp_path / 'no.csv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "leads to no file" in done.stderr
    assert "Traceback" not in done.stderr
