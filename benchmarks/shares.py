"""Where a training step of the LUM spends its time: the share of each part, forward and backward.

    python benchmarks/shares.py [--events 4096] [--users 6040] [--width 64] [--repeats 5]

    data        the pack, put together from the log (in training a thread makes it ahead of time)
    lookup      embedding tables: forward, backward and the update that is fused into it
    projection  of what was looked up to the width of the model
    attention   scores, softmax or SiLU, and values; of HSTU its bias of position and time too
    blocks      the rest of the blocks: linear layers of attention and FFN, norms, dropout
    loss        InfoNCE over the candidates
    optimizer   clipping and AdamW of all that is no table; in the plain model Adam over the tables too
    other       positions, the output's projection, DDP

Each case is a row, in % of its step; a part's time runs from the mark at its beginning to the mark of the next part, in
both passes, so that the parts sum to 100. `marked` is the marked step over the step as it is. Plain: the GPT-style
model padded to the longest window allowed, from stock PyTorch (see pretrain.py). The ratio within one run is what
counts; machines differ.
"""

import argparse
import statistics
from typing import NamedTuple

from _measure import in_turn, parser_of, print_machine
from _training import PARTS, LumTraining, PlainTraining, drawn_log, log_normal

from lumrec.models.lum import ModelConfig
from lumrec.run.distributed import init_distributed


class Case(NamedTuple):
    """longest: window in events; histories have a median of `median`."""

    name: str
    encoder: str = "gpt"
    tokens: str = "interleaved"
    longest: int = 128
    median: int = 96
    num_items: int = 3900
    full: bool = True


CASES = (
    Case("plain, padded", encoder="plain"),
    Case("gpt"),
    Case("llama", encoder="llama"),
    Case("hstu", encoder="hstu"),
    Case("gpt, merged", tokens="merged"),
    Case("gpt, 100k items, sampled", num_items=100_000, full=False),
    Case("gpt, windows ≤ 4096", longest=4096, median=256),
    Case("hstu, windows ≤ 4096", encoder="hstu", longest=4096, median=256),
)


def measure(case: Case, args: argparse.Namespace) -> tuple[dict[str, float], float, int]:
    """Mean processor seconds of each part, median of the step without marks, number of events."""
    longest = min(case.longest, args.events)
    lengths_U = log_normal(args.users, median=case.median, sigma=1.05 if case.median == 96 else 1.2)
    log = drawn_log(lengths_U, num_items=case.num_items, width=args.width)
    config = {"tokens": case.tokens, "max_events": longest, "dim": args.width, "similarity": "dot"}
    if case.encoder == "plain":
        windows = LumTraining(log, ModelConfig(**config), events=args.events, full=True).windows
        training: LumTraining | PlainTraining = PlainTraining(log, ModelConfig(**config), windows, longest=longest)
    else:
        config["encoder"] = case.encoder
        training = LumTraining(log, ModelConfig(**config), events=args.events, full=case.full)
        windows = training.windows
    parts: list[dict[str, float]] = []
    times = in_turn({"step": training.step, "marked": lambda: parts.append(training.parts())}, repeats=args.repeats)
    timed = parts[-args.repeats :]
    mean = {part: statistics.fmean(seconds[part] for seconds in timed) for part in PARTS}
    return mean, times["step"].cpu, int(windows.length_W.sum())


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--events", type=int, default=4096, help="budget of a pack (default 4096)")
    parser.add_argument("--users", type=int, default=6040, help="of the drawn log (default 6040)")
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    init_distributed("cpu", threads=args.threads)
    print_machine(args)
    print(f"width {args.width}, 2 layers, 2 heads, float32; % of the step\n")
    print(f"{'':24} {'events':>6} {'step s':>7} {'marked':>6} " + "".join(f"{part:>11}" for part in PARTS))
    for case in CASES:
        mean, step_s, num_events = measure(case, args)
        whole = sum(mean.values())
        shares = "".join(f"{100 * mean[part] / whole:11.1f}" for part in PARTS)
        print(f"{case.name:24} {num_events:6} {step_s:7.3f} {whole / step_s:5.2f}× {shares}", flush=True)


if __name__ == "__main__":
    main()
