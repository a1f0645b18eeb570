"""The server under load: latency and throughput of POST /v1/score at rising rates, by model and length of the history.

    python benchmarks/serve.py [--models dlrm] [--events 50 1024 4096] [--rates 5 20 80] [--seconds 5] [--workers 1]
                               [--candidates 100] [--knowledge] [--lum_dim 32] [--end_to_end 1 10 100]
                               [--calls float32 float16 int8 aoti]

For each model a ranker of a small simulated log is trained for a few steps (what it learns does not matter here),
exported, and served by `lumrec serve` in a process of its own, with three users whose histories have --events events;
the ranker reads all of them. Arrivals are open-loop: requests are sent at random times of a fixed rate, whether or not
earlier ones are answered, and a request's latency counts from the time at which it was due. What is refused (503, 504)
or fails is counted beside it, and memory is that of the server's processes. --knowledge trains a small LUM too and
serves its answers.

The baselines are in this process, one request at a time without HTTP: `scorer` is lumrec.Scorer with the same bundle
and state, `eager` the trained ranker as a plain PyTorch module over the same features. One process loads the server, so
that on a machine of few cores both share them.

--calls times only the model, for a batch that is ready: eager and exported with tables of each dtype, or compiled by
AOTInductor (float32), in turns; processor time, median [least … most]. `--rates` without a number starts no server.

--lum_dim is the width of that LUM: a request reads its answers, so that its size should cost nothing (the paper's
Figure 5 b). --end_to_end shows beside it what an end-to-end generative ranker (E2E-GR) pays: a causal encoder of about
so many million parameters reads the user's events at request time, and all candidates as queries of that one history.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _load import Outcome, made_to_serve, memory_mib, message, offer, serving
from _measure import in_turn, parser_of, print_machine

from lumrec.models.ranker import open_ranker_run, plain_ranker
from lumrec.modules.layout import make_layout
from lumrec.modules.rankers.base import Ranker
from lumrec.modules.user_encoder import UserEncoder
from lumrec.serving.graph import export_graph, load_graph
from lumrec.serving.requests import Event, ScoreRequest
from lumrec.serving.scorer import Scorer
from lumrec.serving.state import UserState
from lumrec.serving.tables import open_tables, write_tables

ENCODERS = {1: (128, 5), 10: (256, 13), 100: (768, 14)}  # million parameters: width, layers


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="*", default=["dlrm"], help="dlrm, din, dien, sim, twin")
    parser.add_argument("--events", type=int, nargs="+", default=[50, 1024, 4096], help="of a history")
    parser.add_argument("--rates", type=float, nargs="*", default=[5, 20, 80], help="requests per second")
    parser.add_argument("--seconds", type=float, default=5, help="of each rate")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1, help="processes of the server")
    parser.add_argument("--knowledge", action="store_true", help="with the answers of a small LUM")
    parser.add_argument("--lum_dim", type=int, default=32, help="width of the LUM (with --knowledge)")
    parser.add_argument(
        "--end_to_end", nargs="*", type=int, default=[], choices=ENCODERS, help="million parameters of an E2E-GR"
    )
    parser.add_argument(
        "--calls", nargs="*", default=[], choices=["float32", "float16", "int8", "aoti"], help="exported graphs to time"
    )
    args = parser.parse_args()
    if args.calls and args.knowledge:
        parser.error("--calls times rankers without knowledge: leave out --knowledge")
    torch.set_num_threads(1)
    print_machine(args)
    for million in args.end_to_end:
        end_to_end(million, args)
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            measure(model, Path(folder), args)


def measure(model: str, runs: Path, args: argparse.Namespace) -> None:
    """Prints the table of one model."""
    words = made_to_serve(
        runs, model=model, max_history=max(args.events), lum_dim=args.lum_dim, knowledge=args.knowledge
    )
    bundle, state, store = (runs / f"bench-{name}" for name in ("rank-bundle", "rank-user_state", "query"))
    scorer = Scorer.open(bundle, store=store if args.knowledge else None, state=state)
    items, _ = scorer.bundle.titles()
    asked = fill(scorer, state, items, args)
    knowledge = " with knowledge" if args.knowledge else ""
    print(f"\n{model}{knowledge}: {args.candidates} candidates, {args.workers} worker(s)")
    ranker, _ = plain_ranker(open_ranker_run(runs / "bench-rank"))
    if args.calls:
        calls(ranker, runs, scorer, asked, args)
    baselines(ranker, runs, scorer, asked, args)
    if not args.rates:
        return
    words += [f"serve.workers={args.workers}", "serve.page=false"]
    with serving(words, runs / "serve.log") as (server, port):
        for num_events, request in asked.items():
            sent = message("/v1/score", {"user": request.user, "items": list(request.items)})
            for rate in args.rates:
                outcomes: list[Outcome] = []
                end = time.perf_counter() + args.seconds
                goes_on = lambda: time.perf_counter() < end  # noqa: B023, E731
                asyncio.run(offer(port, lambda: sent, rate, goes_on, outcomes.append))  # noqa: B023
                print(f"  {num_events:5,} events  {rate:6g} requests/s  {line(outcomes, args.seconds)}", flush=True)
        print(f"  memory of the server: {memory_mib(server.pid):,.0f} MiB")


def line(outcomes: Sequence[Outcome], seconds: float) -> str:
    """Percentiles in ms, answers per second, and what had none."""
    latency_ms = [1000 * each.seconds for each in outcomes if each.status == 200]
    failed = sum(each.status == 0 for each in outcomes)
    missed = f"{len(outcomes) - len(latency_ms) - failed} refused, {failed} failed"
    if not latency_ms:
        return f"no answer; {missed}"
    p50, p95, p99 = np.quantile(latency_ms, [0.5, 0.95, 0.99])
    return f"p50 {p50:8.1f}  p95 {p95:8.1f}  p99 {p99:8.1f} ms  {len(latency_ms) / seconds:7.1f} answers/s  {missed}"


@torch.no_grad()
def end_to_end(million: int, args: argparse.Namespace) -> None:
    """Prints how long an encoder takes over a history and the candidates after it, without its embedding tables."""
    dim, num_layers = ENCODERS[million]
    encoder = UserEncoder(
        encoder="gpt", dim=dim, num_layers=num_layers, num_heads=dim // 64, max_tokens=max(args.events) + 1
    ).eval()
    size = sum(weight.numel() for layer in encoder.children() for weight in layer.parameters())
    for num_events in args.events:
        prefix_Q = torch.full((args.candidates,), num_events)
        layout = make_layout(
            torch.tensor([num_events]), query_sequence_Q=torch.zeros_like(prefix_Q), query_prefix_Q=prefix_Q
        )
        x_TD, y_QD = torch.randn(num_events, dim), torch.randn(args.candidates, dim)

        def score(inputs: tuple = (x_TD, y_QD, layout, prefix_Q)) -> None:
            encoder(*inputs[:3], query_prefix_Q=inputs[3])

        took = milliseconds(score, 3)
        print(f"E2E-GR of {size / 1e6:.0f}M  {num_events:5,} events  in this process, ms: {took}", flush=True)


def fill(scorer: Scorer, state: Path, items: Sequence[str], args: argparse.Namespace) -> dict[int, ScoreRequest]:
    """A request of a user for each length of history; the events are in the state afterwards."""
    draw, now, asked = random.Random(0), time.time(), {}
    for num_events in args.events:
        user = f"user of {num_events}"
        events = [
            Event(user, draw.choice(items), now - 60 * (num_events - n), float(draw.random() < 0.3), event_id=str(n))
            for n in range(num_events)
        ]
        UserState.open(state, scorer.bundle.builder).append(events)
        asked[num_events] = ScoreRequest(user, draw.sample(list(items), args.candidates))
    return asked


@torch.no_grad()
def calls(ranker: Ranker, runs: Path, scorer: Scorer, asked: dict[int, ScoreRequest], args: argparse.Namespace) -> None:
    """Prints what a call of the model takes, eager and in each of --calls, and how far its scores are from eager."""
    graphs = {}
    for form in args.calls:
        dtype, compile = ("float32", "aoti") if form == "aoti" else (form, "none")
        write_tables(runs / form, ranker.tables, dtype=dtype)
        export_graph(ranker, runs / form / "graph.pt2", dtype=dtype, compile=compile)
        graphs[form] = load_graph(runs / form / "graph.pt2", open_tables(runs / form))
    state = UserState.open(runs / "bench-rank-user_state", scorer.bundle.builder)
    for num_events, request in asked.items():
        batch = scorer.bundle.builder.batch([request], state.get([request.user])).rank
        steps = {name: partial(graph, batch) for name, graph in graphs.items()}
        times = in_turn({"eager": partial(ranker, batch), **steps}, repeats=args.repeats)
        print(f"  {num_events:5,} events  one call, ms of processor time")
        expected_B = ranker(batch).sigmoid()
        for name, each in times.items():
            median, least, most = (1000 * of(each.cpu_s) for of in (statistics.median, min, max))
            far = f"  differs by {(graphs[name](batch) - expected_B).abs().max():.1e}" if name in graphs else ""
            print(f"    {name:8} {median:7.2f} [{least:.2f} … {most:.2f}]{far}", flush=True)


def baselines(
    ranker: Ranker, runs: Path, scorer: Scorer, asked: dict[int, ScoreRequest], args: argparse.Namespace
) -> None:
    """Prints what a request takes in this process, without HTTP."""
    state = UserState.open(runs / "bench-rank-user_state", scorer.bundle.builder)
    for num_events, request in asked.items():

        def eager(request: ScoreRequest = request) -> None:
            with torch.no_grad():
                ranker(scorer.bundle.builder.batch([request], state.get([request.user])).rank)

        def score(request: ScoreRequest = request) -> None:
            scorer.score_many([request])

        steps: dict[str, Callable[[], None]] = {"scorer": score}
        if not args.knowledge:  # which the scorer puts into the batch
            steps["eager"] = eager
        shown = "  ".join(f"{name} {milliseconds(step, args.repeats)}" for name, step in steps.items())
        print(f"  {num_events:5,} events  in this process, ms of wall time: {shown}", flush=True)


def milliseconds(step: Callable[[], None], repeats: int) -> str:
    """Median [least … most] of the wall time."""
    times = []
    for repeat in range(repeats + 2):
        start = time.perf_counter()
        step()
        if repeat >= 2:  # the first two warm up
            times.append(1000 * (time.perf_counter() - start))
    return f"{np.median(times):.1f} [{min(times):.1f} … {max(times):.1f}]"


if __name__ == "__main__":
    main()
