"""A real redis-server for tests, on a socket of its own; they skip where this machine has none."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumrec.knowledge.store import KnowledgeStore


class RedisServer:
    """Started when made. place: URL for a name. `kill` is kill -9; `start` begins again: empty, unless it keeps each
    change in a file."""

    def __init__(self, folder: Path, *, keeps: bool = False) -> None:
        self.socket, self.keeps = folder / "redis.sock", keeps
        self.start()

    def start(self) -> None:
        """Returns once the server takes connections."""
        words = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir", str(self.socket.parent)]
        words += ["--appendonly", "yes" if self.keeps else "no"]
        self.process = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while not self._listens():
            assert self.process.poll() is None and time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.01)

    def _listens(self) -> bool:
        """The socket is there a moment before Redis listens."""
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.socket))
            except OSError:
                return False
        return True

    def kill(self) -> None:
        """As a crash: nothing is saved."""
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)

    def place(self, name: str) -> str:
        return f"unix://{self.socket}#{name}"


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """Skips where redis-server or its client is missing."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not on this machine (Debian: apt-get install redis-server)")
    pytest.importorskip("redis", reason="the client of Redis is not installed: pip install 'lumrec[redis]'")
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:  # pytest's paths may be too long for a socket
        server = RedisServer(Path(folder))
        with pytest.MonkeyPatch.context() as patch:  # a machine that stalls is no Redis that does not answer
            patch.setitem(KnowledgeStore.open.__func__.__kwdefaults__, "timeout_s", 120.0)
            yield server
        server.kill()
