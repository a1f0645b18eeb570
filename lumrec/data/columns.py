"""Feature columns: one vocabulary row, or a jagged list of them, for each item, user or event."""

from typing import NamedTuple

import torch
from torch import Tensor


class Column(NamedTuple):
    """Vocabulary rows of one feature.

    values: int64; one for each entry when `offsets` is None, else all lists one after the other.
    offsets: int64 [entries + 1], or None where each entry has exactly one row.
    """

    values: Tensor
    offsets: Tensor | None = None

    def take(self, index_N: Tensor) -> tuple[Tensor, Tensor]:
        """Values and lengths (both int64) of the entries `index_N`, in that order: what a KJT is made of.

        >>> genres = Column(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 2, 3]))
        >>> genres.take(torch.tensor([2, 0, 1]))
        (tensor([3, 1, 2]), tensor([1, 2, 0]))
        """
        if self.offsets is None:
            return self.values[index_N], torch.ones_like(index_N)
        starts_N = self.offsets[index_N]
        lengths_N = self.offsets[index_N + 1] - starts_N
        return self.values[expand_ranges(starts_N, lengths_N)], lengths_N


def expand_ranges(starts_N: Tensor, lengths_N: Tensor) -> Tensor:
    """Concatenated ranges start, start + 1, … of each given length (int64).

    >>> expand_ranges(torch.tensor([5, 0]), torch.tensor([2, 3]))
    tensor([5, 6, 0, 1, 2])
    """
    ends_N = lengths_N.cumsum(0)
    shift_N = starts_N - ends_N + lengths_N
    total = int(ends_N[-1]) if len(ends_N) else 0
    return torch.arange(total) + torch.repeat_interleave(shift_N, lengths_N, output_size=total)
