"""README.md: short, its table is what the figures give, and every key=value in it and in docs/ is one that loads."""

import json
import re
import shlex
from pathlib import Path

import pytest

from lumrec.experiments.config import Config
from lumrec.experiments.report_table import RANKER_NAMES
from lumrec.run.config_file import load, valid_keys
from lumrec.run.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PARTS = [key.split(".") for key in valid_keys(Config)]
KEYS = {".".join(parts[:depth]) for parts in PARTS for depth in range(1, len(parts) + 1)}  # sections too


def test_the_readme_is_short_and_its_table_is_up_to_date():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    result = json.loads((ROOT / "docs/results/fresh-users/table4-ml-1m.json").read_text(encoding="utf-8"))
    for model, name in RANKER_NAMES.items():
        cells = [
            f"{result[f'{model}/{row}/auc']:.4f} ± {result[f'{model}/{row}/auc_sd']:.4f}"
            for row in ("base", "tables", "lum")
        ]
        line = " | ".join([f"| {name}", *cells, f"{result[f'{model}/gain/auc']:+.4f} |"]).replace("0.", ".")
        assert line in text


def commands(page: Path) -> list[str]:
    """The commands of stages in code blocks, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    return re.findall(r"^\s*((?:torchx run|python) apps/(?!reproduce).*)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_of_commands_load(page):
    for command in commands(page):
        words = shlex.split(command, comments=True)
        given = dict(zip(words, words[1:]))
        config = given.get("--config")
        if config is not None and config.startswith(("configs/", "examples/")):
            assert (ROOT / config).is_file(), command
        overrides = [
            word for word in words if re.match(r"[a-z_]+[a-z_.]*=", word) and "…" not in word and "$" not in word
        ]
        path = ROOT / config if config and (ROOT / config).is_file() else None
        try:
            load(Config, path, overrides)
        except UserError as error:
            pytest.fail(f"{command}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_in_the_text_exist(page):
    for key in re.findall(r"`'?([a-z_]+\.[a-z_.]+)=", page.read_text(encoding="utf-8")):
        assert any(re.fullmatch(re.escape(known).replace("<name>", "[^.]+"), key) for known in KEYS), key
