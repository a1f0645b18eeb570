"""InfoNCE forward and backward, beside the whole logit matrix through F.cross_entropy.

    python benchmarks/losses.py [--positions 8192] [--width 64] [--items 4000] [--sampled 1024] [--repeats 7]

in-batch: plain is one logit for each pair of positions, those of the same item masked; ours one for each distinct item,
weighted by its count. sampled: plain puts the positive beside the drawn ones and masks it among them. full: every item
of the catalogue. Both sides compute the same loss, which is checked, and gradients of the outputs and of the item
embeddings; items are drawn by a Zipf law, and who is drawn is left out of the time. Memory is what a separate process
takes at its highest beyond its inputs. The ratio within one run is what counts; machines differ.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lumrec.modules.losses import info_nce

VARIANTS, DTYPES = ("in-batch", "sampled", "full"), {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP = 2
Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs [positions, width] and the table of items [items, width]


def plain(variant: str, item_T: Tensor, drawn_N: Tensor, num_items: int) -> Loss:
    """All logits at once; N drawn items."""
    if variant == "full":
        return lambda o, table: F.cross_entropy((o @ table.t()).float(), item_T, reduction="sum")
    if variant == "sampled":
        collision = item_T[:, None] == drawn_N

        def sampled(o: Tensor, table: Tensor) -> Tensor:
            positive = (o * F.embedding(item_T, table)).sum(1, keepdim=True).float()
            negative = (o @ F.embedding(drawn_N, table).t()).float().masked_fill(collision, float("-inf"))
            return F.cross_entropy(torch.cat([positive, negative], 1), torch.zeros_like(item_T), reduction="sum")

        return sampled
    collision, place = item_T[:, None] == item_T, torch.arange(len(item_T))
    collision.fill_diagonal_(False)

    def in_batch(o: Tensor, table: Tensor) -> Tensor:
        logits = (o @ F.embedding(item_T, table).t()).float()
        return F.cross_entropy(logits.masked_fill(collision, float("-inf")), place, reduction="sum")

    return in_batch


def ours(variant: str, item_T: Tensor, drawn_N: Tensor, num_items: int) -> Loss:
    """The same loss over distinct candidates."""
    if variant == "full":
        return lambda o, table: info_nce(o, table, item_T)
    count = torch.bincount(item_T if variant == "in-batch" else drawn_N, minlength=num_items)
    candidate = count > 0
    candidate[item_T] = True
    item_C = candidate.nonzero().squeeze(1)
    positive_T, log_weight_C = torch.searchsorted(item_C, item_T), count[item_C].float().log()
    return lambda o, table: info_nce(o, F.embedding(item_C, table), positive_T, log_weight_C)


def measure(args: argparse.Namespace, side: str, variant: str, dtype: str) -> tuple[list[float], float, float]:
    """(sorted times in ms, peak memory in MiB, loss); run in its own process."""
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    popularity = 1 / torch.arange(1, args.items + 1).double()
    item_T = torch.multinomial(popularity, args.positions, replacement=True, generator=generator)
    drawn_N = torch.randint(args.items, (args.sampled,), generator=generator)
    o, table = (torch.randn(n, args.width, generator=generator) for n in (args.positions, args.items))
    o, table = o.requires_grad_(), (0.3 * table).requires_grad_()
    loss_of = {"plain": plain, "ours": ours}[side](variant, item_T, drawn_N, args.items)

    def step() -> Tensor:
        o.grad = table.grad = None
        with torch.autocast("cpu", dtype=DTYPES[dtype], enabled=dtype != "float32"):
            loss = loss_of(o, table)
        loss.backward()
        return loss.detach()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(WARM_UP):
        loss = step()
    times = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return sorted(times), peak, float(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--items", type=int, default=4000, help="of the catalogue (default 4000)")
    parser.add_argument("--sampled", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}")
    print(f"{args.positions} positions, width {args.width}; median [least … most] of {args.repeats} repeats")
    print(f"{'':9} {'':8}  {'plain':>28} {'MiB':>5}  {'lumrec':>28} {'MiB':>5}  lumrec / plain")
    for variant in VARIANTS:
        for dtype in DTYPES:
            sides = []
            for side in ("plain", "ours"):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    sides.append(pool.apply(measure, (args, side, variant, dtype)))
            (plain_ms, plain_mib, expected), (ours_ms, ours_mib, loss) = sides
            assert abs(loss - expected) < 0.01 * expected, f"{variant}: the losses are {loss} and {expected}"
            ratio = statistics.median(ours_ms) / statistics.median(plain_ms)
            columns = f"{shown(plain_ms)} {plain_mib:5.0f}  {shown(ours_ms)} {ours_mib:5.0f}"
            print(f"{variant:9} {dtype:8}  {columns}  {ratio:.2f}", flush=True)


def shown(times: list[float]) -> str:
    return f"{statistics.median(times):8.1f} ms [{times[0]:.1f} … {times[-1]:.1f}]".rjust(28)


if __name__ == "__main__":
    main()
