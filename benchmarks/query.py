"""Step 2's hot path: a group query of N conditions, beside asking the same conditions one by one (LUM section 4.2).

    python benchmarks/query.py [--users 16] [--width 64] [--repeats 7]

One by one: N passes over the same packs with one condition each, so that the history is computed N times. Both ask the
same LUM, with fresh weights, about the same users of a simulated log; packs are built within the time. The paper
reports a saving of 78% (17 to 3.6 hours). The ratio within one run is what counts; machines differ.
"""

import argparse
import contextlib
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import torchrec

from lumrec.config import load
from lumrec.data.prepare import open_or_prepare
from lumrec.data.prepared import PreparedData
from lumrec.query.group_query import GroupQuery
from lumrec.train.lum import ModelConfig, build_lum

LENGTHS, NUM_CONDITIONS = (128, 512), (4, 16)
WARM_UP = 2


def simulated_log(runs: str, length: int) -> PreparedData:
    """A log in which many users have at least `length` events, and the condition `category` has 16 values."""
    words = ["data.source=simulator", "data.simulator.num_users=64", f"data.simulator.events_per_user={2 * length}"]
    with contextlib.redirect_stdout(io.StringIO()):
        return open_or_prepare(load(None, [*words, f"runs_dir={runs}", f"name=l{length}"]))


def wall_ms(ask: Callable[[], object], repeats: int) -> list[float]:
    for _ in range(WARM_UP):
        ask()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        ask()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)


def shown(times: list[float]) -> str:
    return f"{statistics.median(times):8.1f} ms [{times[0]:.1f} … {times[-1]:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, torchrec {torchrec.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {versions}, float32")
    print(f"{args.users} users, width {args.width}, 2 layers, 2 heads; median [least … most] of {args.repeats} repeats")
    print(f"{'L':>4} {'N':>3}  {'group query':>28}  {'one by one':>30}  group / one by one")
    with tempfile.TemporaryDirectory() as runs:
        for length in LENGTHS:
            data = simulated_log(runs, length)
            long_enough = np.flatnonzero(np.diff(data.user_offsets) >= length)[: args.users]
            assert len(long_enough) == args.users, f"only {len(long_enough)} users have {length} events"
            users = torch.from_numpy(long_enough)
            torch.manual_seed(0)
            model, builder = build_lum(ModelConfig(dim=args.width, max_events=length + 1), data)
            for num_conditions in NUM_CONDITIONS:
                conditions = [{"category": value} for value in list(data.vocabulary("categories"))[:num_conditions]]
                group = GroupQuery(model, builder, conditions, max_events=length + 1)
                single = [GroupQuery(model, builder, [condition], max_events=length + 1) for condition in conditions]
                one_by_one = torch.cat([query.users(users) for query in single], dim=1)
                torch.testing.assert_close(group.users(users), one_by_one, atol=5e-5, rtol=0)
                fast = wall_ms(lambda: group.users(users), args.repeats)  # noqa: B023
                slow = wall_ms(lambda: [query.users(users) for query in single], args.repeats)  # noqa: B023
                ratio = statistics.median(fast) / statistics.median(slow)
                print(
                    f"{length:4} {num_conditions:3}  {shown(fast)}  {shown(slow)}  {ratio:.3f} ({1 - ratio:.0%} saved)"
                )


if __name__ == "__main__":
    main()
