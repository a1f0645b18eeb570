"""Source "served": what a server scored, with the labels of the events that followed, as rows for a ranker.

    <log>/spec-<id>.json                     how the rows of a bundle were made
    <log>/requests-<id>-<time>-….parquet     what was scored (lumrec/batches/served_rows.py), one row for each request
    <log>/events-<time>-….parquet            what /v1/events took in

A candidate's label is that of the events that name its request and item, the highest if there are several. Features and
knowledge are those that were scored: nothing is computed again.

    prepared   manifest.json   rows.parquet (a row for each labelled candidate)   features.parquet (a row each request)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from lumrec.data.forgotten import digest
from lumrec.data.prepared import PreparedData
from lumrec.data.served_config import ServedConfig
from lumrec.data.splits import PARTS, SplitConfig, assign, cut_times
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import read_json

ROWS, FEATURES = "rows.parquet", "features.parquet"
ABOUT = ("request_id", "user", "time", "items")  # columns of a request that its join reads


class ServedData(PreparedData):
    """Served rows in the place of a log's events; vocabularies, items and tables are those of the log (`base`).

    request, candidate: int64 [R], of each row its request, and which of the request's candidates it is. served: "spec"
    (RequestSpec as JSON), "knowledge" (None, or conditions, dim, num_folds, log_z) and "bundle".
    """

    def __init__(self, path: Path, manifest: dict[str, Any], base: PreparedData) -> None:
        self.__dict__.update(base.__dict__)
        self.base, self.path, self.manifest, self.fingerprint = base, path, manifest, manifest["fingerprint"]
        self.served: dict[str, Any] = manifest["served"]
        rows = pl.read_parquet(path / ROWS)
        self.num_events = self.num_rows = len(rows)
        self.request, self.candidate = (rows[name].to_numpy().astype(np.int64) for name in ("request", "candidate"))
        self.timestamp, self.item = (rows[name].to_numpy().astype(np.int64) for name in ("timestamp", "item"))
        self.label, self.split = rows["label"].to_numpy().astype(np.float32), rows["split"].to_numpy().astype(np.int8)
        self._users = pl.read_parquet(path / "users.parquet")
        self.num_users = len(self._users)
        self.user = (rows["user"] != rows["user"].shift(1)).fill_null(False).cum_sum().to_numpy().astype(np.int64)
        self.user_offsets = np.searchsorted(self.user, np.arange(self.num_users + 1)).astype(np.int64)
        self.order = self.before = np.arange(len(rows))
        self.negative_event = self.negative_item = np.zeros(0, np.int64)
        self.probability, self.absolute_time = None, True

    def vocabulary(self, table: str) -> dict[str, int]:
        """As of the log."""
        return self.base.vocabulary(table)

    def read_features(self) -> pa.Table:
        """What was scored, one row for each request."""
        return pq.read_table(self.path / FEATURES, memory_map=True)


def served_files(log: Path) -> list[Path]:
    """The files of a served log. Raises MissingFileError where there is none."""
    files = sorted(each for each in log.glob("*") if each.suffix in (".json", ".parquet") and each.name[0] != ".")
    if not any(each.name.startswith("requests-") for each in files):
        raise MissingFileError(f"there are no served rows in {log} (data.served.log); a server writes them: serve.log")
    return files


def write_served(
    config: ServedConfig, split: SplitConfig, log: Path, base: PreparedData, work: Path, forgotten: set[str]
) -> dict[str, Any]:
    """Joins a served log with its events, writes rows and features into `work`; gives what its manifest says.

    Raises UserError where no row is left.
    """
    bundle, served, tables = _requests(config, log)
    requests = pl.DataFrame(pa.concat_tables([table.select(ABOUT) for table in tables])).with_row_index("request")
    events = _events(log)
    rows = (
        requests.unique("request_id", keep="last", maintain_order=True)
        .with_columns(candidate=pl.int_ranges(0, pl.col("items").list.len()))
        .explode("items", "candidate")
        .rename({"items": "item_key"})
        .join(events, on=["request_id", "item_key"], how="left")
    )
    rows = rows.filter(~pl.col("user").map_elements(lambda key: digest(key) in forgotten, return_dtype=pl.Boolean))
    num_scored, num_labelled = len(rows), len(rows) - rows["label"].null_count()
    if config.without_event == "negative":
        rows = rows.with_columns(pl.col("label").fill_null(0.0))
    rows = rows.filter(pl.col("label").is_not_null())
    if rows.is_empty():
        raise UserError(
            f"{log}: none of {num_scored:,} scored candidates has an event; events name their request_id and item"
        )
    index = {key: place for place, key in enumerate(base.item_keys())}
    rows = rows.with_columns(
        timestamp=pl.col("time").floor().cast(pl.Int64),
        item=pl.col("item_key").replace_strict(index, default=base.num_items, return_dtype=pl.Int64),
    ).sort("user", "time", "request", "candidate")
    rows = rows.with_columns(split=_split(split, rows, work))
    kept = rows["request"].unique().sort()
    new = pl.DataFrame({"request": kept, "number": np.arange(len(kept))})
    rows = rows.join(new, on="request", how="left", maintain_order="left").with_columns(request=pl.col("number"))
    rows.select(user_key=pl.col("user").unique(maintain_order=True)).write_parquet(work / "users.parquet")
    rows.select("request", "candidate", "user", "item", "timestamp", "label", "split").write_parquet(work / ROWS)
    features = pa.concat_tables(tables).take(pa.array(kept.to_numpy()))
    pq.write_table(features, work / FEATURES, compression="zstd")
    counts = {part: int((rows["split"] == number).sum()) for number, part in enumerate(PARTS)}
    return {
        "served": {**served, "bundle": bundle},
        "has_clock": True,
        "absolute_time": True,
        "table_rows": base.table_rows,
        "counts": {"events": len(rows), "scored": num_scored, "with_event": num_labelled, **counts},
        "base": {"folder": str(base.path), "fingerprint": base.fingerprint},
    }


def _requests(config: ServedConfig, log: Path) -> tuple[str, dict[str, Any], list[pa.Table]]:
    """The newest bundle's name, how its rows were made, and the requests whose rows were made in the same way."""
    files = [each for each in served_files(log) if each.name.startswith("requests-")]
    specs = {each.stem.removeprefix("spec-"): read_json(each) for each in log.glob("spec-*.json")}
    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
    tables = {file: pq.read_table(file) for file in files}
    bundle = config.bundle or tables[newest]["bundle"][-1].as_py()
    if bundle not in specs:
        raise UserError(f"{log} has no rows of the bundle {bundle!r}; it has: {', '.join(sorted(specs)) or 'none'}")
    same = [name for name, spec in specs.items() if spec == specs[bundle]]
    found = [table for table in tables.values() if table["bundle"][0].as_py() in same]
    return bundle, specs[bundle], found


def _events(log: Path) -> pl.DataFrame:
    """request_id, item_key, label: the highest of each pair."""
    files = sorted(log.glob("events-*.parquet"))
    empty = pl.DataFrame(schema={"request_id": pl.String, "item_key": pl.String, "label": pl.Float32})
    frames = [pl.read_parquet(file, columns=["request_id", "item", "label"]) for file in files]
    events = pl.concat([empty, *(frame.rename({"item": "item_key"}) for frame in frames)])
    return events.filter(pl.col("request_id") != "").group_by("request_id", "item_key").agg(pl.col("label").max())


def _split(config: SplitConfig, rows: pl.DataFrame, work: Path) -> np.ndarray:
    """The part of each row, as of a log's events; the candidates of a request are in one part."""
    keys, first = np.unique(rows["user"].to_numpy(), return_index=True)
    time_E, request_E = rows["timestamp"].to_numpy(), rows["request"].to_numpy()
    is_first_E = np.concatenate([[True], (request_E[1:] != request_E[:-1])])
    before_E = np.maximum.accumulate(np.where(is_first_E, np.arange(len(rows)), 0))
    (scratch := work / "times.parquet").write_bytes(b"")
    rows.select("timestamp").write_parquet(scratch)
    cuts = cut_times(config, [scratch])
    scratch.unlink()
    offsets = np.append(first, len(rows)).astype(np.int64)
    return assign(config, keys.tolist(), offsets, time_E, cuts, before_E=before_E)
