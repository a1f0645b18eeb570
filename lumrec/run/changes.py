"""Compares the settings of a stored run with the current ones, for runs, inputs and checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args

from lumrec.run.errors import UserError
from lumrec.run.typed_yaml import defaults, field_types, overlaid, plain, read, section_of, todays_section

# Settings that determine where and how to run, but not the result; NEUTRAL_TRAIN_KEYS are in a stage's section.
NEUTRAL_KEYS = ("run", "runs_dir", "threads", "overwrite")
NEUTRAL_TRAIN_KEYS = ("train.optimizer_state", "train.sharding", "train.fsdp")
_AGAIN = "make the run again with overwrite=true"


def config_differences(path: Path, settings: Any) -> dict[str, str]:
    """How the config.yaml of run folder `path` differs from `settings` (a dataclass): dotted key → "key: old → new".

    NEUTRAL_KEYS do not count, nor do sections that `settings` does not have. A key that the folder's version of lumrec
    did not have yet counts as its default.
    """
    stored = read(path / "config.yaml")
    if not isinstance(stored, Mapping):
        raise UserError(f"{path / 'config.yaml'} is damaged: it has no settings; {_AGAIN}")
    known = {name: value for name, value in stored.items() if name in field_types(type(settings))}
    return {key: f"{key}: {old!r} → {new!r}" for key, (old, new) in changes(known, settings).items()}


def changes(stored: Mapping[str, Any], settings: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted key → (stored, current value) of each setting that differs; a missing key counts as its default.

    stored: the contents of a config.yaml. settings: a dataclass. NEUTRAL_KEYS do not count.
    """
    return {
        key: (old, new)
        for key, old, new in differing(stored, settings)
        if key.split(".")[0] not in NEUTRAL_KEYS and not key.endswith(NEUTRAL_TRAIN_KEYS)
    }


def differing(stored: Any, now: Any, kind: Any = None, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, stored, now) of each value that differs; an empty mapping equals an absent one.

    kind: the declared type of the value; None if unknown.
    """
    section = type(now) if is_dataclass(now) else section_of(kind)
    if is_dataclass(section) and isinstance(stored, Mapping):
        stored = todays_section(section, stored)
        stored = {**dict.fromkeys(field_types(section), "(absent)"), **defaults(section), **stored}
    if isinstance(stored, Mapping) and (isinstance(now, Mapping) or is_dataclass(now)):
        values = vars(now) if is_dataclass(now) else now
        types = (
            field_types(section) if is_dataclass(section) else dict.fromkeys(values, (*get_args(kind), None, None)[1])
        )
        for name in sorted({*stored, *values}):
            part = f"{key}.{name}" if key else str(name)
            yield from differing(stored.get(name, "(absent)"), values.get(name, "(absent)"), types.get(name), part)
        return
    if kind is not None:
        with contextlib.suppress(UserError):  # a value of another type is compared as it is
            stored = overlaid(kind, None, stored)
    now, none = plain(now), [{}, "(absent)"]
    if stored != now and not (stored in none and now in none):
        yield key, stored, now
