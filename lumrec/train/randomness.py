"""The global random generators of torch (CPU and CUDA), numpy and python: their state, and seeds by key."""

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int, *key: int) -> None:
    """Seeds every generator from `seed` and `key` (say, step and rank): different keys give independent numbers."""
    words = np.random.SeedSequence([seed, *key]).generate_state(4, np.uint32)
    torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
    np.random.seed(words[2:])
    random.seed(words.tobytes())


def random_state() -> dict[str, Any]:
    """State of every global random generator (torch on CPU and CUDA, numpy, python), JSON-compatible."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "torch": _encode(torch.get_rng_state()),
        "numpy": [name, base64.b64encode(np.asarray(keys).tobytes()).decode(), position, has_gauss, gauss],
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Sets every generator to a state from `random_state`."""
    torch.set_rng_state(_decode(state["torch"]))
    name, keys, position, has_gauss, gauss = state["numpy"]
    words = np.frombuffer(base64.b64decode(keys), dtype=np.uint32)
    np.random.set_state((name, words, position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state:
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
