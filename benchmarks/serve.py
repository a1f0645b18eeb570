"""The server under load: latency and throughput of POST /v1/score at rising rates, by model and length of the history.

    python benchmarks/serve.py [--models dlrm] [--events 50 1024 4096] [--rates 5 20 80] [--seconds 5] [--workers 1]
                               [--candidates 100] [--knowledge] [--lum_dim 32] [--end_to_end 1 10 100]

For each model a ranker of a small simulated log is trained for a few steps (what it learns does not matter here),
exported, and served by `lumrec serve` in a process of its own, with three users whose histories have --events events;
the ranker reads all of them. Arrivals are open-loop: requests are sent at random times of a fixed rate, whether or not
earlier ones are answered, and a request's latency counts from the time at which it was due. What is refused (503, 504)
or fails is counted beside it, and memory is that of the server's processes. --knowledge trains a small LUM too and
serves its answers.

The baselines are in this process, one request at a time without HTTP: `scorer` is lumrec.Scorer with the same bundle
and state, `eager` the trained ranker as a plain PyTorch module over the same features. One process loads the server, so
that on a machine of few cores both share them.

--lum_dim is the width of that LUM: a request reads its answers, so that its size should cost nothing (the paper's
Figure 5 b). --end_to_end shows beside it what an end-to-end generative ranker (E2E-GR) pays: a causal encoder of about
so many million parameters reads the user's events at request time, and all candidates as queries of that one history.
"""

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from _measure import parser_of, print_machine

from lumrec.experiments.config import load
from lumrec.models.ranker import open_ranker_run, plain_ranker
from lumrec.modules.layout import make_layout
from lumrec.modules.user_encoder import UserEncoder
from lumrec.serving.requests import Event, ScoreRequest
from lumrec.serving.scorer import Scorer
from lumrec.serving.state import UserState
from lumrec.stages.registry import STAGES

START_S, DRAIN_S = 120.0, 5.0
ENCODERS = {1: (128, 5), 10: (256, 13), 100: (768, 14)}  # million parameters: width, layers
SERVE = "from lumrec.launch.main import run_command; run_command('serve')"


@dataclass
class Outcome:
    """latency_s: of each answered request, from when it was due. refused: by status. failed: without an answer."""

    latency_s: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0

    def line(self, seconds: float) -> str:
        """Percentiles in ms, answers per second, and what had none."""
        if not self.latency_s:
            return f"no answer; {self.refused} refused, {self.failed} failed"
        p50, p95, p99 = np.quantile(np.array(self.latency_s) * 1000, [0.5, 0.95, 0.99])
        rate = len(self.latency_s) / seconds
        return (
            f"p50 {p50:8.1f}  p95 {p95:8.1f}  p99 {p99:8.1f} ms  {rate:7.1f} answers/s  "
            f"{self.refused} refused, {self.failed} failed"
        )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="*", default=["dlrm"], help="dlrm, din, dien, sim, twin")
    parser.add_argument("--events", type=int, nargs="+", default=[50, 1024, 4096], help="of a history")
    parser.add_argument("--rates", type=float, nargs="+", default=[5, 20, 80], help="requests per second")
    parser.add_argument("--seconds", type=float, default=5, help="of each rate")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1, help="processes of the server")
    parser.add_argument("--knowledge", action="store_true", help="with the answers of a small LUM")
    parser.add_argument("--lum_dim", type=int, default=32, help="width of the LUM (with --knowledge)")
    parser.add_argument(
        "--end_to_end", nargs="*", type=int, default=[], choices=ENCODERS, help="million parameters of an E2E-GR"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    print_machine(args)
    for million in args.end_to_end:
        end_to_end(million, args)
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            measure(model, Path(folder), args)


def measure(model: str, runs: Path, args: argparse.Namespace) -> None:
    """Prints the table of one model."""
    words = made(model, runs, args)
    bundle, state, store = (runs / f"bench-{name}" for name in ("rank-bundle", "rank-user_state", "query"))
    scorer = Scorer.open(bundle, store=store if args.knowledge else None, state=state)
    items, _ = scorer.bundle.titles()
    asked = fill(scorer, state, items, args)
    knowledge = " with knowledge" if args.knowledge else ""
    print(f"\n{model}{knowledge}: {args.candidates} candidates, {args.workers} worker(s)")
    baselines(runs, scorer, asked, args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words += [f"serve.port={port}", f"serve.workers={args.workers}", "serve.page=false"]
    with (runs / "serve.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-c", SERVE, *words], stdout=log, stderr=log)
        try:
            wait_until_ready(server, port, runs / "serve.log")
            for num_events, request in asked.items():
                body = {"user": request.user, "items": list(request.items)}
                for rate in args.rates:
                    outcome = asyncio.run(offered(port, json.dumps(body).encode(), rate, args.seconds))
                    print(f"  {num_events:5,} events  {rate:6g} requests/s  {outcome.line(args.seconds)}", flush=True)
            print(f"  memory of the server: {memory_mib(server.pid):,.0f} MiB")
        finally:
            server.terminate()
            server.wait(60)


def made(model: str, runs: Path, args: argparse.Namespace) -> list[str]:
    """The words of a config whose ranker was trained, exported, and given a state."""
    words = [
        *("name=bench", f"runs_dir={runs}", "data.source=simulator", "data.simulator.num_users=200"),
        *("data.simulator.num_items=2000", "data.simulator.events_per_user=30", f"rank.model={model}"),
        *(f"rank.max_history={max(args.events)}", "rank.batch_size=32", "rank.train.max_steps=4"),
        *(f"model.dim={args.lum_dim}", "model.num_layers=1", "model.max_events=32", "pretrain.train.max_steps=4"),
        *("pretrain.packing.events_per_pack=1024", f"rank.knowledge={'both' if args.knowledge else 'none'}"),
    ]
    for stage in [*(["pretrain", "query"] if args.knowledge else []), "rank", "export", "user_state"]:
        STAGES[stage].run(load(None, words))
    return words


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


def baselines(runs: Path, scorer: Scorer, asked: dict[int, ScoreRequest], args: argparse.Namespace) -> None:
    """Prints what a request takes in this process, without HTTP."""
    ranker, _ = plain_ranker(open_ranker_run(runs / "bench-rank"))
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


def wait_until_ready(server: subprocess.Popen, port: int, log: Path) -> None:
    """Raises RuntimeError, with the end of the server's log, where it does not come up."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as ready:
                ready.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                if b" 200 " in ready.recv(64):
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server did not come up: {log.read_text()[-2000:]}")


async def offered(port: int, body: bytes, rate: float, seconds: float) -> Outcome:
    """Sends requests at random times, `rate` per second on average, and waits for their answers."""
    draw, outcome = random.Random(1), Outcome()
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    head = (
        f"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    message = head.encode() + b"\r\n\r\n" + body

    async def one(due: float) -> None:
        try:
            reader, writer = free.pop() if free else await asyncio.open_connection("127.0.0.1", port)
            writer.write(message)
            status, closes = await read_answer(reader)
        except (OSError, ValueError, asyncio.IncompleteReadError):
            outcome.failed += 1
            return
        if status == 200:
            outcome.latency_s.append(time.perf_counter() - due)
        else:
            outcome.refused += 1
        if closes:
            writer.close()
        else:
            free.append((reader, writer))

    due, end, tasks = time.perf_counter(), time.perf_counter() + seconds, []
    while due < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due)))
        due += draw.expovariate(rate)
    _, late = await asyncio.wait(tasks, timeout=DRAIN_S)
    outcome.failed += len(late)
    for task in late:
        task.cancel()
    return outcome


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status, and whether the connection is closed after it."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    await reader.readexactly(int(headers.get("content-length", 0)))
    return int(lines[0].split()[1]), headers.get("connection") == "close"


def memory_mib(pid: int) -> float:
    """Of a process and its children, pages that they share counted once (Linux)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    own = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) / 1024
    return own + sum(memory_mib(int(child)) for child in children)


if __name__ == "__main__":
    main()
