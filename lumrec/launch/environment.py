"""One sentence about what is missing or wrong in the installation, before any stage imports torch, torchrec and fbgemm.

`python -m lumrec.launch.environment` prints the versions, or that sentence with exit code 2. Needs only Python.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from lumrec.run.shipped import PACKAGE

PYTHON = (3, 10), (3, 14)
# Built for each other: other versions together fail at import with an undefined symbol.
SET = {"torch": "2.13", "torchrec": "1.8", "fbgemm-gpu-cpu": "1.8", "fbgemm-gpu": "1.8"}
# What the stages and torchrec import, by distribution: the extra "stages" in pyproject.toml, and torchrec itself, which
# the extra cannot name.
NEEDED = {
    **{name: name for name in ("torch", "torchrec", "torchx", "numpy", "polars", "pyarrow", "lmdb", "safetensors")},
    **{name: name for name in ("tqdm", "tensorboard", "matplotlib", "jinja2", "tensordict", "torchmetrics")},
    "pyre-extensions": "pyre_extensions",
    "pyyaml": "yaml",
    "faiss-cpu": "faiss",
}
if (PACKAGE.parent / "Makefile").is_file():
    REPAIR = "run `make setup` (CPU) or `make setup DEVICE=cuda`"
    RENEW = "remove .venv, then " + REPAIR
else:
    REPAIR = (
        'run `pip install "lumrec[stages]"`, then `pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0` '
        "(CUDA: fbgemm-gpu==1.8.0)"
    )
    RENEW = "make a new virtual environment, then " + REPAIR


def installed(name: str) -> str:
    """Version of a distribution, "" if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def diagnose() -> str:
    """One sentence about what is missing or wrong in this installation, and what repairs it; "" if nothing is."""
    if not PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]:
        low, high = (".".join(map(str, version)) for version in PYTHON)
        return f"this is Python {sys.version.split()[0]}, and lumrec needs {low} to {high}: {REPAIR} with PYTHON=<path>"
    missing = [name for name, module in NEEDED.items() if find_spec(module) is None]
    if missing:
        return f"the stages need packages that are not installed ({', '.join(missing)}): {REPAIR}"
    return _wrong_fbgemm() or _wrong_versions() or _import_failure()


def _wrong_fbgemm() -> str:
    cpu, cuda = installed("fbgemm-gpu-cpu"), installed("fbgemm-gpu")
    if cpu and cuda:
        return (
            f"both builds of fbgemm are installed (fbgemm-gpu-cpu {cpu} and fbgemm-gpu {cuda}), and they overwrite "
            f"each other's files: {RENEW}"
        )
    if not cpu and not cuda:
        return f"fbgemm is not installed (fbgemm-gpu-cpu for CPU, fbgemm-gpu for CUDA): {REPAIR}"
    if cuda and not torch_cuda():
        return (
            f"fbgemm-gpu {cuda} is the CUDA build, but torch {installed('torch')} is a CPU build "
            f"(a bare `pip install torchrec` mixes them): {RENEW}"
        )
    return ""


def _wrong_versions() -> str:
    found = {name: installed(name) for name in SET if installed(name)}
    if all(version.startswith(SET[name] + ".") for name, version in found.items()):
        return ""
    got = ", ".join(f"{name} {version}" for name, version in found.items())
    return (
        f"{got} do not fit together; expected torch {SET['torch']} with torchrec and fbgemm {SET['torchrec']}: {RENEW}"
    )


def _import_failure() -> str:
    for name in ("torch", "fbgemm_gpu", "torchrec"):
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(name)
        except Exception as error:  # a shared library that does not load may raise nearly anything
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            if "libcuda" in reason or "libnvidia" in reason:
                return (
                    f"{name} is a CUDA build, and this machine has no NVIDIA driver ({reason}): make setup DEVICE=cpu"
                )
            return f"{name} is installed but does not load ({type(error).__name__}: {reason}): {RENEW}"
    return ""


def torch_cuda() -> str:
    """CUDA version that torch was built for, "" for a CPU build; read from torch's files without importing it."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return ""
    version = Path(list(spec.submodule_search_locations)[0]) / "version.py"
    return (runpy.run_path(str(version)).get("cuda") or "") if version.exists() else ""


def check_environment() -> None:
    """Returns if the installation works; else prints one sentence about what is wrong and exits with code 2.

    The CPU build of fbgemm works with a CUDA build of torch (the one that PyPI has for Linux), but only on the CPU:
    then the GPU is hidden from this process, with a message if the machine has one.
    """
    problem = diagnose()
    if problem:
        print(f"lumrec: {problem}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    if installed("fbgemm-gpu-cpu") and torch_cuda():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if Path("/proc/driver/nvidia/version").exists():
            print(f"lumrec: fbgemm is the CPU build, so the GPU is not used; to use it: {REPAIR}", file=sys.stderr)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on; names as on the package index."""
    names = [*SET, "torchx", "numpy", "polars"]
    return {"python": sys.version.split()[0], **{name: installed(name) for name in names if installed(name)}}


if __name__ == "__main__":
    check_environment()
    print("lumrec is ready: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
