"""Compares a filled model with production: rows of its tables, by raw id, and scores.

Shape suffixes: N rows of a check, C columns of the source.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from lumrec.run.distributed import gathered, on_rank_zero
from lumrec.run.errors import UserError
from lumrec.warm_start.plan import Plan, flat, overlaps, shards_of
from lumrec.warm_start.rules import Rule
from lumrec.warm_start.vocabulary import join, read_columns, read_vocabulary, row_numbers

_FILLED = "the model is filled and must not be used"


class Rows(NamedTuple):
    """Rows that production has: row_N int64, of the target's table; value_NC float32, all columns of the source."""

    row_N: Tensor
    value_NC: Tensor


def read_checks(plan: Plan, folder: Path) -> dict[str, Rows]:
    """Parameter → rows to compare, by the `check` of its rule. Collective. Raises UserError for a file that does not
    fit.
    """
    checks = {}
    for copy in plan.copies:
        rule = plan.rules.get(copy.name)
        if rule is None or not rule.check:
            continue
        num_rows = copy.rows.num_rows
        columns = flat(plan.source.tensors[copy.source].size)[1]

        def read(rule: Rule = rule, what: str = copy.name, num_rows: int = num_rows, columns: int = columns) -> Rows:
            return _read_rows(folder, rule, what, num_rows, columns)

        checks[copy.name] = on_rank_zero(read)
    return checks


def _read_rows(folder: Path, rule: Rule, what: str, num_rows: int, columns: int) -> Rows:
    path, by = folder / rule.check, "key" if rule.target_vocabulary else "row"
    frame = read_columns(path, [by, "values"], key="check", expected=f"Parquet with the columns {by} and values")
    if by == "key":
        vocabulary = read_vocabulary(folder / rule.target_vocabulary, rule.target_columns, num_rows, what)
        frame = join(vocabulary, frame.select("key", "values"))
    frame = frame.select("row", "values").drop_nulls()
    if not len(frame):
        raise UserError(f"{path} has no row of {what!r}: are its raw ids of another table?")
    row_N = torch.from_numpy(row_numbers(frame["row"], path, "row").to_numpy(writable=True))
    try:
        value_NC = torch.from_numpy(np.array(frame["values"].to_list(), np.float32))
    except (ValueError, TypeError, pl.exceptions.PolarsError):
        raise UserError(f"{path}: values must be lists of {columns:,} numbers, one for each row") from None
    if value_NC.dim() != 2 or value_NC.shape[1] != columns:
        raise UserError(
            f"{path}: values are {list(value_NC.shape)}; expected lists of the source's {columns:,} columns"
        )
    if int(row_N.min()) < 0 or int(row_N.max()) >= num_rows:
        raise UserError(f"{path} has rows {int(row_N.min())} to {int(row_N.max())}; {what!r} has {num_rows:,} rows")
    return Rows(row_N, value_NC)


def check_rows(plan: Plan, checks: dict[str, Rows]) -> None:
    """Raises UserError where a filled table differs too much from production's rows. Collective."""
    problems = []
    for copy in plan.copies:
        if copy.name not in checks:
            continue
        row_N, value_NC = checks[copy.name]
        tolerance = plan.rules[copy.name].tolerance
        for shard in shards_of(plan.targets[copy.name]):
            inside_N = (row_N >= shard.first_row) & (row_N < shard.first_row + shard.values.shape[0])
            ours_NC = shard.values[(row_N[inside_N] - shard.first_row).to(shard.values.device)].float().cpu()
            for ours, theirs in overlaps(shard, copy.parts):
                apart_N = (ours_NC[:, ours] - value_NC[inside_N, theirs]).abs().amax(1)
                bad_N = ~(apart_N <= tolerance)  # nan is bad
                if bad_N.any():
                    worst = int(apart_N.nan_to_num(torch.inf).argmax())
                    problems.append(
                        f"{int(bad_N.sum()):,} of {len(bad_N):,} rows of {copy.name!r} differ from production's by "
                        f"more than {tolerance:g}, row {int(row_N[inside_N][worst]):,} by {float(apart_N[worst]):.3g}"
                    )
        plan.audit.rows = [
            replace(row, checked=len(row_N)) if row.target == copy.name else row for row in plan.audit.rows
        ]
    _raise_everywhere(problems)


def check_scores(model: nn.Module, check: Callable[[nn.Module], tuple[Tensor, Tensor]], tolerance: float) -> int:
    """Compares the model's scores with production's; returns how many there are on all ranks. Collective.

    Raises UserError where they differ by more than `tolerance`, are not of one shape, or are none.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        given: Any = check(model)
    finally:
        for module, mode in modes:
            module.training = mode
    if not (isinstance(given, (tuple, list)) and len(given) == 2):
        return _raise_everywhere([f"check gave a {type(given).__name__}; expected the model's scores and production's"])
    problems = []
    scores, expected = (torch.as_tensor(values).detach().float().cpu() for values in given)
    if scores.shape != expected.shape or not scores.numel():
        problems.append(f"check gave scores of {list(scores.shape)}, production's are {list(expected.shape)}")
    else:
        apart = (scores - expected).abs()
        bad = ~(apart <= tolerance)
        if bad.any():
            problems.append(
                f"{int(bad.sum()):,} of {scores.numel():,} scores differ from production's by more than {tolerance:g}, "
                f"at most by {float(apart.nan_to_num(torch.inf).max()):.3g}"
            )
    return _raise_everywhere(problems, scores.numel())


def _raise_everywhere(problems: list[str], number: int = 0) -> int:
    everywhere = gathered((problems, number))
    if found := sorted({problem for part, _ in everywhere for problem in part}):
        raise UserError(f"{'; '.join(found[:6])}: {_FILLED}")
    return sum(count for _, count in everywhere)
