"""Writes what the server scored, and the events that followed, as Parquet files to train on (data.source=served).

A separate thread collects the rows and writes a file once it has enough of them or the oldest has waited long enough. A
file is written completely or not at all, so a server that is killed loses the rows of the last seconds. Rows are also
lost if the queue is full or the disk cannot be written: these are counted and logged, and no request waits for them.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lumrec.batches.served_rows import column_types, served_columns
from lumrec.run.files import new_file, write_atomically
from lumrec.serving.metrics import Metrics
from lumrec.serving.requests import Event

logger = logging.getLogger(__name__)
MOST_WAITING = 1000
MOST_BYTES = 64 << 20  # rows of one file in memory
ABOUT = [
    ("request_id", pa.string()),
    ("user", pa.string()),
    ("time", pa.float64()),
    ("bundle", pa.string()),
    ("items", pa.list_(pa.string())),
    ("scores", pa.list_(pa.float32())),
]
EVENTS = pa.schema(
    [("request_id", pa.string()), ("user", pa.string()), ("item", pa.string())]
    + [("time", pa.float64()), ("label", pa.float32()), ("event_id", pa.string()), ("features", pa.string())]
)
Row = tuple[str, Callable[[], dict[str, Any]]]


class ServedLog:
    """Collects rows without waiting. A file has at most `max_rows` rows, which wait at most `max_age_s` seconds."""

    def __init__(self, folder: Path, metrics: Metrics, *, max_rows: int, max_age_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.metrics, self.max_rows, self.max_age_s = folder, metrics, max_rows, max_age_s
        self._queue: queue.Queue[Row | None] = queue.Queue(MOST_WAITING)
        self._held: dict[str, list[dict[str, Any]]] = {}
        self._bytes: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._number, self._described = 0, set[str]()
        self._thread = threading.Thread(target=self._run, name="served-log", daemon=True)
        self._thread.start()

    def scored(self, scorer: Any, request: Any, request_id: str, scored: Any) -> None:
        """Logs a request with what the ranker read of it."""
        now = time.time() if request.time is None else request.time
        about = {"request_id": request_id, "user": request.user, "time": now, "items": request.items}
        self._describe(scorer)

        def columns() -> dict[str, Any]:
            of = {**about, "bundle": scorer.version, "scores": scored.scores}
            return of | served_columns(scored.batch.rank, scored.rows)

        self._put(f"requests-{scorer.version}", columns)

    def events(self, events: list[Event]) -> None:
        """Logs events of users."""
        now = time.time()
        for event in events:
            row = {
                "request_id": event.request,
                "user": event.user,
                "item": event.item,
                "time": now if event.time is None else event.time,
                "label": event.label,
                "event_id": event.event_id,
                "features": json.dumps(event.features),
            }
            self._put("events", lambda row=row: row)  # type: ignore[misc]

    def close(self) -> None:
        """Writes the rows that are left, and ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _put(self, kind: str, row: Callable[[], dict[str, Any]]) -> None:
        try:
            self._queue.put_nowait((kind, row))
        except queue.Full:
            self.metrics.log_rows.labels("lost").inc()

    def _run(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=min(1.0, self.max_age_s / 4))
            except queue.Empty:
                self._write_old()
                continue
            if item is None:
                break
            try:
                self._hold(*item)
            except Exception:  # a row that cannot be logged must not end the log
                self.metrics.log_rows.labels("lost").inc()
                logger.exception("a row could not be logged")
            self._write_old()
        for kind in list(self._held):
            self._write(kind)

    def _hold(self, kind: str, make: Callable[[], dict[str, Any]]) -> None:
        row = make()
        self._held.setdefault(kind, []).append(row)
        self._since.setdefault(kind, time.monotonic())
        self._bytes[kind] = self._bytes.get(kind, 0) + sum(getattr(value, "nbytes", 64) for value in row.values())
        if len(self._held[kind]) >= self.max_rows or self._bytes[kind] >= MOST_BYTES:
            self._write(kind)

    def _write_old(self) -> None:
        for kind, since in list(self._since.items()):
            if time.monotonic() - since >= self.max_age_s:
                self._write(kind)

    def _write(self, kind: str) -> None:
        rows = self._held.pop(kind)
        del self._since[kind], self._bytes[kind]
        self._number += 1
        file = self.folder / f"{kind}-{time.time_ns()}-{os.getpid()}-{self._number}.parquet"
        try:
            table = pa.Table.from_pylist(rows, schema=EVENTS if kind == "events" else _schema(rows[0]))
            with new_file(file) as temporary:
                pq.write_table(table, temporary, compression="zstd")
        except (OSError, pa.ArrowException) as error:
            self.metrics.log_rows.labels("lost").inc(len(rows))
            logger.error("%d rows could not be logged: %s cannot be written (%s)", len(rows), file, error)
            return
        self.metrics.log_rows.labels("written").inc(len(rows))

    def _describe(self, scorer: Any) -> None:
        """Writes, once for each bundle, how its rows are made."""
        file = self.folder / f"spec-{scorer.version}.json"
        if scorer.version in self._described or file.exists():
            return
        self._described.add(scorer.version)
        needs = scorer.bundle.manifest["needs"]
        knowledge = needs and {
            "conditions": needs["conditions"],
            "dim": needs["dim"],
            "num_folds": len(needs["lums"]),
            "log_z": bool(needs["log_normalizer"]),
        }
        spec = {"spec": scorer.bundle.builder.spec.to_json(), "knowledge": knowledge}
        write_atomically(file, json.dumps(spec, indent=1) + "\n")


def _schema(row: dict[str, Any]) -> pa.Schema:
    named = {name for name, _ in ABOUT}
    return pa.schema([*ABOUT, *column_types({name: value for name, value in row.items() if name not in named})])
