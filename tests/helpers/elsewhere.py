"""Runs exported graphs in a process that has torch, and neither lumrec nor torchrec."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODE = """
import importlib.abc, sys

class NoLumrec(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("lumrec", "torchrec", "fbgemm_gpu"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, NoLumrec())
import torch
results = []
for graph, arguments in torch.load(sys.argv[1], weights_only=True):
    with torch.inference_mode():
        results.append(torch.export.load(graph).module()(*arguments))
torch.save(results, sys.argv[2])
assert not [name for name in sys.modules if name.startswith(("lumrec", "torchrec"))]
"""


def run_elsewhere(calls: Sequence[tuple[Path, tuple[Any, ...]]]) -> list[Tensor]:
    """What each graph gives there for its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = (f"{folder}/{name}.pt" for name in ("calls", "results"))
        torch.save([(str(graph), arguments) for graph, arguments in calls], given)
        subprocess.run([sys.executable, "-I", "-c", CODE, given, made], check=True, cwd=folder)
        return torch.load(made)
