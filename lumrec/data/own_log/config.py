"""Settings of your own log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lumrec.data.sources.lines import NO_VALUE
from lumrec.run.errors import UserError
from lumrec.run.limits import setting

Names = str | list[str]  # a single name is a list of one
TAB = {"\\t": "\t", "tab": "\t"}  # as typed in a shell


def check_encoding(key: str, name: str) -> None:
    """Raises UserError for a name that is no text encoding ("zip" encodes bytes)."""
    try:
        "".encode(name)
        bytes(range(256)).decode(name, "replace")  # idna cannot go on behind a byte that is no text
    except (LookupError, ValueError):
        raise UserError(f"{key}: got {name!r}, expected the name of an encoding, such as utf8, latin-1, gbk") from None


@dataclass(frozen=True)
class LogConfig:
    """Files and columns of your own log.

    events: files, folders or globs of the events, one or a list (.parquet, .csv, .csv.gz, .tsv, .tsv.gz).
    items: the same for the items; [] = the features of items are columns of the events.
    users: the same for the users; [] = the features of users are columns of the events.
    user: column of the events with the user's key.
    item: column of the events with the item's key.
    timestamp: column of the events with the time; "" = the log has no times, and its rows are in the order of events.
    item_in_items: the item's key in the items' files; "" = the same column name as in the events.
    user_in_users: the user's key in the users' files; "" = the same column name as in the events.
    title: column of the items to show to people; "" = `title`, where there is one.
    all_positive: every event is positive (a log of purchases, say), and there is no label column.
    time_unit: unit of the times; auto recognises it by the size of the numbers, or as ISO 8601, and reports it. A time
        without a zone is UTC.
    utc_offset_hours: local time of the users, for hour, weekday and time_of_day.
    known_after: columns of the events that are known only after the item was shown, such as dwell time. The label's
        column always is.
    separator: for CSV: character between fields (.tsv: a tab). Where the first lines of a file are clearly separated by
        another one of comma, semicolon, | and tab, that one is used and reported.
    quote: for CSV: character around fields that hold separators; "" = none.
    line_breaks: for CSV: quoted fields may hold line breaks. Otherwise such a row is quarantined, because a line break
        usually means that a quote was left open.
    encoding: for CSV: utf8, latin-1, gbk, …, unless the file begins with a byte order mark. Rows that cannot be decoded
        are quarantined.
    missing: for CSV: texts that mean "no value".
    lists: for CSV: columns whose text holds several values.
    list_separator: for CSV: character between the values of a list.
    decimal_comma: columns of numbers that are written 1,5 or 1.234,5.
    exact: columns in which 007 and 7, or 1 and 1.0, are different values. In all other columns such a pair is an
        error, because one value would count as two.
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
    """A list of names; a single text is a list of one, "" an empty list."""
    return ([names] if names else []) if isinstance(names, str) else list(names)
