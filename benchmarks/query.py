"""Step 2's hot path: a group query of N conditions, beside asking the same conditions one by one (LUM section 4.2).

    python benchmarks/query.py [--events 256 1024 4096] [--conditions 4 16 64] [--width 64] [--budget_s 100]

One by one is N whole passes over the same histories with one condition each, so that the history is computed N times.
Both ask the same LUM, with fresh weights, about the same users of a simulated log; packs are built within the time. A
history of L events is 2 L tokens; about 4096 events are asked in one call, in whole users. The paper reports a saving
of 78% (17 to 3.6 hours). Then a kept history that is read on by some new events, beside reading all of it again.

Times are of this process's CPU, the least of the repeats, for the machine may be shared; wall time is shown beside it.
The ratio within one run is what counts; machines differ. Set OMP_NUM_THREADS=1 for one core.
"""

import argparse
import contextlib
import io
import os
import platform
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torchrec

from lumrec.data.prepare import open_or_prepare
from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import load
from lumrec.models.lum import ModelConfig, build_lum
from lumrec.query.group_query import GroupQuery
from lumrec.query.prefix_cache import KeptHistories

EVENTS_A_CALL = 4096
REPEATS = 5
NEW_EVENTS = (1, 8, 64)


class Took(NamedTuple):
    """Seconds of the CPU and of the clock, the least of the repeats."""

    cpu_s: float
    wall_s: float


def simulated_log(runs: str, length: int) -> PreparedData:
    """A log in which many users have at least `length` events, and search queries have many words."""
    users = max(4, 64 * 256 // length)
    words = ["data.source=simulator", f"data.simulator.num_users={users}"]
    words += [f"data.simulator.events_per_user={2 * length}"]
    with contextlib.redirect_stdout(io.StringIO()):
        return open_or_prepare(load(None, [*words, f"runs_dir={runs}", f"name=l{length}"]))


def took(ask: Callable[[], object], *, budget_s: float) -> Took:
    """Up to REPEATS calls after one to warm up, fewer where they take more than `budget_s` in all."""
    end = time.perf_counter() + budget_s
    ask()
    times: list[Took] = []
    while not times or (len(times) < REPEATS and time.perf_counter() < end):
        cpu, wall = time.process_time(), time.perf_counter()
        ask()
        times.append(Took(time.process_time() - cpu, time.perf_counter() - wall))
    return Took(min(t.cpu_s for t in times), min(t.wall_s for t in times))


def conditions_of(data: PreparedData, count: int) -> list[dict[str, str]]:
    """Different conditions: search words, by the wish."""
    words, wishes = list(data.vocabulary("query")), list(data.vocabulary("feedback"))
    asked = [{"query": word, "feedback": wish} for word in words for wish in wishes][:count]
    assert len(asked) == count, f"the log has only {len(asked)} conditions"
    return asked


def against_one_by_one(model, builder, users: torch.Tensor, length: int, count: int, budget_s: float) -> str:
    conditions = conditions_of(builder.data, count)
    group = GroupQuery(model, builder, conditions, max_events=length + 1)
    single = [GroupQuery(model, builder, [condition], max_events=length + 1) for condition in conditions]
    fast = took(lambda: group.users(users), budget_s=budget_s)
    o_BND = group.users(users)
    # The one-by-one passes are the same work N times; where all of them would take long, fewer are timed.
    cpu, wall, done = time.process_time(), time.perf_counter(), 0
    for n, query in enumerate(single):
        torch.testing.assert_close(o_BND[:, n : n + 1], query.users(users), atol=1e-4, rtol=0)
        done = n + 1
        if time.perf_counter() - wall > budget_s and done >= 4:
            break
    slow = Took((time.process_time() - cpu) * count / done, (time.perf_counter() - wall) * count / done)
    note = "" if done == count else f"  ({done} of {count} passes timed)"
    saved, saved_wall = (1 - a / b for a, b in zip(fast, slow))
    return (
        f"{length:6} {len(users):5} {count:4} {fast.cpu_s:9.3f} {fast.wall_s:8.3f} {slow.cpu_s:9.3f} {slow.wall_s:8.3f}"
        f" {saved:7.1%} {saved_wall:7.1%} {len(users) / fast.wall_s:9.1f}{note}"
    )


def against_reading_anew(model, builder, users: torch.Tensor, length: int, new: int, budget_s: float) -> str:
    """Both end at the last event: a kept history that lacks `new` events, and one that is read from nothing."""
    query = GroupQuery(model, builder, conditions_of(builder.data, 4), max_events=length + 1)
    kept = KeptHistories(query, users)
    kept.first_B = kept.last_B - length  # histories of exactly L events
    kept.end_B = kept.first_B
    kept.advance(kept.last_B - new)
    before, kept_K = kept.history, kept.kept_K
    assert before is not None and len(kept_K) == len(users)

    def read_on() -> torch.Tensor:
        kept.history, kept.end_B = before, kept.last_B - new
        return kept.advance()[0]

    torch.testing.assert_close(read_on(), query.users(users), atol=1e-4, rtol=0)
    fast = took(read_on, budget_s=budget_s)
    slow = took(lambda: query.users(users), budget_s=budget_s)
    saved, saved_wall = (1 - a / b for a, b in zip(fast, slow))
    return (
        f"{length:6} {len(users):5} {new:4} {fast.cpu_s:9.3f} {fast.wall_s:8.3f} {slow.cpu_s:9.3f} {slow.wall_s:8.3f}"
        f" {saved:7.1%} {saved_wall:7.1%} {len(users) / fast.wall_s:9.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--conditions", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--budget_s", type=float, default=100.0, help="seconds to spend on timing, about")
    args = parser.parse_args()
    each_s = args.budget_s / (2 * len(args.events) * (len(args.conditions) + len(NEW_EVENTS)))
    versions = f"torch {torch.__version__}, torchrec {torchrec.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {versions}, float32")
    print(f"width {args.width}, 2 layers, 2 heads; L events = 2 L tokens; least of up to {REPEATS} repeats, seconds")
    columns = f"{'cpu':>9} {'wall':>8} {'cpu':>9} {'wall':>8} {'cpu':>7} {'wall':>7} {'users/s':>9}"
    with tempfile.TemporaryDirectory() as runs:
        setups = []
        for length in args.events:
            data = simulated_log(runs, length)
            long_enough = np.flatnonzero(np.diff(data.user_offsets) >= length)[: max(1, EVENTS_A_CALL // length)]
            assert len(long_enough), f"no user has {length} events"
            torch.manual_seed(0)
            config = ModelConfig(dim=args.width, max_events=length + 1, conditions=["query", "feedback"])
            model, builder = build_lum(config, data)
            setups.append((model.eval(), builder, torch.from_numpy(long_enough), length))
        print(f"\n{'':17} {'group query':>18} {'one by one':>18} {'saved':>15}\n{'L':>6} users    N {columns}")
        for setup in setups:
            for count in args.conditions:
                print(against_one_by_one(*setup, count, each_s), flush=True)
        print(f"\n{'':17} {'read on':>18} {'read again':>18} {'saved':>15}\n{'L':>6} users  new {columns}")
        for setup in setups:
            for new in NEW_EVENTS:
                print(against_reading_anew(*setup, new, each_s), flush=True)


if __name__ == "__main__":
    main()
