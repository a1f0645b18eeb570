"""Tables of bytes, as TorchRec and FBGEMM quantise them, read as numbers: value = byte * scale + bias of its row.

Shape suffixes: N rows of a block, C columns.
"""

import torch
from torch import Tensor

from lumrec.run.errors import UserError
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
    beside = rule.quantized == "int8" and scale in source.tensors
    aligned = [columns + -columns % by for by in (1, 4)]
    widths = [width] if beside else range(columns + 4, columns + 5 + -(columns + 4) % _ALIGNMENT)
    if rule.quantized == "int8_fused":
        widths = [number + 8 for number in aligned]
    if beside and (bias not in source.tensors or any(source.tensors[n].size[0] != rows for n in (scale, bias))):
        raise UserError(f"{what} has {rows:,} rows; expected as many numbers in both {scale!r} and {bias!r}")
    if width not in widths or not beside and rule.columns != "error":
        raise UserError(
            f"{what} has {width:,} bytes a row, which hold its scale and bias too; expected {widths[0]:,} to "
            f"{widths[-1]:,} for the target's {columns:,} columns, and columns=error"
        )
    columns = width if beside else columns

    def decode(first: int, last: int) -> Tensor:
        byte_NC = source.read(name, first, last)
        if beside:
            scale_N1, bias_N1 = (source.read(n, first, last).reshape(-1, 1).float() for n in (scale, bias))
        elif rule.quantized == "int8":
            scale_N1, bias_N1 = byte_NC[:, :4].contiguous().view(torch.float16).float().split(1, dim=1)
            byte_NC = byte_NC[:, 4 : 4 + columns]
        else:
            scale_N1, bias_N1 = byte_NC[:, width - 8 :].contiguous().view(torch.float32).split(1, dim=1)
            byte_NC = byte_NC[:, :columns]
        # A row's numbers span the bytes from 0 to 255, but for rounded scales; or they are all one number.
        span_N = byte_NC.amax(1).int() - byte_NC.amin(1).int()
        if ((span_N > 240) | (span_N == 0)).float().mean() < 0.9:
            raise UserError(f"{what} does not look so: its rows do not span the bytes from 0 to 255")
        return byte_NC.float() * scale_N1 + bias_N1

    return Stored((rows, columns), torch.float32, (), decode)
