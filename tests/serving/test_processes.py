"""The server's processes: SIGTERM drains, a killed worker is replaced, a killed parent leaves nobody behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from lumrec.run.errors import UserError
from lumrec.serving import processes
from lumrec.serving.processes import _Http, _listen, run
from lumrec.serving.settings import ServeConfig

HELPER = Path(__file__).parents[1] / "helpers" / "serve_small.py"


@contextmanager
def server(folder: Path, *, workers: int = 1) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process of a small server, and its address."""
    words = [sys.executable, str(HELPER), str(folder), str(workers)]
    # TMPDIR: a parent that is killed leaves the folder of its counters.
    environment = {**os.environ, "TMPDIR": str(folder)}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.search(r"http://\S+", line)
        assert url, line
        _until(lambda: httpx.get(f"{url[0]}/healthz", timeout=60).status_code == 200)
        yield process, url[0]
    finally:
        process.kill()
        process.wait()


def post(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/score", json={"user": "1", "items": ["3"]}, timeout=120)


def _drains(process: subprocess.Popen, url: str, folder: Path) -> None:
    """SIGTERM, while six requests wait for an answer: each gets it, and the server ends with 0."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    body = '{"user": "1", "items": ["3"]}'
    head = f"POST /v1/score HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    hold = folder / "hold"  # nothing is scored while it is there
    hold.touch()
    asking = [socket.create_connection((host, int(port))) for _ in range(6)]
    for each in asking:
        each.sendall(f"{head}\r\n\r\n{body}".encode())
    _until(lambda: "lumrec_queue_requests 6.0" in httpx.get(f"{url}/metrics", timeout=60).text)
    process.send_signal(signal.SIGTERM)
    _until(lambda: _is_refused(host, int(port)))  # and does not wait for an answer that nobody will give
    hold.unlink()
    for each in asking:
        each.settimeout(120)
        assert each.recv(65_536).startswith(b"HTTP/1.1 200 ")
        each.close()
    assert process.wait(120) == 0
    with pytest.raises(httpx.ConnectError):
        post(url)


def test_one_process_drains_and_its_address_is_taken_meanwhile(tmp_path: Path) -> None:
    with server(tmp_path) as (process, url):
        port = int(url.rpartition(":")[2])
        with pytest.raises(UserError, match=f"serve.port={port}: Address already in use; choose"):
            run(lambda: pytest.fail("is not made"), ServeConfig(port=port), threads=1)
        _drains(process, url, tmp_path)


def test_a_killed_worker_is_replaced_counters_are_of_all_and_all_drain(tmp_path: Path) -> None:
    with server(tmp_path, workers=2) as (process, url):
        _until(lambda: len(_children(process.pid)) == 2)
        for _ in range(5):
            assert post(url).status_code == 200
        _until(lambda: "lumrec_starts_total 2.0" in httpx.get(f"{url}/metrics", timeout=60).text)
        assert "lumrec_candidates_total 5.0" in httpx.get(f"{url}/metrics").text
        first = _children(process.pid)[0]
        os.kill(first, signal.SIGSTOP)
        time.sleep(1)  # the parent has asked it whether it is alive, and waits for the answer
        os.kill(first, signal.SIGKILL)
        _until(lambda: len(_children(process.pid)) == 2 and first not in _children(process.pid))
        assert [post(url).status_code for _ in range(5)] == [200] * 5
        _until(lambda: "lumrec_starts_total 3.0" in httpx.get(f"{url}/metrics", timeout=60).text)
        assert "lumrec_candidates_total 10.0" in httpx.get(f"{url}/metrics").text
        _drains(process, url, tmp_path)


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    with server(tmp_path, workers=2) as (process, _):
        _until(lambda: len(_children(process.pid)) == 2)
        workers = _children(process.pid)
        process.kill()
        process.wait()
        _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_answers_are_sent_at_once() -> None:
    """Nagle's algorithm would hold back the body of each answer until its head is acknowledged, 40 ms later."""

    async def main() -> int:
        sockets: asyncio.Queue[socket.socket] = asyncio.Queue()
        listening = _listen(ServeConfig(port=0))
        server = await asyncio.start_server(
            lambda _, writer: sockets.put(writer.get_extra_info("socket")), sock=listening
        )
        async with server:
            _, writer = await asyncio.open_connection(*listening.getsockname())
            accepted = await sockets.get()
            no_delay = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
        return no_delay

    assert asyncio.run(main()) == 1


def test_a_connection_without_a_whole_head_or_after_a_refused_body_is_closed() -> None:
    async def answer(_: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(answer, http=_Http, lifespan="off", log_config=None, timeout_keep_alive=1)
    served = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=served.run, args=([listening],))
        thread.start()
        begun = {
            "nothing": b"",
            "half a head": b"POST / HTTP/1.1\r\nHost: localhost\r\n",
            "half a body": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{",
        }
        for name, sent in begun.items():
            with socket.create_connection(listening.getsockname(), timeout=120) as client:
                client.sendall(sent)
                assert name != "half a body" or client.recv(1000).startswith(b"HTTP/1.1 413")
                ends = time.monotonic() + 120
                while not _is_closed(client):  # a byte now and then does not keep it open
                    assert time.monotonic() < ends, name
                    time.sleep(0.1)
        with socket.create_connection(listening.getsockname(), timeout=120) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)  # one after the other
            received = b""
            while received.count(b"HTTP/1.1 413") < 2:
                received += client.recv(1000)
        served.should_exit = True
        thread.join()


def _is_closed(client: socket.socket) -> bool:
    """Whether the other side has closed; sends a byte of a header or body."""
    try:
        client.sendall(b"x")
        client.setblocking(False)
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        client.setblocking(True)


def test_a_worker_that_cannot_open_its_bundle_ends_with_one_sentence(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(processes, "AGAIN_S", 0)

    def make() -> Any:
        raise UserError("the bundle in x is damaged:\nexport it again")

    with pytest.raises(SystemExit, match="1"):
        processes._made(make)
    [record] = caplog.records
    assert record.getMessage().endswith("the bundle in x is damaged: export it again") and record.exc_info is None


def _children(pid: int) -> list[int]:
    """Worker processes: children that are no resource tracker of Python's."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    return [int(each) for each in tasks if "spawn_main" in _command(int(each))]


def _is_refused(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=120).close()
    except ConnectionRefusedError:
        return True
    return False


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return ""


def _until(true: Callable[[], Any]) -> None:
    """Waits for something to come true, at most two minutes."""
    ends = time.monotonic() + 120
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.05)
