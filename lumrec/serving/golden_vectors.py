"""What an exported LUM or tower gave when it was exported, checked where it is opened.

golden.npz    inputs, and what came of them under "expected:<name>"
items.npy     vectors of all items, float32 [I, D]
"""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lumrec.run.errors import UserError
from lumrec.run.files import new_file
from lumrec.serving.tables import TableDtype

EXPECTED = "expected:"
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "int8": 0.02}  # of a vector, as a share of the largest number


def write_golden_vectors(
    folder: Path, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], items_ID: Tensor
) -> None:
    """Writes golden.npz and items.npy."""
    arrays = {**inputs, **{EXPECTED + name: vectors for name, vectors in expected.items()}}
    with new_file(folder / "golden.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **{name: array.numpy() for name, array in arrays.items()})  # type: ignore[arg-type]
    with new_file(folder / "items.npy") as temporary, temporary.open("wb") as file:
        np.save(file, items_ID.numpy())


def check_golden_vectors(
    folder: Path, what: str, dtype: TableDtype, run: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> tuple[Tensor, float]:
    """The items' vectors, and by how much, as a share of the largest number, `run` misses the golden vectors.

    run: golden inputs → vectors by name. what: of the messages, such as "the LUM". Raises UserError where a file is
    damaged, or the vectors are further off than `dtype` allows.
    """
    try:
        items_ID = torch.from_numpy(np.load(folder / "items.npy", allow_pickle=False))
        with np.load(folder / "golden.npz", allow_pickle=False) as arrays:
            inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        expected = {name: inputs.pop(EXPECTED + name) for name in _expected(inputs)}
        found = run(inputs)
        if not expected or found.keys() != expected.keys():
            raise ValueError(f"golden.npz has {sorted(expected)}, and {sorted(found)} came out")
        difference = max(
            float((found[name] - vectors).abs().max() / vectors.abs().max()) for name, vectors in expected.items()
        )
    except (OSError, ValueError, EOFError, LookupError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{what} in {folder} is damaged ({error!r:.200}); export it again") from None
    if not difference <= TOLERANCES[dtype]:
        raise UserError(
            f"{what} in {folder} does not give its golden vectors: they differ by {difference:.2g} of the largest "
            f"number (this is torch {torch.__version__}); export it again"
        )
    return items_ID, difference


def _expected(arrays: Mapping[str, Tensor]) -> list[str]:
    return [name.removeprefix(EXPECTED) for name in arrays if name.startswith(EXPECTED)]
