"""Memory and time of a warm start on two ranks, beside loading the whole table on each.

    python benchmarks/warm_start.py [--rows 400000] [--width 64] [--block_mib 4]

One table of `rows` rows, saved whole (as a table_wise production job leaves it), goes into a table that is row_wise
over two ranks, each half of it:

    lumrec        lumrec.warm_start in blocks of rows: the rows as they are, or (remap) by raw id through two
                  vocabularies in another order
    dcp.load      torch.distributed.checkpoint in place, which reads a whole saved shard at a time
    torch.load    the whole file on each rank, of which it copies its half: what one writes first

Each runs in two separate processes. Memory is what a rank takes at its highest beyond what it had before, when its
half of the table was there already; a vocabulary's ids are part of it.
"""

import argparse
import os
import platform
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchrec
from safetensors.torch import save_file
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from lumrec.modules.tokens import make_tables
from lumrec.run.distributed import init_distributed, rank
from lumrec.train.parallel import shard
from lumrec.warm_start import warm_start
from lumrec.warm_start.plan import shards_of

NAME = "tables.embedding_bags.item.weight"
VARIANTS = {  # source, rows
    "lumrec, DCP": ("dcp", "same"),
    "lumrec, torch.save": ("model.pt", "same"),
    "lumrec, safetensors": ("model.safetensors", "same"),
    "lumrec, DCP, remap": ("dcp", "remap"),
    "dcp.load": ("dcp", "dcp.load"),
    "torch.load": ("model.pt", "torch.load"),
}


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (the highest since `forget_highest`) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def forget_highest() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def save(folder: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    init_distributed("cpu", threads=1)
    table = {NAME: torch.randn(args.rows, args.width)}
    dcp.save(table, checkpoint_id=folder / "dcp")
    torch.save(table, folder / "model.pt")
    save_file(table, folder / "model.safetensors")
    order = np.random.default_rng(0).permutation(args.rows)
    for name, row in (("theirs", np.arange(args.rows)), ("ours", order)):
        pl.DataFrame({"key": np.arange(args.rows), "row": row}).write_parquet(folder / f"{name}.parquet")


def plain_load(model: DistributedModelParallel, source: Path) -> None:
    table = torch.load(source, weights_only=True)[NAME]
    for part in shards_of(model.state_dict()[NAME]):
        part.values.copy_(table[part.first_row : part.first_row + len(part.values)])


def check(model: DistributedModelParallel, folder: Path, how: str) -> None:
    """Every hundredth row against the file."""
    table = torch.load(folder / "model.pt", weights_only=True, mmap=True)[NAME]
    order = torch.from_numpy(pl.read_parquet(folder / "ours.parquet")["row"].to_numpy().copy())
    for part in shards_of(model.state_dict()[NAME]):
        row = torch.arange(part.first_row, part.first_row + len(part.values), 100)
        theirs = torch.argsort(order)[row] if how == "remap" else row
        assert torch.equal(part.values[::100], table[theirs])


def work(local_rank: int, port: int, folder: Path, variant: str, args: argparse.Namespace) -> None:
    os.environ |= {"RANK": str(local_rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    init_distributed("cpu", threads=1)
    tables = make_tables({"item": (args.rows, args.width)}, {"item": "item"}, device="meta")
    model = shard(nn.ModuleDict({"tables": tables}), device="cpu", sharding="row_wise")
    file, how = VARIANTS[variant]
    rule = {"source": NAME}
    if how == "remap":
        rule |= {"rows": "remap", "source_vocabulary": "theirs.parquet", "target_vocabulary": "ours.parquet"}
    forget_highest()
    before, started = memory_mib("VmRSS"), time.perf_counter()
    if how == "torch.load":
        plain_load(model, folder / file)
    elif how == "dcp.load":
        dcp.load(model.state_dict(), checkpoint_id=folder / file)
    else:
        rules = {"folder": str(folder), "rules": [rule]}
        warm_start(model, folder / file, rules, block_bytes=args.block_mib << 20)
    taken_s, taken_mib = time.perf_counter() - started, memory_mib("VmHWM") - before
    figures = torch.tensor([taken_s, taken_mib])
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    check(model, folder, how)
    if rank() == 0:
        table_mib = args.rows * args.width * 4 / 2**20
        seconds, mib = figures.tolist()
        print(f"{variant:22} {table_mib:>10.0f} {mib:>14.0f} {mib / table_mib:>10.2f} {seconds:>8.1f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--block_mib", type=int, default=4, help="of the source in memory at a time")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}, torchrec {torchrec.__version__}")
    print(f"{args.rows:,} rows × {args.width}, float32; blocks of {args.block_mib} MiB; the higher of two ranks")
    print(f"{'':22} {'table MiB':>10} {'rank peak MiB':>14} {'of table':>10} {'seconds':>8}", flush=True)
    start = torch.multiprocessing.get_context("fork").Process
    with tempfile.TemporaryDirectory() as name:
        saving = start(target=save, args=(Path(name), args))
        saving.start()
        saving.join()
        for variant in VARIANTS:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            ranks = [start(target=work, args=(number, port, Path(name), variant, args)) for number in range(2)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            if any(process.exitcode for process in ranks):
                raise SystemExit(f"{variant} failed")


if __name__ == "__main__":
    main()
