"""The server's processes: one, or several that share a port, and the memory of the tables that each of them maps.

Workers are spawned, not forked: no thread of torch or LMDB is copied half-way. The socket is open before the first one
is there, so that requests which come meanwhile wait. A worker that dies is replaced; if the parent dies, they end.
SIGTERM ends the server after the requests that are being answered, or after serve.drain_s.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import wait

import torch
import uvicorn
from fastapi import FastAPI
from prometheus_client import multiprocess
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.supervisors import Multiprocess

from lumrec.run.errors import UserError
from lumrec.run.logs import start_logging
from lumrec.run.printable import say
from lumrec.serving.metrics import FOLDER
from lumrec.serving.settings import ServeConfig

logger = logging.getLogger(__name__)
STARTS_WITHIN_S = 120  # a worker that does not answer its parent for so long is replaced
BACKLOG = 2048  # connections that wait until a worker takes them
KEEP_ALIVE_S = 75  # longer than the usual 60 s of load balancers, which close idle connections first
AGAIN_S = 5  # between two starts of a worker that cannot open what it serves


def run(make: Callable[[], FastAPI], settings: ServeConfig, *, threads: int) -> None:
    """Serves what `make` gives until SIGTERM or Ctrl-C; it is pickled where there are several workers.

    threads: of torch in each process; 0 = the cores, shared among the workers. Raises UserError where the address
    cannot be listened on.
    """
    listening = _listen(settings)
    address, port = listening.getsockname()[:2]
    address = f"[{address}]" if ":" in address else address
    say(f"listening on http://{address}:{port} (the API: /docs); Ctrl-C or SIGTERM ends the server")
    threads = threads or max(1, (os.cpu_count() or 1) // settings.workers)
    config = partial(
        uvicorn.Config,
        factory=True,
        http=_Http,
        ws="none",
        workers=settings.workers,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.drain_s,
        timeout_worker_healthcheck=STARTS_WITHIN_S,
        backlog=BACKLOG,
    )
    if settings.workers == 1:
        torch.set_num_threads(threads)
        _serve_here(uvicorn.Server(config(make)), listening)
        return
    with tempfile.TemporaryDirectory(prefix="lumrec-metrics-") as folder:
        os.environ[FOLDER] = folder
        _Workers(config(partial(_make_in_worker, make, threads)), [listening]).run()


def _serve_here(server: uvicorn.Server, listening: socket.socket) -> None:
    """Serves in this process. uvicorn raises SIGTERM once more when it has ended, which is no failure."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run([listening])
    finally:
        signal.signal(signal.SIGTERM, before)


def _listen(settings: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # TCP by name: asyncio turns Nagle's algorithm off (40 ms in each answer) only for sockets that have it.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        where = f"serve.host={settings.host} serve.port={settings.port}"
        raise UserError(f"{where}: {error.strerror or error}; choose an address of this machine that is free") from None
    listening.set_inheritable(True)
    return listening


def _make_in_worker(make: Callable[[], FastAPI], threads: int) -> FastAPI:
    """The application, in a process that ends with its parent."""
    start_logging()
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    return _made(make)


def _made(make: Callable[[], FastAPI]) -> FastAPI:
    """The application; where what it serves cannot be opened, this worker ends after a while with one sentence."""
    try:
        return make()
    except (UserError, OSError) as error:
        logger.error("a worker cannot start, the next one tries in %d s: %s", AGAIN_S, " ".join(str(error).split()))
        time.sleep(AGAIN_S)
        sys.exit(1)


class _Http(H11Protocol):
    """uvicorn's, but a connection is closed on which no head of a request is complete KEEP_ALIVE_S after it was opened,
    or after the last answer: uvicorn waits without end for the second half of a head, or of a body that was refused.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        self.conn.receive_data(data)
        self.handle_events()  # which ends the waiting where a head is complete


class _Workers(Multiprocess):
    """uvicorn's workers; the gauges of a dead one (its queue) are dropped."""

    def keep_subprocess_alive(self) -> None:
        before = list(self.processes)
        for process in before:
            # With the worker's end of the pipe open here too, a worker that dies before it answers would be waited for.
            process.child_conn.close()
        super().keep_subprocess_alive()
        for process in before:
            if process not in self.processes and process.pid is not None:
                logger.error("worker %d has ended (%s); another one starts", process.pid, _how(process.exitcode))
                multiprocess.mark_process_dead(process.pid)

    def terminate_all(self) -> None:
        for listening in self.sockets:  # who comes from now on is refused, and does not wait for an answer in vain
            listening.close()
        super().terminate_all()


def _how(exitcode: int | None) -> str:
    """How a process ended."""
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"
