"""Writes the reference of every config key from the dataclasses: type, range, default, and the text of the docstring.

python docs/hooks/config_reference.py      # prints the page
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from lumrec.experiments.config import Config
from lumrec.run import limits
from lumrec.run.typed_yaml import defaults, dump, field_types, section_of

HEAD = """# Configuration

Every key that a YAML file or a `key=value` override can set, with its default. `<name>` is a name that you choose, such
as that of a feature. Later layers win: defaults, then the files of `base:`, then your YAML file, then overrides. An
unknown key is an error that names the nearest valid one. This page is generated from the code.
"""
WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}


class Key(NamedTuple):
    """One key: its dotted name, its values in words, its default as YAML ("" = it has to be given), and its text."""

    name: str
    values: str
    default: str
    text: str


class Section(NamedTuple):
    """One dataclass at one place of the config: its dotted name ("" = the top), what it is for, and its keys."""

    name: str
    text: str
    keys: list[Key]


def sections(root: type = Config) -> list[Section]:
    """All sections of a config, in the order of declaration."""
    return list(_sections(root, "", defaults(root)))


def _sections(kind: Any, at: str, values: dict[str, Any]) -> Iterator[Section]:
    """values: the defaults at this place, which may differ from those of the dataclass."""
    said = texts(kind)
    keys, below = [], []
    for field in dataclasses.fields(kind):
        name, hint = (f"{at}.{field.name}" if at else field.name), field_types(kind)[field.name]
        inner = section_of(hint)
        if dataclasses.is_dataclass(inner):
            below.append((inner, name, values.get(field.name) or defaults(inner)))
        elif get_origin(hint) is dict and dataclasses.is_dataclass(section_of(get_args(hint)[1])):
            inner = section_of(get_args(hint)[1])
            below.append((inner, f"{name}.<name>", defaults(inner)))
        else:
            default = dump(values[field.name], default_flow_style=True, width=10_000) if field.name in values else ""
            found = Key(name, _values(hint, field.metadata.get("limits")), default, said.get(field.name, ""))
            keys.append(found._replace(default=default.removesuffix("\n").removesuffix("\n...")))
    yield Section(at, _heading(kind), keys)
    for inner, name, inner_values in below:
        yield from _sections(inner, name, inner_values)


def texts(kind: type) -> dict[str, str]:
    """Field → the text of its `name: …` entry in the docstring of the dataclass or of one that it inherits from."""
    found: dict[str, str] = {}
    for each in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        doc, entries = _entries(each, kind)
        for entry, after in zip(entries, [*entries[1:], None]):
            text = doc[entry.end() : after.start() if after else len(doc)]
            for name in re.split(r", | and ", entry["names"]):
                found[name] = " ".join(text.split())
    return found


def _heading(kind: type) -> str:
    """What a docstring says before its first entry."""
    doc, entries = _entries(kind, kind)
    return " ".join(doc[: entries[0].start() if entries else len(doc)].split())


def _entries(kind: type, fields_of: Any) -> tuple[str, list[re.Match[str]]]:
    """The docstring of a class, and where its entries begin: `name: ` or `name, other: ` at the start of a sentence."""
    doc = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
    name = f"(?:{'|'.join(field.name for field in dataclasses.fields(fields_of))})"
    pattern = rf"(?:^|(?<=[.)]))\s*\b(?P<names>{name}(?:(?:,\s| and ){name})*):\s"
    return doc, list(re.finditer(pattern, doc, re.MULTILINE))


def _values(hint: Any, allowed: limits.Limits | None = None) -> str:
    """A type in words, with its range."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(f"`{choice}`" if choice != "" else '`""`' for choice in inner)
    if origin is list:
        return f"list of: {_values(inner[0], allowed)}"
    if origin is dict:
        return f"mapping of names to: {_values(inner[1], allowed)}"
    if inner:
        return " or ".join(_values(each, allowed) for each in inner)
    return WORDS[hint] + (_range(allowed) if allowed and hint in (int, float) else "")


def _range(allowed: limits.Limits) -> str:
    low = f" ≥ {_number(allowed.least)}" if allowed.least is not None else ""
    low = f" > {_number(allowed.above)}" if allowed.above is not None else low
    most = allowed.most if allowed.most is None or allowed.most < limits.MOST_COUNT else None
    high = f" ≤ {_number(most)}" if most is not None else ""
    high = f" < {_number(allowed.below)}" if allowed.below is not None else high
    return low + (" and" if low and high else "") + high


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:g}"


def page() -> str:
    """The page, in Markdown."""
    lines = [HEAD]
    for section in sections():
        top = section.name.count(".") == 0
        title = f"`{section.name}`" if section.name else "The run"
        lines += [
            f"{'##' if top else '###'} {title} {{ #{section.name or 'run-keys'} }}",
            "",
            _escaped(section.text),
            "",
        ]
        for key in section.keys:
            default = f"default `{key.default or dump('').strip()}`" if key.default != "" else "has to be given"
            lines += [f"`{key.name}`{{ #{key.name} }} · {key.values} · {default}", f":   {_escaped(key.text)}", ""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return re.sub(r"(?<!`)<(?=\w)", "&lt;", text).replace("*", r"\*")


if __name__ == "__main__":
    print(page())
