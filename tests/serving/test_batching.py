"""Micro-batches: who is computed with whom, who is refused, and who is left out."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from lumrec.serving.batching import Batcher, QueueFull


class Squares:
    """A computation that can be held up, and that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def __call__(self, numbers: list[int]) -> list[int]:
        self.calls.append(numbers)
        self.begun.set()
        assert self.go_on.wait(120)
        if 13 in numbers:
            raise ValueError("13 is no number")
        return [number**2 for number in numbers]


async def _behind_one(squares: Squares, batcher: Batcher[int, int], *others: int) -> list[int | BaseException]:
    """Answers to 1 and the others, which arrive while 1 is computed."""
    squares.go_on.clear()
    first = asyncio.create_task(batcher.submit(1, timeout_s=120))
    await asyncio.to_thread(squares.begun.wait, 120)
    rest = [asyncio.create_task(batcher.submit(other, timeout_s=120)) for other in others]
    await asyncio.sleep(0)
    squares.go_on.set()
    return await asyncio.gather(first, *rest, return_exceptions=True)


def test_requests_that_arrive_during_a_call_become_the_next_one() -> None:
    squares = Squares()
    batcher = Batcher(squares, max_weight=100, max_waiting=10)
    assert asyncio.run(_behind_one(squares, batcher, 2, 3, 4)) == [1, 4, 9, 16]
    assert squares.calls == [[1], [2, 3, 4]]


def test_a_call_takes_what_its_weight_allows_and_a_heavier_request_by_itself() -> None:
    squares = Squares()
    batcher = Batcher(squares, weigh=lambda number: number, max_weight=10, max_waiting=10)
    assert asyncio.run(_behind_one(squares, batcher, 4, 6, 3, 50, 2)) == [1, 16, 36, 9, 2500, 4]
    assert squares.calls == [[1], [4, 6], [3], [50], [2]]


def test_a_request_that_fails_fails_no_other() -> None:
    squares = Squares()
    batcher = Batcher(squares, max_weight=100, max_waiting=10)
    first, four, failed, nine = asyncio.run(_behind_one(squares, batcher, 2, 13, 3))
    assert (first, four, nine) == (1, 4, 9)
    assert isinstance(failed, ValueError)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async def main() -> None:
        squares = Squares()
        squares.go_on.clear()
        batcher = Batcher(squares, max_weight=1, max_waiting=2)
        taken = [asyncio.create_task(batcher.submit(1, timeout_s=120))]
        await asyncio.to_thread(squares.begun.wait, 120)
        taken += [asyncio.create_task(batcher.submit(number, timeout_s=120)) for number in (2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as refused:
            await batcher.submit(4, timeout_s=120)
        assert refused.value.retry_after_s >= 1
        squares.go_on.set()
        assert await asyncio.gather(*taken) == [1, 4, 9]
        assert await batcher.submit(5, timeout_s=120) == 25

    asyncio.run(main())


def test_a_request_whose_time_is_over_is_not_computed_and_leaves_the_queue() -> None:
    async def main() -> None:
        squares = Squares()
        squares.go_on.clear()
        batcher = Batcher(squares, max_weight=10, max_waiting=1)
        first = asyncio.create_task(batcher.submit(1, timeout_s=120))
        await asyncio.to_thread(squares.begun.wait, 120)
        with pytest.raises(TimeoutError):
            await batcher.submit(2, timeout_s=0.05)
        assert batcher.busy_s > 0
        later = asyncio.create_task(batcher.submit(3, timeout_s=120))  # the queue has room again
        await asyncio.sleep(0)
        squares.go_on.set()
        assert await asyncio.gather(first, later) == [1, 9]
        assert squares.calls == [[1], [3]]
        assert batcher.busy_s == 0

    asyncio.run(main())


class Slow:
    """A computation of five seconds each, by a clock of its own, that remembers its calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[list[int]] = []

    def __call__(self, numbers: list[int]) -> list[int]:
        self.calls.append(numbers)
        self.now += 5.0 * len(numbers)
        return numbers

    def batcher(self, **settings: Any) -> Batcher[int, int]:
        return Batcher(self, max_weight=100, max_waiting=100, clock=lambda: self.now, **settings)


async def _learned(batcher: Batcher[int, int]) -> None:
    """The batcher knows from a hundred calls that a request takes five seconds."""
    for _ in range(100):
        await batcher.submit(0, timeout_s=120)


def test_a_call_takes_no_more_requests_than_its_time_allows() -> None:
    async def main() -> None:
        slow = Slow()
        batcher = slow.batcher(max_call_s=11.0)
        await _learned(batcher)
        assert await asyncio.gather(*(batcher.submit(n, timeout_s=120) for n in range(5))) == [0, 1, 2, 3, 4]
        assert slow.calls[100:] == [[0, 1], [2, 3], [4]]

    asyncio.run(main())


def test_too_much_is_refused_at_once_and_the_rest_is_answered_in_time() -> None:
    async def main() -> None:
        slow = Slow()
        batcher = slow.batcher(max_call_s=11.0)
        await _learned(batcher)
        asked = [batcher.submit(n, timeout_s=60.0) for n in range(50)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert answers[:12] == [*range(12)]  # five seconds each
        assert all(isinstance(answer, QueueFull) for answer in answers[12:])
        assert slow.calls[100:] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]

    asyncio.run(main())


def test_a_request_that_would_be_late_gives_way_to_one_that_has_time() -> None:
    async def main() -> None:
        slow = Slow()
        batcher = slow.batcher(max_call_s=6.0)
        await _learned(batcher)
        short = asyncio.create_task(batcher.submit(1, timeout_s=0.5))  # to an idle server
        long = asyncio.create_task(batcher.submit(2, timeout_s=120))
        assert await long == 2
        with pytest.raises(TimeoutError):
            await short
        assert slow.calls[100:] == [[2]]
        assert await batcher.submit(3, timeout_s=4.0) == 3  # the estimate may be wrong: it is tried

    asyncio.run(main())
