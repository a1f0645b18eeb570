"""A server of two workers under load, while its workers, its Redis and its files are killed, taken away and replaced.

    python tests/soak.py [MINUTES, 60] [FOLDER for its runs and what it measured]

`lumrec serve` answers scores, rankings, events, retrievals and questions to a LUM, with its knowledge in a folder and
the states of its users in a redis-server. Requests come at random times, at 70 % of what the server answered without a
pause just before. In the middle third of the time come the faults of tests/helpers/soak_faults.py, one after the other;
in the others, nothing happens. At the end SIGTERM comes, under load. What is required:

    answers   every request gets 200, or, where more come than can be served, 408, 503 or 504. Without any answer are at
              most those that a killed worker held
    seen      each fault is in /metrics, and in the log in one sentence without a traceback; afterwards all is as before
    flat      in the last third, memory and open files do not grow
    drained   what was sent before SIGTERM is answered

minutes.jsonl, server.log and metrics.txt are in FOLDER afterwards. Exit code: 1 where something was found.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
sys.path.append(str(ROOT / "benchmarks"))  # last: it has a requests.py

import numpy as np  # noqa: E402
from _load import Client, Outcome, made_to_serve, message, offer, serving  # noqa: E402
from redis_servers import RedisServer  # noqa: E402
from soak_faults import FAULTS, SEEN_WITHIN_S  # noqa: E402

from lumrec.serving.bundle import open_bundle  # noqa: E402

SHARE, TRY_S, AT_ONCE = 0.7, 20.0, 4
HELD_S = 1.0  # around a kill: a request may go out on a connection whose end is not known yet
MOST_GROWTH = 0.02  # of the memory or the files of the first minutes of the last third


class Soak:
    """The server, what is sent to it, and what came of it. found: what is not as it should be, in sentences."""

    def __init__(self, folder: Path, redis: RedisServer) -> None:
        self.folder, self.redis, self.runs = folder, redis, folder / "runs"
        more = [f"user_state.place={redis.place('soak')}", "query.rows=true"]
        self.words = made_to_serve(self.runs, model="din", max_history=50, lum_dim=32, knowledge=True, more=more)
        self.bundle, self.store = self.runs / "bench-rank-bundle", self.runs / "bench-query"
        self.log = folder / "server.log"
        self.log.unlink(missing_ok=True)
        self.draw_from, self.items = random.Random(0), open_bundle(self.bundle).titles()[0]
        self.outcomes: list[Outcome] = []
        self.minutes: list[dict[str, Any]] = []
        self.kills: list[float] = []
        self.found: list[str] = []
        self.now, self.ended, self.stopped_at = "quiet", False, float("inf")

    def draw(self) -> bytes:
        """A request."""
        draw, user = self.draw_from, str(self.draw_from.randrange(250))  # of 200 known ones
        kind, items = draw.random(), draw.sample(self.items, 50)
        if kind < 0.1:
            event = {"user": user, "item": items[0], "label": draw.randrange(2), "event_id": uuid.uuid4().hex}
            return message("/v1/events", {"events": [event]})
        if kind < 0.15:
            return message("/v1/retrieve", {"user": user, "k": 5})
        if kind < 0.2:
            return message("/v1/ask", {"user": user, "conditions": [{"feedback": "like"}], "k": 5})
        return message("/v1/rank" if kind < 0.3 else "/v1/score", {"user": user, "items": items})

    async def saturation(self, port: int) -> float:
        """Answers per second when there is always another request, in the second of two tries."""
        client, number = Client(port), 0

        async def ask() -> None:
            nonlocal number
            while time.perf_counter() < end:
                answered = (await client.ask(self.draw(), time.perf_counter())).status == 200
                number += answered
                await asyncio.sleep(0 if answered else 0.2)  # who was refused comes again a little later

        for _ in range(2):
            number, end = 0, time.perf_counter() + TRY_S
            await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
        return number / TRY_S

    async def run(self, server: subprocess.Popen, port: int, minutes: float) -> None:
        """All of it."""
        self.server, self.port = server, port
        saturated = await self.saturation(port)
        print(f"saturated at {saturated:.1f} answers/s; offered: {SHARE * saturated:.1f} requests/s", flush=True)
        self.began = time.perf_counter()
        load_on = asyncio.create_task(
            offer(port, self.draw, SHARE * saturated, lambda: not self.ended, self.outcomes.append)
        )
        watching = asyncio.create_task(self._watch())
        await asyncio.sleep(20 * minutes)
        for number, (name, fault) in enumerate(FAULTS.items()):
            wait_s = self.began + 20 * minutes * (1 + number / len(FAULTS)) - time.perf_counter()
            await asyncio.sleep(max(5.0, wait_s))
            await self._suffer(name, fault)
        await asyncio.sleep(max(60.0, self.began + 60 * minutes - time.perf_counter()))
        watching.cancel()
        (self.folder / "metrics.txt").write_text(await self.metrics())
        self.now, self.stopped_at = "SIGTERM", time.perf_counter()
        server.send_signal(signal.SIGTERM)
        await asyncio.sleep(1)
        self.ended = True
        code = await asyncio.to_thread(server.wait, 60)
        await load_on
        self._check(code, minutes)

    async def _suffer(self, name: str, fault: Callable[[Soak], Awaitable[str]]) -> None:
        start, before = time.perf_counter(), self._size()
        self.now, self.log_from = name, self.log.stat().st_size
        try:
            says = await fault(self)
        except Exception as error:  # the next fault comes all the same
            says = f"NOT AS IT SHOULD BE: {type(error).__name__}: {error}"
            self.found.append(f"{name}: {error}")
        of = Counter(each.status for each in self.outcomes if start <= each.due)
        size = ", ".join(f"{key} {before[key]:g} → {value:g}" for key, value in self._size().items())
        print(f"{name}: {time.perf_counter() - start:.0f} s; {_said(of)}; {size}\n    {says}", flush=True)
        self.now = "quiet"

    async def metrics(self) -> str:
        """What /metrics says."""

        def get() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
                return answer.read().decode()

        for _ in range(5):
            with contextlib.suppress(OSError, http.client.HTTPException):  # the worker that was asked has been killed
                return await asyncio.to_thread(get)
        raise AssertionError("/metrics cannot be read")

    async def metric(self, name: str) -> float:
        """The value of one line; 0 where there is none."""
        lines = [line.rpartition(" ") for line in (await self.metrics()).splitlines()]
        return next((float(value) for key, _, value in lines if key == name), 0.0)

    async def seen(self, metric: str, wanted: Callable[[float], bool], sentence: str = "") -> str:
        """Waits until a metric is as wanted, and the log since the fault has the sentence, a regular expression."""
        end, value, said = time.monotonic() + SEEN_WITHIN_S, 0.0, None
        while time.monotonic() < end:
            value = await self.metric(metric)
            said = re.search(sentence, self.logged())
            if wanted(value) and said:
                line = next((line for line in self.logged().splitlines() if sentence and re.search(sentence, line)), "")
                return f"{metric} {value:g}; {line}"
            await asyncio.sleep(0.5)
        raise AssertionError(f"{metric} is {value:g}; {sentence!r} {'is' if said else 'is not'} in the log")

    def logged(self) -> str:
        """The log since the fault began."""
        with self.log.open("rb") as log:
            log.seek(self.log_from)
            return log.read().decode()

    def workers(self) -> list[int]:
        """The process ids of those that answer."""
        children = Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def _size(self) -> dict[str, float]:
        """Memory (MiB) and open files of the server's processes, all together; workers that have just died left out."""
        size = {"rss": 0.0, "pss": 0.0, "files": 0.0}
        for pid in (self.server.pid, *self.workers()):
            try:
                rollup = dict(re.findall(r"^(\w+): +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M))
                size["files"] += len(os.listdir(f"/proc/{pid}/fd"))
            except OSError:
                continue
            size["rss"] += round(int(rollup["Rss"]) / 1024, 1)
            size["pss"] += round(int(rollup["Pss"]) / 1024, 1)
        return size

    async def _watch(self) -> None:
        """Notes each minute, and removes what was logged of the requests."""
        seen = 0
        while True:
            await asyncio.sleep(60)
            new, seen = self.outcomes[seen:], len(self.outcomes)
            latency_ms = [1000 * each.seconds for each in new if each.status == 200] or [0.0]
            p50, p99 = np.quantile(latency_ms, [0.5, 0.99]).round(1).tolist()
            of = {str(status): number for status, number in sorted(Counter(each.status for each in new).items())}
            minute = {"minute": len(self.minutes) + 1, "now": self.now, **self._size(), "p50_ms": p50, "p99_ms": p99}
            self.minutes.append({**minute, "answers": of, "load": round(os.getloadavg()[0], 1)})
            with (self.folder / "minutes.jsonl").open("a") as file:
                print(json.dumps(self.minutes[-1]), file=file)
            for file in (self.runs / "served").glob("*.parquet"):
                file.unlink()

    def _check(self, code: int, minutes: float) -> None:
        """The verdict, apart from that of each fault."""
        sent = [each for each in self.outcomes if each.due < self.stopped_at]
        lost = [each for each in sent if each.status == 0]
        held = [
            each
            for each in lost
            if any(each.due - HELD_S <= at <= each.due + each.seconds + HELD_S for at in self.kills)
        ]
        of = Counter(each.status for each in sent)
        print(f"{len(sent)} requests: {_said(of)}; {len(held)} of those without an answer were held by a killed worker")
        if len(lost) > len(held):
            self.found.append(f"{len(lost) - len(held)} requests have no answer, and no killed worker held them")
        if wrong := set(of) - {0, 200, 408, 503, 504}:
            self.found.append(f"there are answers {sorted(wrong)}")
        late = Counter(each.status for each in self.outcomes if each.due >= self.stopped_at)
        print(f"SIGTERM: exit code {code}; of those that came afterwards: {_said(late)}")
        if code:
            self.found.append(f"the server ended with {code}")
        if (number := self.log.read_text().count("Traceback")) > 0:
            self.found.append(f"the log has {number} tracebacks")
        quiet = [each for each in self.minutes[int(2 * minutes / 3) :] if each["now"] == "quiet"]
        for key in ("pss", "files") if len(quiet) > 2 else ():
            size = [each[key] for each in quiet]
            slope = float(np.polyfit(range(len(size)), size, 1)[0])
            growth = slope * len(size) / size[0]
            print(f"{key} in the last third: {size[0]:g} → {size[-1]:g}, {slope:+.3f} a minute, {growth:+.2%} in all")
            if growth > MOST_GROWTH:
                self.found.append(
                    f"{key} grew by {growth:.1%} in {len(size)} minutes; expected {MOST_GROWTH:.0%} at most"
                )


def _said(of: Counter[int]) -> str:
    return ", ".join(f"{number} × {status or 'no answer'}" for status, number in sorted(of.items())) or "none"


def main() -> int:
    """Exit code."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp(prefix="lumrec-soak-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lumrec-redis-") as place:
        redis = RedisServer(Path(place), keeps=True)
        try:
            soak = Soak(folder, redis)
            words = [*soak.words, "serve.workers=2", f"serve.state={redis.place('soak')}", "serve.log=served"]
            with serving([*words, "serve.lums=[bench-pretrain]"], soak.log) as (server, port):
                asyncio.run(soak.run(server, port, minutes))
        finally:
            redis.kill()
    print(f"measured: {folder}", *(soak.found or ["nothing was found"]), sep="\n  ")
    return bool(soak.found)


if __name__ == "__main__":
    sys.exit(main())
