"""Scores a whole Parquet table of (user, item, time, context) with a bundle, by many processes, into a Parquet file.

rows of the input    0 … 99,999 | 100,000 … 199,999 | …      parts, each scored by one process
<run>/parts/         00000.parquet 00001.parquet             finished parts; a killed run continues with the others
<run>/scores.parquet                                         all of them, in the order of the input
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lumrec.data.common import Common
from lumrec.data.forms import as_text, text_of
from lumrec.data.schema import SchemaConfig
from lumrec.run.errors import MissingFileError, UserError, did_you_mean
from lumrec.run.files import full_disk_told, new_file
from lumrec.run.folder import RunFolder
from lumrec.run.limits import count
from lumrec.serving.bundle import read_manifest
from lumrec.serving.requests import RequestSpec, ScoreRequest
from lumrec.serving.scorer import Scorer

logger = logging.getLogger(__name__)
OUTPUT = "scores.parquet"
ROWS_OF_CALL, REQUESTS_OF_CALL = 4096, 512  # scored in one call, at most
SCORES = pa.schema(
    {"score": pa.float32(), "unknown_user": pa.bool_(), "unknown_item": pa.bool_(), "knowledge_age_s": pa.float32()}
)


@dataclass(frozen=True)
class ScoreConfig:
    """A table to score with a bundle. Its columns of context are found by the names of features, or of log columns.

    bundle: the bundle's folder, or its name under runs_dir; "" = "<name>-rank-bundle".
    input: a Parquet file, or a folder of them, which are read in the order of their names.
    store: knowledge run (its name, its folder, or a Redis URL); "" = none: every answer is absent.
    state: user states (a folder, or a Redis URL); "" = none: every user is unknown.
    user: column of the raw user id.
    item: column of the raw item id.
    time: column of the time (a date with time, or seconds since 1970, UTC); "" = now.
    processes: processes that score, each on one core; 0 = one for each core.
    rows_per_part: rows that one process takes at a time.
    trust_compiled: open a compiled bundle, which is machine code; see docs/security.md.
    """

    bundle: str = ""
    input: str = ""
    store: str = ""
    state: str = ""
    user: str = "user"
    item: str = "item"
    time: str = ""
    processes: int = count(0, most=1024)
    rows_per_part: int = count(100_000, least=1, most=2**24)
    trust_compiled: bool = False


class Part(NamedTuple):
    """Rows of one row group of a file: from `first` up to, without, `last`. number: of all parts, in order."""

    number: int
    file: Path
    group: int
    first: int
    last: int


def check_inputs(common: Common, *, score: ScoreConfig) -> None:
    """Raises UserError for a table or a bundle that is not there; reads no data."""
    input_files(score)
    read_manifest(bundle_of(common, score))


def bundle_of(common: Common, settings: ScoreConfig) -> Path:
    """The folder of the bundle."""
    return common.find_run(settings.bundle or f"{common.name}-rank-bundle")


def input_files(settings: ScoreConfig) -> list[Path]:
    """The Parquet files to score, in order. Raises MissingFileError where there are none."""
    path = Path(settings.input)
    if not settings.input:
        raise UserError("score.input is empty; expected a Parquet file, or a folder of them: score.input=<path>")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise MissingFileError(f"score.input: there is no Parquet file at {path}")
    return files


def run(common: Common, settings: ScoreConfig) -> dict[str, float | str]:
    """Scores the table into `<runs_dir>/<run>/scores.parquet` and returns what its result.json holds.

    The output has the columns of user, item and time, and score (float32), unknown_user, unknown_item and
    knowledge_age_s (NaN where the LUM had no answer), in the order of the input. Keys of the result: rows, and of them
    users_unknown, items_unknown, without_knowledge; rows_per_s, wall_s, and as text bundle, output.
    A killed run continues. Raises MissingFileError for what is not there, UserError for what cannot be scored.
    """
    started = time.perf_counter()
    check_inputs(common, score=settings)
    bundle, files = bundle_of(common, settings), input_files(settings)
    manifest = read_manifest(bundle)
    spec = RequestSpec.from_json(manifest["spec"])
    columns = _columns(files, settings, spec.schema)
    for name, what in (("state", "every user is scored as unknown"), ("store", "every answer of the LUM as absent")):
        if not getattr(settings, name) and (name == "state" or manifest["needs"] is not None):
            logger.warning("score.%s is empty: %s", name, what)
    inputs = {"bundle": manifest["sha256"], "input": json.dumps([[str(file), *_stamp(file)] for file in files])}
    run_folder = RunFolder.create(common.folder("score"), "score", common.settings(score=settings), inputs=inputs)
    if run_folder.finished:
        return run_folder.result()
    parts_folder = run_folder.path / "parts"
    parts_folder.mkdir(exist_ok=True)
    parts = list(_parts(files, settings.rows_per_part))
    pending = [part for part in parts if not (parts_folder / _name(part)).exists()]
    work = partial(_score_part, parts_folder, settings, columns)
    with full_disk_told(run_folder.path, "the scores", then="make room and run the same command again: it continues"):
        _in_processes(common, settings, bundle, work, pending)
        counts = _join(parts_folder, parts, run_folder.path / OUTPUT)
    shutil.rmtree(parts_folder)
    wall_s = time.perf_counter() - started
    scored = sum(part.last - part.first for part in pending)
    result: dict[str, float | str] = {
        "bundle": str(bundle),
        "output": str(run_folder.path / OUTPUT),
        **counts,
        "rows_per_s": scored / wall_s,
        "wall_s": wall_s,
    }
    run_folder.finish(result)
    return result


def _in_processes(common: Common, settings: ScoreConfig, bundle: Path, work: partial, parts: list) -> None:
    """Scores the parts; with one process in this one."""
    processes = min(settings.processes or os.cpu_count() or 1, len(parts))
    store = settings.store and (settings.store if "://" in settings.store else str(common.find_run(settings.store)))
    state = settings.state and (settings.state if "://" in settings.state else str(common.find_run(settings.state)))
    trusted = settings.trust_compiled
    open_scorer = partial(Scorer.open, bundle, store=store or None, state=state or None, trust_compiled=trusted)
    scorer = open_scorer()  # what is wrong is said once, and here
    if processes <= 1:
        _use(scorer)
        for part in parts:
            work(part)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=_open, initargs=(open_scorer,)) as pool:
        for done, part in enumerate(pool.map(work, parts), start=1):
            logger.info("part %d (%d of %d) is scored", part, done, len(parts))


_scorer: Scorer | None = None


def _use(scorer: Scorer) -> None:
    global _scorer
    _scorer = scorer


def _open(open_scorer: partial[Scorer]) -> None:
    torch.set_num_threads(1)
    _use(open_scorer(verify=False))


def _columns(files: list[Path], settings: ScoreConfig, schema: SchemaConfig) -> dict[str, str]:
    """Features of the context that the table has: feature → column. Raises UserError for a missing column."""
    names = pq.read_schema(files[0]).names
    for key in ("user", "item", "time"):
        wanted = getattr(settings, key)
        if wanted not in names and (wanted or key != "time"):
            near = did_you_mean(wanted, names)
            raise UserError(f"score.{key}: {files[0]} has no column {wanted!r}{near}; it has: {', '.join(names)}")
    found = {}
    for name, feature in schema.features.items():
        if feature.role in ("context", "condition", "user") and not feature.wish:
            column = next((each for each in (name, feature.column) if each in names), "")
            if column and column not in (settings.user, settings.item):
                found[name] = column
    return found


def _parts(files: list[Path], rows_per_part: int) -> Iterator[Part]:
    number = 0
    for file in files:
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            num_rows = metadata.row_group(group).num_rows
            for first in range(0, num_rows, rows_per_part):
                yield Part(number, file, group, first, min(first + rows_per_part, num_rows))
                number += 1


def _name(part: Part) -> str:
    return f"{part.number:06}.parquet"


def _score_part(folder: Path, settings: ScoreConfig, columns: dict[str, str], part: Part) -> int:
    """Scores the rows of a part into its file; its number."""
    assert _scorer is not None
    keys = [name for name in (settings.user, settings.item, settings.time) if name]
    wanted = list(dict.fromkeys([*keys, *columns.values()]))
    whole = pq.ParquetFile(part.file).read_row_group(part.group, columns=wanted)
    table = whole.slice(part.first, part.last - part.first)
    frame = pl.DataFrame(table)
    try:
        scored = _scored(_scorer, frame, settings, columns)
    except UserError as error:
        raise UserError(
            f"{part.file}, rows {part.first:,} to {part.last:,} of row group {part.group}: {error}"
        ) from None
    output = pa.table({**{name: table[name] for name in keys}, **scored}).cast(
        pa.schema([*(table.schema.field(name) for name in keys), *SCORES])
    )
    with new_file(folder / _name(part)) as temporary:
        pq.write_table(output, temporary, write_page_checksum=True)
    return part.number


def _scored(
    scorer: Scorer, frame: pl.DataFrame, settings: ScoreConfig, columns: dict[str, str]
) -> dict[str, np.ndarray]:
    """The columns of SCORES for the rows of a frame."""
    users = as_text(frame[settings.user]).fill_null("").to_list()
    items = as_text(frame[settings.item]).fill_null("").to_list()
    times = _seconds(frame[settings.time]).to_list() if settings.time else [time.time()] * len(frame)
    schema = scorer.bundle.builder.spec.schema
    context = {name: _raw(frame[column], schema.features[name].kind) for name, column in columns.items()}
    # Rows of one user and time that follow each other are candidates of one request, and share its history.
    same = frame.select(pl.struct({settings.user, settings.time} - {""}).rle_id()).to_series().to_numpy()
    bounds = np.flatnonzero(np.diff(same, prepend=-1, append=-1)).tolist()
    result: dict[str, list[np.ndarray]] = {name: [] for name in SCORES.names}
    for spans in _calls(list(zip(bounds, bounds[1:]))):
        requests = [
            ScoreRequest(users[a], items[a:b], {}, times[a], {name: values[a:b] for name, values in context.items()})
            for a, b in spans
        ]
        for request, scored in zip(requests, scorer.score_many(requests)):
            if problem := scored.state_error or scored.store_error:
                raise UserError(f"{problem}. Nothing is scored without it; run the same command again")
            num, unknown = len(request.items), set(scored.unknown_items)
            result["score"].append(scored.scores)
            result["unknown_user"].append(np.full(num, scored.unknown_user))
            result["unknown_item"].append(np.array([item in unknown for item in request.items]))
            result["knowledge_age_s"].append(np.full(num, scored.knowledge_age_s, np.float32))
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in result.items()}


def _raw(column: pl.Series, kind: str) -> list:
    """The values of a feature's column as a request has them."""
    if kind == "id":
        return as_text(column).to_list()
    if isinstance(kind_of := column.dtype, pl.List) and isinstance(inner := kind_of.inner, pl.DataType):
        return column.list.eval(text_of(pl.element(), inner)).to_list()
    return column.to_list()


def _calls(spans: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Rows of each request, in groups that are scored at once."""
    group: list[tuple[int, int]] = []
    for first, last in spans:
        for begin in range(first, last, ROWS_OF_CALL):
            end = min(begin + ROWS_OF_CALL, last)
            if group and (end - group[0][0] > ROWS_OF_CALL or len(group) == REQUESTS_OF_CALL):
                yield group
                group = []
            group.append((begin, end))
    if group:
        yield group


def _seconds(column: pl.Series) -> pl.Series:
    """Times as seconds since 1970, float64. Raises UserError for another type and for missing times."""
    if column.null_count():
        raise UserError(f"column {column.name!r} lacks {column.null_count():,} times")
    if isinstance(column.dtype, pl.Datetime):
        return column.dt.epoch("us") / 1e6
    if column.dtype == pl.Date:
        return column.cast(pl.Datetime("us")).dt.epoch("us") / 1e6
    if not column.dtype.is_numeric():
        raise UserError(f"column {column.name!r} is {column.dtype}; expected times, or seconds since 1970")
    return column.cast(pl.Float64)


def _join(folder: Path, parts: list[Part], output: Path) -> dict[str, float]:
    """Writes the parts as one file, in order; the figures of its rows."""
    figures = np.zeros(4, np.int64)
    with new_file(output) as temporary:
        writer = None
        for part in parts:
            table = pq.read_table(folder / _name(part), page_checksum_verification=True)
            writer = writer or pq.ParquetWriter(temporary, table.schema, write_page_checksum=True)
            writer.write_table(table)
            absent = np.isnan(table["knowledge_age_s"].to_numpy())
            unknown = (table[name].to_numpy() for name in ("unknown_user", "unknown_item"))
            figures += [len(table), *(column.sum() for column in unknown), absent.sum()]
        if writer is None:
            pq.write_table(SCORES.empty_table(), temporary)
        else:
            writer.close()
    names = ("rows", "users_unknown", "items_unknown", "without_knowledge")
    return dict(zip(names, figures.tolist()))


def _stamp(file: Path) -> tuple[int, int]:
    return file.stat().st_size, file.stat().st_mtime_ns
