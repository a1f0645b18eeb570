"""The command `lumrec`: what it lists and explains, and how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lumrec
from lumrec.launch.commands import COMMANDS, TOOLS, describe
from lumrec.launch.main import main

ROOT = Path(__file__).resolve().parents[2]


def test_every_app_is_a_command_and_every_command_an_app():
    assert {path.stem for path in (ROOT / "apps").glob("*.py")} == set(COMMANDS)


def test_help_lists_the_commands_with_one_line_each(capsys):
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    main([])
    assert capsys.readouterr().out.splitlines() == lines
    for name in [*COMMANDS, *TOOLS, "configs"]:
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_teaches(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert describe(name).summary in out
    assert f"  lumrec {name} " in out
    assert "torchx run" not in out
    assert all(section in out for section in COMMANDS[name].sections)
    assert "python -m pydoc lumrec.stages.rank.RankConfig" in out
    for argument in describe(name).arguments:
        assert {"words": "key=value", "j": "-j 1xN"}.get(argument, f"--{argument}") in out


def test_help_loads_neither_torch_nor_torchx_nor_polars():
    code = "import sys, lumrec.launch.main as m\nm.main(['--help']); m.main(['configs'])\n"
    code += "try: m.main(['rank', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'torchx', 'polars', 'numpy', 'yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_version_and_configs(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"lumrec {lumrec.__version__}\n"
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} >= {"ml-1m", "simulator", "models/19m", "reproduce/ml-1m"}
    assert all(len(line.split()) > 4 for line in lines)


def test_a_tool_gets_its_own_arguments(tmp_path, capsys):
    main(["report", str(tmp_path)])
    assert "no runs" in capsys.readouterr().out
    assert (tmp_path / "leaderboard.html").is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pretrian"], "there is no command 'pretrian' (did you mean 'pretrain'?); lumrec --help lists them"),
        (["show-user"], "did you mean 'show_user'?"),
        (["pretrain", "--config", "ml1m"], "no config is named 'ml1m' (did you mean 'ml-1m'?)"),
        (["pretrain", "-j", "1x2", "model.dmi=3"], "the nearest valid key is 'model.dim'"),
        (["pretrain", "-j", "2x2"], "-j 2x2 is several machines: use torchx run apps/pretrain.py"),
        (["pretrain", "-j", "two"], "-j is 'two'; expected nodes x processes"),
        (["reproduce", "--table", "6"], "6"),
        (["show_user", "name=z", "--user", "u", "show_user.top=0"], "show_user.top: got 0, expected at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, says, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert len(lines := capsys.readouterr().err.strip().splitlines()) == 1
    assert lines[0].startswith("lumrec: ") and says in lines[0]


def test_a_closed_stream_takes_what_is_printed(monkeypatch):
    """As Python finds it after >&- in a shell."""
    monkeypatch.setattr(sys, "stdout", None)
    main(["configs"])
    assert sys.stdout.name == os.devnull
    sys.stdout.close()


@pytest.mark.slow
def test_processes_end_with_the_exit_code_of_the_first_that_failed(tmp_path):
    words = ["query", "-j", "1x2", "inputs.lums=[nowhere]", "data.source=simulator", f"runs_dir={tmp_path}"]
    command = [sys.executable, "-m", "lumrec.launch.main", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
