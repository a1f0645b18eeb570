"""The root config: defaults < YAML file < key=value words. Each section is a dataclass beside the code it configures.

    config = load("configs/ml-1m.yaml", ["model.dim=32", "pretrain.train.epochs=4"])

A YAML file may name others that it builds on, relative to itself, each over the one before it: `base: ml-1m.yaml` or
`base: [ml-1m.yaml, models/19m.yaml]`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lumrec.data.prepare import DataConfig
from lumrec.data.schema import SchemaConfig
from lumrec.errors import MissingFileError, UserError
from lumrec.pipeline import PipelineConfig
from lumrec.query.inspect import InspectConfig
from lumrec.query.stage import QueryConfig
from lumrec.train.lum import ModelConfig
from lumrec.train.pretrain import PretrainConfig
from lumrec.train.rank import RankConfig
from lumrec.train.retrieve import RetrieveConfig
from lumrec.tune import TuneConfig
from lumrec.warm_up import WarmUpConfig


@dataclass(frozen=True)
class InputsConfig:
    """Run names of the stages that this one reads.

    prepared: "" = "<name>-prepare". lums: one LUM, or one per fold of users in order; [] = ["<name>-pretrain"].
    knowledge: "" = "<name>-query".
    """

    prepared: str = ""
    lums: List[str] = field(default_factory=list)
    knowledge: str = ""


@dataclass(frozen=True)
class Config:
    """Settings of a run. A stage reads the general ones, its own section, and those of what it builds on.

    run: folder under runs_dir; "" = "<name>-<stage>". name: of the experiment; "" = the YAML file's name.
    fold: "k/K" leaves the users of fold k out of pre-training (cross-fitting). threads: of a process; 0 = torch's own.
    overwrite: replace a finished run, or one of another config, in the same folder.
    """

    run: str = ""
    name: str = ""
    runs_dir: str = "runs"
    seed: int = 0
    fold: str = ""
    threads: int = 0
    overwrite: bool = False
    inputs: InputsConfig = field(default_factory=InputsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    schema: SchemaConfig = field(default_factory=SchemaConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    query: QueryConfig = field(default_factory=QueryConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    retrieve: RetrieveConfig = field(default_factory=RetrieveConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    warm_up: WarmUpConfig = field(default_factory=WarmUpConfig)


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file (None: defaults alone) with `key=value` words over it.

    In a word, key is dotted ("model.dim=64"), and a value that opens with [ or { is read as YAML ("seeds=[0, 1]").
    Raises MissingFileError for a missing file, and UserError for broken YAML, a word without "=", an unknown key (it
    names the nearest valid one) and a value of the wrong type.
    """
    layers = [*(_files(Path(path)) if path is not None else []), ("the command line", _words(overrides))]
    config = _merged(OmegaConf.structured(Config), layers, origin=str(path or "the command line"))
    if not config.name:
        config = dataclasses.replace(config, name=Path(path).stem if path is not None else "lumrec")
    return config


def with_words(config: Config, words: Sequence[str], *, origin: str) -> Config:
    """`config` with `key=value` words over it; raises as `load` does, naming `origin` as where the words stand."""
    return _merged(OmegaConf.structured(config), [(origin, _words(words))], origin=origin)


def _merged(merged: Any, layers: Sequence[tuple[str, Any]], *, origin: str) -> Config:
    """The layers over what `merged` holds, each over the one before it, as dataclasses."""
    for name, values in layers:
        unknown = [key for key, _ in _leaves(values) if not _is_valid(key)]
        if unknown:
            raise UserError(f"{name}: unknown key {unknown[0]!r}{_suggestion(unknown[0])}")
        try:
            merged = OmegaConf.merge(merged, values)
        except (OmegaConfBaseException, TypeError) as error:
            raise UserError(f"{name}: {_explain(error, values)}") from None
    try:
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {_explain(error, {})}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain dictionaries and lists."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """A config as YAML, in the order of declaration; `load` reads it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def leaves(config: Any) -> dict[str, Any]:
    """A config as a flat dictionary, dotted key → value; lists and empty sections are values."""
    return dict(_leaves(to_dict(config)))


def _files(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """(name, content) of a YAML file and of the files it builds on, the deepest first."""
    if path.resolve() in above:
        raise UserError(f"{path}: base files in a circle: {' → '.join(map(str, [*above, path]))}")
    if not path.is_file():
        near = sorted(str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise MissingFileError(
            f"no config file {path} (from {Path.cwd()})" + (f"; there are: {', '.join(near)}" if near else "")
        )
    try:
        content = OmegaConf.load(path)
        values = OmegaConf.to_container(content, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, DictConfig) or not isinstance(values, dict):
        raise UserError(f"{path}: expected sections and keys at the top, got a list")
    base = values.pop("base", None) or []
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: base is {base!r}; expected the name of a YAML file, or a list of names")
    below = [layer for name in names for layer in _files(path.parent / name, (*above, path.resolve()))]
    return [*below, (str(path), values)]


def _words(words: Sequence[str]) -> dict[str, Any]:
    """key=value words as nested dictionaries; a scalar stays text, which the field's type then reads."""
    nested: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"got {word!r} on the command line; expected key=value, such as model.dim=64")
        value: Any = None if text == "null" else text
        if text[:1] in ("[", "{"):
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                raise UserError(f"{word!r}: the value is not a valid YAML list or mapping") from None
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"{word!r} contradicts another word, which gives {section!r} a value")
        place[last] = value
    return nested


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, values


def _type_at(key: str) -> Any:
    """The declared type of a dotted key (of an optional section the section's); None where there is no such key."""
    kind: Any = Config
    for part in key.split("."):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            kind = _fields(kind).get(part)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return None
    return kind


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    return {name: _section(hint) for name, hint in get_type_hints(kind).items()}


def _section(hint: Any) -> Any:
    """The dataclass of an optional section; any other type as it is."""
    sections = [kind for kind in get_args(hint) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    return sections[0] if get_origin(hint) is Union and sections else hint


def _is_valid(key: str) -> bool:
    return _type_at(key) is not None


def valid_keys() -> list[str]:
    """Every dotted key of a config; "<name>" stands for a name of the user's own (a feature, a table)."""

    def walk(kind: Any, prefix: str) -> Iterator[str]:
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            for name, inner in _fields(kind).items():
                yield from walk(inner, f"{prefix}.{name}" if prefix else name)
        elif get_origin(kind) is dict:
            yield from walk(get_args(kind)[1], f"{prefix}.<name>")
        else:
            yield prefix

    return list(walk(Config, ""))


def _suggestion(key: str) -> str:
    """The nearest valid keys, as the end of a sentence: by the whole path, else by the last name anywhere."""
    keys, last = valid_keys(), key.split(".")[-1]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if not near:
        names = {valid.split(".")[-1] for valid in keys}
        alike = difflib.get_close_matches(last, sorted(names), n=1, cutoff=0.6)
        alike = alike or sorted(name for name in names if last in name.split("_"))
        near = [valid for valid in keys if valid.split(".")[-1] in alike][:3]
    if not near:
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    return f"; the nearest valid key is {' or '.join(map(repr, near))}"


def _explain(error: Exception, values: Any) -> str:
    """OmegaConf's complaint in one line: the key, what was got, what was expected."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not given, and has no default"
    for key, value in _leaves(values):
        try:
            OmegaConf.merge(OmegaConf.structured(Config), _nested(key, value))
        except (OmegaConfBaseException, TypeError):
            kind = _type_at(key)
            expected = str(kind).replace("typing.", "") if get_args(kind) else kind.__name__
            return f"{key}: got {value!r}, expected {'a section (a mapping of keys)' if _is_section(key) else expected}"
    return str(error).splitlines()[0]


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast("dict[str, Any]", value)


def _is_section(key: str) -> bool:
    kind = _type_at(key)
    return dataclasses.is_dataclass(kind) or get_origin(kind) is dict
