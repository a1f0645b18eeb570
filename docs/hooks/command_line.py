"""Writes the reference of the command line from the TorchX components in apps/."""

from __future__ import annotations

import ast
from pathlib import Path

from docstring_parser.google import parse

APPS = Path(__file__).resolve().parents[2] / "apps"
ORDER = "prepare pretrain query show_user rank retrieve warm_start pipeline tune reproduce".split()
HEAD = """# Command line

Each stage is a TorchX component in `apps/`. `torchx run apps/<stage>.py …` starts it, as one process or as
several (`-j 1x2`); `python apps/<stage>.py …` starts one process without TorchX. Settings come last, as `key=value`
over the YAML file of `--config`; all keys are in [Configuration](configuration.md).

| exit code | meaning |
|---|---|
| 0 | finished, or already finished with the same settings |
| 2 | an error in a setting or an input, in one sentence (`LUMREC_TRACEBACK=1` adds the trace) |
| other | a bug, with its traceback |
"""


def page() -> str:
    """The page, in Markdown."""
    names = {path.stem for path in APPS.glob("*.py")}
    assert names == set(ORDER), f"apps/ and this page differ: {names ^ set(ORDER)}"
    return "\n".join([HEAD, *(_app(name) for name in ORDER)])


def _app(name: str) -> str:
    tree = ast.parse((APPS / f"{name}.py").read_text(encoding="utf-8"))
    component = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    doc = parse(ast.get_docstring(component) or "")
    text, _, example = "\n\n".join(filter(None, [doc.short_description, doc.long_description])).partition("Example: ")
    usage = (ast.get_docstring(tree) or "").split("\n\n", 1)[-1]
    lines = [f"## {name} {{ #{name} }}", "", text.strip(), "", "```", usage.strip() or example.strip(), "```", ""]
    for argument in doc.params:
        shown = argument.arg_name if argument.arg_name == "words" else f"--{argument.arg_name}"
        shown = {"words": "key=value …", "--j": "-j"}.get(shown, shown)
        lines += [f"`{shown}`", f":   {' '.join((argument.description or '').split())}", ""]
    return "\n".join(lines)
