"""Errors of the user, as opposed to bugs, and the hint that names what they may have meant.

An app reports a `UserError` in one sentence (what was given, what was expected, how to fix it) and ends with exit code
2. Every other exception is a bug of ours or a fault of the machine: an app shows its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user gave cannot be used: a setting, a file, a log. The message is the whole explanation."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named, or that a stage reads, is not there. The message says what makes it."""


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The nearest of the known names, whatever their case, as a question in brackets; "" if none is near.

    >>> did_you_mean("feedbak", ["scenario", "feedback"])
    " (did you mean 'feedback'?)"
    """
    names = {other.lower().strip(): other for other in known}
    near = difflib.get_close_matches(name.lower().strip(), names, n=1, cutoff=cutoff)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""
