"""The settings that identify a checkpoint: those that differ from their defaults, as text in its meta.json.

So a setting that a later version adds does not invalidate a checkpoint, as long as it has its default. Older
checkpoints hold the repr of the config's dataclass instead; it can still be read.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Small:
...     dim: int = 64
...     compile: bool = False
>>> str(Settings.of(Small(dim=32, compile=True), ignored=["compile"]))
'{"dim": 32}'
>>> Settings.of(Small(dim=32)).differences("Small(dim=16, compile=False)")
['dim is 16 there, 32 here']
"""

import ast
import json
from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from lumrec.run.changes import differing
from lumrec.run.errors import UserError

_LONGEST = 100_000


@dataclass(frozen=True)
class Settings:
    """changed: dotted name → value of the settings that differ from their default. defaults: those of all settings.

    kind: the config's dataclass, which may know keys of earlier versions (`earlier_keys`). partly: a stored text
    may have other settings too, which are not compared.
    """

    changed: dict[str, Any]
    defaults: dict[str, Any]
    ignored: tuple[str, ...] = ()
    kind: Any = None
    partly: bool = False

    @classmethod
    def of(cls, config: Any, *, ignored: Collection[str] = (), partly: bool = False) -> "Settings":
        """Those of a config (a dataclass whose fields have defaults), without the settings and sections `ignored`."""
        values, defaults = _flat(config), _flat(type(config)())
        kept = {name for name in {**values, **defaults} if not _is_in(name, ignored)}
        changed = {name: values[name] for name in sorted(kept & {*values}) if values[name] != defaults.get(name)}
        defaults = {name: value for name, value in defaults.items() if name in kept}
        return cls(changed, defaults, tuple(ignored), type(config), partly)

    def __str__(self) -> str:
        return json.dumps(self.changed, sort_keys=True)

    def differences(self, stored: str) -> list[str]:
        """How the settings of a stored text differ from these, in words. Raises UserError for any other text."""
        there = _read(stored)
        moved = self.kind.earlier_keys(there) if hasattr(self.kind, "earlier_keys") else {}
        there = {new: value for name, value in there.items() if (new := moved.get(name, name)) is not None}
        there = {name: value for name, value in there.items() if not _is_in(name, self.ignored)}
        if self.partly:
            there = {name: value for name, value in there.items() if name in self.defaults}
        found = differing({**self.defaults, **there}, {**self.defaults, **self.changed})
        return [f"{name} is {old!r} there, {now!r} here" for name, old, now in found]


def _is_in(name: str, sections: Collection[str]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name → value as JSON has it."""
    flat: dict[str, Any] = {}
    for field in fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = json.loads(json.dumps(value))
    return flat


def _read(text: str) -> dict[str, Any]:
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"it has {len(text):,} characters")
        values = json.loads(text) if text.startswith("{") else _of_call(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"its settings cannot be read ({str(error)[:200]})") from None
    if not isinstance(values, dict):
        raise UserError("its settings cannot be read (expected names and values)")
    return values


def _of_call(call: ast.expr, prefix: str = "") -> dict[str, Any]:
    """Dotted name → value of the repr of a dataclass; nothing of it is executed."""
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("expected the repr of a config")
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        name = f"{prefix}{keyword.arg}"
        if isinstance(keyword.value, ast.Call):
            values |= _of_call(keyword.value, f"{name}.")
        else:
            values[name] = ast.literal_eval(keyword.value)
    return values
