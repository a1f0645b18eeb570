"""Step 1's hot path: a training step of the LUM on flat packs, beside the same model written plainly and padded.

    python benchmarks/pretrain.py [--lengths ml-1m,long] [--encoders gpt,llama,hstu] [--tokens interleaved,merged]
                                  [--precisions float32,bfloat16] [--events 4096] [--users 6040] [--repeats 5]

A repeat is one step on one pack: put together from the log, forward, backward, optimizers. Plain: every window padded
to the longest allowed (and, where lengths differ much, also to the longest of its pack), PyTorch's stock GPT-style
transformer on all places, the whole logit matrix through F.cross_entropy, dense Adam for the tables and all else. Both
train on the same windows of a drawn log, against its whole catalogue. `of plain` divides by the plain GPT-style model
with the same tokens and precision, padded to the longest allowed. Lengths (windows of log-normal histories):

    ml-1m   median 96 and mean 166 as in MovieLens-1M, windows of at most 128 events
    long    median 256, mean 526, windows of at most 4096 events; the first of the precisions only,
            half the repeats, after one

The ratio within one run is what counts; machines differ.
"""

import argparse
from collections.abc import Callable

from _measure import WARM_UP, Times, in_turn, parser_of, print_machine
from _training import LumTraining, PlainTraining, drawn_log, log_normal

from lumrec.data.prepared import PreparedData
from lumrec.models.lum import ModelConfig
from lumrec.modules.large_user_model import TOKENS_PER_EVENT
from lumrec.modules.user_encoder import ENCODERS
from lumrec.run.distributed import init_distributed
from lumrec.stages.pretrain import PRECISIONS

NUM_ITEMS = 3900
# median and sigma of the histories' lengths, longest window in events
LENGTHS = {"ml-1m": (96, 1.05, 128), "long": (256, 1.2, 4096)}


def steps_of(
    log: PreparedData, tokens: str, precision: str, max_events: int, args: argparse.Namespace
) -> tuple[dict[str, Callable[[], object]], LumTraining]:
    """Name → step, the plain ones first; the last training describes the pack."""
    config = {"tokens": tokens, "max_events": max_events, "dim": args.width, "similarity": "dot"}
    trainings = {
        encoder: LumTraining(
            log, ModelConfig(encoder=encoder, **config), events=args.events, full=True, precision=precision
        )
        for encoder in args.encoders
    }
    *_, training = trainings.values()
    steps: dict[str, Callable[[], object]] = {}
    for name, longest in (("plain, padded", max_events), ("plain, pack's longest", 0)):
        if longest or int(training.windows.length_W.max()) < max_events:
            plain = PlainTraining(log, ModelConfig(**config), training.windows, longest=longest, precision=precision)
            steps[name] = plain.step
    return steps | {f"lumrec {encoder}": of.step for encoder, of in trainings.items()}, training


def print_rows(times: dict[str, Times], tokens: str, precision: str, num_events: int) -> None:
    plain = times["plain, padded"].cpu
    for name, taken in times.items():
        per_s = num_events / taken.cpu
        print(
            f"{name:22} {tokens:11} {precision:8} {taken.shown():>23} {taken.wall:8.3f} {per_s:10,.0f} "
            f"{TOKENS_PER_EVENT[tokens] * per_s:10,.0f} {taken.cpu / plain:9.2f}",
            flush=True,
        )


def main() -> None:
    def words(known: object) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            unknown = [word for word in text.split(",") if word not in known]  # type: ignore[operator]
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")  # type: ignore
            return text.split(",")

        return parse

    parser = parser_of(__doc__)
    for name, known in (
        ("lengths", LENGTHS),
        ("encoders", ENCODERS),
        ("tokens", TOKENS_PER_EVENT),
        ("precisions", PRECISIONS),
    ):
        everything = ",".join(known)
        parser.add_argument(f"--{name}", type=words(known), default=everything, help=f"default {everything}")
    parser.add_argument("--events", type=int, default=4096, help="budget of a pack (default 4096)")
    parser.add_argument("--max-events", type=int, help="longest window (default: see above)")
    parser.add_argument("--users", type=int, default=6040, help="of the drawn log (default 6040)")
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    init_distributed("cpu", threads=args.threads)
    print_machine(args)
    print(f"width {args.width}, 2 layers, 2 heads, {NUM_ITEMS} items")
    for lengths in args.lengths:
        median, sigma, max_events = LENGTHS[lengths]
        max_events = args.max_events or max_events
        log = drawn_log(log_normal(args.users, median=median, sigma=sigma), num_items=NUM_ITEMS, width=args.width)
        repeats, warm_up, precisions = args.repeats, WARM_UP, args.precisions
        if lengths == "long":  # plain steps of many seconds
            repeats, warm_up, precisions = max(1, repeats // 2), 1, precisions[:1]
        shown = False
        for tokens in args.tokens:
            for precision in precisions:
                steps, training = steps_of(log, tokens, precision, max_events, args)
                if not shown:
                    shown, windows = True, training.windows
                    fill = training.num_events / (windows.count * max_events)
                    print(
                        f"\n{lengths}: {training.num_events} events in {windows.count} windows, the longest "
                        f"{int(windows.length_W.max())}; {fill:.0%} of the places padded to {max_events}; "
                        f"{repeats} repeats after {warm_up}"
                    )
                    print(
                        f"{'':22} {'tokens':11} {'':8} {'processor s':>23} {'wall s':>8} {'events/s':>10} "
                        f"{'tokens/s':>10} {'of plain':>9}"
                    )
                print_rows(in_turn(steps, repeats=repeats, warm_up=warm_up), tokens, precision, training.num_events)


if __name__ == "__main__":
    main()
