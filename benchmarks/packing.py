"""Packing: what is computed beside the useful tokens, and how evenly the ranks of a step work (LUM section 4.1.3).

    python benchmarks/packing.py [--ratings ml-1m/ratings.dat] [--width 64]

Counts, no training. Padding: tokens that the linear layers see, scores of causal attention, and both in operations (see
lumrec.batches.windows.token_cost), for one epoch's packs; "saved" is against padding to the longest window allowed,
and what an ideal packing would save is shown below. Balance: operations of the busiest rank of a step over the mean.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from lumrec.batches.windows import deal, token_cost, training_windows, window_cost
from lumrec.data.splits import TRAIN
from lumrec.modules.layout import make_layout

WORLD_SIZES = (2, 4, 8)
SEED = 0


def ml1m_histories(path: Path) -> tuple[str, np.ndarray]:
    """What they are and the number of events of each user: MovieLens-1M where it is, else as many drawn like it."""
    if path.is_file():
        users = [line.split(b"::", 1)[0] for line in path.read_bytes().splitlines()]
        return "MovieLens-1M", np.unique(np.array(users), return_counts=True)[1]
    return f"like MovieLens-1M (log-normal; {path} is not there)", log_normal(6040, median=96, sigma=1.05)


def log_normal(count: int, *, median: float, sigma: float) -> np.ndarray:
    return np.exp(np.random.default_rng(SEED).normal(np.log(median), sigma, count)).astype(np.int64).clip(1)


def shuffled_windows(histories_U: np.ndarray, max_events: int) -> torch.Tensor:
    """Events of each window of an epoch, in the order of training (int64 [W])."""
    offsets = np.concatenate([[0], histories_U.cumsum()])
    log = SimpleNamespace(
        user_offsets=offsets,
        user=np.repeat(np.arange(len(histories_U)), histories_U),
        split=np.full(offsets[-1], TRAIN),
        num_events=int(offsets[-1]),
        num_users=len(histories_U),
    )
    generator = torch.Generator().manual_seed(SEED)
    everyone = np.ones(len(histories_U), dtype=bool)
    windows = training_windows(log, max_events=max_events, users=everyone, generator=generator)  # type: ignore[arg-type]
    return windows.length_W[torch.randperm(windows.count, generator=generator)]


def step_of_window(length_W: torch.Tensor, budget: int) -> torch.Tensor:
    return (length_W.cumsum(0) - length_W) // budget


def scores(tokens: torch.Tensor | np.ndarray | int) -> torch.Tensor | np.ndarray | int:
    """Query-key pairs under a causal mask."""
    return tokens * (tokens + 1) // 2


def computed(packs: list[torch.Tensor], max_events: int) -> dict[str, tuple[int, int]]:
    """Way → (tokens in the linear layers, attention scores) of an epoch."""
    ways: dict[str, Callable[[torch.Tensor], tuple[int, int]]] = {
        "padded to the longest allowed": lambda n: (len(n) * 2 * max_events, len(n) * scores(2 * max_events)),
        "padded to the pack's longest": lambda n: (len(n) * int(n.max()), len(n) * scores(int(n.max()))),
        "lumrec: flat, length buckets": lambda n: (
            int(n.sum()),
            sum(bucket.num_sequences * scores(bucket.max_tokens) for bucket in make_layout(n).buckets),
        ),
        "ideal: useful alone": lambda n: (int(n.sum()), int(scores(n).sum())),
    }
    totals = {}
    for name, count in ways.items():
        tokens, pairs = zip(*(count(2 * length_W) for length_W in packs), strict=True)
        totals[name] = (sum(tokens), sum(pairs))
    return totals


def print_padding(length_W: torch.Tensor, max_events: int, budget: int, cost: float) -> None:
    step_W = step_of_window(length_W, budget)
    packs = list(length_W.split(torch.bincount(step_W).tolist()))
    print(f"  {len(length_W):,} windows in {len(packs)} packs of {budget} events")
    print(f"  {'':30}{'tokens':>12}{'scores':>16}{'operations':>12}   saved: tokens, scores, operations")
    totals = computed(packs, max_events)
    ideal = totals["ideal: useful alone"]
    most: np.ndarray | None = None
    for name, (tokens, pairs) in totals.items():
        row = np.array([tokens, pairs, tokens * cost + 2 * pairs], dtype=float)
        most = row if most is None else most
        ideal_operations = ideal[0] * cost + 2 * ideal[1]
        saved = "".join(f"{share:9.1%}" for share in 1 - row / most)
        print(f"  {name:30}{tokens:12,}{pairs:16,}{row[2] / ideal_operations:11.2f}×   {saved}")


def print_balance(length_W: torch.Tensor, budget: int, cost: float) -> None:
    print(f"  {'ranks':>7}   {'in turn: mean, worst':>22}   {'dealt: mean, worst':>20}   most events   ms a step")
    cost_W = window_cost(2 * length_W, cost)
    for world_size in WORLD_SIZES:
        pack_W = step_of_window(length_W, budget)
        in_turn = busiest(cost_W, pack_W // world_size, pack_W % world_size, world_size)
        step_W = step_of_window(length_W, budget * world_size)
        started = time.perf_counter()
        rank_W = deal(cost_W, step_W, world_size)
        milliseconds = 1e3 * (time.perf_counter() - started) / (int(step_W[-1]) + 1)
        dealt = busiest(cost_W, step_W, rank_W, world_size)
        events = np.bincount((step_W * world_size + rank_W).numpy(), weights=length_W.numpy()).max() / budget
        print(
            f"  {world_size:7}{in_turn.mean():17.3f}{in_turn.max():8.3f}{dealt.mean():15.3f}{dealt.max():8.3f}"
            f"{events:13.2f}×{milliseconds:11.3f}"
        )


def busiest(cost_W: torch.Tensor, step_W: torch.Tensor, rank_W: torch.Tensor, world_size: int) -> np.ndarray:
    """Cost of the busiest rank over the mean of the ranks, of each step but the last, which is a rest."""
    load = np.bincount((step_W * world_size + rank_W).numpy(), weights=cost_W.numpy())
    load_SR = load[: len(load) // world_size * world_size].reshape(-1, world_size)[: int(step_W[-1])]
    return load_SR.max(1) / load_SR.mean(1)


def main() -> None:
    default = Path(os.environ.get("LUMREC_DATA") or Path.home() / ".cache" / "lumrec") / "ml-1m" / "ratings.dat"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=Path, default=default, help="MovieLens-1M's ratings.dat")
    parser.add_argument("--width", type=int, default=64, help="of GPT blocks with an FFN of four times it (default 64)")
    args = parser.parse_args()
    cost = token_cost(12 * args.width**2, dim=args.width, num_layers=1)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}, numpy {np.__version__}; seed {SEED}"
    )
    print(f"width {args.width}: a token costs as much as {cost:.0f} tokens attended to, the loss left out")
    name, histories = ml1m_histories(args.ratings)
    long = log_normal(6040, median=256, sigma=1.2)
    for title, lengths_U, max_events, budget in (
        (name, histories, 128, 4096),
        (name, histories, 512, 4096),
        ("log-normal, median 256, sigma 1.2", long, 4096, 16384),
    ):
        print(f"\n{title}: {len(lengths_U):,} users, {lengths_U.sum():,} events, windows of at most {max_events}")
        length_W = shuffled_windows(lengths_U, max_events)
        print_padding(length_W, max_events, budget, cost)
        print_balance(length_W, budget, cost)


if __name__ == "__main__":
    main()
