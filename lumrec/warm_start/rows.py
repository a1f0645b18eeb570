"""Which row of the source each row of a table gets: by place, by raw id, or by a hash of the raw id.

Shape suffixes: R rows of the target table, S rows of the source's, N rows of a block.
"""

import functools
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from lumrec.run.errors import UserError
from lumrec.warm_start.rules import Rule
from lumrec.warm_start.vocabulary import hash_rows, join, lookalikes, read_columns, read_vocabulary, short

NEW = -1


@dataclass(frozen=True)
class RowMap:
    """Rows of the source for `num_rows` rows of the target.

    source_row_R: int64, NEW for none; None: by place, the source's rows first, which takes no memory. category_R:
    number of a row's category, -1 for none. joined: share of the target's raw ids that the source has, None where rows
    are not by raw id.
    """

    num_rows: int
    num_source_rows: int
    source_row_R: Tensor | None = None
    category_R: Tensor | None = None
    num_categories: int = 0
    joined: float | None = None

    def sources(self, first: int, last: int) -> Tensor:
        """Row of the source of each of the rows first … last-1 (int64 [N]), NEW for none."""
        if self.source_row_R is not None:
            return self.source_row_R[first:last]
        row_N = torch.arange(first, last)
        return row_N.where(row_N < self.num_source_rows, NEW)

    def taken(self, first: int, last: int) -> Tensor:
        """Whether each of the source's rows first … last-1 is taken (bool [N])."""
        return torch.arange(first, last) < self.num_rows if self.source_row_R is None else self._taken_S[first:last]

    @functools.cached_property
    def _taken_S(self) -> Tensor:
        assert self.source_row_R is not None
        taken_S = torch.zeros(self.num_source_rows, dtype=torch.bool)
        taken_S[self.source_row_R[self.source_row_R >= 0]] = True
        return taken_S

    @functools.cached_property
    def num_new(self) -> int:
        """Rows of the target without a source."""
        if self.source_row_R is None:
            return max(0, self.num_rows - self.num_source_rows)
        return int((self.source_row_R == NEW).sum())

    @functools.cached_property
    def num_unused(self) -> int:
        """Rows of the source that are not taken."""
        if self.source_row_R is None:
            return max(0, self.num_source_rows - self.num_rows)
        return int((~self._taken_S).sum())

    def stacked(self, number: int) -> "RowMap":
        """The map of tables that hold `number` such tables behind each other."""
        if self.source_row_R is None and self.num_rows == self.num_source_rows:
            return RowMap(self.num_rows * number, self.num_source_rows * number)
        row_R = self.sources(0, self.num_rows)
        parts = [row_R.where(row_R == NEW, row_R + index * self.num_source_rows) for index in range(number)]
        return RowMap(self.num_rows * number, self.num_source_rows * number, torch.cat(parts))


def map_rows(rule: Rule, name: str, *, source_rows: int, target_rows: int, folder: Path, what: str) -> RowMap:
    """The RowMap that a rule asks for. name: of the source's tensor; what: the parameter, both for errors.

    Raises UserError for tables of other sizes than the rule allows, a vocabulary that has an id or a row twice or a row
    beyond its table, ids that share a row of the source although the rule does not allow it, too few ids that both
    vocabularies have, and new rows for which the rule states nothing.
    """
    if rule.rows in ("error", "grow"):
        if source_rows != target_rows and (rule.rows == "error" or source_rows > target_rows):
            hint = "rows=grow or remap" if source_rows < target_rows else "rows=remap, by raw id"
            raise UserError(
                f"{what} has {target_rows:,} rows, {name!r} {source_rows:,}: say what row is which by {hint}"
            )
        return _stated(rule, RowMap(target_rows, source_rows), what)
    target = read_vocabulary(folder / rule.target_vocabulary, rule.target_columns, target_rows, what)
    joined = None
    if rule.rows == "remap":
        source = read_vocabulary(
            folder / rule.source_vocabulary,
            rule.source_columns,
            source_rows,
            repr(name),
            is_shared=rule.collisions == "share",
        )
        _check_keep_rows(rule, source, rule.source_vocabulary, what)
        pairs = join(target, source.rename({"row": "source_row"}))
        joined = _joined(rule, target, source, len(pairs), what, rule.source_vocabulary)
    else:
        hash_N = torch.from_numpy(hash_rows(target["key"], rule.hash, source_rows, what))
        pairs = target.with_columns(pl.Series("source_row", hash_N.numpy()))
        _check_collisions(rule, pairs, source_rows, what)
    source_row_R = torch.full((target_rows,), NEW)
    source_row_R[_tensor(pairs["row"])] = _tensor(pairs["source_row"])
    for row in rule.keep_rows:
        if not (0 <= row < source_rows and row < target_rows):
            raise UserError(f"{what}: keep_rows has {row}; there are {source_rows} and {target_rows} rows")
        source_row_R[row] = row
    _check_keep_rows(rule, target, rule.target_vocabulary, what)
    category_R, num_categories = None, 0
    if rule.new_rows == "category_mean":
        category_R, num_categories = _categories(rule, folder, target, target_rows, what)
    row_map = RowMap(target_rows, source_rows, source_row_R, category_R, num_categories, joined)
    return _stated(rule, row_map, what)


def _check_keep_rows(rule: Rule, vocabulary: pl.DataFrame, name: str, what: str) -> None:
    taken = vocabulary.filter(pl.col("row").is_in(rule.keep_rows))
    if len(taken):
        raise UserError(
            f"{what}: keep_rows has {taken['row'][0]}, but {name} gives that row to the raw id "
            f"{short(taken['key'][0])}: keep_rows is of rows without one; say new_rows for rows without a source"
        )


def _joined(rule: Rule, target: pl.DataFrame, other: pl.DataFrame, number: int, what: str, file: str) -> float:
    """The share of the target's raw ids that another file has. Raises UserError where it is too low."""
    share = number / len(target) if len(target) else 1.0
    if rule.lookalikes == "error":
        alike, ours, theirs = lookalikes(target, other)
        if alike:
            show = ascii if unicodedata.normalize("NFC", ours) == unicodedata.normalize("NFC", theirs) else repr
            raise UserError(
                f"{what}: {alike:,} raw ids of {rule.target_vocabulary} differ only in form from ids of "
                f"{file}, such as {short(ours, show)} and {short(theirs, show)}: write them alike, "
                "or say lookalikes=new if they are different things"
            )
    if len(target) and not number:
        raise UserError(
            f"{what}: not one raw id is in both {rule.target_vocabulary} and {file} (the first ids are "
            f"{short(target['key'][0])} and {short(other['key'][0]) if len(other) else 'none'}): are they of one table?"
        )
    if share < rule.min_joined:
        raise UserError(
            f"{what}: {number:,} of {len(target):,} raw ids ({share:.1%}) of {rule.target_vocabulary} are in "
            f"{file}, fewer than min_joined={rule.min_joined}: are they of one table? If so, say "
            f"min_joined={max(0.0, share - 0.005):.2f}"
        )
    return share


def _stated(rule: Rule, row_map: RowMap, what: str) -> RowMap:
    if rule.new_rows == "unknown" and row_map.num_new and row_map.sources(0, 1)[0] == NEW:
        raise UserError(f"{what}: new_rows=unknown copies row 0, which has no source itself: say keep_rows: [0]")
    if row_map.num_new and not rule.new_rows:
        raise UserError(
            f"{what}: {row_map.num_new:,} of {row_map.num_rows:,} rows have no source: say new_rows=mean, "
            "category_mean, unknown, zero or random"
        )
    if rule.new_rows in ("mean", "category_mean") and row_map.num_new == row_map.num_rows:
        raise UserError(f"{what}: not one row has a source, so there is no mean: are the vocabularies of one table?")
    return row_map


def _categories(rule: Rule, folder: Path, target: pl.DataFrame, target_rows: int, what: str) -> tuple[Tensor, int]:
    """Number of each row's category, -1 for none, and how many categories there are."""
    path = folder / rule.categories
    frame = read_columns(path, ["key", "category"]).select(
        pl.col("key").cast(pl.String), pl.col("category").cast(pl.String)
    )
    twice = frame.filter(pl.col("key").is_duplicated())
    if len(twice):
        raise UserError(f"{path}: key {short(twice['key'][0])} has several categories; expected one for each")
    known = join(target, frame.drop_nulls())
    _joined(rule, target, frame, len(known), what, rule.categories)
    codes = known["category"].rank("dense").cast(pl.Int64) - 1
    category_R = torch.full((target_rows,), -1)
    category_R[_tensor(known["row"])] = _tensor(codes)
    return category_R, int(codes.max()) + 1  # type: ignore[arg-type]


def _check_collisions(rule: Rule, pairs: pl.DataFrame, source_rows: int, what: str) -> None:
    shared = pairs.filter(pl.col("source_row").is_duplicated()).sort("source_row")
    if len(shared) and rule.collisions == "error":
        (one, two), row = shared["key"][:2], shared["source_row"][0]
        raise UserError(
            f"{what}: {len(shared):,} of {len(pairs):,} raw ids share a row of the source under hash={rule.hash} "
            f"modulo {source_rows:,}, such as {short(one)} and {short(two)} (row {row:,}): "
            "say collisions=share to begin each with that row, as production answered them"
        )


def _tensor(series: pl.Series) -> Tensor:
    return torch.from_numpy(series.cast(pl.Int64).to_numpy(writable=True))
