"""Errors of the user, as opposed to bugs, and a hint at the name that they may have meant.

An app reports a `UserError` in one sentence (what was given, what was expected, how to fix it) and ends with exit code
2. Every other exception is a bug of ours or a fault of the machine: an app shows its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A setting, file or log of the user cannot be used. The message explains it completely."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named, or that a stage reads, is missing. The message says how to make it."""


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The nearest known name, ignoring case, as a question in brackets; "" if none is near.

    >>> did_you_mean("feedbak", ["scenario", "feedback"])
    " (did you mean 'feedback'?)"
    """
    names = {other.lower().strip(): other for other in known}
    near = difflib.get_close_matches(name.lower().strip(), names, n=1, cutoff=cutoff)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""
