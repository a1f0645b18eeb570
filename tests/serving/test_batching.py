"""Micro-batches: who is computed with whom, who is refused, and who is left out."""

from __future__ import annotations

import asyncio
import threading

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
