"""Finds the apps and configs that come with lumrec, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """The folder "apps" or "configs": in the installed package, or beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def shipped_configs() -> dict[str, Path]:
    """Name → path of every config that `--config` finds by name, such as "ml-1m" or "reproduce/ml-1m", sorted."""
    folder = shipped("configs")
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return dict(sorted(names.items(), key=lambda item: (item[0].count("/"), item[0])))
