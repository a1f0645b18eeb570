"""Computes requests of many connections together: those that arrive during one call form the next call.

::

    arrive    a   b c        d
    calls     [a.....][b c....][d.....]

Nothing waits for a timer: a request that arrives alone is computed at once, and batches grow with the load. The queue
is bounded, in number and in time: a request that could not be answered in time is refused at once, with the time after
which to come back. So a server under too much load still answers as many requests as it has time for.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class QueueFull(Exception):
    """No more requests are taken. retry_after_s: whole seconds after which the queue is likely to have room."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Entry(Generic[Request, Answer]):
    """A waiting request. deadline: time of the clock after which nobody waits for the answer."""

    request: Request
    deadline: float
    future: asyncio.Future[Answer]


class Batcher(Generic[Request, Answer]):
    """Calls `compute` with several requests at a time, in one worker thread, and gives each caller its own answer.

    weigh: the cost of a request, such as its number of candidates. max_weight: largest cost of one call (a heavier
    request is computed by itself). max_call_s: a call takes no more requests than are likely to be computed in this
    time. max_waiting: most requests in the queue, without those being computed. on_call: is called with the answers of
    each call (an exception for a request that failed) and its seconds. clock: in seconds. Used by one event loop only.
    """

    def __init__(
        self,
        compute: Callable[[list[Request]], Sequence[Answer]],
        *,
        weigh: Callable[[Request], int] = lambda _: 1,
        max_weight: int,
        max_waiting: int,
        max_call_s: float = math.inf,
        on_call: Callable[[Sequence[Answer | Exception], float], Any] = lambda _answers, _seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.compute, self.weigh, self.max_weight, self.max_call_s = compute, weigh, max_weight, max_call_s
        self.max_waiting, self.on_call, self.clock = max_waiting, on_call, clock
        self._waiting: deque[_Entry[Request, Answer]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._running: asyncio.Task[None] | None = None
        self._began: float | None = None  # start of the current call
        self._num_computed = 0  # requests of that call
        self._seconds_per_request = 0.0  # a moving average

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def busy_s(self) -> float:
        """Seconds that the current call has taken so far; 0 if there is none."""
        return 0.0 if self._began is None else self.clock() - self._began

    async def submit(self, request: Request, *, timeout_s: float) -> Answer:
        """The answer to one request. Raises QueueFull, TimeoutError after `timeout_s`, and what `compute` raises.

        A request that cannot be answered in time is not computed.
        """
        running_s = max(0.0, self._num_computed * self._seconds_per_request - self.busy_s)
        wait_s = running_s + len(self._waiting) * self._seconds_per_request
        # With an empty queue it is computed in any case: the estimate may be of other requests.
        is_late = bool(self._waiting) and wait_s + self._seconds_per_request > timeout_s
        if is_late or len(self._waiting) >= self.max_waiting:
            raise QueueFull(max(1, math.ceil(wait_s)))
        entry = _Entry(request, self.clock() + timeout_s, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        try:
            return await asyncio.wait_for(entry.future, timeout_s)
        finally:
            if entry.future.cancelled() and entry in self._waiting:
                self._waiting.remove(entry)

    async def beside(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, computed in the worker thread between two calls."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def close(self) -> None:
        """Ends the worker thread once its current call has ended."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._next_batch():
                self._began, self._num_computed = self.clock(), len(batch)
                requests = [entry.request for entry in batch]
                answers = await loop.run_in_executor(self._thread, self._compute, requests)
                seconds, self._began, self._num_computed = self.busy_s, None, 0
                self._seconds_per_request += 0.2 * (seconds / len(batch) - self._seconds_per_request)
                self.on_call(answers, seconds)
                for entry, answer in zip(batch, answers):
                    if (future := entry.future).done():
                        continue
                    if isinstance(answer, BaseException):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        finally:
            self._running, self._began, self._num_computed = None, None, 0

    def _next_batch(self) -> list[_Entry[Request, Answer]]:
        batch: list[_Entry[Request, Answer]] = []
        now, weight, left_s = self.clock(), 0, self.max_call_s
        while self._waiting:
            entry, seconds = self._waiting[0], (len(batch) + 1) * self._seconds_per_request
            heavier = weight + self.weigh(entry.request)
            if batch and (heavier > self.max_weight or seconds > left_s):
                break
            self._waiting.popleft()
            if now + seconds > entry.deadline and self._waiting:
                continue  # it is answered by its timeout; others still have time
            weight, left_s = heavier, min(left_s, entry.deadline - now)
            batch.append(entry)
        return batch

    def _compute(self, requests: list[Request]) -> list[Answer | Exception]:
        """The answers, with an exception in place of each that failed: a request never makes another one fail."""
        try:
            return [*self.compute(requests)]
        except Exception as error:
            if len(requests) == 1:
                return [error]
            return [answer for request in requests for answer in self._compute([request])]
