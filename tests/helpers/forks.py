"""Runs of one or several processes, real ones that can be killed, without the seconds that each would take to import.

A server imports everything once and forks a child per rank, while it has one thread and no process group. As a program
(`python forks.py`) it is that server: a JSON request per line of stdin, a JSON answer per line of stdout.
"""

import importlib
import json
import logging
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Run:
    """The processes of one run; `pids` by rank, what they say in `logs`."""

    def __init__(self, server: "ForkServer", pids: list[int], logs: list[Path]) -> None:
        self._server, self.pids, self.logs = server, pids, logs

    def wait(self) -> list[int]:
        """Exit code of each rank, a negative one for the signal that ended it. To be called once."""
        return self._server.ask({"wait": self.pids})

    def kill(self, number: int = signal.SIGKILL, *, rank: int = 0) -> None:
        """Sends a signal to one rank, whether or not it has ended."""
        os.kill(self.pids[rank], number)

    def text(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())

    def wait_for_text(self, text: str, timeout_s: float = 300.0) -> None:
        """Returns once a rank has said `text`."""
        end = time.monotonic() + timeout_s
        while text not in self.text():
            assert time.monotonic() < end, f"nobody said {text!r}: {self.text()}"
            time.sleep(0.002)


class ForkServer:
    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.ask({"wait": []})  # answered once all is imported

    def start(self, function: str, *, world_size: int = 1, **arguments: Any) -> Run:
        """Runs `function` ("module:name") with `arguments` in `world_size` processes."""
        self._count += 1
        logs = [self._folder / f"{self._count}-{rank}.log" for rank in range(world_size)]
        request = {"function": function, "arguments": arguments, "logs": [str(log) for log in logs]}
        return Run(self, self.ask(request), logs)

    def run(self, function: str, *, world_size: int = 1, **arguments: Any) -> Run:
        """The same, waited for; every rank must end well."""
        run = self.start(function, world_size=world_size, **arguments)
        codes = run.wait()
        assert codes == [0] * world_size, f"{codes}: {run.text()}"
        return run

    def start_script(self, path: Path, *words: str, world_size: int = 1) -> Run:
        """Runs `python <path> <words>` in `world_size` processes, with what torchrun would tell them."""
        return self.start("forks:run_script", world_size=world_size, path=str(path), words=words)

    def run_script(self, path: Path, *words: str, world_size: int = 1) -> Run:
        """The same, waited for; every rank must end well."""
        return self.run("forks:run_script", world_size=world_size, path=str(path), words=words)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=300)


def run_script(path: str, words: list[str]) -> None:
    """What `python <path> <words>` does."""
    sys.argv = [path, *words]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def free_port() -> int:
    """A port that nobody listens on, below those that the system hands out, so that nobody gets it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as free:
            try:
                free.bind(("localhost", port))
            except OSError:
                continue
            return port


def serve() -> None:
    import tiny_training  # noqa: F401 (with it comes all that is slow to import)
    import torch.utils.tensorboard

    from lumrec.train.flops import gemm_peak

    gemm_peak(torch.device("cpu"), torch.float32, num_threads=1)  # each run would measure it

    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would lose all but one"
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in request["wait"]]
        else:
            port = free_port()
            answer = [_fork(request, rank, port) for rank in range(len(request["logs"]))]
        print(json.dumps(answer), flush=True)


def _fork(request: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(request["logs"][rank], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os.close(0)
        world_size = len(request["logs"])
        if world_size > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        # A shell starts what it puts into the background with SIGINT ignored, the tests too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logging.basicConfig(level=logging.INFO, force=True)
        module, name = request["function"].split(":")
        getattr(importlib.import_module(module), name)(**request["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        traceback.print_exc()
        code = getattr(error, "exit_code", 1)
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # whatever happens, a child never goes on as a second server


if __name__ == "__main__":
    serve()
