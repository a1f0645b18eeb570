"""Writes the page of the public Python names; mkdocstrings fills it from the docstrings."""

import lumrec
from lumrec import modules

HEAD = """# Python API

`import lumrec` gives the names below, `from lumrec.modules import …` the building blocks as plain `nn.Module`s. Each
name is imported when it is first used. Shape suffixes name the axes of a tensor: `T` tokens, `B` users, `L` events,
`D` width, `N` queries, `C` candidates.
"""


def page() -> str:
    """The page, in Markdown."""
    lines = [HEAD, "## lumrec", ""]
    lines += [_entry(f"lumrec.{name}", members=name != "Config") for name in sorted(lumrec.__all__)]
    lines += ["## lumrec.modules", ""]
    lines += [_entry(f"lumrec.modules.{name}") for name in sorted(modules.__all__)]
    return "\n".join(lines)


def _entry(path: str, *, members: bool = True) -> str:
    return f"::: {path}\n" + ("" if members else "    options:\n      members: false\n")
