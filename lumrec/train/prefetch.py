"""Loads batches ahead in a background thread, with the loader state that belongs to each."""

import queue
import threading
import time
from collections.abc import Generator
from typing import Any, NamedTuple

import torch

from lumrec.run.errors import UserError


class Fetched(NamedTuple):
    """A batch on its device, the loader's state after it, whether it ends the epoch, and the time spent waiting for it.

    The state after an epoch's last batch is the beginning of the next epoch.
    """

    batch: Any
    loader_state: dict[str, Any]
    is_last: bool
    wait_s: float


def prefetch(loader: Any, device: torch.device, *, depth: int = 2) -> Generator[Fetched, None, None]:
    """Yields the rest of the loader's epoch, which a thread loads at most `depth` batches ahead of the caller.

    Close it (`contextlib.closing`) when leaving early: that ends the thread. The loader is then ahead of the caller:
    load the last `loader_state` into it to bring it back. An exception of the loader is raised here. Raises UserError
    for an epoch without batches.
    """
    ready: queue.Queue[tuple[Any, dict[str, Any], BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: tuple[Any, dict[str, Any], BaseException | None]) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            for batch in loader:
                put((batch.to(device), loader.state_dict(), None))
                if closed.is_set():
                    return
            put((None, loader.state_dict(), None))
        except BaseException as error:  # noqa: BLE001 (handed over to the consumer)
            put((None, {}, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        started = time.perf_counter()
        batch, state, error = ready.get()
        if batch is None and error is None:
            raise UserError("the loader gave no batch for this epoch: is the training part empty?")
        while batch is not None and error is None:
            # Whether this batch is the last is known once the next has come: that wait counts as waiting for data too.
            following = ready.get()
            is_last = following[0] is None and following[2] is None
            waited = time.perf_counter() - started
            yield Fetched(batch, following[1] if is_last else state, is_last, waited)
            started = time.perf_counter()
            batch, state, error = following
        if error is not None:
            raise error
    finally:
        closed.set()
        thread.join()
