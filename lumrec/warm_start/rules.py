"""The rules of a warm start: which tensor of the source each parameter gets, and what may differ. YAML.

source_prefix: model.            # cut from the front of the source's names
optimizer_prefix: optim.state.   # state lies under <optimizer_prefix><parameter>.<entry>
rules:
  - {source: dense_arch., target: bottom., match: prefix}
  - source: sparse.embedding_bags.item.weight
    target: tables.embedding_bags.item.weight
    rows: remap
    source_vocabulary: item.csv  # key, row
    target_vocabulary: runs/shop-prepare/vocabulary/item.parquet
    new_rows: mean
unused: [over_arch.*]            # of the source, left behind on purpose
fresh: [knowledge.*]             # of the model, stay as they were initialised
"""

import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from yaml.representer import RepresenterError

from lumrec.run.errors import UserError
from lumrec.run.typed_yaml import Text, built, defaults, overlaid, parse, read, to_yaml

MATCHES = ("exact", "prefix", "regex")
ROWS = ("error", "grow", "remap", "hash")
COLUMNS = ("error", "slice", "pad_zero", "pad_fresh", "slice_pad_zero")
NEW_ROWS = ("", "mean", "category_mean", "unknown", "zero", "random")
HASHES = ("modulo", "splitmix64", "fnv1a64")
KINDS = ("", "adagrad", "rowwise_adagrad", "adam", "lamb", "partial_rowwise_adam", "partial_rowwise_lamb", "sgd")


@dataclass(frozen=True)
class Rule:
    """What one parameter, or several alike, get.

    match: "exact" names one tensor; "prefix" all whose name begins with `source`, which `target` replaces; "regex" all
    that `source` matches as a whole, `target` with \\1 or \\g<name>. target: null = the source's name. exclude: glob
    patterns of source names that this rule leaves to others.

    rows: "error" (the same number, the same order), "grow" (the source's rows come first), "remap" (by raw id through
    both vocabularies), "hash" (the source's row of a raw id is a hash of it). A vocabulary is a Parquet or CSV file
    with a column of raw ids and one of rows (source_columns, target_columns); relative to the rules file. keep_rows:
    rows without a raw id that keep their number, such as 0 for "unknown". hash: "modulo" (whole numbers), "splitmix64"
    (whole numbers) or "fnv1a64" (text), of the id, modulo the source's rows. collisions: "error", or "share": ids that
    had one row in the source begin with equal rows; so a vocabulary may be written by any hash. min_joined: lowest
    share of the target's raw ids that the source's vocabulary must have, and the categories. lookalikes: "error" where
    an id that is missing there differs only in its form from one that is there (`7` and `7.0`, `7` and `007`, `AB` and
    `ab`, trailing blanks), or "new".
    new_rows: what rows without a source begin with, to be stated where there are any: "mean" of the rows taken,
    "category_mean" of those of the same category (categories: file of key, category; "mean" where a category has none),
    "unknown" (as row 0), "zero", or "random" (as the model was initialised).

    columns: "error" (as many), "slice" (the first ones), "pad_zero" or "pad_fresh" (the source's come first; new ones
    are zero, or as initialised), "slice_pad_zero" (some of the source's, as parts says, and new ones that are zero).
    parts: [[source column, number, target column], …] where old columns are not the first. dtype: "up" (no number may
    lose precision) or "cast" (rounded; what the target's dtype cannot hold is an error). quantized: how a table of
    bytes is read as numbers, value = byte * scale + bias of its row: "int8" (TorchRec's quantize_embeddings: scale and
    bias as fp16 in front of the row, or as <name>_qscale and <name>_qbias), "int8_fused" (FBGEMM's
    FloatToFused8BitRowwiseQuantized: as fp32 behind the row).

    optimizer: "auto" keeps the state, converted where it has to be, and drops it with the reason where its meaning is
    not known or another; "keep" refuses then; "drop". optimizer_kind: the source's optimizer, where the entries do not
    say it (FBGEMM calls the first state of every optimizer momentum1).

    check: a Parquet file of rows that production has, compared with the model's after the takeover: columns "key" (a
    raw id; without a vocabulary "row") and "values" (list of the source's columns). tolerance: highest difference.
    """

    source: str
    target: str | None = None
    match: str = "exact"
    exclude: list[str] = field(default_factory=list)
    rows: str = "error"
    source_vocabulary: str = ""
    target_vocabulary: str = ""
    source_columns: list[str] = field(default_factory=lambda: ["key", "row"])
    target_columns: list[str] = field(default_factory=lambda: ["key", "row"])
    keep_rows: list[int] = field(default_factory=list)
    hash: str = "modulo"
    collisions: str = "error"
    min_joined: float = 0.1
    lookalikes: str = "error"
    new_rows: str = ""
    categories: str = ""
    columns: str = "error"
    parts: list[list[int]] = field(default_factory=list)
    dtype: str = "up"
    quantized: str = ""
    optimizer: str = "auto"
    optimizer_kind: str = ""
    check: str = ""
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Rules:
    """All rules, what is left behind and what stays fresh on purpose. folder: where relative paths begin.

    optimizer_source: another checkpoint that holds the optimizer's state, under optimizer_prefix; "": the source does.
    optimizer_parameters: parameters in the order of the source's optimizer, where it keeps its state by index
    (torch.optim's `state: {0: …}`), as the source names them without source_prefix.
    """

    rules: list[Rule] = field(default_factory=list)
    source_prefix: str = ""
    optimizer_prefix: str = ""
    optimizer_source: str = ""
    optimizer_parameters: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    folder: str = "."


_CHOICES = {
    "match": MATCHES,
    "rows": ROWS,
    "columns": COLUMNS,
    "new_rows": NEW_ROWS,
    "hash": HASHES,
    "collisions": ("error", "share"),
    "lookalikes": ("error", "new"),
    "dtype": ("up", "cast"),
    "quantized": ("", "int8", "int8_fused"),
    "optimizer": ("auto", "keep", "drop"),
    "optimizer_kind": KINDS,
}
# Settings that do nothing but under some values of `rows`.
_ONLY_WITH = {
    "keep_rows": ("remap",),
    "hash": ("hash",),
    "collisions": ("remap", "hash"),
    "min_joined": ("remap", "hash"),
    "lookalikes": ("remap", "hash"),
    "source_columns": ("remap",),
    "target_columns": ("remap", "hash"),
}


def read_rules(rules: "str | Path | Mapping[str, Any] | Rules") -> Rules:
    """Rules of a YAML file, or of a mapping of the same form. Relative paths begin at the file's folder.

    Raises MissingFileError for a missing file; UserError for broken YAML, an unknown key or value (with the nearest
    valid one), and settings that contradict one another.
    """
    origin = "rules"
    if isinstance(rules, (str, Path)):
        path = Path(rules)
        origin = str(path)
        rules = _parse(origin, read(path, "warm_start.rules"), str(path.parent))
    elif not isinstance(rules, Rules):
        try:
            text = to_yaml(rules)
        except RepresenterError as error:
            raise UserError(f"{origin} hold {error.args[-1]!r}; expected text, numbers, lists and mappings") from None
        rules = _parse(origin, parse(text, origin))
    for rule in rules.rules:
        _check(f"{origin}, rule {rule.source!r}", rule)
    names = ["optimizer_parameters"] if rules.optimizer_parameters else []
    names += [f"optimizer_kind of rule {rule.source!r}" for rule in rules.rules if rule.optimizer_kind]
    if names and not (rules.optimizer_prefix or rules.optimizer_source):
        raise UserError(f"{origin}: {names[0]} is given without optimizer_prefix, so no optimizer state is read")
    return rules


def _parse(origin: str, content: Any, folder: str = ".") -> Rules:
    if not isinstance(content, Mapping):
        what = "a list" if isinstance(content, list) else "nothing" if content is None else "text"
        raise UserError(f"{origin} holds {what}; expected keys such as rules, unused and fresh")
    content = {"folder": Text(folder, is_plain=False), **content}
    _check_keys(origin, content, Rules.__dataclass_fields__)
    rules = content.get("rules", [])
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        raise UserError(f"{origin}: rules is {rules!r}; expected a list of mappings, each with source and target")
    for rule in rules:
        _check_keys(f"{origin}, rule {rule.get('source', rule)!r}", rule, Rule.__dataclass_fields__)
        if "source" not in rule:
            raise UserError(f"{origin}: rule {dict(rule)!r} has no source")
    try:
        return cast(Rules, built(Rules, overlaid(Rules, defaults(Rules), content)))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _check_keys(where: str, content: Mapping[str, Any], known: Collection[str]) -> None:
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")


def _check(where: str, rule: Rule) -> None:
    for name, choices in _CHOICES.items():
        value = getattr(rule, name)
        if value not in choices:
            raise UserError(f"{where}: {name} is {value!r}; expected one of {', '.join(filter(None, choices))}")
    needed = {
        "source_vocabulary": rule.rows == "remap",
        "target_vocabulary": rule.rows in ("remap", "hash"),
        "categories": rule.new_rows == "category_mean",
    }
    for name, is_needed in needed.items():
        if is_needed != bool(getattr(rule, name)):
            said = "has no" if is_needed else "has"
            reason = "new_rows=" + rule.new_rows if name == "categories" else "rows=" + rule.rows
            raise UserError(f"{where} {said} {name}, with {reason}: give both or neither")
    if rule.new_rows == "category_mean" and rule.rows not in ("remap", "hash"):
        raise UserError(f"{where}: new_rows=category_mean needs the raw ids of the rows; say rows=remap or hash")
    default = Rule(source="")
    for name, rows in _ONLY_WITH.items():
        if getattr(rule, name) != getattr(default, name) and rule.rows not in rows:
            if name == "keep_rows" and rule.rows == "hash":
                raise UserError(
                    f"{where}: keep_rows is {rule.keep_rows}, but with rows=hash all the source's rows are of raw ids: "
                    "say new_rows for rows that have none"
                )
            raise UserError(f"{where}: {name} has no effect with rows={rule.rows}; it is of rows={' and '.join(rows)}")
    for name in ("source_columns", "target_columns"):
        if len(getattr(rule, name)) != 2:
            raise UserError(f"{where}: {name} is {getattr(rule, name)}; expected [<raw id>, <row>] of its vocabulary")
    for part in rule.parts:
        if len(part) != 3 or min(part) < 0 or part[1] < 1:
            raise UserError(f"{where}: parts has {part}; expected [source column, number of columns, target column]")
    if rule.parts and rule.columns == "error":
        raise UserError(f"{where}: parts says that columns move; say too what is new, by columns=pad_zero, …")
    if not 0 <= rule.min_joined <= 1:
        raise UserError(f"{where}: min_joined is {rule.min_joined}; expected a share between 0 and 1")
    if not 0 <= rule.tolerance < math.inf:
        raise UserError(f"{where}: tolerance is {rule.tolerance}; expected 0 or more")
    if rule.match == "regex":
        try:
            re.compile(rule.source)
        except re.error as error:
            raise UserError(f"{where}: source is no regular expression: {error}") from None
    if rule.match != "exact" and rule.check:
        raise UserError(f"{where}: check is of one table; expected match=exact")
    for name, has_effect, wanted in (
        ("exclude", rule.match != "exact", "match=prefix or regex"),
        ("tolerance", bool(rule.check), "a check"),
        ("optimizer_kind", rule.optimizer != "drop", "another value of optimizer"),
    ):
        if getattr(rule, name) != getattr(default, name) and not has_effect:
            raise UserError(f"{where}: {name} has no effect without {wanted}")


def nearest(name: str, names: Collection[str], number: int = 2) -> str:
    """The nearest of the names as the end of a sentence; by their last part where the whole is too far."""
    near = difflib.get_close_matches(name, list(names), n=number, cutoff=0.6)
    if not near:
        near = [other for other in names if other.split(".")[-2:] == name.split(".")[-2:]][:number]
    near = near or difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    return f"; the nearest is {' or '.join(map(repr, near))}" if near else ""
