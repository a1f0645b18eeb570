"""The module that reads each `data.source`."""

from __future__ import annotations

from types import ModuleType

from lumrec.data.own_log import read as own_log
from lumrec.data.simulator import simulate
from lumrec.data.sources import amazon, kuairand, movielens

# Name of a source → module with `DEFAULT_SCHEMAS` and `read(data, *, seed, scratch) -> RawLog`.
SOURCES: dict[str, ModuleType] = {
    name: module for module in (movielens, amazon, kuairand, own_log, simulate) for name in module.DEFAULT_SCHEMAS
}
