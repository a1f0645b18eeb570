"""mkdocs hook: adds the pages that are made from the code, the README as home page, and the changelog."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import command_line  # noqa: E402
import config_reference  # noqa: E402
import python_api  # noqa: E402
import results_pages  # noqa: E402


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the results into the navigation."""
    results = next(entry["Results"] for entry in config.nav if "Results" in entry)
    results += [{title: f"results/{path}"} for path, title in results_pages.titles().items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages that are no file in docs/."""
    pages = {
        "index.md": _at_the_top("README.md"),
        "changelog.md": _at_the_top("CHANGELOG.md"),
        "reference/configuration.md": config_reference.page(),
        "reference/command-line.md": command_line.page(),
        "reference/python-api.md": python_api.page(),
        "results/index.md": results_pages.index(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for path in ("examples/shop.py", "examples/ask_a_lum.ipynb"):  # the home page links to them
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def _at_the_top(name: str) -> str:
    """A file beside docs/, with its links made relative to docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text)
