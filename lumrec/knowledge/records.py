"""How the knowledge store encodes vectors and users: dtypes, the record of one user, and keys.

float16, float32   without a scale
int8               each vector in 127 steps up to its largest element: values int8, scale float32; x = values · scale

A scale has 16 significant bits, so values · scale is exact in float32, and encoding it again gives the same bytes.
Shape suffixes: X vectors of any leading shape, B users, N conditions, D width.

>>> import torch
>>> values, scale = encode(torch.tensor([[0.5, -1.0, 0.0]]), "int8")
>>> values.tolist(), decode(values, scale).round(4).tolist()
([[63, -127, 0]], [[0.4961000084877014, -1.0, 0.0]])
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumrec.run.errors import UserError

DTYPES = ("float16", "float32", "int8")
STEPS = 127
# Bits of a float32 that are 0 in a scale.
_LOW_BITS = np.uint32(0xFF)
# The fold in the record of a user whom the store does not know; its other fields are 0.
ABSENT_FOLD = -1


def encode(x_XD: Tensor, dtype: str, *, what: str = "answers") -> tuple[np.ndarray, np.ndarray | None]:
    """Values [X, D] in `dtype` and, for int8, their scale (float32 [X]).

    Raises UserError for elements that are not finite or too large for float16.
    """
    x = x_XD.numpy().astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        values = x if dtype == "int8" else x.astype(np.dtype(dtype).newbyteorder("<"))
    if not np.isfinite(values).all():
        raise UserError(
            f"the LUM's {what} have values that do not fit into {values.dtype.name} (largest "
            f"{float(x_XD.abs().max()):g}); set query.dtype=float32, or check the LUM's loss if they are not finite"
        )
    if dtype != "int8":
        return values, None
    scale = np.abs(x).max(-1, initial=0.0) / np.float32(STEPS)
    # Rounded up, so that the largest element has at most 127 steps.
    scale = ((scale.view(np.uint32) + _LOW_BITS) & ~_LOW_BITS).view(np.float32)
    return np.rint(x / np.where(scale > 0, scale, 1)[..., None]).astype(np.int8), scale


def decode(values: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """The vectors of `encode` as readers see them, float32 [X, D]."""
    # With torch, because NumPy takes seven times as long for float16. A copy, because arrays from files may be
    # read-only.
    x = torch.from_numpy(np.array(values)).float().numpy()
    return x if scale is None else np.multiply(x, scale[..., None], out=x)


def user_dtype(num_conditions: int, dim: int, dtype: str, *, with_log_z: bool) -> np.dtype:
    """The record of one user in the LMDB, as a NumPy dtype without padding.

    asked_at, last_event_at: seconds since 1970. num_events: number of the user's events when asked. num_seen: how many
    of them (the last ones) the LUM saw. fold: index of the LUM that answered. scale [N]: only for int8. o [N, D]. log_z
    [N]: unless switched off.
    """
    fields: list[tuple] = [("asked_at", "<i8"), ("last_event_at", "<i8"), ("num_events", "<i8")]
    fields += [("num_seen", "<i4"), ("fold", "<i4")]
    if dtype == "int8":
        fields.append(("scale", "<f4", (num_conditions,)))
    fields.append(("o", np.dtype(dtype).newbyteorder("<"), (num_conditions, dim)))
    if with_log_z:
        fields.append(("log_z", "<f4", (num_conditions,)))
    return np.dtype(fields)


def identity_user_dtype(identity: dict) -> np.dtype:
    """`user_dtype` of a version's identity or manifest."""
    return user_dtype(
        len(identity["conditions"]), identity["dim"], identity["dtype"], with_log_z=identity["log_normalizer"]
    )


def make_records(record: np.dtype, dtype: str, o_BND: Tensor, log_z_BN: Tensor | None, **fields: Any) -> np.ndarray:
    """Records [B] of `user_dtype` with these answers. fields: asked_at, last_event_at, num_events, num_seen, fold.

    Raises UserError like `encode`.
    """
    record_B = np.zeros(len(o_BND), record)
    record_B["o"], scale = encode(o_BND, dtype)
    if scale is not None:
        record_B["scale"] = scale
    if log_z_BN is not None:
        record_B["log_z"] = log_z_BN.numpy()
    for name, value in fields.items():
        record_B[name] = value
    return record_B


def records_to_bytes(record_B: np.ndarray) -> list[bytes]:
    """The LMDB value of each record."""
    return np.ascontiguousarray(record_B).view(f"V{record_B.dtype.itemsize}").tolist()


def bytes_to_records(values: Sequence[bytes], dtype: np.dtype) -> np.ndarray:
    """Records [B] of LMDB values. Raises UserError if a value's size does not match the manifest's dtype."""
    wrong = {len(value) for value in values} - {dtype.itemsize}
    if wrong:
        raise UserError(
            f"the store has a value of {min(wrong)} bytes; expected {dtype.itemsize}: build the knowledge again"
        )
    return np.frombuffer(b"".join(values), dtype)


def decode_records(record_B: np.ndarray) -> np.ndarray:
    """The answers in records as readers see them, float32 [B, N, D]."""
    assert record_B.dtype.names is not None
    return decode(record_B["o"], record_B["scale"] if "scale" in record_B.dtype.names else None)


def raw_bytes(key: str) -> bytes:
    """A raw user key in UTF-8. Raises UserError for a key that is not text."""
    if not isinstance(key, str):
        raise UserError(f"a user key must be text; got {key!r} ({type(key).__name__}): pass {str(key)!r}")
    return key.encode(errors="surrogatepass")


def user_key_bytes(key: str) -> bytes:
    """The LMDB key of a raw user key. LMDB allows 1 to 511 bytes, so a long key is replaced by its SHA-256.

    Half a surrogate pair, which JSON can contain but no log can, gives a key that no user has.
    """
    raw = raw_bytes(key)
    return b"u" + raw if len(raw) <= 256 else b"h" + hashlib.sha256(raw).digest()


def user_digest(key: str) -> str:
    """SHA-256 of a raw user key in hexadecimal: how a forgotten user is remembered."""
    return hashlib.sha256(raw_bytes(key)).hexdigest()
