"""Reads a config into the dataclass that declares it: defaults < YAML file < key=value overrides.

    config = load(Config, "configs/ml-1m.yaml", ["model.dim=32", "pretrain.train.epochs=4"])

A YAML file may name files that it builds on, each overriding the one before: `base: ml-1m.yaml` or `base: [ml-1m.yaml,
models/19m.yaml]`, relative to its own folder. A name without .yaml is a config that comes with lumrec.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

from lumrec.run import limits
from lumrec.run.errors import MissingFileError, UserError, did_you_mean
from lumrec.run.shipped import shipped_configs
from lumrec.run.typed_yaml import (
    Text,
    UnknownKey,
    built,
    defaults,
    dotted,
    dump,
    field_types,
    overlaid,
    parse,
    read,
    section_of,
    todays_section,
)

Root = TypeVar("Root")


def load(root: type[Root], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Root:
    """The config of a YAML file (None: the defaults) with `key=value` overrides, as the dataclass `root`.

    The key of an override is dotted ("model.dim=64", 'schema.features."a.b".role=item'), and lists and mappings are
    written in YAML ("seeds=[0, 1]"). Text is read as it is written, in overrides and in files
    (lumrec/run/typed_yaml.py). Raises MissingFileError for a missing file, and UserError for broken YAML, an override
    without "=", an unknown key (it names the nearest valid one), a value of the wrong type, and one that cannot work
    (see lumrec/run/limits.py).
    """
    layers = [*(_files(find(path)) if path is not None else []), *_overrides(root, overrides, "the command line")]
    config = _merged(root, defaults(root), layers, origin=str(path or "the command line"))
    limits.check(config)
    return config


def with_overrides(config: Root, overrides: Sequence[str], *, origin: str) -> Root:
    """`config` with `key=value` overrides; raises like `load`, and names `origin` as the source of the overrides."""
    root = type(config)
    config = _merged(root, to_dict(config), _overrides(root, overrides, origin), origin=origin)
    try:
        limits.check(config)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    return config


def stored(path: Path, kind: type[Root], section: str = "", *, partly: bool = False) -> Root:
    """A section of a run's config.yaml, as the dataclass `kind`; "" reads its fields from the keys at the top level.

    Keys that the file does not have get their defaults. partly: the section may have other keys, which are ignored.
    Raises MissingFileError, and UserError for a damaged file or values that do not fit `kind`.
    """
    values = read(path) if path.is_file() else None
    if not isinstance(values, Mapping):
        if path.is_file():
            raise UserError(f"{path} is damaged: it has no settings; make the run again with overwrite=true")
        raise MissingFileError(f"there is no {path}: expected the config.yaml of a run")
    given = values.get(section, {}) if section else values
    if isinstance(given, Mapping):
        given = todays_section(kind, given)
    if (partly or not section) and isinstance(given, Mapping):
        given = {name: given[name] for name in field_types(kind) if name in given}
    return _merged(kind, defaults(kind), [(str(path), given)], origin=str(path), at=section)


def _merged(
    kind: type[Root], values: dict[str, Any], layers: Sequence[tuple[str, Any]], *, origin: str, at: str = ""
) -> Root:
    """Plain values overridden by the layers, one after another, as dataclasses."""
    for name, given in layers:
        try:
            values = overlaid(kind, values, given)
        except UnknownKey as error:
            key, near = dotted(error.path), _suggestion(kind, dotted(error.path))
            raise UserError(f"{name}: unknown key {f'{at}.{key}' if at else key!r}{near}") from None
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    try:
        return cast(Root, built(kind, values))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dictionaries and lists."""
    return dataclasses.asdict(config)


def leaves(config: Any) -> dict[str, Any]:
    """A config as a flat dictionary, dotted key → value; lists and empty sections count as values."""
    return {dotted(path): value for path, value in _leaves(to_dict(config))}


def as_text(value: Any) -> str:
    """A value of `leaves` as text that `load` can read from a key=value override."""
    if isinstance(value, str):
        return value
    text = dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def find(name: str | Path, folder: Path = Path()) -> Path:
    """The path of a config: `my.yaml` is a file in `folder`, `ml-1m` a config that comes with lumrec.

    Raises MissingFileError for an unknown name. Does not check that a .yaml file exists.
    """
    path, known = folder / name, shipped_configs()
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    if str(name) in known:
        return known[str(name)]
    raise MissingFileError(
        f"no config is named {str(name)!r}{did_you_mean(str(name), known)}: `lumrec configs` lists those that come "
        "with lumrec; the name of a file must end with .yaml"
    )


def _files(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """(name, content) of a YAML file and of the files that it builds on, the deepest first."""
    if path.resolve() in above:
        raise UserError(f"{path}: its base files form a circle: {' → '.join(map(str, [*above, path]))}")
    if not path.exists():
        near = sorted(str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise MissingFileError(
            f"no config file {path} (from {Path.cwd()})"
            + (f"; there are: {', '.join(near)}" if near else "")
            + (
                f"; the config that comes with lumrec is: --config {path.stem}"
                if path.stem in shipped_configs()
                else ""
            )
        )
    values = read(path)
    values = {} if values is None else values
    if not isinstance(values, dict):
        what = "a list" if isinstance(values, list) else "text"
        raise UserError(f"{path}: expected sections and keys at the top, got {what}")
    base = values.pop("base", [])
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: base is {base!r}; expected the name of a YAML file, or a list of names")
    below = [layer for name in names if name for layer in _files(find(name, path.parent), (*above, path.resolve()))]
    return [*below, (str(path), values)]


_KEY = r'"(?:[^"\\]|\\.)*"|[^."=]+'
_OVERRIDE = re.compile(rf"((?:{_KEY})(?:\.(?:{_KEY}))*)=(.*)", re.DOTALL)


def _overrides(root: type, overrides: Sequence[str], origin: str) -> list[tuple[str, Any]]:
    """A layer (origin, nested mappings) for each key=value override."""
    layers = []
    for word in overrides:
        match = _OVERRIDE.fullmatch(word)
        if not match:
            raise UserError(f"got {word!r} on the command line; expected key=value, such as model.dim=64")
        path = tuple(str(parse(part, word)) if part[0] == '"' else part for part in re.findall(_KEY, match[1]))
        given: Any = Text(match[2])
        if match[2][:1] in ("[", "{") and _type_at(root, path) not in (str, int, float, bool):
            try:
                given = parse(match[2], word)
            except UserError:
                raise UserError(f"{word!r}: the value is not a valid YAML list or mapping") from None
        for name in reversed(path):
            given = {name: given}
        layers.append((origin, given))
    return layers


def _leaves(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _leaves(value, (*path, name))
    elif path:
        yield path, values


def _type_at(root: type, path: Sequence[str]) -> Any:
    """The declared type of a key; None if there is no such key."""
    kind: Any = root
    for name in path:
        kind = section_of(kind)
        if dataclasses.is_dataclass(kind):
            kind = field_types(kind).get(name)
        else:
            kind = get_args(kind)[1] if get_origin(kind) is dict else None
    return kind


def valid_keys(root: type) -> list[str]:
    """Every dotted key of a config; "<name>" is a name that the user chooses (such as a feature or a table)."""

    def walk(kind: Any, prefix: str) -> Iterator[str]:
        kind = section_of(kind)
        if dataclasses.is_dataclass(kind):
            for name, inner in field_types(kind).items():
                yield from walk(inner, f"{prefix}.{name}" if prefix else name)
        elif get_origin(kind) is dict:
            yield from walk(get_args(kind)[1], f"{prefix}.<name>")
        else:
            yield prefix

    return list(walk(root, ""))


def _suggestion(root: type, key: str) -> str:
    """The nearest valid keys, as the end of a sentence: compares whole paths, then only the last name."""
    keys, last = valid_keys(root), key.split(".")[-1]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if not near:
        names = {valid.split(".")[-1] for valid in keys}
        alike = difflib.get_close_matches(last, sorted(names), n=1, cutoff=0.6)
        alike = alike or sorted(name for name in names if last in name.split("_"))
        near = [valid for valid in keys if valid.split(".")[-1] in alike][:3]
    if not near:
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    return f"; the nearest valid key is {' or '.join(map(repr, near))}"
