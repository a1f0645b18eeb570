"""Windows: parts of a user's history that the user encoder reads as one sequence.

Shape suffixes: U users, W windows, S steps, R ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lumrec.data.columns import expand_ranges
from lumrec.data.mapped import blocks
from lumrec.data.prepared import PreparedData
from lumrec.data.splits import TRAIN
from lumrec.run.errors import UserError


@dataclass(frozen=True)
class Windows:
    """start_W: int64, first event row of each window. length_W: int64, its number of events. user_W: int64."""

    start_W: Tensor
    length_W: Tensor
    user_W: Tensor

    def __getitem__(self, index: Tensor | slice) -> "Windows":
        return Windows(self.start_W[index], self.length_W[index], self.user_W[index])

    @property
    def count(self) -> int:
        return len(self.start_W)


def training_lengths(data: PreparedData) -> np.ndarray:
    """Number of training events of each user (int64 [U]); they are the user's first events.

    Raises UserError where a later event is marked as training: the LUM would read across its own targets.
    """
    length_U, last_U = np.zeros(data.num_users, np.int64), np.full(data.num_users, -1)
    for part in blocks(data.num_events):
        row_R = part.start + np.flatnonzero(data.split[part] == TRAIN)
        user_R = data.user[row_R]
        length_U += np.bincount(user_R, minlength=data.num_users)
        last_U[user_R] = row_R  # of equal users the last one stays
    wrong = np.flatnonzero((length_U > 0) & (last_U - data.user_offsets[:-1] + 1 != length_U))
    if len(wrong):
        raise UserError(f"user {wrong[0]} has training events after validation or test events; split the log by time")
    return length_U


def training_windows(data: PreparedData, *, max_events: int, users: np.ndarray, generator: torch.Generator) -> Windows:
    """Windows that contain each training event of `users` (bool [U]) exactly once.

    The history of a user with more than `max_events` is cut at a random position, so that over the epochs each event
    has both short and long histories.
    """
    length_U = torch.from_numpy(np.where(users, training_lengths(data), 0))
    start_U = torch.from_numpy(data.user_offsets[:-1])
    phase_U = torch.randint(1, max_events + 1, (len(length_U),), generator=generator)
    first_U = torch.where(length_U > max_events, phase_U, length_U)
    windows_U = torch.where(length_U > 0, 1 + (length_U - first_U + max_events - 1) // max_events, 0)
    user_W = torch.repeat_interleave(torch.arange(len(length_U)), windows_U)
    number_W = torch.arange(len(user_W)) - (windows_U.cumsum(0) - windows_U)[user_W]
    begin_W = torch.where(number_W == 0, 0, first_U[user_W] + (number_W - 1) * max_events)
    end_W = torch.minimum(first_U[user_W] + number_W * max_events, length_U[user_W])
    return Windows(start_U[user_W] + begin_W, end_W - begin_W, user_W)


def token_cost(num_parameters: int, *, dim: int, num_layers: int, num_candidates: int = 0) -> float:
    """The cost of a token without attention, in units of one token attended to: a / b of a·n + b·n² for n tokens.

    A forward pass takes 2 operations per parameter of the blocks and token, and 2·n·dim per layer and token for causal
    attention over n tokens (Kaplan et al., arXiv 2001.08361, section 2.1 and table 1); the backward pass twice as much
    of both. InfoNCE takes 2·dim per event and candidate, and an event is two tokens. All divided by 2·dim·num_layers:

    >>> token_cost(2 * 12 * 64**2, dim=64, num_layers=2)  # GPT blocks with an FFN of 4·dim: 12·dim
    768.0
    >>> token_cost(2 * 12 * 64**2, dim=64, num_layers=2, num_candidates=4000)
    1768.0
    """
    return num_parameters / (dim * num_layers) + num_candidates / (2 * num_layers)


def window_cost(tokens_W: Tensor, token_cost: float) -> Tensor:
    """n · (token_cost + n) for windows of n tokens (float64 [W]): proportional to their operations."""
    return tokens_W.double() * (token_cost + tokens_W.double())


def deal(cost_W: Tensor, step_W: Tensor, num_ranks: int) -> Tensor:
    """The rank of each window (int64 [W]), so that within each step the ranks' total costs are nearly equal.

    Longest processing time first (Graham 1969): a step's windows, the most expensive first, go to the rank with the
    lowest cost so far; the highest total is then at most 4/3 of the best possible. step_W: int64, step of each window.
    All steps are processed in parallel, so the loop is as long as the step with the most windows.

    >>> deal(torch.tensor([1.0, 5.0, 4.0, 2.0, 7.0]), torch.tensor([0, 0, 0, 0, 1]), 2).tolist()
    [0, 0, 1, 1, 0]
    """
    cost, step = cost_W.numpy(), step_W.numpy()
    order = np.lexsort((-cost, step))  # stable, by step, the most expensive first
    count_S = np.bincount(step)
    turn = np.arange(len(order)) - np.repeat(np.cumsum(count_S) - count_S, count_S)
    order = order[np.argsort(turn, kind="stable")]
    load_SR = np.zeros((len(count_S), num_ranks))
    rank_W = np.zeros(len(order), dtype=np.int64)
    for windows in np.split(order, np.cumsum(np.bincount(turn))[:-1]):  # the most expensive of each step, the next, …
        steps = step[windows]
        ranks = load_SR[steps].argmin(1)
        load_SR[steps, ranks] += cost[windows]
        rank_W[windows] = ranks
    return torch.from_numpy(rank_W)


class AnsweringWindows(NamedTuple):
    """windows, and the positions in each of them at which answers are asked for.

    answers_W: int64, number of answers of each window. seen_R: int64 [R], how many events of its window each answer
    sees, in ascending order within a window, windows in order. The history of an answer ends before the row start +
    seen.
    """

    windows: Windows
    answers_W: Tensor
    seen_R: Tensor

    @property
    def window_R(self) -> Tensor:
        """The window of each answer (int64 [R])."""
        return torch.repeat_interleave(torch.arange(self.windows.count), self.answers_W)

    @property
    def row_R(self) -> Tensor:
        """The row before which each answer's history ends (int64 [R])."""
        return self.windows.start_W[self.window_R] + self.seen_R

    def take(self, index_W: Tensor) -> "AnsweringWindows":
        """The windows `index_W`, in that order, with their answers."""
        first_W = self.answers_W.cumsum(0) - self.answers_W
        answers_R = expand_ranges(first_W[index_W], self.answers_W[index_W])
        return AnsweringWindows(self.windows[index_W], self.answers_W[index_W], self.seen_R[answers_R])


def behind(windows: Windows) -> AnsweringWindows:
    """One answer for each window, after its last event."""
    return AnsweringWindows(windows, torch.ones_like(windows.length_W), windows.length_W)


def answering_windows(
    start_U: Tensor, length_U: Tensor, user_U: Tensor, *, max_events: int, stride: int
) -> AnsweringWindows:
    """Windows that ask exactly once for an answer before each of a user's first `length` events.

    A user with up to max_events is one window. A longer one is covered by windows that begin every `stride` events and
    answer only where at least max_events - stride events are seen::

        max_events 4, stride 2     events  0 1 2 3 4 5 6
        window 0                           a a a a
        window 1                               . . a a          a: answered here
        window 2                                   . . a        .: read as history only

    Raises UserError unless 1 ≤ stride ≤ max_events.
    """
    if not 1 <= stride <= max_events:
        raise UserError(f"the window stride is {stride}; expected 1 to max_events = {max_events}")
    more_U = (length_U - max_events).clamp(min=0)
    windows_U = torch.where(length_U > 0, 1 + (more_U + stride - 1) // stride, 0)
    index_W = torch.repeat_interleave(torch.arange(len(length_U)), windows_U)
    number_W = torch.arange(len(index_W)) - (windows_U.cumsum(0) - windows_U)[index_W]
    begin_W = number_W * stride
    length_W = torch.minimum(length_U[index_W] - begin_W, torch.tensor(max_events))
    first_W = torch.where(number_W == 0, 0, max_events - stride)
    windows = Windows(start_U[index_W] + begin_W, length_W, user_U[index_W])
    return AnsweringWindows(windows, length_W - first_W, expand_ranges(first_W, length_W - first_W))
