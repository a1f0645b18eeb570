"""What `import lumrec` and `lumrec.modules` export, and what importing them loads."""

import subprocess
import sys
from pathlib import Path

import pytest

import lumrec
import lumrec.modules

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("package", [lumrec, lumrec.modules])
def test_every_public_name_is_there(package):
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="it has: "):
        package.no_such_name  # noqa: B018


def test_every_module_of_building_blocks_shows_a_tiny_batch():
    files = [file for file in (ROOT / "modules").rglob("*.py") if file.name != "__init__.py"]
    without = [file.name for file in files if ">>> " not in file.read_text(encoding="utf-8")]
    assert len(files) > 20 and not without, f"add a doctest to {without}"


def test_a_name_is_imported_when_it_is_first_used():
    code = (
        "import sys, lumrec, lumrec.modules; loaded = lambda: {'torch', 'torchrec', 'polars'} & set(sys.modules); "
        "print(sorted(loaded())); lumrec.UserError; print(sorted(loaded())); lumrec.modules.LargeUserModel; "
        "print(sorted(loaded()))"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["[]", "[]", "['torch', 'torchrec']"]
