"""Reads YAML by the types of dataclass fields: a scalar is text until its field's type decides how to read it.

    run: 007       str             "007"   (7 in YAML 1.1, which PyYAML reads)
    scene: NO      str             "NO"    (False there)
    seed: 010      int             10      (8 there)
    bias: null     bool | None     None
    name: ${HOME}  str             "${HOME}": there is no interpolation

Numbers, booleans and null are written as in the core schema of YAML 1.2. A repeated key or a tag (!!python/…) is an
error. Supported types: str, int, float, bool, Literal, X | None, X | Y, list, dict, and dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from lumrec.run.errors import UserError, did_you_mean
from lumrec.run.files import check_file

MAX_VALUES = 200_000  # of a file; an alias counts at each use, because a few lines of aliases can mean billions
NULLS = ("null", "Null", "NULL", "~", "")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.?(inf|infinity|nan)", re.IGNORECASE)  # JSON and Python write them without the dot

KeyPath = tuple[str, ...]  # the names that lead to a value


class UnknownKey(UserError):
    """A key that its section does not have. path: the names that lead to the key and to the first value below it."""

    def __init__(self, section: KeyPath, name: str, value: Any, known: Sequence[str]) -> None:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        super().__init__(
            f"unknown key {dotted((*section, name))!r}" + (f"; the nearest is {near[0]!r}" if near else "")
        )
        self.path = (*section, name)
        while isinstance(value, Mapping) and value:
            name, value = next(iter(value.items()))
            self.path += (name,)


class Text(str):
    """A scalar as it is written. is_plain: it has no quotes, so `null` may mean that there is no value."""

    is_plain: bool

    def __new__(cls, value: str, *, is_plain: bool = True) -> Text:
        text = super().__new__(cls, value)
        text.is_plain = is_plain
        return text


def read(path: Path, key: str = "") -> Any:
    """The contents of a YAML file: mappings, lists and Text; None if it is empty.

    key: the setting that names the file, for errors. Raises like `check_file` and `parse`.
    """
    return parse(check_file(path, key, "a YAML file").read_bytes(), str(path))


def parse(content: str | bytes, where: str) -> Any:
    """The contents of YAML text: mappings (text → value), lists and Text; None if it is empty.

    Raises UserError, which names `where`, for invalid YAML, a repeated key, a tag, and an alias within its own value.
    """
    try:
        node = yaml.compose(content, Loader=yaml.BaseLoader)
        return None if node is None else _Composed().value_of(node)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{where} is not valid YAML: lists or mappings are nested too deeply") from None


class _Composed:
    """Turns the nodes of one document into mappings, lists and Text."""

    def __init__(self) -> None:
        self.num_values = 0
        self.open: set[int] = set()  # the nodes around the current one

    def value_of(self, node: yaml.Node) -> Any:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise _problem(f"over {MAX_VALUES:,} values, counting each use of an alias", node)
        kind = {yaml.ScalarNode: "str", yaml.SequenceNode: "seq", yaml.MappingNode: "map"}[type(node)]
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise _problem(f"the tag {node.tag!r} is not supported; write the value without it", node)
        if isinstance(node, yaml.ScalarNode):
            return Text(node.value, is_plain=node.style is None)
        if id(node) in self.open:
            raise _problem("an alias is within its own value", node)
        self.open.add(id(node))
        value = self._mapping(node) if isinstance(node, yaml.MappingNode) else [self.value_of(n) for n in node.value]
        self.open.remove(id(node))
        return value

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, value = self.value_of(key_node), self.value_of(value_node)
            if not isinstance(key, Text):
                raise _problem("a key is a list or a mapping; expected text", key_node)
            if key == "<<" and key.is_plain:
                for other in reversed(value if isinstance(value, list) else [value]):  # the first one given wins
                    if not isinstance(other, dict):
                        raise _problem("<< takes a mapping, or a list of mappings", value_node)
                    merged.update(other)
            elif key in own:
                raise _problem(f"the key {str(key)!r} is given twice", key_node)
            else:
                own[str(key)] = value
        return {**merged, **own}


def _problem(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def overlaid(kind: Any, below: Any, given: Any, path: KeyPath = ()) -> Any:
    """`below` overridden by `given`, as plain values: mappings are merged, everything else is replaced.

    kind: the type. below: plain values of that type (None: the type's defaults). given: from `parse`. A null removes an
    entry from a mapping whose values are not text. Raises UserError with the key, the given value and what was
    expected, and UnknownKey.
    """
    options = get_args(kind) if _is_union(kind) else (kind,)
    if type(None) in options and isinstance(given, Text) and given.is_plain and given in NULLS:
        return None
    for option in options:
        if isinstance(given, Mapping) and dataclasses.is_dataclass(option):
            return _section_over(option, below, given, path)
        if isinstance(given, Mapping) and get_origin(option) is dict:
            return _mapping_over(get_args(option)[1], below, given, path)
        if isinstance(given, list) and get_origin(option) is list:
            inner = get_args(option)[0]
            return [overlaid(inner, None, value, _at(path, index)) for index, value in enumerate(given)]
    if isinstance(given, Text):
        for option in options:
            found = _scalar(option, given)
            if found is not None:
                return found
    raise UserError(f"{dotted(path)}: got {_shown(given)}{_hint(given, options)}, expected {_expected(kind)}")


def _section_over(kind: Any, below: Any, given: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
    hints = field_types(kind)
    over = dict(below if below is not None else defaults(kind))
    for name, value in given.items():
        if name not in hints:
            raise UnknownKey(path, name, value, list(hints))
        over[name] = overlaid(hints[name], over.get(name), value, (*path, name))
    return over


def _mapping_over(inner: Any, below: Any, given: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
    over = dict(below or {})
    for name, value in given.items():
        if isinstance(value, Text) and value.is_plain and value in NULLS and inner is not str:
            if name not in over:
                raise UserError(
                    f"{dotted((*path, name))}: null removes an entry, but there is none with this name"
                    + did_you_mean(name, over)
                    + (f"; there are: {', '.join(over)}" if over else "")
                )
            del over[name]
        else:
            over[name] = overlaid(inner, over.get(name), value, (*path, name))
    return over


def built(kind: Any, values: Any, path: KeyPath = ()) -> Any:
    """Plain values, such as those from `overlaid`, as the dataclasses of their type.

    Raises UserError for a missing field without a default.
    """
    options = get_args(kind) if _is_union(kind) else (kind,)
    for option in options:
        if isinstance(values, Mapping) and dataclasses.is_dataclass(option):
            for field in dataclasses.fields(option):
                if field.name not in values and field.name not in defaults(option):
                    raise UserError(f"{dotted((*path, field.name))} is not given, and has no default")
            hints = field_types(option)
            made = {name: built(hints[name], value, (*path, name)) for name, value in values.items()}
            return option(**made)  # type: ignore[operator]
        if isinstance(values, Mapping) and get_origin(option) is dict:
            inner = get_args(option)[1]
            return {name: built(inner, value, (*path, name)) for name, value in values.items()}
        if isinstance(values, list) and get_origin(option) is list:
            inner = get_args(option)[0]
            return [built(inner, value, _at(path, index)) for index, value in enumerate(values)]
    return values


def _scalar(kind: Any, text: Text) -> Any:
    """The scalar as a value of this type; None if it is not one."""
    if kind is str:
        return str(text)
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), None)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower()) if text in _TRUTHS else None
    if kind is int and _INT.fullmatch(text):
        try:
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        except ValueError:  # over 4,300 digits
            return None
    if kind is float:
        if match := _NOT_FINITE.fullmatch(text):
            return float(f"{match[1]}{match[2]}")
        if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
            return float(text)
    return None


_TRUTHS = ("true", "True", "TRUE", "false", "False", "FALSE")


def field_types(kind: Any) -> dict[str, Any]:
    """Name → type of the fields of a dataclass."""
    return _field_types(kind)


@functools.cache
def _field_types(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def defaults(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass that have a default, as plain values."""
    found = {}
    for field in dataclasses.fields(kind):
        if field.default_factory is not dataclasses.MISSING:
            found[field.name] = plain(field.default_factory())
        elif field.default is not dataclasses.MISSING:
            found[field.name] = plain(field.default)
    return found


def todays_section(kind: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """A section that a run of an earlier version stored, with the keys of this version.

    A dataclass whose keys have moved into sections has a method `earlier_keys(stored)`: old key → "section.key", or
    None where the value had no effect.
    """
    moved = kind.earlier_keys(stored) if hasattr(kind, "earlier_keys") else {}
    found = {key: value for key, value in stored.items() if key not in moved}
    for key in [key for key in stored if moved.get(key)]:
        section, _, name = moved[key].partition(".")
        found[section] = {**found.get(section, {}), name: stored[key]}
    return found


def plain(value: Any) -> Any:
    """A value with dataclasses as dictionaries, tuples as lists, and paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, (str, Path)) else value


def to_yaml(value: Any) -> str:
    """A value as YAML, with dataclasses as mappings in the order of declaration; reading it by its type restores it."""
    return dump(plain(value))


class _Dumper(yaml.SafeDumper):
    """Escapes Unicode's line breaks, which PyYAML writes as they are but reads as blanks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    is_safe = text.replace("\n", "").isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_safe else '"')


_Dumper.add_representer(str, _text)


def dump(value: Any, **style: Any) -> str:
    """Plain values as YAML, in their order, that reads back as the same text. style: arguments of yaml.dump."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)


def dotted(path: KeyPath) -> str:
    """The names that lead to a value as one dotted key; a name that contains a dot, for example, is quoted."""
    text = ""
    for name in path:
        if re.fullmatch(r"\[\d+\]", name):
            text += name
            continue
        needs_quotes = not name or re.search(r'[.="\\\s]', name) or not name.isprintable()
        text += ("." if text else "") + (in_quotes(name) if needs_quotes else name)
    return text


def in_quotes(text: str) -> str:
    """Text in YAML's double quotes, on one line."""
    return dump(text, default_style='"', width=math.inf).rstrip("\n")


def section_of(kind: Any) -> Any:
    """The dataclass of an optional section; any other type as it is."""
    sections = [option for option in get_args(kind) if dataclasses.is_dataclass(option)]
    return sections[0] if _is_union(kind) and sections else kind


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _at(path: KeyPath, index: int) -> KeyPath:
    return (*path, f"[{index}]")


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _hint(given: Any, options: Sequence[Any]) -> str:
    choices = [str(choice) for option in options if get_origin(option) is Literal for choice in get_args(option)]
    return did_you_mean(given, choices) if isinstance(given, str) else ""


def _expected(kind: Any) -> str:
    if dataclasses.is_dataclass(section_of(kind)):
        return "a section (a mapping of keys)"
    if get_origin(kind) is dict:
        return "a mapping of keys"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        return f"a list of {_expected(get_args(kind)[0])}"
    if _is_union(kind):
        return " or ".join(_expected(option) for option in get_args(kind))
    return {bool: "true or false", type(None): "null"}.get(kind) or kind.__name__
