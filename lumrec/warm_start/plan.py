"""What each parameter of a model gets from a source, worked out from names, shapes and vocabularies; no number is read.

Shape suffixes: R rows, C columns of the target. A tensor of one dimension has one column, of more than two those of all
its further dimensions; a scalar is one row.
"""

import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lumrec.errors import UserError
from lumrec.train.parallel import world_size
from lumrec.train.run import on_rank_zero
from lumrec.warm_start.audit import Audit, AuditRow
from lumrec.warm_start.rows import RowMap, map_rows
from lumrec.warm_start.rules import Rule, Rules, nearest
from lumrec.warm_start.sources import Source

SUMS_OF_SQUARES = ("momentum1", "sum")  # FBGEMM's and torch's name of what Adagrad keeps


class PlanError(UserError):
    """Rules that do not fit; the message lists all problems, `audit` says what was found besides."""

    def __init__(self, message: str, audit: Audit) -> None:
        super().__init__(message)
        self.audit = audit


class Shard(NamedTuple):
    """A rank's part of a tensor [R, C]: a view on its numbers, and the row and column at which it begins."""

    values: Tensor
    first_row: int
    first_column: int


class Copy(NamedTuple):
    """One tensor of the source into one of the target.

    parts: (source column, number, target column). average: all columns of the source become one, their mean. spread:
    the one column of the source goes to every column that has a source. fill: what new rows get; fresh_columns: new
    columns stay as they are, and are zero otherwise.
    """

    name: str
    source: str
    rows: RowMap
    parts: list[tuple[int, int, int]]
    fill: str
    fresh_columns: bool = False
    average: bool = False
    spread: bool = False


@dataclass
class Plan:
    """The copies (states among them), the tensors that they go to, as far as this rank holds them, and the audit."""

    audit: Audit
    copies: list[Copy] = field(default_factory=list)
    targets: dict[str, Any] = field(default_factory=dict)


def shards_of(value: Any) -> list[Shard]:
    """This rank's parts of a tensor, sharded by TorchRec or FSDP2 or not, as views with two dimensions."""
    if isinstance(value, ShardedTensor):
        parts = [(part.tensor, tuple(part.metadata.shard_offsets)) for part in value.local_shards()]
    elif isinstance(value, DTensor):
        _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        parts = [(value.to_local(), tuple(offset))]
    else:
        parts = [(value.detach(), (0,) * value.dim())]
    shards = []
    for tensor, offset in parts:
        if tensor.dim() > 2 and any(offset[2:]):
            raise UserError(
                f"a tensor of {tensor.dim()} dimensions is sharded along the last ones; expected rows or columns"
            )
        view = (
            tensor.detach().reshape(tensor.shape[0] if tensor.dim() else 1, -1) if tensor.numel() else tensor.detach()
        )
        assert view.data_ptr() == tensor.data_ptr(), "a copy would be filled in place of the parameter"
        if tensor.numel():
            inner = math.prod(tensor.shape[2:])
            shards.append(Shard(view, offset[0] if offset else 0, offset[1] * inner if len(offset) > 1 else 0))
    return shards


def flat(size: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a size."""
    return (size[0] if size else 1, math.prod(size[1:]))


def make_plan(model: nn.Module, source: Source, rules: Rules, optimizer: Any = None) -> Plan:
    """The plan of a warm start of `model` (plain, or under DMP). Collective.

    optimizer: what holds the state that is to go on, such as TorchRec's CombinedOptimizer or lumrec's; None takes the
    fused optimizer of a DMP alone. Raises PlanError, which lists every problem at once: rules that match nothing, a
    parameter that two rules match or none, tensors of the source that are not listed as unused, and all that differs
    without leave.
    """
    targets = {name: value for name, value in model.state_dict().items() if hasattr(value, "size")}
    audit = Audit(str(source.path), source.kind)
    plan = Plan(audit)
    problems: list[str] = []
    pairs = _match(source, rules, targets, audit, problems)
    states = _states(model, optimizer)
    for target, (name, full, rule) in pairs.items():
        try:
            _add(plan, source, rules, rule, name, full, target, targets[target], states.get(target, {}))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise PlanError(
            f"the model cannot start from {source.path} by these rules; nothing was changed:{shown}{more}", audit
        )
    return plan


def _match(
    source: Source, rules: Rules, targets: Mapping[str, Any], audit: Audit, problems: list[str]
) -> dict[str, tuple[str, str, Rule]]:
    """Target → (name in the source without its prefix, with it, rule)."""
    theirs = {}
    for full in source.tensors:
        if not (rules.optimizer_prefix and full.startswith(rules.optimizer_prefix)):
            theirs[full.removeprefix(rules.source_prefix)] = full
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
                problems.append(f"{name!r} is to go to {target!r}, which the model has not{nearest(target, targets)}")
            elif target in fresh:
                problems.append(f"{target!r} is listed as fresh, and rule {rule.source!r} fills it")
            elif target in pairs:
                problems.append(f"{target!r} is matched twice: by {pairs[target][2].source!r} and {rule.source!r}")
            else:
                pairs[target] = (name, theirs[name], rule)
            used.add(name)
    for name in theirs:
        if name not in used and name not in unused:
            problems.append(
                f"{name!r} of the source is left over{nearest(name, targets)}; give it a rule or list it as unused"
            )
    for target in targets:
        if target not in pairs and target not in fresh:
            problems.append(f"{target!r} has no source{nearest(target, theirs)}; give it a rule or list it as fresh")
    audit.fresh = [name for name in targets if name not in pairs]
    audit.unused = [theirs[name] for name in theirs if name not in used]
    audit.others = list(source.others)
    return pairs


def _listed(what: str, patterns: list[str], names: Mapping[str, Any], problems: list[str]) -> set[str]:
    listed = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            problems.append(f"{what} lists {pattern!r}, which matches nothing{nearest(pattern, names)}")
        listed |= set(found)
    return listed


def _matches(rule: Rule, name: str) -> bool:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in rule.exclude):
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
    return match.expand(rule.target)


def _add(
    plan: Plan,
    source: Source,
    rules: Rules,
    rule: Rule,
    name: str,
    full: str,
    target: str,
    value: Any,
    states: Mapping[str, Any],
) -> None:
    """Adds the copies of one parameter and its state, and its row of the audit."""
    stored = source.tensors[full]
    (source_rows, source_columns), (target_rows, target_columns) = flat(stored.size), flat(tuple(value.size()))
    _check_dtype(rule, name, stored.dtype, target, value.dtype)
    if max(len(stored.size), len(value.size())) > 2 and stored.size[1:] != tuple(value.size())[1:]:
        raise UserError(
            f"{target!r} is {list(value.size())}, {name!r} {list(stored.size)}: only two dimensions may differ"
        )
    parts = _parts(rule, name, source_columns, target, target_columns)

    def row_map_of() -> RowMap:
        folder = Path(rules.folder)
        return map_rows(rule, source_rows=source_rows, target_rows=target_rows, folder=folder, what=repr(target))

    # Vocabularies need more memory than the rows' numbers: one rank has them.
    row_map = on_rank_zero(row_map_of) if rule.target_vocabulary else row_map_of()
    fresh = rule.columns == "pad_fresh"
    plan.copies.append(Copy(target, full, row_map, parts, rule.new_rows, fresh))
    plan.targets[target] = value
    note = "dropped, as the rule says"
    if rule.optimizer != "drop":
        note = _add_states(plan, source, f"{rules.optimizer_prefix}{name}.", rules, plan.copies[-1], value, states)
        if not note.startswith("kept") and rule.optimizer == "keep":
            raise UserError(f"the optimizer state of {target!r} is to be kept, but would be {note}; say optimizer=drop")
    taken = sum(number for _, number, _ in parts)
    plan.audit.rows.append(
        AuditRow(
            target=target,
            source=full,
            target_size=list(value.size()),
            source_size=list(stored.size),
            dtype=_dtype_note(stored.dtype, value.dtype),
            rows_taken=target_rows - row_map.num_new,
            rows_new=row_map.num_new,
            rows_unused=int((~row_map.taken_S).sum()),
            new_rows=rule.new_rows if row_map.num_new else "",
            columns_taken=taken,
            columns_new=target_columns - taken,
            columns_unused=source_columns - taken,
            new_columns=("fresh" if fresh else "zero") if target_columns > taken else "",
            optimizer=note,
        )
    )


def _dtype_note(source: torch.dtype, target: torch.dtype) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in (source, target)]
    return names[0] if source == target else " → ".join(names)


def _check_dtype(rule: Rule, name: str, source: torch.dtype, target_name: str, target: torch.dtype) -> None:
    if source.is_floating_point != target.is_floating_point:
        raise UserError(f"{target_name!r} is {target}, {name!r} {source}: numbers of different kinds are not converted")
    if rule.dtype == "up" and torch.promote_types(source, target) != target:
        raise UserError(
            f"{target_name!r} is {target}, {name!r} {source}: precision is lost; say dtype=cast to allow it"
        )


def _parts(rule: Rule, name: str, source_C: int, target: str, target_C: int) -> list[tuple[int, int, int]]:
    """(source column, number, target column) of all columns that are taken; raises UserError for what has no leave."""
    sizes = f"{target!r} has {target_C:,} columns, {name!r} {source_C:,}"
    if rule.columns == "error" and source_C != target_C:
        wanted = "slice" if source_C > target_C else "pad_zero or pad_fresh"
        raise UserError(f"{sizes}: say what becomes of the others by columns={wanted}")
    parts = [(part[0], part[1], part[2]) for part in rule.parts] or [(0, min(source_C, target_C), 0)]
    for place, (columns, side) in enumerate(((source_C, "source"), (target_C, "target"))):
        starts = sorted((part[2 * place], part[2 * place] + part[1]) for part in parts)
        if starts[-1][1] > columns or any(end > start for (_, end), (start, _) in zip(starts, starts[1:])):
            raise UserError(f"{sizes}: parts {rule.parts} overlap or go beyond the {side}'s columns")
    taken = sum(number for _, number, _ in parts)
    if taken < source_C and not rule.columns.startswith("slice"):
        raise UserError(
            f"{sizes}: {source_C - taken:,} of the source's would be left out; say columns=slice to allow it"
        )
    if taken < target_C and rule.columns == "slice":
        raise UserError(
            f"{sizes}: slice leaves {target_C - taken:,} without a source; say columns=pad_zero or pad_fresh"
        )
    return parts


def _states(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Any]]:
    """Parameter → entry → (size, tensor or None where another rank holds it), equal in order on all ranks.
    Collective."""
    if optimizer is None:
        optimizer = getattr(model, "fused_optimizer", None)
    if optimizer is None:
        return {}
    state = optimizer.state_tensors() if hasattr(optimizer, "state_tensors") else optimizer.state_dict()["state"]
    ours = {
        str(name): {str(entry): value for entry, value in entries.items() if hasattr(value, "size")}
        for name, entries in state.items()
    }
    sizes = {name: {entry: tuple(value.size()) for entry, value in entries.items()} for name, entries in ours.items()}
    everywhere: list[Any] = [sizes]
    if world_size() > 1:
        everywhere = [None] * world_size()
        dist.all_gather_object(everywhere, sizes)
    merged: dict[str, dict[str, Any]] = {}
    for part in everywhere:
        for name, entries in part.items():
            for entry, size in entries.items():
                merged.setdefault(name, {})[entry] = (size, ours.get(name, {}).get(entry))
    return {name: dict(sorted(merged[name].items())) for name in sorted(merged)}


def _add_states(
    plan: Plan, source: Source, prefix: str, rules: Rules, weight: Copy, value: Any, states: Mapping[str, Any]
) -> str:
    """Adds the copies of a parameter's optimizer state; what became of it, in words."""
    stored = {
        name.removeprefix(prefix): name for name in source.tensors if rules.optimizer_prefix and name.startswith(prefix)
    }
    if not stored:
        return "none in the source" if rules.optimizer_prefix else "none: no optimizer_prefix"
    if not states:
        return "dropped: the model's optimizer has no state for it"
    target_size, source_size = tuple(value.size()), source.tensors[weight.source].size
    copies, notes = [], []
    for entry, (size, tensor) in states.items():
        kind = _kind(entry)
        name = next((full for their, full in stored.items() if _kind(their) == kind), None)
        if name is None:
            return f"dropped: the source has {', '.join(sorted(map(_kind, stored)))}, the optimizer needs {kind}"
        ours, theirs = _form(size, target_size), _form(source.tensors[name].size, source_size)
        key = f"{weight.name} {entry}"
        new = weight._replace(name=key, source=name, fill="zero", fresh_columns=False)
        if "" in (ours, theirs) or (ours != theirs and kind != SUMS_OF_SQUARES[0]):
            return f"dropped: {name.removeprefix(prefix)} is {list(source.tensors[name].size)}, here it is {list(size)}"
        if ours == "scalar":
            new = new._replace(rows=RowMap(torch.zeros(1, dtype=torch.int64), 1), parts=[(0, 1, 0)])
        elif ours == "row":
            new = new._replace(average=theirs == "element", parts=weight.parts if theirs == "element" else [(0, 1, 0)])
        elif theirs == "row":
            new = new._replace(spread=True)
        if ours != theirs:
            notes.append("per element → per row (mean)" if ours == "row" else "per row → per element (equal columns)")
        copies.append(new)
        plan.targets[key] = tensor
    plan.copies += copies
    return "kept" + "".join(f", {note}" for note in dict.fromkeys(notes))


def _kind(entry: str) -> str:
    last = entry.split(".")[-1]
    return SUMS_OF_SQUARES[0] if last in SUMS_OF_SQUARES else last


def _form(size: tuple[int, ...], parameter: tuple[int, ...]) -> str:
    """How an entry of the state belongs to its parameter: "element", "row" or "scalar"; "" if in none of these ways."""
    if size == parameter:
        return "element"
    if len(parameter) == 2 and size in ((parameter[0],), (parameter[0], 1)):
        return "row"
    return "scalar" if math.prod(size) == 1 else ""
