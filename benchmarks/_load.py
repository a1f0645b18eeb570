"""A small ranker that is served by a process of its own, and requests at random times, whether or not it keeps up."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lumrec.experiments.config import load
from lumrec.stages.registry import STAGES

START_S, DRAIN_S = 120.0, 5.0
SERVE = "from lumrec.launch.main import run_command; run_command('serve')"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Outcome(NamedTuple):
    """Of one request. status: 0 = no answer. due: time.perf_counter() at which it was to be sent. seconds: from then to
    the answer, or to its failure."""

    status: int
    due: float
    seconds: float


def made_to_serve(runs: Path, *, model: str, max_history: int, lum_dim: int, knowledge: bool, more: Any = ()) -> list:
    """The words of a config whose ranker was trained, exported, and given a state of users."""
    words = [
        *("name=bench", f"runs_dir={runs}", "data.source=simulator", "data.simulator.num_users=200"),
        *("data.simulator.num_items=2000", "data.simulator.events_per_user=30", f"rank.model={model}"),
        *(f"rank.max_history={max_history}", "rank.batch_size=32", "rank.train.max_steps=4"),
        *(f"model.dim={lum_dim}", "model.num_layers=1", "model.max_events=32", "pretrain.train.max_steps=4"),
        *("pretrain.packing.events_per_pack=1024", f"rank.knowledge={'both' if knowledge else 'none'}", *more),
    ]
    for stage in [*(["pretrain", "query"] if knowledge else []), "rank", "export", "user_state"]:
        STAGES[stage].run(load(None, words))
    return words


@contextmanager
def serving(words: Sequence[str], log: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """The process of `lumrec serve`, ready, and its port. Raises RuntimeError, with the end of its log, where it does
    not come up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("ab") as opened:
        command = [sys.executable, "-c", SERVE, *words, f"serve.port={port}"]
        server = subprocess.Popen(command, stdout=opened, stderr=opened)
        try:
            _wait_until_ready(server, port, log)
            yield server, port
        finally:
            server.terminate()
            server.wait(60)


def _wait_until_ready(server: subprocess.Popen, port: int, log: Path) -> None:
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


def message(endpoint: str, body: Any) -> bytes:
    """A request as it is sent."""
    content = json.dumps(body).encode()
    head = f"POST {endpoint} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(content)}\r\n\r\n".encode() + content


class Client:
    """Sends requests over connections that it keeps, as many as are needed at once."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._free: list[Connection] = []

    async def ask(self, sent: bytes, due: float) -> Outcome:
        """What came of a request."""
        try:
            connection = await self._connection()
            connection[1].write(sent)
            status, closes = await _read_answer(connection[0])
        except (OSError, ValueError, asyncio.IncompleteReadError):
            return Outcome(0, due, time.perf_counter() - due)
        if closes:
            connection[1].close()
        else:
            self._free.append(connection)
        return Outcome(status, due, time.perf_counter() - due)

    async def _connection(self) -> Connection:
        while self._free:
            reader, writer = self._free.pop()
            if not (reader.at_eof() or reader.exception() or writer.is_closing()):
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self.port)


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status, and whether the connection is closed after it."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    await reader.readexactly(int(headers.get("content-length", 0)))
    return int(lines[0].split()[1]), headers.get("connection") == "close"


async def offer(
    port: int, draw: Callable[[], bytes], rate: float, goes_on: Callable[[], bool], note: Callable[[Outcome], Any]
) -> None:
    """Sends requests at random times, `rate` per second on average, as long as it goes on; notes what came of each.

    What has no answer DRAIN_S after the last one is noted as failed.
    """
    random_times, client = random.Random(1), Client(port)
    due, tasks = time.perf_counter(), dict[asyncio.Task[Outcome], float]()

    def ended(task: asyncio.Task[Outcome]) -> None:
        due = tasks.pop(task)
        note(Outcome(0, due, time.perf_counter() - due) if task.cancelled() else task.result())

    while goes_on():
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(client.ask(draw(), due))
        tasks[task] = due
        task.add_done_callback(ended)
        due += random_times.expovariate(rate)
    if tasks:
        await asyncio.wait(list(tasks), timeout=DRAIN_S)
    for task in list(tasks):
        task.cancel()
    await asyncio.sleep(0)  # they are noted


def memory_mib(pid: int) -> float:
    """Of a process and its children, pages that they share counted once (Linux)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    own = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) / 1024
    return own + sum(memory_mib(int(child)) for child in children)
