"""What benchmarks share: the times of steps that take turns, the parts of a step, and what they ran on."""

import argparse
import contextlib
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchrec
from torch import Tensor

WARM_UP = 2


@dataclass
class Times:
    """Processor seconds (over all threads) and wall seconds of each repeat.

    On a machine that is shared, processor time is what can be compared; wall time holds the waiting for a core as well.
    """

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    @property
    def cpu(self) -> float:
        return statistics.median(self.cpu_s)

    @property
    def wall(self) -> float:
        return statistics.median(self.wall_s)

    def shown(self, digits: int = 3) -> str:
        """Processor seconds as median [least … most]."""
        return f"{self.cpu:.{digits}f} [{min(self.cpu_s):.{digits}f} … {max(self.cpu_s):.{digits}f}]"


def in_turn(steps: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = WARM_UP) -> dict[str, Times]:
    """Times of each step; they take turns, so that all feel the same machine."""
    times = {name: Times() for name in steps}
    for repeat in range(warm_up + repeats):
        for name, step in steps.items():
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            step()
            if repeat >= warm_up:
                times[name].cpu_s.append(time.process_time() - cpu_s)
                times[name].wall_s.append(time.perf_counter() - wall_s)
    return times


class Timeline:
    """Processor seconds of each part of a step, forward and backward; they sum to the whole.

    The time from one mark to the next belongs to the part that the first mark names. A border marks twice: when the
    forward pass crosses it, and when the backward pass comes back through it (on a CPU both run one operation after
    the other, the backward pass in the opposite order).
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.part, self.since = "other", time.process_time()

    def enter(self, part: str) -> None:
        """What follows belongs to `part`."""
        now = time.process_time()
        self.seconds[self.part] += now - self.since
        self.part, self.since = part, now

    def border(self, before: str, after: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors as they are; going forward `after` begins here, going backward `before` does."""
        self.enter(after)
        return _Border.apply(self, before, *tensors)

    def entered_after_backward(self, part: str, loss: Tensor) -> None:
        """What the backward pass of `loss` leaves to its end (DDP's reduction) belongs to `part`."""
        queue = torch.autograd.Variable._execution_engine.queue_callback
        loss.register_hook(lambda grad: queue(lambda: self.enter(part)))

    @contextlib.contextmanager
    def within(self, owner: Any, name: str, inside: str, outside: str) -> Iterator[None]:
        """The function `name` of `owner`, of tensors to a tensor, belongs to `inside` while this lasts."""
        inner = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Tensor:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            others = args[len(tensors) :]
            out = inner(*self.border(outside, inside, *tensors), *others, **kwargs)
            return self.border(inside, outside, out)[0]

        with mock.patch.object(owner, name, marked):
            yield


class _Border(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, timeline: Timeline, before: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.timeline, ctx.before = timeline, before
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.timeline.enter(ctx.before)
        return None, None, *grads


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that these benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1: what can be compared)")
    return parser


def print_machine(args: argparse.Namespace) -> None:
    """The hardware, versions and what the figures below are."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "")
    print(f"{platform.machine()} {model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s);", end=" ")
    print(f"torch {torch.__version__}, torchrec {torchrec.__version__}")
    print(f"processor seconds: median [least … most] of {args.repeats} after {WARM_UP} to warm up, all in turn")
