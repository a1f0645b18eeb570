"""Whether the labels of a prepared log are what its config says they are."""

from __future__ import annotations

from typing import Any

from lumrec.data.config import DataConfig
from lumrec.data.splits import PARTS
from lumrec.run.errors import UserError

MOST_UNREADABLE = 0.1  # share of the events; more are another kind of label, not noise
BY_CHANCE = 1e-6  # less likely than this is no chance


def check_labels(data: DataConfig, content: dict[str, Any], earlier_rate: float | None) -> None:
    """Raises UserError where a log's labels are of another kind than declared, or all of one class.

    content: as `convert` returns it. earlier_rate: share of positive training events of the log that
    data.vocabulary_from names; a few events that continue it may be of one class by chance.
    """
    if data.source != "log" or data.log.all_positive:
        return
    label, counts = data.label, content["counts"]
    column = label.column or "label"
    rule = f"values={label.values}" if label.values else f"at_least={label.at_least}"
    if not label.values and label.at_least is None:
        rule = "neither values nor at_least, so 0 and 1 are expected"
    unreadable = (f"events: {column} is {what}" for what in ("neither 0 nor 1, true nor false", "no number"))
    unread = sum(content["quarantine"].get(reason, 0) for reason in unreadable)
    found = f"data.label has {rule}; in column {column!r} of the log "
    hint = "; say what is positive by data.label.values or data.label.at_least (--check shows the column's values)"
    if unread > MOST_UNREADABLE * counts["events_read"]:
        raise UserError(f"{found}{unread:,} of {counts['events_read']:,} events have another label{hint}")
    rates = [content["facts"][f"{part}_positive_rate"] for part in PARTS]
    rates = [rate for rate in rates if rate is not None]
    if not rates or (any(rates) and (min(rates) < 1 or data.negatives is not None)):
        return
    which = "every event is" if any(rates) else "no event is"
    if data.vocabulary_from:
        share = earlier_rate if earlier_rate is None or any(rates) else 1 - earlier_rate
        if share is None or share ** counts["events"] >= BY_CHANCE:
            return
        hint = f", and {earlier_rate:.1%} of those of the log in data.vocabulary_from are{hint}"
    elif any(rates):
        hint += ". Where the log has only positives, say data.log.all_positive=true"
    raise UserError(f"{found}{which} positive{hint}")
