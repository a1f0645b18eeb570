"""Memory of a ranker's process up to its first batch, and how long that takes, as the log grows.

    python benchmarks/memory.py [--users 10000,50000] [--model din] [--runs FOLDER]

Each row is a process of its own, after a log of the simulator (100 events a user) was prepared in FOLDER, which is kept
and used again (none: a temporary one). `in memory` computes statistics and tokens for itself, the plain way; `first`
computes them and keeps them beside the log; `later` maps what was kept, as every further process and run does. MiB:
what the process alone holds beyond what it had after the imports, so neither mapped files nor what is freed again.
"""

import contextlib
import ctypes
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _measure import parser_of, print_machine

from lumrec.batches.rows import RowLoader, training_rows
from lumrec.data.mapped import KEPT
from lumrec.data.prepare import open_prepared
from lumrec.experiments.config import load
from lumrec.models.ranker import make_ranker
from lumrec.stages.registry import STAGES

WAYS = {"in memory": False, "first": True, "later": True}


def own_mib() -> float:
    """Memory that this process shares with no file, in MiB, without what the allocator could give back."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def first_batch(prepared: Path, model: str, *, keep: bool) -> None:
    """Prints MiB and seconds up to the first batch of an epoch."""
    before, started = own_mib(), time.perf_counter()
    data = open_prepared(prepared)
    config = load(None, [f"rank.model={model}", "rank.hidden_dims=[16]"]).rank
    _, builder = make_ranker(config, data, keep=keep)
    loader = RowLoader(builder, data.with_negatives(training_rows(data, None)), batch_size=4096)
    next(iter(loader))
    seconds = time.perf_counter() - started
    print(f"{data.num_events} {own_mib() - before:.0f} {seconds:.1f}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--users", default="10000,50000")
    parser.add_argument("--model", default="din")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "WAY"), help="one row, in this process")
    args = parser.parse_args()
    if args.one:
        first_batch(Path(args.one[0]), args.model, keep=WAYS[args.one[1]])
        return
    print_machine(args)
    with tempfile.TemporaryDirectory() as temporary:
        runs = args.runs or Path(temporary)
        print(f"{'events':>12} {'statistics':>11} {'MiB':>7} {'bytes/event':>12} {'s to the first batch':>21}")
        for users in map(int, args.users.split(",")):
            words = [f"name=users-{users}", f"runs_dir={runs}", "data.source=simulator", "data.split.kind=user"]
            words += [f"data.simulator.num_users={users}", "data.simulator.num_items=20000"]
            with contextlib.redirect_stdout(sys.stderr):
                STAGES["prepare"].run(load(None, words))
            prepared = runs / f"users-{users}-prepare"
            shutil.rmtree(prepared / KEPT, ignore_errors=True)
            for way in WAYS:
                command = [sys.executable, __file__, "--model", args.model, "--one", str(prepared), way]
                found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                events, mib, seconds = np.array(found.stdout.split()[-3:], float)
                per_event = mib * 2**20 / events
                print(f"{events:>12,.0f} {way:>11} {mib:>7,.0f} {per_event:>12,.1f} {seconds:>21,.1f}", flush=True)


if __name__ == "__main__":
    main()
