"""Ctrl-C or SIGTERM ends a training run between two steps, with a checkpoint; a second one ends it immediately."""

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended a run after saving a checkpoint; the message says how to continue. exit_code: 128 + the signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interrupts:
    """Inside, SIGINT and SIGTERM are only recorded, in `received`; the same signal a second time has its usual effect.

    A signal that was recorded but not handled takes effect at the end. Outside the main thread nothing is recorded.
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
        # Not by logging or print, because this signal may have interrupted one of them.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: training ends after this step, with a checkpoint; again ends it immediately\n".encode())
