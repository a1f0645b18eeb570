"""The server's counters for Prometheus, summed over its worker processes by files in PROMETHEUS_MULTIPROC_DIR."""

from __future__ import annotations

import os
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
    multiprocess,
)

SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
AGES = (1, 5, 15, 60, 300, 900, 3600, 6 * 3600, 86_400, 7 * 86_400, 30 * 86_400)
FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported


class Metrics:
    """The counters of one server process."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        if FOLDER not in os.environ:
            ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lumrec_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, mode: Literal["livesum", "livemin"], *labels: str) -> Gauge:
            return Gauge(f"lumrec_{name}", text, labels, registry=registry, multiprocess_mode=mode)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"lumrec_{name}", text, labels, registry=registry, buckets=buckets)

        self.starts = counter(
            "starts", "Server processes that began to serve; those beyond serve.workers replace dead ones"
        )
        self.requests = counter("requests", "Requests answered", "endpoint", "status")
        self.request_s = histogram("request_seconds", "From the first byte to the last", SECONDS, "endpoint")
        self.call_s = histogram("call_seconds", "One call of the ranker", SECONDS)
        self.call_requests = histogram("call_requests", "Requests in one call of the ranker", BATCHES)
        self.queue = gauge("queue_requests", "Requests that wait or are being scored", "livesum")
        self.refused = counter("refused", "Requests refused or given up", "why")
        self.candidates = counter("candidates", "Items scored")
        self.unknown_users = counter("unknown_users", "Requests of users without any event")
        self.unknown_items = counter("unknown_items", "Scored items that the ranker has never seen")
        self.unknown_values = counter("unknown_values", "Values of contexts that are missing or never seen")
        self.cut = counter("cut", "Requests for a time that the user's state no longer holds")
        self.no_knowledge = counter("knowledge_absent", "Requests scored without knowledge by a ranker that reads it")
        self.knowledge_age_s = histogram("knowledge_age_seconds", "Since the LUM was asked", AGES)
        self.failures = counter("failures", "Requests for which this could not be read", "what")
        self.readable = gauge("readable", "1 where it can be read; 0 is an alarm", "livemin", "what")
        self.reloads = counter("reloads", "New versions found", "what", "outcome")
        self.log_rows = counter("log_rows", "Rows of the served log", "outcome")
        self.events = counter("events", "Events received", "outcome")

    def text(self) -> bytes:
        """All counters, of all worker processes, as Prometheus reads them."""
        if FOLDER not in os.environ:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)
