"""Every benchmark explains itself and runs through at a small size. What it measures is nobody's test."""

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
# Words of a small run, and what its table must say.
SMALL = {
    "requests": ("--repeats 1 --users 50 --events 60 --candidates 5", "60 events × 5 candidates"),
    "fresh": ("--repeats 1 --users 40 --width 16 --max-events 16 --seconds 0.5", "s to the answer"),
    "pretrain": (
        "--lengths long --encoders hstu --tokens merged --events 128 --max-events 32 --users 20 --repeats 1",
        "lumrec hstu",
    ),
    "shares": ("--events 128 --users 20 --repeats 1", "hstu, windows ≤ 4096"),
    "tables": ("--rows 50 --tokens 8 --width 8 --repeats 1", "sparse Adam"),
    "scaling": ("--sweeps users,length --factors 1,2 --events 256 --repeats 1", "exponent"),
    "query": ("--events 65 --conditions 2 --width 16 --budget_s 0.1", "read again"),
    "store": ("--users 100 --reads 5 --no-refresh", "warm"),
    "rank": ("--widths 16 --history 4 --batch 64 --repeats 1", "dlrm"),
    "packing": ("--ratings nowhere/ratings.dat --width 16", "lumrec: flat, length buckets"),
}
# These measure in processes of their own, each of which would import torch or Polars again: only their help is run.
IN_PROCESSES = ("losses", "memory", "prepare", "serve", "warm_start")


def test_no_benchmark_is_left_out():
    assert {file.stem for file in FOLDER.glob("*.py") if not file.stem.startswith("_")} == {*SMALL, *IN_PROCESSES}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Runs a benchmark in this process, as `python benchmarks/<name>.py <words>` does; gives what it printed."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(FOLDER))

    def run_main(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield run_main
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [*SMALL, *IN_PROCESSES])
def test_help_gives_the_command(run, name, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(name, "--help")
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


@pytest.mark.parametrize("name", SMALL)
def test_a_small_run_prints_its_table(run, name):
    words, expected = SMALL[name]
    assert expected in run(name, *words.split())
