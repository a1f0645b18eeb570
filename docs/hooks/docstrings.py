"""Griffe extension: shows docstrings as Markdown, their `name: …` entries as a list and doctests as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>.*)")


class Docstrings(griffe.Extension):
    """Rewrites each docstring when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The docstring with a list where lines begin with `name: `, and fences around doctests and drawings."""
    lines: list[str] = []
    in_code = False
    for line in text.splitlines():
        is_code = line.startswith((">>>", "... ")) or (in_code and line.strip() != "")
        if is_code != in_code:
            lines += ["", "```python"] if is_code else ["```", ""]
            in_code = is_code
        entry = None if is_code else ENTRY.fullmatch(line)
        if entry:
            lines += ["", f"* **{entry['names']}**: {entry['text']}"]
        else:
            lines.append(re.sub("::$", ":", line))
    return "\n".join([*lines, *(["```"] if in_code else [])])
