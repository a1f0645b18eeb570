"""Compares two ranking runs over the same test rows: the metrics of both, and their difference with its interval.

    python -m lumrec.metrics.compare runs/ml-1m-rank-none runs/ml-1m-rank-both

A finished run of apps/rank.py has the scores of its test rows in `scores.parquet`: row (of the prepared data), label (0
or 1), user (index in the prepared data), logit.

Shape suffixes: N rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lumrec.metrics.bootstrap import Comparison, Interval, compare
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.failures import command_parser, machine_errno, reported
from lumrec.run.files import new_file
from lumrec.run.printable import say, text_table

SCORES, RANKS = "scores.parquet", "ranks.parquet"
LOWER_IS_BETTER = ("log_loss",)


class Scores(NamedTuple):
    """row_N: int64, ascending. label_N: int8. user_N: int64. logit_N: float64."""

    row_N: np.ndarray
    label_N: np.ndarray
    user_N: np.ndarray
    logit_N: np.ndarray


class Ranks(NamedTuple):
    """Ranks of a two-tower run: of each test user's target among all items, from 1. row_N, user_N, rank_N: int64."""

    row_N: np.ndarray
    user_N: np.ndarray
    rank_N: np.ndarray


def write_scores(folder: Path, scores: Scores | Ranks) -> None:
    """Writes `scores` to the run folder, atomically."""
    name = SCORES if isinstance(scores, Scores) else RANKS
    table = pa.table({name.removesuffix("_N"): value for name, value in scores._asdict().items()})
    with new_file(folder / name) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def read_scores(folder: Path) -> Scores:
    """The scores of a finished run. Raises MissingFileError without them, UserError for another table."""
    if not (folder / "result.json").exists() or not (folder / SCORES).exists():
        what = f"has no scores (no {SCORES})" if (folder / "result.json").exists() else "is no finished run"
        raise MissingFileError(f"{folder} {what}; train it again with: apps/rank.py … overwrite=true")
    return Scores(*_columns(folder / SCORES, Scores._fields))


def read_ranks(folder: Path) -> Ranks:
    """The ranks of a finished run of two towers. Raises UserError for a file that is damaged."""
    return Ranks(*_columns(folder / RANKS, Ranks._fields))


def _columns(path: Path, fields: Sequence[str]) -> list[np.ndarray]:
    names = [field.removesuffix("_N") for field in fields]
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        if machine_errno(error):
            raise
        raise UserError(
            f"{path} is damaged ({str(error).splitlines()[0]}); train the run again with overwrite=true"
        ) from None
    if table.column_names != names:
        raise UserError(f"{path} has the columns {table.column_names}; expected {names}")
    return [table[name].to_numpy() for name in names]


def compare_runs(
    a: Path, b: Path, *, num_resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[Scores, dict[str, Comparison]]:
    """The test rows (with the logits of a), and AUC, gAUC and log loss of a, of b and of b - a.

    Raises MissingFileError where a run has no scores, UserError where the two scored different rows.
    """
    of_a, of_b = read_scores(a), read_scores(b)
    for name in ("row", "label", "user"):
        ours, theirs = (np.asarray(getattr(of, f"{name}_N")) for of in (of_a, of_b))
        if not np.array_equal(ours, theirs):
            raise UserError(
                f"{a} ({len(ours)} rows) and {b} ({len(theirs)} rows) were not tested on the same rows (column {name} "
                "differs); expected two rankers tested on the same prepared data"
            )
    found = compare(
        of_a.label_N, of_a.logit_N, of_b.logit_N, of_a.user_N, num_resamples=num_resamples, level=level, seed=seed
    )
    return of_a, found


def better(metric: str, difference: Interval) -> int:
    """1 where the interval of b - a says that b is better, -1 where a is, 0 where it includes 0 or there is none."""
    side = int(difference.low > 0) - int(difference.high < 0)
    return -side if metric in LOWER_IS_BETTER else side


def as_table(
    a: Path, b: Path, scores: Scores, found: dict[str, Comparison], *, num_resamples: int, level: float
) -> str:
    """The comparison as a text table."""
    verdicts = {1: "b is better", -1: "a is better", 0: "no difference shown"}

    def cell(interval: Interval, sign: str = "") -> str:
        return f"{interval.value:{sign}.4f} [{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]"

    lines = [
        f"{len(scores.row_N)} test rows of {len(np.unique(scores.user_N))} users; {level:.0%} intervals over users, "
        f"{num_resamples} resamples",
        f"a = {a}",
        f"b = {b}",
    ]
    rows = [["", "a", "b", "b - a", ""]]
    for metric, (of_a, of_b, difference) in found.items():
        rows.append([metric, cell(of_a), cell(of_b), cell(difference, "+"), verdicts[better(metric, difference)]])
    return "\n".join([*lines, *text_table(rows)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser("python -m lumrec.metrics.compare", __doc__)
    parser.add_argument("a", type=Path, help="folder of a finished ranking run")
    parser.add_argument("b", type=Path, help="folder of another, over the same test rows")
    parser.add_argument("--resamples", type=int, default=1000, help="number of resamples of the users (default 1000)")
    parser.add_argument("--level", type=float, default=0.95, help="share of the resamples within an interval")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamples")
    given = parser.parse_args(arguments)
    with reported():
        scores, found = compare_runs(
            given.a, given.b, num_resamples=given.resamples, level=given.level, seed=given.seed
        )
    say(as_table(given.a, given.b, scores, found, num_resamples=given.resamples, level=given.level))


if __name__ == "__main__":
    main()
