"""Requests of many connections, computed together: those that arrive during one call become the next one.

::

    arrive    a   b c        d
    calls     [a.....][b c....][d.....]

Nothing waits for a timer: a request that arrives alone is computed at once, and batches grow with the load. The queue
is bounded: whoever finds it full is refused at once, and reads when to come back.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class QueueFull(Exception):
    """No more requests are taken. retry_after_s: whole seconds after which the queue is likely to have room."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Batcher(Generic[Request, Answer]):
    """Calls `compute` with several requests at a time, in one worker thread, and gives each caller its own answer.

    weigh: what a request costs, such as its number of candidates. max_weight: of one call (a heavier request is
    computed by itself). max_waiting: requests in the queue, those being computed left out. on_call: is given the
    answers of each call (an exception for a request that failed) and its seconds. Used by one event loop only.
    """

    def __init__(
        self,
        compute: Callable[[list[Request]], Sequence[Answer]],
        *,
        weigh: Callable[[Request], int] = lambda _: 1,
        max_weight: int,
        max_waiting: int,
        on_call: Callable[[Sequence[Answer | Exception], float], Any] = lambda _answers, _seconds: None,
    ) -> None:
        self.compute, self.weigh, self.max_weight, self.max_waiting = compute, weigh, max_weight, max_waiting
        self.on_call = on_call
        self._waiting: deque[tuple[Request, asyncio.Future[Answer]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._running: asyncio.Task[None] | None = None
        self._began: float | None = None  # of the call that runs now
        self._seconds_per_request = 0.0  # a moving average

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def busy_s(self) -> float:
        """Seconds that the current call has taken so far; 0 if there is none."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    async def submit(self, request: Request, *, timeout_s: float) -> Answer:
        """The answer to one request. Raises QueueFull, TimeoutError after `timeout_s`, and what `compute` raises of it.

        A request whose time is over before its turn is not computed.
        """
        if len(self._waiting) >= self.max_waiting:
            raise QueueFull(max(1, math.ceil(len(self._waiting) * self._seconds_per_request)))
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        entry = request, future
        self._waiting.append(entry)
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        try:
            return await asyncio.wait_for(future, timeout_s)
        finally:
            if future.cancelled() and entry in self._waiting:
                self._waiting.remove(entry)

    async def beside(self, call: Callable[[], Any]) -> Any:
        """What `call` gives, made in the worker thread between two calls."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def close(self) -> None:
        """Ends the worker thread once its current call has ended."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._next_batch():
                self._began = time.monotonic()
                requests = [request for request, _ in batch]
                answers = await loop.run_in_executor(self._thread, self._compute, requests)
                seconds, self._began = time.monotonic() - self._began, None
                self._seconds_per_request += 0.2 * (seconds / len(batch) - self._seconds_per_request)
                self.on_call(answers, seconds)
                for (_, future), answer in zip(batch, answers):
                    if future.done():
                        continue
                    if isinstance(answer, BaseException):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        finally:
            self._running = self._began = None

    def _next_batch(self) -> list[tuple[Request, asyncio.Future[Answer]]]:
        batch: list[tuple[Request, asyncio.Future[Answer]]] = []
        weight = 0
        while self._waiting:
            weight += self.weigh(self._waiting[0][0])
            if batch and weight > self.max_weight:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _compute(self, requests: list[Request]) -> list[Answer | Exception]:
        """The answers, an exception in place of those that failed: one request never fails another."""
        try:
            return [*self.compute(requests)]
        except Exception as error:
            if len(requests) == 1:
                return [error]
            return [answer for request in requests for answer in self._compute([request])]
