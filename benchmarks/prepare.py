"""Data's hot path: events/s and peak memory of the simulator and of the prepare stage, beside Polars in one gulp.

    python benchmarks/prepare.py [--rows 1000000] [--threads 2] [--repeats 3] [--no-real]

Each measurement runs in its own process; its peak is its largest resident set, of which `start` was there before the
work began (imports). In that order, for each number of rows:

    simulate  the simulated log as Parquet files, by blocks of users (--rows=50000000 shows that memory does not grow)
    prepare   the whole prepare stage on that log (simulated in it again): checks, sort, split, vocabularies, manifest
    plain     the same raw log read whole into memory by Polars and sorted by user, time and row: no checks, no files

and prepare and plain on the published logs that LUMREC_DATA holds. The ratio within one run is what counts; machines
differ.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lumrec.stages.registry import STAGES

EVENTS_PER_USER = 100
# source → folder of LUMREC_DATA, further words
PUBLISHED = {
    "movielens-1m": ("ml-1m", []),
    "kuairand-pure": ("kuairand-pure-late", []),
    "amazon-5core-sequences": ("amazon-beauty-5core", ["data.category=Beauty"]),
}


def peak_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def cpu_s() -> float:
    """Processor seconds of this process so far, over all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(kind: str, words: list[str], folder: str) -> dict[str, float]:
    """Does the work of one measurement in this process: events, seconds, processor seconds, MiB at start and peak."""
    from lumrec.data.open_log import read_source
    from lumrec.experiments.config import load

    config = load(None, words)
    if kind == "plain":  # what the source does before the log is a frame is not measured: CSVs are read in `collect`
        events = read_source(config.data, config.schema, seed=config.seed, scratch=Path(folder))[0].events
    start_mib, start_s, start_cpu_s = peak_mib(), time.perf_counter(), cpu_s()
    if kind == "prepare":
        num_events = STAGES["prepare"].run(config)["events_read"]
    elif kind == "simulate":
        read_source(config.data, config.schema, seed=config.seed, scratch=Path(folder))
        num_events = 0
    else:
        num_events = len(events.collect(engine="in-memory").sort("user_id", "time_us", "order"))
    took = {"wall_s": time.perf_counter() - start_s, "cpu_s": cpu_s() - start_cpu_s}
    memory = {"start_mib": start_mib, "peak_mib": peak_mib()}
    if kind == "simulate":
        import polars as pl

        num_events = pl.scan_parquet(Path(folder) / "events" / "*.parquet").select(pl.len()).collect().item()
    return {"events": num_events, **took, **memory}


def in_process(kind: str, words: list[str], threads: int) -> dict[str, float]:
    """`measure` in its own process, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        (scratch := Path(folder) / "scratch").mkdir()
        words = [*words, f"runs_dir={folder}/runs", "name=bench"]
        env = {**os.environ, "POLARS_MAX_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-W", "ignore", __file__, "--measure", kind, str(scratch), *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind} {' '.join(words)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def report(label: str, kind: str, runs: list[dict[str, float]]) -> None:
    """One line of the table: the median run's seconds, the spread, and the largest peak."""
    walls = sorted(run["wall_s"] for run in runs)
    wall_s, num_events = statistics.median(walls), runs[0]["events"]
    cpu = statistics.median(run["cpu_s"] for run in runs)
    start_mib, peak = max(run["start_mib"] for run in runs), max(run["peak_mib"] for run in runs)
    spread = f"{wall_s:8.2f} [{walls[0]:.2f} … {walls[-1]:.2f}]"
    print(
        f"{label:24} {kind:9} {num_events:>12,} {spread:>27} {cpu:8.2f} {num_events / wall_s:>12,.0f} "
        f"{peak:8,.0f} {start_mib:6,.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000000", help="events to simulate, about; empty for none")
    parser.add_argument("--kinds", default="simulate,prepare,plain", help="what to measure on simulated logs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-real", action="store_true", help="leave out the published logs")
    parser.add_argument("--measure", nargs="+", metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, folder, *words = args.measure
        print(json.dumps(measure(kind, words, folder)))
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("polars", "numpy", "pyarrow"))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    print(f"{platform.machine()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, {args.threads} threads, {versions}")
    print(f"a process for each measurement; seconds: median [least … most] of {args.repeats}; MiB: the largest")
    print(
        f"{'log':24} {'work':9} {'events':>12} {'s':>27} {'cpu s':>8} {'events/s':>12} {'peak MiB':>8} {'start':>6}",
        flush=True,
    )
    for rows in (int(rows) for rows in args.rows.split(",") if rows):
        num_items = min(max(rows // 1000, 1000), 1_000_000)
        words = ["data.source=simulator", f"data.simulator.num_users={rows // EVENTS_PER_USER}"]
        words += [f"data.simulator.num_items={num_items}", f"data.simulator.events_per_user={EVENTS_PER_USER}"]
        for kind in args.kinds.split(","):
            runs = [in_process(kind, words, args.threads) for _ in range(args.repeats)]
            report(f"simulated, {num_items:,} items", kind, runs)
    root = os.environ.get("LUMREC_DATA", "")
    for source, (folder, more) in PUBLISHED.items():
        if args.no_real or not root or not (Path(root) / folder).is_dir():
            reason = "left out" if args.no_real else f"LUMREC_DATA ({root or 'not set'}) has no {folder}"
            print(f"{source:24} skipped: {reason}")
            continue
        for kind in ("prepare", "plain"):
            words = [f"data.source={source}", *more]
            report(source, kind, [in_process(kind, words, args.threads) for _ in range(args.repeats)])


if __name__ == "__main__":
    main()
