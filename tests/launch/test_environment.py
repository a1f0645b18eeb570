"""Wrong mixes of torch, torchrec and fbgemm, made of package folders in front of the real ones on sys.path."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from lumrec.launch.environment import NEEDED, diagnose, versions

ROOT = Path(__file__).resolve().parents[2]


def distribution(folder: Path, name: str, version: str, **packages: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for package, source in packages.items():
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(source)


def check(*folders: Path, code: str = "", isolated: bool = False) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, [*folders, ROOT]))
    command = [
        sys.executable,
        *(["-S"] if isolated else []),
        "-c",
        code + "\nimport lumrec.launch.environment as e\ne.check_environment()",
    ]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600)


def complaint(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("lumrec: ")
    return lines[0]


def test_this_installation_is_sound():
    assert diagnose() == ""
    assert {"python", "torch", "torchrec"} <= set(versions())


def test_both_fbgemm_builds(tmp_path):
    distribution(tmp_path, "fbgemm-gpu", "1.8.0")
    distribution(tmp_path, "fbgemm-gpu-cpu", "1.8.0")
    assert "both builds of fbgemm" in complaint(check(tmp_path))


@pytest.fixture
def bare(tmp_path):
    """A path with the given versions of all that is needed, and nothing else (run with -S)."""

    def build(**given: str) -> Path:
        others = set(NEEDED) - {"torch", "torchrec"}
        for name, version in (dict.fromkeys(others, "9.9.9") | given).items():
            cuda = "'13.0'" if name == "torch" and "+cpu" not in version else "None"
            packages = {NEEDED[name]: ""} if name in NEEDED else {}
            distribution(tmp_path, name.replace("_", "-"), version, **packages)
            if name == "torch":
                (tmp_path / "torch" / "version.py").write_text(f"cuda = {cuda}\n")
        return tmp_path

    return build


def test_cuda_fbgemm_with_cpu_torch(bare):
    folder = bare(torch="2.13.0+cpu", torchrec="1.8.0", fbgemm_gpu="1.8.0")
    message = complaint(check(folder, isolated=True))
    assert "fbgemm-gpu 1.8.0 is the CUDA build, but torch 2.13.0+cpu is a CPU build" in message
    assert "make setup" in message


def test_no_fbgemm(bare):
    assert "fbgemm is not installed" in complaint(check(bare(torch="2.13.0", torchrec="1.8.0"), isolated=True))


@pytest.mark.parametrize("torch, torchrec", [("2.13.0+cpu", "1.9.0"), ("2.14.0", "1.8.0")])
def test_versions_that_do_not_go_together(bare, torch, torchrec):
    message = complaint(check(bare(torch=torch, torchrec=torchrec, fbgemm_gpu_cpu="1.8.0"), isolated=True))
    assert f"torch {torch}, torchrec {torchrec}" in message
    assert "do not fit together" in message


def test_what_is_needed_is_the_extra_of_the_stages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == []
    extra = {re.split("[=<>]", each)[0] for each in project["optional-dependencies"]["stages"]}
    assert extra | {"torchrec"} == set(NEEDED)


def test_missing_package(bare):
    message = complaint(check(bare(torch="2.13.0"), isolated=True))
    assert "the stages need packages that are not installed (torchrec): run `make setup`" in message


def test_fbgemm_that_does_not_load(tmp_path):
    broken = "raise OSError('libtorch_cuda.so: cannot open shared object file')"
    distribution(tmp_path, "fbgemm-gpu-cpu", "1.8.0", fbgemm_gpu=broken)
    assert "fbgemm_gpu is installed but does not load (OSError: libtorch_cuda.so" in complaint(check(tmp_path))


def test_cuda_build_without_a_driver(tmp_path):
    broken = "raise OSError('libnvidia-ml.so.1: cannot open shared object file')"
    distribution(tmp_path, "fbgemm-gpu-cpu", "1.8.0", fbgemm_gpu=broken)
    assert "no NVIDIA driver" in complaint(check(tmp_path))


def test_python_too_old(tmp_path):
    message = complaint(check(tmp_path, code="import sys; sys.version_info = (3, 9, 18, 'final', 0)"))
    assert "lumrec needs 3.10 to 3.14" in message
