"""Model FLOPs of a step and the measured peak of the device: the log's `mfu` (PaLM, arXiv 2204.02311)."""

import functools
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lumrec.run.distributed import world_size

# torch.utils.flop_counter knows these only on CUDA.
_ATEN = torch.ops.aten
_CPU_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}


class MatrixFlops(TorchDispatchMode):
    """Counts the FLOPs of matrix products and attention of what runs inside, forward or backward, in `total`.

    Nothing else is changed, so results are the same to the bit. Attention counts as a full square, without the half
    that causality spares (as in PaLM), and with the padding of its buckets. Kernels that torch has no formula for, such
    as fused table lookups, count as 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        formula = flop_registry.get(_CPU_ATTENTION.get(operator, operator))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def model_flops(forward: int, backward: int) -> int:
    """FLOPs of a step, without recomputation in its backward pass.

    The gradients of a matrix product take two more products of its size; anything beyond that was recomputation. If a
    function computes its gradients in the forward pass, they count there.
    """
    return forward + min(backward, 2 * forward)


class Utilization:
    """Model FLOPs utilization (MFU) of a training run: model FLOPs per second over the peak of all its devices.

    FLOPs per event are counted in the first step that has events. At every step, run the two passes inside `forward()`
    and `backward()`, then call `count_step`. at_one_event_per_s: MFU at one event per second; None until counted.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.at_one_event_per_s: float | None = None
        self._peak = gemm_peak(device, dtype, num_threads=torch.get_num_threads())
        self._device = device
        self._forward, self._backward = MatrixFlops(), MatrixFlops()

    def forward(self) -> AbstractContextManager[Any]:
        return self._forward if self.at_one_event_per_s is None else nullcontext()

    def backward(self) -> AbstractContextManager[Any]:
        return self._backward if self.at_one_event_per_s is None else nullcontext()

    def count_step(self, num_events: float) -> None:
        """Ends the count of a step that had `num_events` events over all ranks. Collective."""
        if self.at_one_event_per_s is None and num_events:
            flops = model_flops(self._forward.total, self._backward.total)
            sums = torch.tensor([flops, self._peak], dtype=torch.float64, device=self._device)
            if world_size() > 1:
                dist.all_reduce(sums)
            self.at_one_event_per_s = float(sums[0] / sums[1]) / num_events
        self._forward.total = self._backward.total = 0


@functools.cache
def gemm_peak(device: torch.device, dtype: torch.dtype, *, num_threads: int, seconds: float = 0.25) -> float:
    """FLOP/s of the fastest square matrix product found on `device` in about `seconds`; measured once in a process.

    num_threads: torch.get_num_threads(), as part of the cache's key: another number is measured again.
    """
    generator = torch.Generator(device).manual_seed(0)  # the global generators belong to the training
    started, size, peak = time.perf_counter(), 256, 0.0

    def product_s(x: torch.Tensor) -> float:
        _synchronize(device)
        begun = time.perf_counter()
        torch.mm(x, x)
        _synchronize(device)
        return time.perf_counter() - begun

    while True:
        x = torch.randn(size, size, generator=generator, device=device).to(dtype)
        took_s = min(product_s(x), product_s(x))
        peak = max(peak, 2 * size**3 / took_s)
        left_s = seconds - (time.perf_counter() - started)
        if left_s < 20 * took_s or size == 8192:  # two products of twice the size would take 16 times as long
            break
        size *= 2
    while time.perf_counter() - started < seconds:
        peak = max(peak, 2 * size**3 / product_s(x))
    return peak


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
