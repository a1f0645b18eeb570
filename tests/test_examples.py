"""The examples run as a newcomer would run them: from the top of the checkout, as scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(code: list[str], tmp_path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, *code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_shop(tmp_path):
    """A small shop's CSV, a LUM, its answers by title, TorchRec's DLRM with them: under 60 lines."""
    script = ROOT / "examples" / "shop.py"
    assert len(script.read_text().splitlines()) < 60
    said = run([str(script), f"runs_dir={tmp_path}"], tmp_path)
    assert "u000, {'feedback': 'like'}: " in said and "log loss after 5 epochs: train 0." in said


def test_the_notebook(tmp_path):
    """Every code cell, in order, in one process; the answers to like and dislike differ."""
    cells = json.loads((ROOT / "examples" / "ask_a_lum.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    said = run(["-c", f"{code}\nassert (similarity_NI[0] - similarity_NI[1]).std() > 0.1"], tmp_path)
    assert "{'feedback': 'like'} → ['" in said
