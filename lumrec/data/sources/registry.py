"""Every source by its name in `data.source`."""

from __future__ import annotations

import difflib
from types import ModuleType
from typing import Dict

from lumrec.data import simulator
from lumrec.data.sources import amazon, kuairand, log, movielens
from lumrec.errors import UserError

SOURCES: Dict[str, ModuleType] = {
    name: module for module in (movielens, amazon, kuairand, log, simulator) for name in module.DEFAULT_SCHEMAS
}


def source_module(name: str) -> ModuleType:
    """The module that reads the source. Raises UserError for an unknown name, with the nearest one."""
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"data.source: got {name!r}{hint}, expected one of {', '.join(SOURCES)}")
    return SOURCES[name]
