"""Finds settings without effect: those that the config's choices leave unread, such as SIM's settings with DIN.

A config (a dataclass) lists them in its method `unread()`: field → the field whose value leaves it unread.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeVar

from lumrec.run.config_file import as_text, leaves
from lumrec.run.errors import UserError


class Choosing(Protocol):
    """A config whose choices leave some of its other settings unread."""

    def unread(self) -> dict[str, str]:
        """Field or section that is not read → the field whose value decides that."""


Config = TypeVar("Config", bound=Choosing)


def without_effect(config: Choosing) -> dict[str, str]:
    """The settings that differ from their defaults and are not read: dotted key → the field that decides that."""
    values, defaults, unread = leaves(config), leaves(type(config)()), config.unread()
    changed = [key for key, value in values.items() if key not in defaults or value != defaults[key]]
    return {key: unread[name] for key in changed if (name := key.split(".")[0]) in unread}


def check_read(config: Choosing, section: str) -> None:
    """Raises UserError for the first setting without effect. section: the config's key, such as "rank"."""
    values = leaves(config)
    for key, choice in without_effect(config).items():
        raise UserError(
            f"{section}.{key}={as_text(values[key])} has no effect with {section}.{choice}={as_text(values[choice])}: "
            "remove the first or change the second"
        )


def as_read(config: Config, *, because_of: str = "") -> Config:
    """The config with defaults for settings that are not read. because_of: only settings that this field decides."""
    default: Any = type(config)()
    unread = [name for name, choice in config.unread().items() if because_of in ("", choice)]
    changes = {name: getattr(default, name) for name in unread}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
