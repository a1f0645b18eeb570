"""Ctrl-C and SIGTERM end a training run between two steps, with a checkpoint; the same signal again ends it at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended a run, whose checkpoint is saved; the message says how to go on. exit_code: 128 + the signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interrupts:
    """While entered, SIGINT and SIGTERM are only noted, in `received`; one that comes twice acts as it did before.

    A signal that has been noted and never heeded acts when it is left. Outside of the main thread it notes nothing.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._restore()
        if kind is None and self.received:
            signal.raise_signal(min(self.received))

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if number in self.received:
            self._restore()
            signal.raise_signal(number)
            return
        self.received.add(number)
        # Not by logging or print: either may be what this signal has interrupted.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: training ends after this step, with a checkpoint; again: at once\n".encode())
