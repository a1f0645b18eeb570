"""Functions on jagged histories: softmax within rows, the latest events, and chunks of rows that fit a CPU's cache.

Shape suffixes: B rows, R rows of a chunk, T history events of all rows, concatenated; L events of the longest history
of a chunk. A place is the index of an event among the T events; the value T means padding.

Three rows with 2, 0 and 1 events::

    event     0 1 | | 2        offsets_B1  0 2 2 3        row_T  0 0 2

>>> row_of_event(torch.tensor([0, 2, 2, 3]), 3)
tensor([0, 0, 2])
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 1 << 20  # gathered at once by each thread


def row_of_event(offsets_B1: Tensor, num_events: int) -> Tensor:
    """The row of each event, int64 [T]."""
    return torch.repeat_interleave(offsets_B1.diff(), output_size=num_events)


def segment_softmax(x_T: Tensor, segment_T: Tensor, num_segments: int) -> Tensor:
    """Softmax of x within each segment, [T]. segment_T: int64, in any order; segments may be empty."""
    highest = x_T.new_full((num_segments,), -torch.inf).scatter_reduce(0, segment_T, x_T.detach(), "amax")
    exp_T = (x_T - highest[segment_T]).exp()
    return exp_T / x_T.new_zeros(num_segments).index_add(0, segment_T, exp_T)[segment_T]


def latest(history_T: Tensor, offsets_B1: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The latest `num` events of each row: (history_T, offsets_B1) without the older ones.

    >>> latest(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 3, 3, 4]), 2)
    (tensor([6, 7, 8]), tensor([0, 2, 2, 3]))
    """
    lengths_B = offsets_B1.diff()
    from_end_T = offsets_B1[1:].repeat_interleave(lengths_B, output_size=len(history_T))
    from_end_T = from_end_T - torch.arange(len(history_T), device=history_T.device)
    kept_B1 = torch.nn.functional.pad(lengths_B.clamp(max=num).cumsum(0), (1, 0))
    return history_T[from_end_T <= num], kept_B1


def row_chunks(
    offsets_B1: Tensor, *, num_events: int, event_bytes: int = 0, row_bytes: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each chunk its rows (int64 [R]) and the places of their events (int64 [R, L]), padded to the longest.

    Rows come longest first, which keeps the padding small; rows without events are left out. event_bytes, row_bytes:
    what the caller gathers for one event, and for one row of any length. On a CPU a chunk has CHUNK_BYTES of it for
    each thread; elsewhere all rows form one chunk.

    >>> for rows, places in row_chunks(torch.tensor([0, 1, 1, 4]), num_events=4, event_bytes=1 << 18):
    ...     print(rows.tolist(), places.tolist())
    [2] [[1, 2, 3]]
    [0] [[0]]
    """
    length_B, order_B = offsets_B1.diff().sort(descending=True, stable=True)
    start_B, lengths = offsets_B1[order_B], length_B.tolist()
    num_rows = len(lengths) - lengths.count(0)
    place_L = torch.arange(lengths[0] if num_rows else 0, device=offsets_B1.device)
    first = 0
    while first < num_rows:
        chunk_rows = num_rows
        if offsets_B1.device.type == "cpu":
            of_row = max(1, lengths[first] * event_bytes + row_bytes)
            chunk_rows = max(1, torch.get_num_threads() * CHUNK_BYTES // of_row)
        rows = slice(first, min(first + chunk_rows, num_rows))
        is_event_RL = place_L[: lengths[first]] < length_B[rows, None]
        yield order_B[rows], torch.where(is_event_RL, start_B[rows, None] + place_L[: lengths[first]], num_events)
        first = rows.stop


def lookup(table_UX: Tensor, index: Tensor) -> Tensor:
    """table[index], [*index, X]; on a CPU faster than F.embedding, whose backward pass is slow for narrow rows."""
    if table_UX.device.type != "cpu":
        return F.embedding(index, table_UX)  # the backward pass of index_select is not deterministic there
    return table_UX.index_select(0, index.flatten()).unflatten(0, index.shape)


def indexed_dot(a_TH: Tensor, b_UH: Tensor, index_T: Tensor) -> Tensor:
    """a_t · b[index_t], [T]. The gathered rows of b are never held at once, forward or backward.

    The plain twin is (a_TH * b_UH[index_T]).sum(1).
    """
    return _IndexedDot.apply(a_TH, b_UH, index_T)


class _IndexedDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_TH: Tensor, b_UH: Tensor, index_T: Tensor) -> Tensor:
        ctx.save_for_backward(a_TH, b_UH, index_T)
        dot_T = a_TH.new_empty(len(index_T))
        for chunk in _event_chunks(a_TH):
            torch.sum(a_TH[chunk] * F.embedding(index_T[chunk], b_UH), dim=1, out=dot_T[chunk])
        return dot_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_T: Tensor) -> tuple[Tensor | None, ...]:
        a_TH, b_UH, index_T = ctx.saved_tensors
        g_a_TH, g_b_UH = torch.empty_like(a_TH), torch.zeros_like(b_UH)
        for chunk in _event_chunks(a_TH):
            g_N1 = g_T[chunk, None]
            torch.mul(F.embedding(index_T[chunk], b_UH), g_N1, out=g_a_TH[chunk])
            g_b_UH.index_add_(0, index_T[chunk], a_TH[chunk] * g_N1)
        return g_a_TH, g_b_UH, None


def _event_chunks(x_TH: Tensor) -> Iterator[slice]:
    """Slices of the events whose gathered rows fit a CPU's cache; on other devices one slice."""
    num_events, num = len(x_TH), max(1, len(x_TH))
    if x_TH.device.type == "cpu":
        num = max(1, torch.get_num_threads() * CHUNK_BYTES // (4 * x_TH.shape[1] * x_TH.element_size()))
    return (slice(start, start + num) for start in range(0, num_events, num))
