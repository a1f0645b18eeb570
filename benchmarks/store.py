"""The knowledge store: reads for serving at 1k, 100k and 1M users, and what a refresh costs against the users changed.

    python benchmarks/store.py [--users 1000 100000] [--reads 500] [--dtype float16] [--no-refresh]

Reads: random users of a store of 2 conditions × 64 numbers, in batches of 1 and of 100, through `KnowledgeStore.get`,
with the tensors made; p50 and p99 of the wall time of a call. Warm: after every user was read once. Cold: before each
call the store's pages are dropped from this process (it is opened again) and from the system's cache
(posix_fadvise DONTNEED); what the disk or a hypervisor keeps beyond that stays. The plain baseline is a Python
dictionary of the same bytes.

Refresh: a simulated log of --log-users users and a LUM of 2 layers of width 64 (fresh weights), rows=false. 1%, 10% and
100% of the users count as changed, and the rest is taken over; beside it, a build from nothing. What does not depend on
users (loading the LUM, its items, checking checksums) is in all of them.
"""

import argparse
import contextlib
import io
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import torch

from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import load
from lumrec.knowledge.digests import key_digests
from lumrec.knowledge.manifest import identity_of, read_manifest
from lumrec.knowledge.records import (
    bytes_to_records,
    decode_records,
    identity_user_dtype,
    records_to_bytes,
    user_key_bytes,
)
from lumrec.knowledge.refresh import Earlier, stored_users, take_over_users
from lumrec.knowledge.store import KnowledgeStore
from lumrec.knowledge.writer import KnowledgeWriter
from lumrec.stages import query as stage
from lumrec.stages.registry import STAGES

NUM_CONDITIONS, DIM, BATCHES, BLOCK = 2, 64, (1, 100), 50_000


def build(path: Path, num_users: int, dtype: str) -> float:
    """Publishes random answers for the users "0", "1", …; seconds that it took."""
    identity = {"data_fingerprint": str(num_users), "conditions": [{"wish": str(n)} for n in range(NUM_CONDITIONS)]}
    identity |= {"dim": DIM, "lums": [{"run": "random"}], "dtype": dtype, "rows": False, "users": True}
    identity |= {"log_normalizer": True, "hazard": "in_sample"}
    start = time.perf_counter()
    writer = KnowledgeWriter(path, identity, num_events=0, num_users=0, num_items=1, max_users=num_users)
    for first in range(0, num_users, BLOCK):
        keys = [user_key_bytes(str(user)) for user in range(first, min(first + BLOCK, num_users))]
        o_BND = torch.randn(len(keys), NUM_CONDITIONS, DIM)
        writer.write_users(keys, writer.user_records(o_BND, o_BND[:, :, 0], asked_at=int(time.time()), fold=0))
    writer.write_items(0, torch.randn(1, DIM))
    writer.write_item_keys(["item"])
    writer.commit("all")
    writer.publish({"counts": {"users": num_users}, "built_at": 0})
    return time.perf_counter() - start


def drop_from_cache(folder: Path) -> None:
    """Gives the pages of the LMDB back to the system; nothing may have them mapped."""
    descriptor = os.open(folder / "store" / "data.mdb", os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def percentiles(times: list[float]) -> str:
    p50, p99 = np.percentile(times, [50, 99]) * 1e3
    return f"{p50:8.3f} {p99:8.3f}"


def time_reads(get: Callable[[list[str]], object], num_users: int, batch: int, reads: int) -> list[float]:
    rng, times = np.random.default_rng(batch), []
    for _ in range(reads):
        keys = [str(user) for user in rng.integers(0, num_users, batch)]
        start = time.perf_counter()
        get(keys)
        times.append(time.perf_counter() - start)
    return times


def time_cold_reads(path: Path, num_users: int, batch: int, reads: int) -> list[float]:
    rng, times = np.random.default_rng(batch + 7), []
    for _ in range(reads):
        keys = [str(user) for user in rng.integers(0, num_users, batch)]
        drop_from_cache(path / read_manifest(path)["folder"])
        store = KnowledgeStore.open(path, verify=False)
        start = time.perf_counter()
        store.get(keys)
        times.append(time.perf_counter() - start)
        del store
    return times


def as_dictionary(path: Path) -> Callable[[list[str]], object]:
    """The same answers from a Python dictionary of the same bytes."""
    manifest = read_manifest(path)
    values, record = {}, identity_user_dtype(manifest)
    for keys, record_B in stored_users(path / manifest["folder"], manifest):
        values |= zip(keys, records_to_bytes(record_B))
    return lambda keys: torch.from_numpy(
        decode_records(bytes_to_records([values[user_key_bytes(key)] for key in keys], record))
    )


def benchmark_reads(users: list[int], reads: int, dtype: str) -> None:
    print(f"reads: {NUM_CONDITIONS} conditions × {DIM}, {dtype}; milliseconds a call, p50 and p99 of {reads} calls")
    print(f"{'users':>9} {'MiB':>6} {'build s':>8} {'take over s':>11}  {'batch':>5}  {'warm p50, p99':>17}  "
          f"{'cold p50, p99':>17}  {'dictionary p50, p99':>19}")  # fmt: skip
    for num_users in users:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            build_s = build(path, num_users, dtype)
            manifest = read_manifest(path)
            mebibytes = manifest["files"]["store/data.mdb"]["bytes"] / 2**20
            start = time.perf_counter()
            copy_all(path, Path(folder) / "copy", num_users)
            copy_s = time.perf_counter() - start
            for batch in BATCHES:
                cold = time_cold_reads(path, num_users, batch, min(reads, 100))
                store = KnowledgeStore.open(path, verify=False)
                for first in range(0, num_users, 1000):
                    store.get([str(user) for user in range(first, min(first + 1000, num_users))])
                warm = time_reads(store.get, num_users, batch, reads)
                del store
                plain = time_reads(as_dictionary(path), num_users, batch, reads)
                print(
                    f"{num_users:9,} {mebibytes:6.1f} {build_s:8.2f} {copy_s:11.2f}  {batch:5}  {percentiles(warm)}  "
                    f"{percentiles(cold)}  {percentiles(plain):>19}",
                    flush=True,
                )


def copy_all(path: Path, target: Path, num_users: int) -> None:
    """What a refresh does where no user has changed, but for asking the LUM for its items."""
    earlier = Earlier(path / read_manifest(path)["folder"], read_manifest(path))
    identity = identity_of(earlier.manifest)
    writer = KnowledgeWriter(target, identity, num_events=0, num_users=0, num_items=1, max_users=num_users)
    take_over_users(writer, earlier, key_digests([str(user) for user in range(num_users)]))
    writer.publish({"counts": {}, "built_at": 0})


def benchmark_refresh(log_users: int) -> None:
    with tempfile.TemporaryDirectory() as runs:
        words = ["data.source=simulator", f"data.simulator.num_users={log_users}", "query.rows=false", "name=bench"]
        words += ["data.simulator.events_per_user=60", "pretrain.train.max_steps=1", f"runs_dir={runs}"]
        with contextlib.redirect_stdout(io.StringIO()):
            STAGES["prepare"].run(load(None, words))
        STAGES["pretrain"].run(load(None, words))
        start = time.perf_counter()
        STAGES["query"].run(load(None, [*words, "run=whole"]))
        whole = time.perf_counter() - start
        data = PreparedData.open(Path(runs) / "bench-prepare")
        print(f"\nrefresh: {log_users:,} users, {data.num_events:,} events; a build from nothing takes {whole:.2f} s")
        print(f"{'changed':>8} {'asked':>7} {'taken over':>10} {'seconds':>8}  of a build from nothing")
        for share in (0.01, 0.1, 1.0):
            result, seconds = refresh_with(share, words)
            print(f"{share:8.0%} {result['users_asked']:7,} {result['users_taken_over']:10,} {seconds:8.2f}  "
                  f"{seconds / whole:.2f}")  # fmt: skip


def refresh_with(share: float, words: list[str]) -> tuple[dict, float]:
    """The stage, taking over from the run "whole" as if the first `share` of the users had another history now."""
    unchanged = stage._Job._unchanged

    def changed(job: stage._Job) -> np.ndarray:
        place_U = unchanged(job)
        place_U[: round(share * len(place_U))] = -1
        return place_U

    stage._Job._unchanged = changed  # type: ignore[method-assign]
    try:
        start = time.perf_counter()
        result = STAGES["query"].run(load(None, [*words, f"run=share-{share}", "query.refresh_from=whole"]))
        return result, time.perf_counter() - start
    finally:
        stage._Job._unchanged = unchanged  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--reads", type=int, default=500)
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32", "int8"))
    parser.add_argument("--log-users", type=int, default=2_000)
    parser.add_argument("--no-refresh", action="store_true")
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, lmdb {lmdb.version()}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {versions}")
    print(f"load of the machine {os.getloadavg()[0]:.1f}")
    benchmark_reads(args.users, args.reads, args.dtype)
    if not args.no_refresh:
        benchmark_refresh(args.log_users)


if __name__ == "__main__":
    main()
