"""Warm start: your model begins from a production checkpoint, audited to the row."""

from lumrec.warm_start.apply import warm_start
from lumrec.warm_start.audit import Audit, PlanError
from lumrec.warm_start.rules import Rule, Rules
from lumrec.warm_start.sources import Source, open_source

__all__ = ["Audit", "PlanError", "Rule", "Rules", "Source", "open_source", "warm_start"]
