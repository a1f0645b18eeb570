"""Which tensor of the source goes to which parameter, by name."""

import fnmatch
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lumrec.run.errors import UserError
from lumrec.warm_start.audit import Audit, refuse
from lumrec.warm_start.quantized import is_companion
from lumrec.warm_start.rules import Rule, Rules, nearest
from lumrec.warm_start.sources import Source, open_source

SECOND = "optimizer_source:"  # in front of the names of a second source


def match_names(
    source: Source,
    rules: Rules,
    targets: Mapping[str, Any],
    audit: Audit,
    problems: list[str],
    *,
    is_whole: bool = True,
) -> dict[str, tuple[str, str, Rule]]:
    """Target → (name in the source without its prefix, with it, rule). is_whole: the targets are all of the model's."""
    theirs, collisions = without_prefix(source, rules)
    problems += collisions
    if rules.source_prefix and not any(full.startswith(rules.source_prefix) for full in source.tensors):
        near = nearest(rules.source_prefix, source.tensors)
        problems.append(f"source_prefix {rules.source_prefix!r} begins no name of the source{near}")
    unused = _listed("unused", rules.unused, theirs, problems)
    fresh = _listed("fresh", rules.fresh, targets, problems)
    pairs: dict[str, tuple[str, str, Rule]] = {}
    used = set()
    for rule in rules.rules:
        found = [name for name in theirs if name not in unused and _matches(rule, name)]
        if not found:
            hidden = " but what is listed as unused" if any(_matches(rule, name) for name in unused) else ""
            problems.append(
                f"rule {rule.source!r} ({rule.match}) matches nothing{hidden}{nearest(rule.source, theirs)}"
            )
        for name in found:
            target = _target_of(rule, name)
            if target not in targets:
                problems.append(
                    f"{name!r} is to fill {target!r}, which the model does not have{nearest(target, targets)}"
                )
            elif target in fresh:
                problems.append(f"{target!r} is listed as fresh, and rule {rule.source!r} fills it")
            elif target in pairs:
                problems.append(f"{target!r} is matched twice: by {pairs[target][2].source!r} and {rule.source!r}")
            else:
                pairs[target] = (name, theirs[name], rule)
            used.add(name)
    for name in theirs:
        if name not in used and name not in unused:
            near = nearest(name, targets) if is_whole else ""
            problems.append(f"{name!r} of the source is left over{near}; give it a rule or list it as unused")
    for target in targets:
        if target not in pairs and target not in fresh:
            problems.append(f"{target!r} has no source{nearest(target, theirs)}; give it a rule or list it as fresh")
    _check_ties(targets, pairs, problems)
    audit.fresh = [name for name in targets if name not in pairs]
    audit.unused = [theirs[name] for name in theirs if name not in used]
    audit.others = list(source.others)
    return pairs


def check_names(source: Source, rules: Rules, tables: Collection[str], before: str) -> None:
    """Raises PlanError for names of rules that the source does not have, or that are of tables that the model does not
    have, before there is a model.

    tables: of the model. before: what begins the name of its collection of tables.
    """
    audit, problems = Audit(str(source.path), source.kind), list[str]()
    collection = f"{before}tables.embedding_bags."
    targets = dict.fromkeys((f"{collection}{table}.weight" for table in tables), None)
    # Of all else it is not known yet whether the model has it.
    others = [target for target, _, _ in targets_of(source, rules) if not target.startswith(collection)]
    named = {**targets, **dict.fromkeys(others)}
    fresh = [one for one in rules.fresh if one.startswith(collection) or any(_is_like(name, one) for name in named)]
    match_names(source, replace(rules, fresh=fresh), named, audit, problems, is_whole=False)
    refuse(audit, problems)


def targets_of(source: Source, rules: Rules) -> Iterator[tuple[str, str, Rule]]:
    """(target, name in the source without its prefix, rule) of each tensor that a rule matches."""
    theirs = without_prefix(source, rules)[0]
    unused = _listed("unused", rules.unused, theirs, [])
    for rule in rules.rules:
        yield from (
            (_target_of(rule, name), name, rule) for name in theirs if name not in unused and _matches(rule, name)
        )


def _check_ties(targets: Mapping[str, Any], pairs: Mapping[str, tuple[str, str, Rule]], problems: list[str]) -> None:
    """Parameters that share their memory must have one source."""
    spans = []  # device, first byte, byte after the last one (of one that is not contiguous: its first number), target
    for target in pairs:
        value = targets[target]
        if (
            type(value) in (Tensor, nn.Parameter)
            and value.layout == torch.strided
            and value.numel()
            and not value.is_meta
        ):
            length = value.nbytes if value.is_contiguous() else value.element_size()
            spans.append((str(value.device), value.data_ptr(), value.data_ptr() + length, target))
    last = ("", 0, 0, "")
    for device, start, end, target in sorted(spans):
        if device == last[0] and start < last[2]:
            one, two = pairs[last[3]][1], pairs[target][1]
            if one != two or targets[last[3]].shape != targets[target].shape:
                problems.append(f"{last[3]!r} and {target!r} share their memory, and get {one!r} and {two!r}")
            last = max(last, (device, start, end, target), key=itemgetter(2))
        else:
            last = device, start, end, target


def _listed(what: str, patterns: list[str], names: Mapping[str, Any], problems: list[str]) -> set[str]:
    listed = set()
    for pattern in patterns:
        found = [name for name in names if _is_like(name, pattern)]
        if not found:
            problems.append(f"{what} lists {pattern!r}, which matches nothing{nearest(pattern, names)}")
        listed |= set(found)
    return listed


def _is_like(name: str, pattern: str) -> bool:
    """Whether a name is a glob pattern's; a name with brackets in it is its own."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _matches(rule: Rule, name: str) -> bool:
    if any(_is_like(name, pattern) for pattern in rule.exclude):
        return False
    if rule.match == "exact":
        return name == rule.source
    if rule.match == "prefix":
        return name.startswith(rule.source)
    return re.fullmatch(rule.source, name) is not None


def _target_of(rule: Rule, name: str) -> str:
    if rule.target is None:
        return name
    if rule.match == "exact":
        return rule.target
    if rule.match == "prefix":
        return rule.target + name.removeprefix(rule.source)
    match = re.fullmatch(rule.source, name)
    assert match is not None
    try:
        return match.expand(rule.target)
    except (re.error, IndexError) as error:
        raise UserError(f"rule {rule.source!r}: target {rule.target!r} cannot be expanded: {error}") from None


def without_prefix(source: Source, rules: Rules) -> tuple[dict[str, str], list[str]]:
    """Name without source_prefix → whole name, and problems. State and scales of bytes are left out."""
    theirs: dict[str, str] = {}
    problems = []
    for full in source.tensors:
        is_state = bool(rules.optimizer_prefix) and full.startswith(rules.optimizer_prefix)
        if is_state or full.startswith(SECOND) or is_companion(full, source):
            continue
        name = full.removeprefix(rules.source_prefix)
        if name in theirs:
            problems.append(
                f"{theirs[name]!r} and {full!r} of the source are both {name!r} without source_prefix "
                f"{rules.source_prefix!r}: give another source_prefix, or save them under names of their own"
            )
        theirs[name] = full
    return theirs, problems


def with_second_source(source: Source, rules: Rules, *, verify: bool = True) -> tuple[Source, Rules]:
    """The source with the tensors of rules.optimizer_source beside its own, and rules that find them.

    Raises UserError where optimizer_prefix begins no name.
    """
    second = source
    if rules.optimizer_source:
        second = open_source(Path(rules.folder) / rules.optimizer_source, verify=verify, key="optimizer_source")
    if rules.optimizer_prefix and not any(name.startswith(rules.optimizer_prefix) for name in second.tensors):
        near = nearest(rules.optimizer_prefix, second.tensors)
        raise UserError(f"optimizer_prefix {rules.optimizer_prefix!r} begins no name of {second.path}{near}")
    if second is source:
        return source, rules
    tensors = {f"{SECOND}{name}": stored for name, stored in second.tensors.items()}
    values = {f"{SECOND}{name}": value for name, value in second.values.items()}
    both = replace(source, tensors={**source.tensors, **tensors}, values={**source.values, **values})
    return both, replace(rules, optimizer_prefix=f"{SECOND}{rules.optimizer_prefix}")
