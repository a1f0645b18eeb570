"""python tests/helpers/serve_small.py FOLDER WORKERS: the small server in a process that a test can end."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from small_server import small_live, write_bundle

from lumrec.run.logs import start_logging
from lumrec.serving import processes
from lumrec.serving.metrics import Metrics
from lumrec.serving.server import make_app
from lumrec.serving.settings import ServeConfig


def make(folder: Path, settings: ServeConfig) -> FastAPI:
    """The application; called in each worker."""
    metrics = Metrics()
    live = small_live(folder, metrics=metrics)
    return make_app(live, settings, token="", metrics=metrics)


if __name__ == "__main__":
    start_logging()
    write_bundle(Path(sys.argv[1]) / "bundle.json")
    settings = ServeConfig(port=0, workers=int(sys.argv[2]), timeout_ms=120_000, drain_s=120)
    processes.STARTS_WITHIN_S = 3600  # no test waits for it
    processes.run(partial(make, Path(sys.argv[1]), settings), settings, threads=1)
