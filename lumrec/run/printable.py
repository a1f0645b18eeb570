"""Foreign text (titles, ids, names of files and columns, messages that quote them) as a terminal may show it.

A log may hold escape sequences that rewrite the screen, carriage returns that hide a line, and characters that turn the
direction of text around. What a terminal would obey is shown as its escape.

>>> printable("Toy\\x1b[2J Story\\r\\u202e(1995)")
'Toy\\\\x1b[2J Story\\\\r\\\\u202e(1995)'
>>> printable("two\\nlines"), printable("two\\nlines", lines=True)
('two\\\\nlines', 'two\\nlines')
"""

import logging
import re
import sys
import unicodedata
from typing import TextIO

_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate, line and paragraph separator
_JOINERS = "\u200c\u200d"  # which scripts and emojis are written with
_MARKDOWN = re.compile(r"([\\`*\[\]<>|])")


def printable(text: object, *, lines: bool = False) -> str:
    """`text` with escapes in place of what is not meant to be seen. lines: line breaks and tabs stay."""
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
    """Prints lines of text that may quote what others wrote, in whatever encoding the stream has."""
    stream = sys.stdout if file is None else file
    encoding = stream.encoding or "utf-8"
    shown = printable(text, lines=True).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, flush=True)


def markdown(text: object) -> str:
    """`text` in a cell of a Markdown table, as it is."""
    return _MARKDOWN.sub(r"\\\1", printable(text))


class PrintableFormatter(logging.Formatter):
    """Log lines of text that may quote what others wrote."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)
