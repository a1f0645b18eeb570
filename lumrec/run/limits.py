"""The limits of settings: declared beside each setting, checked in one place.

    dim: int = setting(64, least=1, most=65_536)
    dropout: float = setting(0.1, least=0, below=1)
    encoder: Literal["gpt", "llama", "hstu"] = "gpt"

`check` checks a whole config: choices and ranges as declared, that numbers are finite and that text can be written to a
file. A section may have a method `check(key)` for settings that must fit each other. The upper limits are generous: far
above what makes sense, but below what would exhaust a machine or overflow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from lumrec.run.errors import UserError, did_you_mean
from lumrec.run.typed_yaml import field_types

# Largest seed that torch, NumPy and a signed 64-bit column accept.
MOST_SEED = 2**63 - 1
# Largest number of rows, events, users or steps: more than any machine can hold, and far below 2**63.
MOST_COUNT = 2**40
MOST_TEXT = 65_536  # characters
MOST_NAME = 180  # bytes of a folder's name; file systems allow 255, and lumrec adds some to a name


@dataclass(frozen=True)
class Limits:
    """least ≤ value ≤ most, and above < value < below; None sets no limit."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def allows(self, value: float) -> bool:
        """Whether a number is within the limits."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def expected(self, value: float) -> str:
        """The allowed range, to report a wrong value: both limits of a share, otherwise the limit that it violates."""
        low = "" if self.least is None else f"at least {_spoken(self.least)}"
        low = low if self.above is None else f"more than {_spoken(self.above)}"
        high = "" if self.most is None else f"at most {_spoken(self.most)}"
        high = high if self.below is None else f"less than {_spoken(self.below)}"
        if low and high and 1 in (self.most, self.below):
            return f"{low} and {high}"
        return high if Limits(self.least, above=self.above).allows(value) else low


def setting(
    default: Any,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with limits for a number, or for a list or mapping of numbers (default: a function)."""
    metadata = {"limits": Limits(least, most, above, below)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def count(default: Any = 0, *, least: int = 0, most: int = MOST_COUNT) -> Any:
    """A field for a count."""
    return setting(default, least=least, most=most)


def share(default: float = 0.0) -> Any:
    """A field for a share: 0 ≤ … < 1."""
    return setting(default, least=0, below=1)


def seed(default: int = 0) -> Any:
    """A field for a seed."""
    return setting(default, least=0, most=MOST_SEED)


def check(config: Any, key: str = "") -> None:
    """Raises UserError for the first invalid setting of a config (a dataclass), with its key, value and limits.

    key: the config's own key in a larger config, such as "rank.train".
    """
    hints = field_types(type(config))
    for each in dataclasses.fields(config):
        at = f"{key}.{each.name}" if key else each.name
        _check_value(at, getattr(config, each.name), hints[each.name], each.metadata.get("limits"))
    own: Callable[[str], None] | None = getattr(config, "check", None)
    if own is not None:
        own(f"{key}." if key else "")


def _check_value(key: str, value: Any, hint: Any, limits: Limits | None) -> None:
    if dataclasses.is_dataclass(value):
        check(value, key)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            _check_text(key, name)
            _check_value(f"{key}.{name}", each, _inner(hint, -1), limits)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _check_value(key, each, _inner(hint, 0), limits)
    elif isinstance(value, str):
        _check_text(key, value)
        if choices := _choices(hint):
            check_choice(key, value, choices)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{key}: got {value}, expected a finite number")
        if limits is not None and not limits.allows(value):
            raise UserError(f"{key}: got {value}, expected {limits.expected(value)}")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError, with the nearest choice, if `value` is none of the choices."""
    if value not in choices:
        hint, expected = did_you_mean(value, filter(None, choices)), ", ".join(choice or "''" for choice in choices)
        raise UserError(f"{key}: got {value!r}{hint}, expected one of {expected}")


def check_names(key: str, given: list[str], known: list[str], what: str) -> None:
    """Raises UserError for the first name that is not in `known`; what: what these are ("condition features")."""
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"{key}: got {name!r}{hint}; the {what}: {', '.join(map(repr, known)) or 'none'}")


def check_run_name(key: str, name: str, *, parts: int = 1) -> None:
    """Raises UserError for an invalid name of a folder in runs_dir; "" is valid. parts: allowed depth."""
    if not name:
        return
    given = name.split("/")
    if len(given) > parts:
        where = f"at most {parts} parts with / between them" if parts > 1 else "one name, without /"
        raise UserError(f"{key}: got {_short(name)}, expected {where}; runs_dir sets the folder of the runs")
    for part in given:
        wrong = (
            "is empty" if not part else
            "begins with a dot (lumrec's own temporary folders do)" if part.startswith(".") else
            "begins with -, which commands take for an option" if part.startswith("-") else
            "contains a character that cannot be printed" if not part.isprintable() else
            "begins or ends with a blank" if part != part.strip() else
            f"is longer than {MOST_NAME} bytes" if len(part.encode()) > MOST_NAME else ""
        )  # fmt: skip
        if wrong:
            raise UserError(
                f"{key}: got {_short(name)}, of which {_short(part)} {wrong}; expected the name of a folder"
            )


def _check_text(key: str, text: Any) -> None:
    if not isinstance(text, str):
        return
    if "\0" in text and not key.endswith(".column"):  # columns may have any name; all other text may be a path
        raise UserError(f"{key}: got {_short(text)}, which contains a NUL byte; expected text")
    if len(text) > MOST_TEXT:
        raise UserError(f"{key}: got {len(text):,} characters, {_short(text)}; expected at most {MOST_TEXT:,}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{key}: got {_short(text)}, which is not valid UTF-8; expected text") from None


def _spoken(limit: float) -> str:
    return f"{int(limit):,}" if float(limit).is_integer() else str(limit)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]}…{text[-15:]}")


def _inner(hint: Any, index: int) -> Any:
    """The type of a list's entries (index 0) or a mapping's values (-1), also within Optional and Union."""
    for kind in _alternatives(hint):
        if get_origin(kind) in (list, dict, tuple):
            return get_args(kind)[index]
    return None


def _choices(hint: Any) -> tuple[str, ...]:
    return tuple(word for kind in _alternatives(hint) if get_origin(kind) is Literal for word in get_args(kind))


def _alternatives(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (None, list, dict, tuple, Literal):
        yield hint
    else:
        yield from get_args(hint)
