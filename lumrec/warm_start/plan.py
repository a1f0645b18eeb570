"""What each parameter of a model gets from a source, worked out from names, shapes and vocabularies; no number is read.

Shape suffixes: R rows, C columns of the target. A tensor of one dimension has one column, of more than two those of all
its further dimensions; a scalar is one row.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parameter import is_lazy

from lumrec.run.distributed import on_rank_zero
from lumrec.run.errors import UserError
from lumrec.warm_start import states
from lumrec.warm_start.audit import Audit, AuditRow, refuse
from lumrec.warm_start.names import SECOND, match_names, with_second_source, without_prefix
from lumrec.warm_start.quantized import dequantised
from lumrec.warm_start.routing import routing_problems
from lumrec.warm_start.rows import RowMap, map_rows
from lumrec.warm_start.rules import Rule, Rules
from lumrec.warm_start.sources import Source

_COUNTS = {torch.int32, torch.int64}
_UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}
_PER = {"": "something unknown", "scalar": "tensor", "shard": "row and column shard"}


class Shard(NamedTuple):
    """A rank's part of a tensor [R, C]: a view on its numbers, and the row and column at which it begins."""

    values: Tensor
    first_row: int
    first_column: int


class Copy(NamedTuple):
    """One tensor of the source into one of the target.

    parts: (source column, number, target column). dtype: of the target. fill: what new rows get. fresh_columns: new
    columns stay as they are, and are zero otherwise. average: all columns of the source become one, their mean. spread:
    the one column of the source goes to every column that has a source. is_positive: no number may be negative.
    """

    name: str
    source: str
    rows: RowMap
    parts: list[tuple[int, int, int]]
    dtype: torch.dtype
    fill: str
    fresh_columns: bool = False
    average: bool = False
    spread: bool = False
    is_positive: bool = False


@dataclass
class Plan:
    """The copies (states among them), the tensors that they go to, as far as this rank holds them, and the audit.

    source: what the copies name. rules: of each filled parameter.
    """

    audit: Audit
    source: Source
    rules: dict[str, Rule] = field(default_factory=dict)
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
        if not tensor.numel():
            continue
        if tensor.dim() > 2 and not tensor.is_contiguous():
            raise UserError(f"a tensor of size {list(tensor.shape)} is not contiguous; call .contiguous() on it first")
        view = tensor.detach()
        if tensor.dim() != 2:
            view = view.unsqueeze(-1) if tensor.dim() == 1 else view.reshape(tensor.shape[0] if tensor.dim() else 1, -1)
        assert view.data_ptr() == tensor.data_ptr(), "a copy would be filled in place of the parameter"
        inner = math.prod(tensor.shape[2:])
        shards.append(Shard(view, offset[0] if offset else 0, offset[1] * inner if len(offset) > 1 else 0))
    return shards


def overlaps(shard: Shard, parts: list[tuple[int, int, int]]) -> Iterator[tuple[slice, slice]]:
    """(columns of the shard, columns of the source) of what the parts put into a shard."""
    first, last = shard.first_column, shard.first_column + shard.values.shape[1]
    for source_column, number, target_column in parts:
        start, stop = max(first, target_column), min(last, target_column + number)
        if start < stop:
            moved = source_column - target_column
            yield slice(start - first, stop - first), slice(start + moved, stop + moved)


def flat(size: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a size."""
    return (size[0] if size else 1, math.prod(size[1:]))


def make_plan(model: nn.Module, source: Source, rules: Rules, optimizer: Any = None) -> Plan:
    """The plan of a warm start of `model` (plain, or under DMP). Collective.

    optimizer: what holds the state that is to go on, such as TorchRec's CombinedOptimizer or lumrec's; None takes the
    fused optimizer of a DMP. Raises PlanError, which lists every problem at once: rules that match nothing, a
    parameter that two rules match or none, tensors of the source that are not listed as unused, and all that differs
    without leave.
    """
    targets = {name: value for name, value in model.state_dict().items() if hasattr(value, "size")}
    audit = Audit(str(source.path), source.kind)
    problems: list[str] = []
    source, rules = with_second_source(source, rules)
    pairs = match_names(source, rules, targets, audit, problems)
    problems += _not_to_be_filled(targets, model.state_dict(), pairs)
    theirs = states.SourceStates(source, rules, without_prefix(source, rules)[0])
    problems += routing_problems(source, targets, pairs)
    source, problems_of_bytes = _with_numbers(source, pairs, targets)
    problems += problems_of_bytes
    plan = Plan(audit, source)
    ours = states.model_states(model, optimizer, targets)
    for target, (name, full, rule) in pairs.items():
        try:
            _add(plan, rules, rule, name, full, target, targets[target])
            note = _state_note(plan, rule, name, targets[target], ours.get(target, []), theirs)
            audit.rows[-1] = replace(audit.rows[-1], optimizer=note)
        except UserError as error:
            problems.append(str(error))
    taken = {copy.source for copy in plan.copies}
    audit.states_left = [name.removeprefix(SECOND) for name in theirs.names if name not in taken]
    refuse(audit, problems)
    return plan


def _not_to_be_filled(targets: Mapping[str, Any], again: Mapping[str, Any], pairs: Mapping[str, Any]) -> Iterator[str]:
    """What has no memory of its own to fill, in words. again: a second state dict, while the first one exists."""
    found: dict[str, list[str]] = {}
    for name, value in targets.items():
        for part, same in zip(_held(value), _held(again[name])):
            reason = (
                "is on the meta device and holds no numbers: call model.to_empty(device=…), or "
                "DistributedModelParallel, first" if part.is_meta else
                "" if name not in pairs else
                "has no size yet: call the model once, first" if is_lazy(part) else
                "is a sparse tensor" if part.layout != torch.strided else
                "is expanded, so that several of its numbers are one: make it contiguous" if _is_expanded(part) else
                "is a copy that the model's state_dict() makes: filling it would not change the model"
                if part.data_ptr() != same.data_ptr() else ""
            )  # fmt: skip
            if reason:
                found.setdefault(reason, []).append(name)
    for reason, names in found.items():
        yield f"{names[0]!r} ({len(names):,} such) {reason}"


def _is_expanded(part: Tensor) -> bool:
    return any(step == 0 and number > 1 for step, number in zip(part.stride(), part.shape))


def _held(value: Any) -> list[Tensor]:
    """What this rank holds of a tensor."""
    if isinstance(value, ShardedTensor):
        return [part.tensor for part in value.local_shards()]
    return [value.to_local() if isinstance(value, DTensor) else value]


def _with_numbers(
    source: Source, pairs: dict[str, tuple[str, str, Rule]], targets: Mapping[str, Any]
) -> tuple[Source, list[str]]:
    """The source with its tables of bytes as numbers, where a rule says how to read them; and problems, without whose
    tables `pairs` is left.
    """
    decoded, problems = {}, []
    for target, (_, full, rule) in list(pairs.items()):
        if rule.quantized:
            try:
                decoded[full] = dequantised(source, full, rule, flat(tuple(targets[target].size()))[1])
            except UserError as error:
                problems.append(str(error))
                pairs.pop(target)
    return replace(source, tensors={**source.tensors, **decoded}), problems


def _add(plan: Plan, rules: Rules, rule: Rule, name: str, full: str, target: str, value: Any) -> None:
    """Adds the copy of one parameter, and its row of the audit."""
    stored = plan.source.tensors[full]
    (source_rows, source_columns), (target_rows, target_columns) = flat(stored.size), flat(tuple(value.size()))
    if not math.prod(stored.size) and math.prod(value.size()):
        raise UserError(
            f"{name!r} is {list(stored.size)} and holds no numbers for {target!r}: list it as unused, and "
            f"{target!r} as fresh"
        )
    _check_dtype(rule, name, stored.dtype, target, value.dtype)
    if max(len(stored.size), len(value.size())) > 2 and stored.size[1:] != tuple(value.size())[1:]:
        raise UserError(
            f"{target!r} is {list(value.size())}, {name!r} {list(stored.size)}: only two dimensions may differ"
        )
    parts = _parts(rule, name, source_columns, target, target_columns)

    def row_map_of() -> RowMap:
        folder = Path(rules.folder)
        return map_rows(rule, name, source_rows=source_rows, target_rows=target_rows, folder=folder, what=repr(target))

    # Vocabularies need more memory than the rows' numbers: one rank has them.
    row_map = on_rank_zero(row_map_of) if rule.target_vocabulary else row_map_of()
    if row_map.num_new and rule.new_rows in ("mean", "category_mean") and not value.dtype.is_floating_point:
        raise UserError(
            f"{target!r} holds whole numbers ({value.dtype}), of which new_rows={rule.new_rows} has no mean"
        )
    fresh = rule.columns == "pad_fresh"
    plan.copies.append(Copy(target, full, row_map, parts, value.dtype, rule.new_rows, fresh))
    plan.targets[target], plan.rules[target] = value, rule
    taken = sum(number for _, number, _ in parts)
    plan.audit.rows.append(
        AuditRow(
            target=target,
            source=full,
            target_size=list(value.size()),
            source_size=list(stored.size),
            dtype=_dtype_note(stored.dtype, value.dtype) + (f" (from {rule.quantized})" if rule.quantized else ""),
            rows_taken=target_rows - row_map.num_new,
            rows_new=row_map.num_new,
            rows_unused=row_map.num_unused,
            new_rows=rule.new_rows if row_map.num_new else "",
            joined=row_map.joined,
            columns_taken=taken,
            columns_new=target_columns - taken,
            columns_unused=source_columns - taken,
            new_columns=("fresh" if fresh else "zero") if target_columns > taken else "",
            optimizer="",
        )
    )


def _dtype_note(source: torch.dtype, target: torch.dtype) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in (source, target)]
    return names[0] if source == target else " → ".join(names)


def _check_dtype(rule: Rule, name: str, source: torch.dtype, target_name: str, target: torch.dtype) -> None:
    if (source.is_floating_point, source.is_complex) != (target.is_floating_point, target.is_complex):
        hint = "; a quantised table is read by quantized=int8 or int8_fused" if source == torch.uint8 else ""
        raise UserError(
            f"{target_name!r} is {target}, {name!r} {source}: numbers of different kinds are not converted{hint}"
        )
    if any(dtype.is_floating_point and dtype.itemsize == 1 for dtype in (source, target)):
        raise UserError(
            f"{target_name!r} is {target}, {name!r} {source}: 8-bit floats are not read; save them as bfloat16"
        )
    if source != target and {source, target} & _UNSIGNED:  # torch can neither compare nor promote them
        raise UserError(f"{target_name!r} is {target}, {name!r} {source}: these are not converted; save them as int64")
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


def _state_note(
    plan: Plan, rule: Rule, name: str, value: Any, ours: list[states.Entry], theirs: states.SourceStates
) -> str:
    """Adds the copies of the state of the parameter that was added last; what became of its state, in words."""
    if rule.optimizer == "drop":
        return "dropped, as the rule says"
    weight = plan.copies[-1]
    try:
        if not theirs.names:
            raise states.Dropped("none: no optimizer_prefix")
        found = theirs.of(name)
        if not ours:
            raise states.Dropped("dropped: the model's optimizer has no state for it")
        source_size = plan.source.tensors[weight.source].size
        stored = states.read_state(found, source_size, kind=rule.optimizer_kind)
        copies, notes = _state_copies(plan, rule, weight, states.read_state(ours, tuple(value.size())), stored, value)
    except states.Dropped as reason:
        note = str(reason) if str(reason).startswith("none") else f"dropped: {str(reason).removeprefix('dropped: ')}"
        if rule.optimizer == "keep":
            raise UserError(
                f"the optimizer state of {weight.name!r} is to be kept, but would be {note}; say optimizer=drop"
            ) from None
        return note
    for copy, tensor in copies:
        plan.copies.append(copy)
        plan.targets[copy.name] = tensor
    notes += [f"saved under {theirs.alias[name]!r}"] if name in theirs.alias else []
    return "kept" + "".join(f", {note}" for note in dict.fromkeys(notes))


def _state_copies(
    plan: Plan, rule: Rule, weight: Copy, ours: states.State, theirs: states.State, value: Any
) -> tuple[list[tuple[Copy, Any]], list[str]]:
    """The copies of a state, with their tensors, and how they are converted. Raises Dropped where they cannot be."""
    copies, notes = [], []
    for meaning in states.matched(ours, theirs):
        to, of = ours.entries[meaning], theirs.entries[meaning]
        form, their_form = ours.forms[meaning], theirs.forms[meaning]
        squares = meaning in states.SQUARES
        new = weight._replace(
            name=f"{weight.name} {to.name}",
            source=of.name,
            dtype=to.dtype,
            fill="zero",
            fresh_columns=False,
            is_positive=squares or meaning == "step",
        )
        if not (of.dtype.is_floating_point and of.dtype.itemsize > 1 or meaning == "step" and of.dtype in _COUNTS):
            raise states.Dropped(f"{of.last} is {of.dtype}, expected floating point of 16 bits or more")
        if rule.dtype == "up" and torch.promote_types(of.dtype, to.dtype) != to.dtype:
            raise states.Dropped(f"{of.last} is {of.dtype}, here {to.dtype}; say dtype=cast to round it")
        if (
            "" in (form, their_form)
            or form != their_form
            and not (squares and {form, their_form} == {"row", "element"})
        ):
            raise states.Dropped(
                f"the source's {of.last} {list(of.size)} has one number per {_PER.get(their_form, their_form)}, the "
                f"model's {list(to.size)} one per {_PER.get(form, form)}"
            )
        if form == "scalar":
            new = new._replace(rows=RowMap(1, 1), parts=[(0, 1, 0)])
        elif form == "shard":
            number = _same_shards(plan, weight, value, to, of)
            new = new._replace(rows=weight.rows.stacked(number), parts=[(0, 1, 0)])
        elif form == "row":
            is_mean = their_form == "element"
            new = new._replace(average=is_mean, parts=weight.parts if is_mean else [(0, 1, 0)])
        elif their_form == "row":
            new = new._replace(spread=True)
        if form != their_form:
            notes.append("per element → per row (mean)" if form == "row" else "per row → per element (equal columns)")
        copies.append((new, to.tensor))
    if "step" not in ours.entries and "exp_avg" in ours.entries:
        notes.append("the step count of the fused optimizer begins at 0")
    return copies, notes


def _same_shards(plan: Plan, weight: Copy, value: Any, ours: states.Entry, theirs: states.Entry) -> int:
    """The number of column shards, of each of which row-wise state has a sum. Raises Dropped unless both sides cut the
    table's columns at the same places.
    """
    stored = plan.source.tensors[weight.source]
    columns = flat(stored.size)[1]
    number = theirs.size[0] // stored.size[0]
    if not isinstance(value, ShardedTensor):
        raise states.Dropped(f"the model's {ours.last} {list(ours.size)} is of column shards, but its table is not")
    here = sorted({shard.shard_offsets[1] for shard in value.metadata().shards_metadata})
    there = sorted({piece.offsets[1] for piece in stored.pieces})
    whole = weight.parts == [(0, columns, 0)] and columns == value.size()[1]
    if not whole or here != there or not number == len(here) == ours.size[0] // value.size()[0]:
        known = f"at columns {there}" if len(there) == number else "where it does not say"
        raise states.Dropped(
            f"the source's {theirs.last} has a sum for each row and column shard; its {number} shards begin {known}, "
            f"those here at {here}"
        )
    return number
