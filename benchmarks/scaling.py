"""Cost of an event as users, items, length and width grow: four sweeps, each with one size × 1, × 4 and × 16.

    python benchmarks/scaling.py [--sweeps users,items,length,width] [--events 4096] [--repeats 3]

A row is a training step of the LUM (GPT-style, 2 layers) in processor seconds per million events, split into `data`
(the loader's packs, with its start of an epoch spread over the epoch), `attention` and the `rest`; `attention %` is its
share. What to expect of the exponents (0 flat, 1 linear, 2 quadratic in the size, from × 1 to × 16):

    users    flat: data too, for an epoch is put together step by step
    items    flat: the loss is over what the pack holds and 1024 drawn, tables update what was met (caches grow cold)
    length   attention linear, all else flat; windows are all full. Beside it the plain padded twin, which has nothing
             to pad here: what is left is its attention, and the whole logit matrix
    width    attention linear (heads of 32), the rest between linear and quadratic, for a block has 12 · width² weights

The exponents are this run's own comparison; machines differ.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from _measure import in_turn, parser_of, print_machine
from _training import LumTraining, PlainTraining, drawn_log, log_normal

from lumrec.data.prepared import PreparedData
from lumrec.models.lum import ModelConfig
from lumrec.run.distributed import init_distributed

HEAD_WIDTH = 32
FACTORS = (1, 4, 16)


class Sweep(NamedTuple):
    """What grows, its size at × 1; the sizes of all else. length 0: lengths as in MovieLens-1M, cut at 128 events."""

    first: int
    users: int = 2000
    items: int = 3900
    length: int = 0
    width: int = 64
    has_plain: bool = False


SWEEPS = {
    "users": Sweep(1500, items=50_000),
    "items": Sweep(62_500),
    "length": Sweep(128, users=256, has_plain=True),
    "width": Sweep(32),
}
# A small catalogue is scored whole; a large one by negatives.
WHOLE_CATALOGUE = 10_000


class Cost(NamedTuple):
    """Processor seconds per million events."""

    data: float
    attention: float
    rest: float
    plain: float | None

    @property
    def total(self) -> float:
        return self.data + self.attention + self.rest


def data_cost(training: LumTraining, repeats: int) -> float:
    """Seconds per million events in the loader: the start of an epoch, spread over it, and its packs."""
    started = time.process_time()
    packs = iter(training.loader)
    next(packs)
    first_s = time.process_time() - started
    each_s, num_events = [], []
    for _ in range(min(repeats + 1, len(training.loader) - 2)):
        started = time.process_time()
        num_events.append(next(packs).num_events)
        each_s.append(time.process_time() - started)
    pack_s = statistics.median(each_s)
    log = training.loader.builder.data
    return 1e6 * (max(0.0, first_s - pack_s) / log.num_events + pack_s / statistics.fmean(num_events))


def measure(sweep: Sweep, name: str, factor: int, args: argparse.Namespace) -> Cost:
    size = sweep._replace(**{name: sweep.first * factor})
    lengths_U = np.full(size.users, size.length) if size.length else log_normal(size.users, median=96, sigma=1.05)
    log: PreparedData = drawn_log(lengths_U, num_items=size.items, width=size.width)
    model = ModelConfig(
        dim=size.width, num_heads=max(1, size.width // HEAD_WIDTH), max_events=size.length or 128, similarity="dot"
    )
    training = LumTraining(log, model, events=args.events, full=size.items <= WHOLE_CATALOGUE)
    parts: list[dict[str, float]] = []
    steps: dict[str, Callable[[], object]] = {"lumrec": lambda: parts.append(training.parts())}
    if sweep.has_plain:
        steps["plain"] = PlainTraining(log, model, training.windows, longest=0).step
    times = in_turn(steps, repeats=args.repeats)
    per_million = 1e6 / training.num_events
    mean = {part: statistics.fmean(p[part] for p in parts[-args.repeats :]) * per_million for part in parts[0]}
    rest = sum(mean.values()) - mean["data"] - mean["attention"]
    plain = times["plain"].cpu * per_million if sweep.has_plain else None
    return Cost(data_cost(training, args.repeats), mean["attention"], rest, plain)


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--sweeps", default=",".join(SWEEPS), help=f"default {','.join(SWEEPS)}")
    parser.add_argument("--events", type=int, default=4096, help="budget of a pack (default 4096)")
    parser.add_argument("--factors", default=",".join(map(str, FACTORS)), help="default 1,4,16")
    args = parser.parse_args()
    unknown = sorted(set(args.sweeps.split(",")) - set(SWEEPS))
    if unknown:
        parser.error(f"no sweep {unknown[0]!r}; there are: {', '.join(SWEEPS)}")
    init_distributed("cpu", threads=args.threads)
    print_machine(args)
    factors = [int(factor) for factor in args.factors.split(",")]
    print("processor seconds per million events")
    for name in args.sweeps.split(","):
        sweep, costs = SWEEPS[name], []
        print(f"\n{name:>10}{'total':>9}{'data':>8}{'attention':>11}{'rest':>9}{'attention %':>13}{'plain':>9}")
        for factor in factors:
            cost = measure(sweep, name, factor, args)
            costs.append(cost)
            share, plain = cost.attention / cost.total, "" if cost.plain is None else f"{cost.plain:.1f}"
            print(
                f"{sweep.first * factor:10,}{cost.total:9.1f}{cost.data:8.2f}{cost.attention:11.1f}{cost.rest:9.1f}"
                f"{share:13.0%}{plain:>9}",
                flush=True,
            )
        if len(factors) > 1:
            print(f"{'exponent':>10}{exponents(costs, factors)}")


def exponents(costs: list[Cost], factors: list[int]) -> str:
    """log(cost at the last size / cost at the first) / log(size / size), of each column."""
    first, last, growth = costs[0], costs[-1], math.log(factors[-1] / factors[0])

    def exponent(after: float, before: float) -> float:
        return math.log(after / before) / growth

    columns = [(last.total, first.total, 9), (last.data, first.data, 8), (last.attention, first.attention, 11)]
    shown = "".join(f"{exponent(after, before):{width}.2f}" for after, before, width in columns)
    shown += f"{exponent(last.rest, first.rest):9.2f}"
    return shown if last.plain is None or first.plain is None else shown + f"{exponent(last.plain, first.plain):22.2f}"


if __name__ == "__main__":
    main()
