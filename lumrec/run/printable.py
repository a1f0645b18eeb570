"""Makes foreign text (titles, ids, file and column names, messages that quote them) safe to show in a terminal.

A log may contain escape sequences that rewrite the screen, carriage returns that hide a line, and characters that
reverse the direction of text. Control characters are therefore shown as escapes.

>>> printable("Toy\\x1b[2J Story\\r\\u202e(1995)")
'Toy\\\\x1b[2J Story\\\\r\\\\u202e(1995)'
>>> printable("two\\nlines"), printable("two\\nlines", lines=True)
('two\\\\nlines', 'two\\nlines')
"""

import logging
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate, line and paragraph separator
_JOINERS = "\u200c\u200d"  # part of scripts and emojis
_MARKDOWN = re.compile(r"([\\`*\[\]<>|])")


def printable(text: object, *, lines: bool = False) -> str:
    """`text` with escapes instead of control characters. lines: keep line breaks and tabs."""
    plain = str(text)
    if plain.isprintable():
        return plain
    kept = _JOINERS + ("\n\t" if lines else "")
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _OBEYED and character not in kept
        else character
        for character in plain
    )


def say(text: object, *, file: TextIO | None = None) -> None:
    """Prints text that may contain foreign text, in the stream's encoding."""
    stream = sys.stdout if file is None else file
    encoding = stream.encoding or "utf-8"
    shown = printable(text, lines=True).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, flush=True)


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for the terminal: each column is as wide as its widest cell.

    >>> text_table([["ranker", "AUC"], ["DIN", "0.7988"]])
    ['ranker  AUC', 'DIN     0.7988']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]


def markdown(text: object) -> str:
    """`text` escaped for a cell of a Markdown table."""
    return _MARKDOWN.sub(r"\\\1", printable(text))


class PrintableFormatter(logging.Formatter):
    """Formats log lines that may contain foreign text."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)
