"""The prepare stage: writes the log as prepared data into a folder that every later stage reads."""

from __future__ import annotations

from typing import Any

from lumrec.data.common import Common
from lumrec.data.prepare import prepare
from lumrec.run.logs import rank


def run(common: Common) -> dict[str, Any]:
    """Prepares the log into `runs/<run>` and returns the contents of result.json; under torchrun only rank 0 works."""
    if rank() > 0:
        return {}
    common.settings()
    return prepare(common, common.runs / (common.run or f"{common.name}-prepare"))
