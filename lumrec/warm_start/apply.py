"""Carries out a plan: every rank fills its own shards, reading the source in blocks of rows.

A first pass reads every number that will be taken, so that a bad one is found before anything is changed; it also gives
the means for new rows. Then each shard is filled, and the filled model is compared with what production has.

Shape suffixes: R rows of a shard, C columns of the target, N rows of a block, G categories.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lumrec.run.distributed import gathered, rank, world_size
from lumrec.run.errors import UserError
from lumrec.warm_start.audit import Audit
from lumrec.warm_start.check import check_rows, check_scores, read_checks
from lumrec.warm_start.plan import Copy, Plan, Shard, flat, make_plan, overlaps, shards_of
from lumrec.warm_start.rows import NEW
from lumrec.warm_start.rules import Rules, read_rules
from lumrec.warm_start.sources import Source, open_source

BLOCK_BYTES = 4 << 20
# Highest share of a tensor's numbers that a cast may round to 0: more are another scale, not noise.
MAX_ZEROED = 1e-3


def warm_start(
    model: nn.Module,
    source: str | Path | Source,
    rules: str | Path | Mapping[str, Any] | Rules,
    *,
    optimizer: Any = None,
    check: Callable[[nn.Module], tuple[Tensor, Tensor]] | None = None,
    tolerance: float = 1e-5,
    dry_run: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> Audit:
    """Fills `model` from a production checkpoint, in place, and returns the audit of what was taken. Collective.

    model: any module, plain or under DistributedModelParallel in any plan, of lumrec or not. source: see `open_source`.
    rules: a YAML file or the same as a mapping; see lumrec/warm_start/rules.py. optimizer: its state is filled too (its
    entries must exist: KeyedOptimizerWrapper.init_state makes Adam's); None: the fused optimizer of a DMP. check:
    called with the filled model (in evaluation mode, without gradients); returns the model's scores of some rows and
    production's scores of the same rows, which may differ by `tolerance`. dry_run: make only the audit, from names,
    shapes and vocabularies. block_bytes: how much of the source is in memory at a time.

    Of a table, a rank holds only its own shard, a block, and a row number per row if rows are matched by raw id. The
    source is opened for reading only. Raises MissingFileError, and UserError (PlanError for rules, with all problems)
    before anything in the model is changed; and UserError where the filled model differs from production in its rows
    (`check` of a rule) or scores. In that case the model is filled, and must not be used.
    """
    source = source if isinstance(source, Source) else open_source(source)
    rules = read_rules(rules)
    if not 0 <= tolerance < math.inf:
        raise UserError(f"tolerance is {tolerance}; expected 0 or more")
    plan = make_plan(model, source, rules, optimizer)
    source, checks = plan.source, read_checks(plan, Path(rules.folder))
    if dry_run:
        return plan.audit
    fills = _survey(plan, source, block_bytes)
    with torch.no_grad():
        for copy in plan.copies:
            value = plan.targets[copy.name]
            for shard in shards_of(value) if value is not None else ():
                _fill(shard, copy, source, fills.get(copy.name), block_bytes)
        check_rows(plan, checks)
        if check is not None:
            plan.audit.checked = check_scores(model, check, tolerance)
    plan.audit.applied = True
    return plan.audit


def _read(source: Source, copy: Copy, first: int, last: int) -> Tensor:
    """Rows first … last-1 of a copy's source: all columns, or, for `average`, the mean of those taken (float32)."""
    block_NC = source.read(copy.source, first, last).reshape(last - first, -1)
    if copy.average:
        taken = [column for start, number, _ in copy.parts for column in range(start, start + number)]
        block_NC = block_NC[:, taken].float().mean(1, keepdim=True)
    return block_NC


def _block_rows(source: Source, name: str, block_bytes: int) -> int:
    """How many rows of a tensor are a block."""
    stored = source.tensors[name]
    return max(1, block_bytes // max(1, flat(stored.size)[1] * stored.dtype.itemsize))


def _blocks(source: Source, name: str, block_bytes: int) -> Iterator[tuple[int, int]]:
    rows, step = flat(source.tensors[name].size)[0], _block_rows(source, name, block_bytes)
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


class _Groups(NamedTuple):
    """Sums and counts of the rows that are taken, by category; the last entry is of the rows without one."""

    sums_GC: Tensor
    counts_G: Tensor
    group_S: Tensor | None  # group of each row of the source; None: all in the last one


def _survey(plan: Plan, source: Source, block_bytes: int) -> dict[str, Tensor]:
    """Name of a copy → what its new rows get: a row for each category, then one for all others ([G + 1, source's
    columns]). Collective.

    Each rank reads every world_size-th block. Raises UserError, on all ranks, for numbers that cannot be taken.
    """
    problems: list[str] = []
    groups: dict[str, _Groups] = {}
    zeroed: dict[str, tuple[int, int]] = {}
    for copy in plan.copies:
        if copy.fill in ("mean", "category_mean") and copy.rows.num_new:
            groups[copy.name] = _make_groups(copy, source)
        for number, (first, last) in enumerate(_blocks(source, copy.source, block_bytes)):
            taken_N = copy.rows.taken(first, last)
            if number % world_size() != rank() or not taken_N.any():
                continue
            try:
                block_NC = source.read(copy.source, first, last).reshape(last - first, -1)
            except (UserError, OSError) as error:
                problems.append(str(error))
                break
            problem, now_zero, numbers = _fault(copy, block_NC, taken_N, first)
            if problem:
                problems.append(problem)
                break
            before = zeroed.get(copy.name, (0, 0))
            zeroed[copy.name] = before[0] + now_zero, before[1] + numbers
            if copy.name in groups:
                sums_GC, counts_G, group_S = groups[copy.name]
                group_N = torch.full((last - first,), len(counts_G) - 1) if group_S is None else group_S[first:last]
                group_N = group_N[taken_N]
                sums_GC.index_add_(0, group_N, block_NC[taken_N].double())
                counts_G.index_add_(0, group_N, torch.ones(len(group_N), dtype=torch.float64))
    everywhere = gathered((problems, zeroed))
    found = {problem for part, _ in everywhere for problem in part} | _too_many_zeroed(plan, [z for _, z in everywhere])
    if found:
        raise UserError(f"{source.path} cannot be taken; nothing was changed: {'; '.join(sorted(found)[:6])}")
    return {name: _means(group) for name, group in groups.items()} | _unknown_rows(plan, source)


def _fault(copy: Copy, block_NC: Tensor, taken_N: Tensor, first: int) -> tuple[str, int, int]:
    """(why the taken rows of a block cannot be written, or ""; how many of their numbers become 0; their number)."""
    taken = [column for start, number, _ in copy.parts for column in range(start, start + number)]
    rows_NC = block_NC if copy.spread or len(taken) == block_NC.shape[1] else block_NC[:, taken]
    is_float = block_NC.is_floating_point() or block_NC.is_complex()
    faults = {"not finite": ~torch.isfinite(rows_NC)} if is_float else {}
    if copy.is_positive:
        faults["below 0, so they are neither sums of squares nor counts of steps (say optimizer_kind)"] = rows_NC < 0
    now_zero = 0
    if copy.dtype != block_NC.dtype:
        cast_NC = rows_NC.to(copy.dtype)
        name = str(copy.dtype).removeprefix("torch.")
        if not is_float:
            faults[f"beyond {name}"] = cast_NC.to(rows_NC.dtype) != rows_NC
        else:
            faults[f"beyond {name} (at most {torch.finfo(copy.dtype).max:g})"] = ~torch.isfinite(cast_NC)
            now_zero = int(((cast_NC == 0) & (rows_NC != 0))[taken_N].sum())
    for what, bad_NC in faults.items():
        bad_N = bad_NC.any(1) & taken_N
        if bad_N.any():
            row = int(bad_N.nonzero()[0])
            value = rows_NC[row][bad_NC[row]][0].item()
            return (
                f"{copy.source!r} has numbers that are {what} in {int(bad_N.sum()):,} rows from row {first + row:,} on "
                f"(such as {value:g}, for {copy.name!r})"
            ), 0, 0  # fmt: skip
    return "", now_zero, int(taken_N.sum()) * rows_NC.shape[1]


def _too_many_zeroed(plan: Plan, parts: list[dict[str, tuple[int, int]]]) -> set[str]:
    """A sentence for each tensor of which a cast rounds too many numbers to 0; writes all counts into the audit."""
    problems = set()
    for copy in plan.copies:
        zeroed, numbers = (sum(part.get(copy.name, (0, 0))[index] for part in parts) for index in (0, 1))
        if zeroed > MAX_ZEROED * numbers:
            dtype = str(copy.dtype).removeprefix("torch.")
            problems.add(
                f"{copy.source!r} has {zeroed:,} of {numbers:,} numbers so small that {dtype} rounds them to 0 (for "
                f"{copy.name!r})"
            )
        plan.audit.rows = [replace(row, zeroed=zeroed) if row.target == copy.name else row for row in plan.audit.rows]
    return problems


def _make_groups(copy: Copy, source: Source) -> _Groups:
    number = copy.rows.num_categories if copy.fill == "category_mean" else 0
    group_S = None
    if number:
        assert copy.rows.category_R is not None and copy.rows.source_row_R is not None
        group_S = torch.full((copy.rows.num_source_rows,), number)
        known_R = (copy.rows.source_row_R != NEW) & (copy.rows.category_R >= 0)
        group_S[copy.rows.source_row_R[known_R]] = copy.rows.category_R[known_R]
    columns = flat(source.tensors[copy.source].size)[1]
    return _Groups(
        torch.zeros(number + 1, columns, dtype=torch.float64), torch.zeros(number + 1, dtype=torch.float64), group_S
    )


def _means(groups: _Groups) -> Tensor:
    sums_GC, counts_G, _ = groups
    if world_size() > 1:
        dist.all_reduce(sums_GC)
        dist.all_reduce(counts_G)
    means_GC = sums_GC / counts_G.clamp(min=1)[:, None]
    means_GC[-1] = sums_GC.sum(0) / counts_G.sum()
    means_GC[:-1][counts_G[:-1] == 0] = means_GC[-1]  # a category of which no row is taken
    return means_GC


def _unknown_rows(plan: Plan, source: Source) -> dict[str, Tensor]:
    rows = {}
    for copy in plan.copies:
        if copy.fill == "unknown" and copy.rows.num_new:
            row = int(copy.rows.sources(0, 1))
            rows[copy.name] = source.read(copy.source, row, row + 1).reshape(1, -1)
    return rows


def _fill(shard: Shard, copy: Copy, source: Source, fill_GC: Tensor | None, block_bytes: int) -> None:
    """Fills one shard: rows with a source from it, the others as `copy.fill` says."""
    if copy.rows.source_row_R is None:
        _fill_by_place(shard, copy, source, fill_GC, block_bytes)
        return
    num_rows, device = shard.values.shape[0], shard.values.device
    row_R = copy.rows.sources(shard.first_row, shard.first_row + num_rows)
    sorted_R, order_R = row_R.sort()
    new = int(torch.searchsorted(sorted_R, 0))
    _fill_new(shard, copy, order_R[:new], fill_GC, block_bytes)
    for first, last in _blocks(source, copy.source, block_bytes):
        low, high = torch.searchsorted(sorted_R, torch.tensor([first, last])).tolist()
        if low == high:
            continue
        first, last = int(sorted_R[low]), int(sorted_R[high - 1]) + 1
        block_NC = _read(source, copy, first, last)
        if high - low != last - first or not torch.equal(sorted_R[low:high], torch.arange(first, last)):
            block_NC = block_NC[sorted_R[low:high] - first]
        _put(shard, copy, order_R[low:high].to(device), block_NC)


def _fill_by_place(shard: Shard, copy: Copy, source: Source, fill_GC: Tensor | None, block_bytes: int) -> None:
    step, num_rows = _block_rows(source, copy.source, block_bytes), shard.values.shape[0]
    end = max(shard.first_row, min(shard.first_row + num_rows, copy.rows.num_source_rows))
    for first in range(shard.first_row, end, step):
        last = min(end, first + step)
        places = slice(first - shard.first_row, last - shard.first_row)
        _put(shard, copy, places, _read(source, copy, first, last))
    for start in range(end - shard.first_row, num_rows, step):
        _fill_new(shard, copy, torch.arange(start, min(num_rows, start + step)), fill_GC, block_bytes)


def _fill_new(shard: Shard, copy: Copy, place_N: Tensor, fill_GC: Tensor | None, block_bytes: int) -> None:
    """Fills the shard's rows `place_N`, which have no source."""
    if not len(place_N) or copy.fill == "random":
        return
    if fill_GC is None:  # zero
        shard.values[place_N.to(shard.values.device)] = 0
        return
    group_N = torch.full((len(place_N),), len(fill_GC) - 1)
    if copy.rows.category_R is not None:
        category_N = copy.rows.category_R[shard.first_row + place_N]
        group_N = category_N.where(category_N >= 0, group_N)
    step = max(1, block_bytes // (8 * fill_GC.shape[1]))
    for first in range(0, len(place_N), step):
        places = place_N[first : first + step].to(shard.values.device)
        _put(shard, copy, places, fill_GC[group_N[first : first + step]])


def _put(shard: Shard, copy: Copy, place_N: Tensor | slice, rows_NC: Tensor) -> None:
    """Writes rows of the source into the shard's rows `place_N`, each column to where the parts say."""
    values = shard.values
    filled = list(overlaps(shard, [(0, 1, 0)] if copy.average else copy.parts))
    if not copy.fresh_columns and sum(ours.stop - ours.start for ours, _ in filled) < values.shape[1]:
        values[place_N] = 0
    for ours, theirs in filled:
        taken_NC = rows_NC[:, :1].expand(-1, ours.stop - ours.start) if copy.spread else rows_NC[:, theirs]
        values[place_N, ours] = taken_NC.to(values.device, values.dtype)
