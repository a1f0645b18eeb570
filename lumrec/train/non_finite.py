"""A loss or gradient that is not a number: the error that ends the run, and the batch in a file to look into."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor


class NonFiniteError(FloatingPointError):
    """The loss or the gradient is not a number; the message names the step and the file that holds the batch."""


def save_batch(batch: Any, path: Path) -> None:
    """Writes a batch so that `torch.load(path, weights_only=True)` gives its tensors by name."""
    torch.save(_tensors_of(batch), path)


def _tensors_of(value: Any) -> Any:
    """A batch as dictionaries, lists, tensors and plain values, which `torch.load(weights_only=True)` can read."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, KeyedJaggedTensor):
        return {"keys": value.keys(), "values": _tensors_of(value.values()), "lengths": _tensors_of(value.lengths())}
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _tensors_of(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _tensors_of(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tensors_of(entry) for entry in value]
    if value is None or isinstance(value, (int, float, str)):
        return value
    return (
        {name: _tensors_of(entry) for name, entry in vars(value).items()} if hasattr(value, "__dict__") else repr(value)
    )
