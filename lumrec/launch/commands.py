"""Every command: what `lumrec` lists and runs, the apps run, and TorchX finds.

What a command does and takes is written once, in its app (apps/<name>.py): the docstring of the TorchX component.
"""

from __future__ import annotations

import ast
import functools
import re
from typing import NamedTuple

from lumrec.experiments.jobs import script_of
from lumrec.stages.registry import STAGES, Stage

# An experiment runs stages: its `run` takes the root config, that of reproduce the overrides and its own options.
EXPERIMENTS = {
    "pipeline": "lumrec.experiments.pipeline",
    "tune": "lumrec.experiments.tune",
    "reproduce": "lumrec.experiments.paper_tables",
}
SWITCHES = ("--check", "--follow", "--json")  # options that are given without a value
COMMANDS = STAGES | {name: Stage(name, path=path) for name, path in EXPERIMENTS.items()}

# Programs with their own arguments: module, and what `lumrec --help` says of it.
TOOLS = {
    "report": ("lumrec.experiments.leaderboard", "Ranks all runs of a folder: a leaderboard as a page and as text."),
}


class Description(NamedTuple):
    """What the app of a command says of it: one line, more lines, examples of commands, and each argument's help."""

    summary: str
    text: str
    examples: str
    arguments: dict[str, str]

    @property
    def with_lumrec(self) -> str:
        """The examples as commands of `lumrec`, without TorchX."""
        return re.sub(r"torchx run apps/(\w+)\.py", r"lumrec \1", self.examples)


@functools.cache
def describe(name: str) -> Description:
    """The description of a command, read from its app without importing it (an app imports TorchX)."""
    with open(script_of(name), encoding="utf-8") as file:
        app = ast.parse(file.read())
    component = next(node for node in app.body if isinstance(node, ast.FunctionDef) and node.name == name)
    text, _, arguments = (ast.get_docstring(component) or "").partition("\nArgs:\n")
    summary, _, text = re.sub(r"^Example: .*\n", "", text, flags=re.MULTILINE).partition("\n\n")
    helps = re.findall(r"^    (\w+): (.+(?:\n {5,}.+)*)", arguments, re.MULTILINE)
    examples = (ast.get_docstring(app) or "").partition("\n\n")[2]
    return Description(summary, text.strip(), examples, {each: " ".join(said.split()) for each, said in helps})
