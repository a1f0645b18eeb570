"""Carries out a plan: every rank fills its own shards, reading the source in blocks of rows.

First all that is going to be read is looked through, so that a bad number is found before anything is changed; the same
pass yields the means for new rows. Then each shard is filled.

Shape suffixes: R rows of a shard, C columns of the target, N rows of a block, G categories.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lumrec.errors import UserError
from lumrec.train.parallel import rank, world_size
from lumrec.warm_start.audit import Audit
from lumrec.warm_start.plan import Copy, Plan, Shard, flat, make_plan, shards_of
from lumrec.warm_start.rows import NEW
from lumrec.warm_start.rules import Rules, read_rules
from lumrec.warm_start.sources import Source, open_source

BLOCK_BYTES = 4 << 20


def warm_start(
    model: nn.Module,
    source: str | Path | Source,
    rules: str | Path | Mapping[str, Any] | Rules,
    *,
    optimizer: Any = None,
    dry_run: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> Audit:
    """Fills `model` from a production checkpoint, in place, and gives the audit of what was taken. Collective.

    model: any module, plain or under DistributedModelParallel in any plan, of lumrec or not. source: see `open_source`.
    rules: a YAML file or the same as a mapping; see lumrec/warm_start/rules.py. optimizer: whose state goes on too (its
    entries must exist: KeyedOptimizerWrapper.init_state makes Adam's); None: of a DMP, its fused optimizer alone.
    dry_run: the audit alone, from names, shapes and vocabularies. block_bytes: of the source in memory at a time.

    No rank holds more of a table than its own shard, its rows' numbers and a block. The source is only read. Raises
    MissingFileError, and UserError (PlanError for rules, with all problems) before anything in the model is changed.
    """
    source = source if isinstance(source, Source) else open_source(source)
    plan = make_plan(model, source, read_rules(rules), optimizer)
    if not dry_run:
        fills = _survey(plan, source, block_bytes)
        with torch.no_grad():
            for copy in plan.copies:
                value = plan.targets[copy.name]
                for shard in shards_of(value) if value is not None else ():
                    _fill(shard, copy, source, fills.get(copy.name), block_bytes)
        plan.audit.applied = True
    return plan.audit


def _read(source: Source, copy: Copy, first: int, last: int) -> Tensor:
    """Rows of a copy's source, with the columns that its parts speak of (float32 where a mean is taken)."""
    block_NC = source.read(copy.source, first, last).reshape(last - first, -1)
    if copy.average:
        taken = [column for start, number, _ in copy.parts for column in range(start, start + number)]
        block_NC = block_NC[:, taken].float().mean(1, keepdim=True)
    return block_NC


def _blocks(source: Source, name: str, block_bytes: int) -> Iterator[tuple[int, int]]:
    stored = source.tensors[name]
    rows, columns = flat(stored.size)
    step = max(1, block_bytes // max(1, columns * torch.empty(0, dtype=stored.dtype).element_size()))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def _survey(plan: Plan, source: Source, block_bytes: int) -> dict[str, Tensor]:
    """What new rows get, by copy: a row for each category and one for all ([G + 1, source's columns]). Collective.

    Each rank reads every world_size-th block. Raises UserError, on all ranks, for numbers that are not finite.
    """
    fills, problems = {}, []
    for copy in plan.copies:
        taken_S = copy.rows.taken_S
        groups_S, sums_GC, counts_G = _groups(copy, source)
        for number, (first, last) in enumerate(_blocks(source, copy.source, block_bytes)):
            if number % world_size() != rank() or not taken_S[first:last].any():
                continue
            try:
                block_NC = source.read(copy.source, first, last).reshape(last - first, -1)
            except (ValueError, OSError) as error:
                problems.append(str(error))
                break
            if not block_NC.is_floating_point():
                continue
            bad_N = taken_S[first:last] & ~torch.isfinite(block_NC).all(1)
            if bad_N.any():
                row = first + int(bad_N.nonzero()[0])
                problems.append(
                    f"{copy.source!r} has numbers that are not finite in {int(bad_N.sum()):,} rows from row {row:,} on "
                    f"(for {copy.name!r})"
                )
                break
            if groups_S is not None:
                block_NC, group_N = block_NC[taken_S[first:last]].double(), groups_S[first:last][taken_S[first:last]]
                sums_GC.index_add_(0, group_N, block_NC)
                counts_G.index_add_(0, group_N, torch.ones(len(group_N), dtype=torch.float64))
        if groups_S is not None:
            fills[copy.name] = (sums_GC, counts_G)
    everywhere = [problems]
    if world_size() > 1:
        everywhere = [[]] * world_size()
        dist.all_gather_object(everywhere, problems)
    if found := sorted({problem for part in everywhere for problem in part}):
        raise UserError(f"{source.path} cannot be taken; nothing was changed: {'; '.join(found[:6])}")
    return {name: _means(*sums) for name, sums in fills.items()} | _unknown_rows(plan, source)


def _groups(copy: Copy, source: Source) -> tuple[Tensor | None, Tensor, Tensor]:
    """Group of each row of the source (the last one: no category), and zeros for the sums and counts of the groups."""
    number = copy.rows.num_categories if copy.fill == "category_mean" else 0
    columns = flat(source.tensors[copy.source].size)[1]
    zeros = torch.zeros(number + 1, columns, dtype=torch.float64), torch.zeros(number + 1, dtype=torch.float64)
    if copy.fill not in ("mean", "category_mean") or not copy.rows.num_new:
        return None, *zeros
    groups_S = torch.full((copy.rows.num_source_rows,), number)
    if number:
        assert copy.rows.category_R is not None
        known_R = (copy.rows.source_row_R != NEW) & (copy.rows.category_R >= 0)
        groups_S[copy.rows.source_row_R[known_R]] = copy.rows.category_R[known_R]
    return groups_S, *zeros


def _means(sums_GC: Tensor, counts_G: Tensor) -> Tensor:
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
            row = int(copy.rows.source_row_R[0])
            rows[copy.name] = source.read(copy.source, row, row + 1).reshape(1, -1)
    return rows


def _fill(shard: Shard, copy: Copy, source: Source, fill_GC: Tensor | None, block_bytes: int) -> None:
    """Fills one shard: rows with a source from it, the others as `copy.fill` says."""
    num_rows, device = shard.values.shape[0], shard.values.device
    row_R = copy.rows.source_row_R[shard.first_row : shard.first_row + num_rows]
    sorted_R, order_R = row_R.sort()
    new = int(torch.searchsorted(sorted_R, 0))
    if new and copy.fill != "random":
        place_N = order_R[:new].to(device)
        if fill_GC is None:  # zero
            shard.values[place_N] = 0
        else:
            group_N = torch.full((new,), len(fill_GC) - 1)
            if copy.rows.category_R is not None:
                category_N = copy.rows.category_R[shard.first_row + order_R[:new]]
                group_N = category_N.where(category_N >= 0, group_N)
            step = max(1, block_bytes // (8 * fill_GC.shape[1]))
            for first in range(0, new, step):
                _put(shard, copy, place_N[first : first + step], fill_GC[group_N[first : first + step]])
    for first, last in _blocks(source, copy.source, block_bytes):
        low, high = torch.searchsorted(sorted_R, torch.tensor([first, last])).tolist()
        if low == high:
            continue
        first, last = int(sorted_R[low]), int(sorted_R[high - 1]) + 1
        block_NC = _read(source, copy, first, last)
        if high - low != last - first or not torch.equal(sorted_R[low:high], torch.arange(first, last)):
            block_NC = block_NC[sorted_R[low:high] - first]
        _put(shard, copy, order_R[low:high].to(device), block_NC)


def _put(shard: Shard, copy: Copy, place_N: Tensor, rows_NC: Tensor) -> None:
    """Writes rows of the source into the shard's rows `place_N`, each column to where the parts say."""
    values = shard.values
    if not copy.fresh_columns:
        first, last = shard.first_column, shard.first_column + values.shape[1]
        if (
            sum(min(last, to + n) - max(first, to) for _, n, to in copy.parts if to < last and to + n > first)
            < last - first
        ):
            values[place_N] = 0
    for source_column, number, target_column in [(0, 1, 0)] if copy.average else copy.parts:
        start = max(shard.first_column, target_column)
        stop = min(shard.first_column + values.shape[1], target_column + number)
        if start >= stop:
            continue
        if copy.spread:
            taken_NC = rows_NC[:, :1].expand(-1, stop - start)
        else:
            taken_NC = rows_NC[:, source_column + start - target_column : source_column + stop - target_column]
        values[place_N, start - shard.first_column : stop - shard.first_column] = taken_NC.to(
            values.device, values.dtype
        )
