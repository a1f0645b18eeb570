"""Production's scores of rows of the log, which a ranker that starts from production must reproduce.

They are in a Parquet or CSV file: user and item (raw ids), timestamp (seconds, as prepared) where a user has several
events with an item, and production's output as score (a probability) or logit.

Shape suffixes: N rows.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from lumrec.data.prepared import PreparedData
from lumrec.run.errors import UserError
from lumrec.warm_start.vocabulary import read_columns, short


class Expected(NamedTuple):
    """row_N: int64, rows of the prepared data. value_N: float64, production's. is_logit: what these are."""

    row_N: np.ndarray
    value_N: np.ndarray
    is_logit: bool

    def compared(self, logit_N: np.ndarray) -> tuple[Tensor, Tensor]:
        """The ranker's values and production's, of the same kind."""
        ours_N = torch.from_numpy(logit_N)
        return ours_N if self.is_logit else ours_N.sigmoid(), torch.from_numpy(self.value_N)


def read_scores(path: str | Path, key: str = "rank.warm_start.scores") -> tuple[pl.DataFrame, np.ndarray, bool]:
    """User, item and timestamp of each row of the file, production's values (float64 [N]), and whether they are logits.

    key: the setting that names the file, for errors. Raises MissingFileError, or UserError for missing columns and
    values, and a score that is no probability.
    """
    path, expected = Path(path), "Parquet or CSV with the columns user, item, and score or logit"
    frame = read_columns(path, ["user", "item"], key=key, expected=expected)
    kinds = [name for name in ("score", "logit") if name in frame.columns]
    if len(kinds) != 1:
        raise UserError(f"{path} has the columns {', '.join(frame.columns)}; expected one of score and logit")
    by = ["user", "item", *(["timestamp"] if "timestamp" in frame.columns else [])]
    numbers = {kinds[0]: pl.Float64, "timestamp": pl.Int64}
    seconds = frame["timestamp"] if len(by) == 3 else pl.Series([0])
    if seconds.dtype.is_float() and not (seconds.floor() == seconds).all() or seconds.dtype.is_temporal():
        raise UserError(f"{path}: timestamp holds {seconds.dtype}; expected whole seconds, as prepared")
    try:
        frame = frame.select(pl.col(name).cast(numbers.get(name, pl.String)) for name in (*by, kinds[0]))
    except pl.exceptions.PolarsError:
        raise UserError(f"{path}: expected numbers as {kinds[0]}, and whole seconds as timestamp") from None
    value_N = frame[kinds[0]].fill_null(np.nan).to_numpy(writable=True)
    if not len(frame) or frame.select(by).null_count().sum_horizontal().item() or not np.isfinite(value_N).all():
        raise UserError(f"{path} has no rows, or some without {', '.join(by)} or a finite {kinds[0]}")
    if kinds == ["score"] and not ((value_N >= 0) & (value_N <= 1)).all():
        raise UserError(f"{path}: score has {value_N.min():g} to {value_N.max():g}, expected probabilities; or logit")
    return frame.select(by), value_N, kinds == ["logit"]


def read_expected(path: str | Path, data: PreparedData) -> Expected:
    """What production said of the rows of `data` that the file names.

    Raises as `read_scores` does, and UserError for a user and item that `data` do not have, or have several times.
    """
    frame, value_N, is_logit = read_scores(path)
    return Expected(_rows(Path(path), frame, data), value_N, is_logit)


def _rows(path: Path, frame: pl.DataFrame, data: PreparedData) -> np.ndarray:
    """The one event of `data` that each row of the file is."""
    users, items = (
        pl.DataFrame({name: keys, f"{name}_index": np.arange(len(keys))}, schema_overrides={name: pl.String})
        for name, keys in (("user", data.user_keys()), ("item", data.item_keys()))
    )
    events = pl.DataFrame({"user_index": data.user, "item_index": data.item, "timestamp": data.timestamp})
    wanted = frame.with_row_index("at").join(users, on="user", how="left").join(items, on="item", how="left")
    on = ["user_index", "item_index", *frame.columns[2:]]
    found = wanted.join(events.with_row_index("row"), on=on, how="left", maintain_order="left")
    for is_wrong, what in (
        (found["row"].is_null(), "no event of the prepared log"),
        (found["at"].is_duplicated(), "several events of the prepared log (a column timestamp separates moments)"),
    ):
        if is_wrong.any():
            wrong = found.filter(is_wrong).unique("at", maintain_order=True)
            named = ", ".join(f"{name} {short(wrong[name][0])}" for name in frame.columns)
            raise UserError(f"{path}: {len(wrong):,} of {len(frame):,} rows are {what}, such as {named}")
    return found["row"].cast(pl.Int64).to_numpy()
