"""Events and drawn rows as mapped files, one .npy file for each column: a machine holds them once for all of its
processes, and only the parts that are read.

    mapped/item.npy  mapped/feature-003.npy  mapped/feature-007.values.npy  mapped/feature-007.offsets.npy

The Parquet files beside them hold the same rows, for other programs. A list has its values, one list after another, and
offsets, int64 [rows + 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

FOLDER = "mapped"
KEPT = "kept"  # beside it, what later stages compute of the events (lumrec/run/kept.py); replaced with the data
BLOCK = 1 << 20  # rows that are looked at together, where all are


def blocks(num_rows: int) -> Iterator[slice]:
    """The rows 0 … num_rows - 1 in parts.

    >>> [*blocks(3)]
    [slice(0, 3, None)]
    """
    for first in range(0, num_rows, BLOCK):
        yield slice(first, min(first + BLOCK, num_rows))


def feature_file(features: Iterable[str], name: str) -> str:
    """Name of the column of a feature: its place in the schema, as any text may be its name.

    >>> feature_file(["user_id", "a/b"], "a/b")
    'feature-001'
    """
    return f"feature-{list(features).index(name):03d}"


def write_mapped(folder: Path, parts: Sequence[Path], names: Mapping[str, str]) -> None:
    """Writes the columns of `parts` (Parquet files, in this order) to `folder`/mapped, one part in memory at a time.

    names: column → name of its file. Whole numbers become int64 (int8 stays), other numbers float32; `rows_back`
    becomes the row that it leads to, counted over all parts.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    scan = pl.scan_parquet(list(parts))
    dtypes = {column: scan.collect_schema()[column] for column in names}
    lists = [column for column, dtype in dtypes.items() if isinstance(dtype, pl.List)]
    counted = scan.select(pl.len().alias("rows"), *(pl.col(c).list.len().cast(pl.Int64).sum() for c in lists))
    sizes = counted.collect(engine="streaming").row(0, named=True)
    first, num_values = 0, dict.fromkeys(lists, 0)
    for path in parts:
        frame = pl.read_parquet(path, columns=list(names))
        for column, name in names.items():
            series = frame[column]
            if column in lists:
                ends = num_values[column] + series.list.len().cast(pl.Int64).cum_sum().to_numpy()
                _put(folder, f"{name}.offsets", first + 1, ends, sizes["rows"] + 1)
                values = series.filter(series.list.len() > 0).explode().to_numpy().astype(np.int64)
                _put(folder, f"{name}.values", num_values[column], values, sizes[column])
                num_values[column] += len(values)
                continue
            values = series.to_numpy()
            if column == "rows_back":
                values = np.arange(first, first + len(values)) - values
            small = np.float32 if series.dtype.is_float() else np.int8 if series.dtype == pl.Int8 else np.int64
            _put(folder, name, first, values.astype(small), sizes["rows"])
        first += len(frame)


def _put(folder: Path, name: str, first: int, values: np.ndarray, size: int) -> None:
    """Writes values into a file of `size` zeros, which is made where it is not there."""
    path = folder / FOLDER / f"{name}.npy"
    mode = "r+" if path.exists() else "w+"
    file = np.lib.format.open_memmap(path, mode, dtype=values.dtype, shape=(size,))
    file[first : first + len(values)] = values


def mapped(folder: Path, name: str) -> np.ndarray:
    """A column, mapped; what is written to it stays in this process. Raises ValueError or OSError if it is damaged."""
    try:
        return np.asarray(np.lib.format.open_memmap(folder / FOLDER / f"{name}.npy", mode="c"))
    except OverflowError as error:
        raise ValueError(str(error)) from None
