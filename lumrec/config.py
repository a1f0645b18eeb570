"""The root config: defaults < YAML file < key=value words. Each section is a dataclass beside the code it configures.

    config = load("configs/ml-1m.yaml", ["model.dim=32", "pretrain.train.epochs=4"])

A YAML file may name others that it builds on, relative to itself, each over the one before it: `base: ml-1m.yaml` or
`base: [ml-1m.yaml, models/19m.yaml]`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, cast, get_args, get_origin

from lumrec import limits
from lumrec.data.prepare import DataConfig
from lumrec.data.schema import SchemaConfig
from lumrec.errors import MissingFileError, UserError
from lumrec.pipeline import PipelineConfig
from lumrec.query.inspect import InspectConfig
from lumrec.query.stage import QueryConfig
from lumrec.train.lum import ModelConfig
from lumrec.train.pretrain import PretrainConfig, parse_fold
from lumrec.train.rank import RankConfig
from lumrec.train.retrieve import RetrieveConfig
from lumrec.tune import TuneConfig
from lumrec.typed_yaml import (
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
)
from lumrec.warm_up import WarmUpConfig

MOST_NESTED = 4  # a pipeline's stages lie in its folder, and a pipeline may lie in another


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
    seed: int = limits.seed()
    fold: str = ""
    threads: int = limits.count(0, most=4096)
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

    def check(self, at: str) -> None:
        """Raises UserError for names that no folder can have, and for sections that contradict one another."""
        limits.check_run_name("run", self.run, parts=MOST_NESTED)
        limits.check_run_name("name", self.name)
        if not self.runs_dir:
            raise UserError("runs_dir: got '', expected the folder of the runs, such as runs")
        if not all(self.inputs.lums):
            raise UserError(f"inputs.lums: got {list(self.inputs.lums)}, expected the names of runs")
        parse_fold(self.fold)
        pack, window = self.pretrain.packing.events_per_pack, self.model.max_events
        if pack < window:
            raise UserError(
                f"pretrain.packing.events_per_pack is {pack}, less than model.max_events {window}: not even one full "
                "window fits; raise the one or lower the other"
            )


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file (None: defaults alone) with `key=value` words over it.

    In a word, key is dotted ("model.dim=64", 'schema.features."a.b".role=item'), and the value of a list or a mapping
    is YAML ("seeds=[0, 1]"). Text stays as it is written, in words and in files (lumrec/typed_yaml.py).
    Raises MissingFileError for a missing file, and UserError for broken YAML, a word without "=", an unknown key (it
    names the nearest valid one), a value of the wrong type, and one that cannot work (see lumrec/limits.py).
    """
    layers = [*(_files(Path(path)) if path is not None else []), *_words(overrides, "the command line")]
    config = _merged(defaults(Config), layers, origin=str(path or "the command line"))
    if not config.name:
        config = dataclasses.replace(config, name=Path(path).stem if path is not None else "lumrec")
    limits.check(config)
    return config


def with_words(config: Config, words: Sequence[str], *, origin: str) -> Config:
    """`config` with `key=value` words over it; raises as `load` does, naming `origin` as where the words stand."""
    config = _merged(to_dict(config), _words(words, origin), origin=origin)
    try:
        limits.check(config)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    return config


def _merged(values: dict[str, Any], layers: Sequence[tuple[str, Any]], *, origin: str) -> Config:
    """The layers over plain values, each over the one before it, as dataclasses."""
    for name, given in layers:
        try:
            values = overlaid(Config, values, given)
        except UnknownKey as error:
            key = dotted(error.path)
            raise UserError(f"{name}: unknown key {key!r}{_suggestion(key)}") from None
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    try:
        return cast(Config, built(Config, values))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain dictionaries and lists."""
    return dataclasses.asdict(config)


def leaves(config: Any) -> dict[str, Any]:
    """A config as a flat dictionary, dotted key → value; lists and empty sections are values."""
    return {dotted(path): value for path, value in _leaves(to_dict(config))}


def as_word(value: Any) -> str:
    """A value of `leaves` as `load` reads it from a word."""
    if isinstance(value, str):
        return value
    text = dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _files(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """(name, content) of a YAML file and of the files it builds on, the deepest first."""
    if path.resolve() in above:
        raise UserError(f"{path}: base files in a circle: {' → '.join(map(str, [*above, path]))}")
    if not path.is_file():
        near = sorted(str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise MissingFileError(
            f"no config file {path} (from {Path.cwd()})" + (f"; there are: {', '.join(near)}" if near else "")
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
    below = [layer for name in names if name for layer in _files(path.parent / name, (*above, path.resolve()))]
    return [*below, (str(path), values)]


_KEY = r'"(?:[^"\\]|\\.)*"|[^."=]+'
_WORD = re.compile(rf"((?:{_KEY})(?:\.(?:{_KEY}))*)=(.*)", re.DOTALL)


def _words(words: Sequence[str], origin: str) -> list[tuple[str, Any]]:
    """Each key=value word as a layer: (origin, nested mappings)."""
    layers = []
    for word in words:
        match = _WORD.fullmatch(word)
        if not match:
            raise UserError(f"got {word!r} on the command line; expected key=value, such as model.dim=64")
        path = tuple(str(parse(part, word)) if part[0] == '"' else part for part in re.findall(_KEY, match[1]))
        given: Any = Text(match[2])
        if match[2][:1] in ("[", "{") and _type_at(path) not in (str, int, float, bool):
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


def _type_at(path: Sequence[str]) -> Any:
    """The declared type of a key; None where there is no such key."""
    kind: Any = Config
    for name in path:
        kind = section_of(kind)
        if dataclasses.is_dataclass(kind):
            kind = field_types(kind).get(name)
        else:
            kind = get_args(kind)[1] if get_origin(kind) is dict else None
    return kind


def valid_keys() -> list[str]:
    """Every dotted key of a config; "<name>" stands for a name of the user's own (a feature, a table)."""

    def walk(kind: Any, prefix: str) -> Iterator[str]:
        kind = section_of(kind)
        if dataclasses.is_dataclass(kind):
            for name, inner in field_types(kind).items():
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
