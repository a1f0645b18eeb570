"""The wheel, built through the sdist and installed into a new environment, from an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the sdist of a copy of the checkout: what `make wheel` builds, without leaving files here."""
    folder = tmp_path_factory.mktemp("build")
    names = ["lumrec", "modules", "apps", "configs", "pyproject.toml", "README.md", "LICENSE"]
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "checkout" / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, folder / "checkout")
    for step, source in (("build_sdist", "checkout"), ("build_wheel", "sdist/*")):
        (place,) = folder.glob(source)
        done = subprocess.run([sys.executable, "-c", BUILD, step, str(folder)], cwd=place, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        if step == "build_sdist":
            with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
                archive.extractall(folder / "sdist")
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory):
    """The bin/ of a new environment with nothing but the wheel."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    return folder / "bin"


def add_packages(bin_folder: Path, *, but: tuple[str, ...] = ()) -> None:
    """The packages of this interpreter, but for some and for lumrec, come into the environment."""
    (site,) = bin_folder.parent.glob("lib/python*/site-packages")
    packages = Path(tempfile.mkdtemp(dir=site.parent))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.lower().startswith((*but, "lumrec", "__editable__")):
            (packages / path.name).symlink_to(path)
    (site / "packages.pth").write_text(f"{packages}\n")


def call(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder, without what would show it the checkout."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(list(map(str, command)), cwd=folder, env=variables, capture_output=True, text=True)


def test_wheel_holds_the_apps_the_configs_and_the_modules(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("apps", "apps"), ("configs", "configs"), ("modules", "modules"), ("lumrec", "")):
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".typed")]
        files = [path.relative_to(ROOT / folder) for path in files]
        if folder == "lumrec":
            files = [path for path in files if path.parts[0] != "modules"]
        missing = {(Path("lumrec") / inside / path).as_posix() for path in files} - names
        assert not missing, f"list the folder in pyproject.toml: {missing}"


def test_commands_from_an_empty_folder(bin_folder, tmp_path):
    assert "show_user" in call(tmp_path, bin_folder / "lumrec", "--help").stdout  # needs no other package
    assert "simulator" in call(tmp_path, bin_folder / "lumrec", "configs").stdout
    add_packages(bin_folder)
    small = ["data.simulator.num_users=60", "data.simulator.events_per_user=20", "name=tiny"]
    done = call(tmp_path, bin_folder / "lumrec", "prepare", "--config", "simulator", *small)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/tiny-prepare/manifest.json").is_file()
    code = "import sys; sys.argv[0] = 'torchx'; from torchx.cli.main import main; main()"
    torchx = [bin_folder / "python", "-c", code, "run", "--dryrun"]
    done = call(tmp_path, *torchx, "apps/rank.py", "--config", "simulator")
    assert done.returncode == 0, done.stderr
    assert f"{bin_folder.parent}/lib" in done.stderr and "lumrec/apps/rank.py --config simulator" in done.stderr


def test_modules_need_torch_and_torchrec_only(bin_folder, tmp_path):
    add_packages(bin_folder, but=("polars", "faiss", "matplotlib", "torchx", "lmdb", "pyarrow", "tensorboard", "yaml"))
    code = "from lumrec.modules import Din, KnowledgeFusion, LargeUserModel; print(LargeUserModel.__name__)"
    done = call(tmp_path, bin_folder / "python", "-c", code)
    assert done.stdout == "LargeUserModel\n", done.stderr
    done = call(tmp_path, bin_folder / "python", "-c", "import lumrec; lumrec.load_config")
    assert done.stderr.strip().endswith("lumrec.load_config needs polars: pip install 'lumrec[stages]', or make setup")
    done = call(tmp_path, bin_folder / "lumrec", "prepare", "--config", "simulator")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "polars" in done.stderr and 'pip install "lumrec[stages]"' in done.stderr
    assert call(tmp_path, bin_folder / "lumrec", "rank", "--help").returncode == 0
