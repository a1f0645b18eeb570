"""The one way to tell an error of the user's from a bug.

A `UserError` is told in one sentence (what was given, what was expected, how to mend it) and ends an app with exit code
2. Every other exception is a bug of ours or an event of the machine's: an app shows its traceback.
"""


class UserError(ValueError):
    """Something that the user gave cannot be used: a setting, a file, a log. The message is the whole explanation."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named, or that a stage reads, is not there. The message says what makes it."""
