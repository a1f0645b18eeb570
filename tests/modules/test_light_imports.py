"""lumrec.modules beside an existing stack: what importing it needs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH_ONLY = ["attention", "hstu", "knowledge", "losses", "moments", "torchrec_models", "user_encoder"]
STAGES_ONLY = {"polars", "pyarrow", "faiss", "lmdb", "matplotlib", "yaml", "tqdm", "tensorboard"}


@pytest.mark.parametrize(
    "blocked, code",
    [
        ({"torchrec", "fbgemm_gpu", *STAGES_ONLY}, "; ".join(f"import lumrec.modules.{name}" for name in TORCH_ONLY)),
        (STAGES_ONLY, "import lumrec.modules as m; [getattr(m, name) for name in m.__all__]"),
    ],
    ids=["torch", "torch and torchrec"],
)
def test_what_importing_needs(blocked, code):
    """An entry of None in sys.modules makes the import of that name fail."""
    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(blocked)}))"
    subprocess.run([sys.executable, "-c", f"{block}; {code}"], cwd=ROOT, check=True)
