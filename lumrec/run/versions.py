"""The versions that a run was made with: packages, machine, and commit."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lumrec.run.distributed import world_size
from lumrec.run.errors import UserError
from lumrec.run.files import read_json

logger = logging.getLogger(__name__)


def versions() -> dict[str, Any]:
    """Name → version of each package, and facts about the machine and the process."""
    packages = ("lumrec", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy")
    installed = {}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        **installed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": world_size(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def warn_of_other_versions(path: Path) -> None:
    """Logs a warning for each version that has changed since the run in `path` started."""
    try:
        before = read_json(path / "versions.json")
    except UserError:
        return
    now = versions()
    for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "threads"):
        if before.get(name) != now.get(name):
            change = f"{name} {before.get(name)}, now {now.get(name)}"
            logger.warning("%s started with %s: its results may differ in the last digits from here on", path, change)


def commit() -> str | None:
    """The commit of this code, followed by "-dirty" if files differ; None if it does not run from its repository.

    Changes in docs/ do not count, because results are written there.
    """
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)

    try:
        if git("ls-files", "--error-unmatch", "lumrec/run/versions.py").returncode:
            return None
        head = git("rev-parse", "HEAD").stdout.strip()
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs").stdout.strip()
        return head + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
