"""Tables of bytes, as TorchRec and FBGEMM quantise them, read as numbers: value = byte * scale + bias of its row.

Shape suffixes: N rows of a block, C columns.
"""

import torch
from torch import Tensor

from lumrec.errors import UserError
from lumrec.warm_start.rules import Rule
from lumrec.warm_start.sources import Source, Stored

COMPANIONS = ("_qscale", "_qbias")
_ALIGNMENT = 16  # bytes to which FBGEMM fills up the rows of "int8"


def is_companion(name: str, source: Source) -> bool:
    """Whether a tensor is the scale or the bias of a table of bytes."""
    base = next((name.removesuffix(end) for end in COMPANIONS if name.endswith(end)), None)
    return base in source.tensors and source.tensors[base].dtype == torch.uint8  # type: ignore[index]


def dequantised(source: Source, name: str, rule: Rule, columns: int) -> Stored:
    """The table `name`, of which the target has `columns` columns, as float32. Raises UserError where it is none."""
    stored, what = source.tensors[name], f"{name!r} with quantized={rule.quantized}"
    if stored.dtype != torch.uint8 or len(stored.size) != 2:
        raise UserError(
            f"{what} is {str(stored.dtype).removeprefix('torch.')} {list(stored.size)}; expected bytes (uint8) "
            "[rows, columns and what TorchRec puts beside them]"
        )
    rows, width = stored.size
    scale, bias = (f"{name}{end}" for end in COMPANIONS)
    if rule.quantized == "int8" and scale in source.tensors:
        if bias not in source.tensors or any(source.tensors[beside].size[0] != rows for beside in (scale, bias)):
            raise UserError(f"{what} has {rows:,} rows; expected as many numbers in both {scale!r} and {bias!r}")
        columns, first_byte, pair = width, 0, None
    elif rule.quantized == "int8":
        expected = range(columns + 4, -(-(columns + 4) // _ALIGNMENT) * _ALIGNMENT + 1)
        columns, first_byte, pair = columns, 4, (0, torch.float16)
    else:
        aligned = -(-columns // 4) * 4
        expected = range(aligned + 8, aligned + 9)
        columns, first_byte, pair = columns, 0, (aligned, torch.float32)
    if pair is not None and (width not in expected or rule.columns != "error"):
        raise UserError(
            f"{what} has {width:,} bytes a row, which hold its scale and bias too; expected {expected[0]:,} to "
            f"{expected[-1]:,} for the target's {columns:,} columns, and columns=error"
        )

    def decode(first: int, last: int) -> Tensor:
        byte_NC = source.read(name, first, last)
        if pair is None:
            scale_N1, bias_N1 = (source.read(beside, first, last).reshape(-1, 1).float() for beside in (scale, bias))
        else:
            start, dtype = pair
            both_N2 = byte_NC[:, start : start + 2 * dtype.itemsize].contiguous().view(dtype).float()
            scale_N1, bias_N1 = both_N2[:, :1], both_N2[:, 1:]
        return byte_NC[:, first_byte : first_byte + columns].float() * scale_N1 + bias_N1

    return Stored((rows, columns), torch.float32, (), decode)
