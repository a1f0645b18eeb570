"""Settings of your own log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lumrec.data.sources.lines import NO_VALUE
from lumrec.run.errors import UserError
from lumrec.run.limits import setting

Names = str | list[str]  # one name may stand for a list of one


TAB = {"\\t": "\t", "tab": "\t"}  # as it is typed in a shell


def check_encoding(key: str, name: str) -> None:
    """Raises UserError for a name that is no encoding of text ("zip" is one of bytes)."""
    try:
        "".encode(name)
    except (LookupError, ValueError):
        raise UserError(f"{key}: got {name!r}, expected the name of an encoding, such as utf8, latin-1, gbk") from None


@dataclass(frozen=True)
class LogConfig:
    """Files and columns of a log of one's own.

    events, items, users: files, folders or globs, one or a list (.parquet, .csv, .csv.gz, .tsv, .tsv.gz); items and
    users may be left out, and their features are then columns of the events. user, item, timestamp: names of the key
    columns. timestamp "": the log has no times, and its rows are in the order of events. item_in_items, user_in_users:
    the same in those files, where they are called otherwise ("" = as in the events). title: column of the items to show
    to people ("" = `title`, where there is one). all_positive: every event is a positive one (a log of purchases, say)
    and there is no label column.
    time_unit: s | ms | us | ns | iso | auto (by the size of the numbers, or ISO 8601; it is told). A time without a
    zone is UTC. utc_offset_hours: local time of the users, for hour, weekday and time_of_day.
    known_after: columns of the events that are known only after the item was shown (dwell time, say); the label's
    column always is.
    Of CSV alone: separator between fields (.tsv: a tab); where another of , ; | and tab parts the first lines of a file
    and this does not, that one is taken and reported. quote: around fields with separators in them ("" = none).
    line_breaks: a quoted field may hold line breaks; else such a row is quarantined, as most often a quote was left
    open. encoding: utf8, latin-1, gbk, …, unless the file begins with a byte
    order mark; what is no such text is quarantined. missing: texts that stand for no value.
    lists: columns whose text holds several values, list_separator between them.
    decimal_comma: columns of numbers that are written 1,5 or 1.234,5. exact: columns whose values may differ in form
    alone (007 and 7, 1 and 1.0); in all others that is an error, as one value would count as two.
    """

    events: Names = field(default_factory=list)
    items: Names = field(default_factory=list)
    users: Names = field(default_factory=list)
    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    item_in_items: str = ""
    user_in_users: str = ""
    title: str = ""
    all_positive: bool = False
    time_unit: Literal["auto", "s", "ms", "us", "ns", "iso"] = "auto"
    utc_offset_hours: float = setting(0.0, least=-24, most=24)
    known_after: Names = field(default_factory=list)
    separator: str = ","
    quote: str = '"'
    line_breaks: bool = False
    encoding: str = "utf8"
    missing: list[str] = field(default_factory=lambda: list(NO_VALUE))
    lists: Names = field(default_factory=list)
    list_separator: str = "|"
    decimal_comma: Names = field(default_factory=list)
    exact: Names = field(default_factory=list)

    def check(self, at: str) -> None:
        """Raises UserError for names and texts that no log can have (`at`: the section, with a dot)."""
        for name in ("user", "item", "list_separator"):
            if not getattr(self, name):
                what = "the text between the values of a list" if name == "list_separator" else "the name of a column"
                raise UserError(f"{at}{name}: got '', expected {what}")
        separator = TAB.get(self.separator, self.separator)
        for key, value, lengths in (("separator", separator, (1,)), ("quote", self.quote, (0, 1))):
            if len(value.encode()) not in lengths:
                raise UserError(f"{at}{key}: got {value!r}, expected one ASCII character{' or none' * (0 in lengths)}")
        check_encoding(f"{at}encoding", self.encoding)


def as_list(names: Names) -> list[str]:
    """A list of names, of which one alone may be given as text; "" is none."""
    return ([names] if names else []) if isinstance(names, str) else list(names)
