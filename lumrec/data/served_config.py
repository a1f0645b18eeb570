"""Settings of the source "served"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ServedConfig:
    """Rows that a server has scored, for data.source=served.

    log: folder of the server's log (serve.log), by run name or path.
    prepared: run name or folder of the prepared data that the served ranker was trained on.
    bundle: version of the bundle whose rows are taken; "" = the newest in the log, and others that made their rows in
        the same way.
    without_event: candidates of which no event has come: "leave_out", or "negative" (the label is 0).
    """

    log: str = ""
    prepared: str = ""
    bundle: str = ""
    without_event: Literal["leave_out", "negative"] = "leave_out"
