"""Processes and devices: the process group, ranks, and work that only rank 0 does."""

from __future__ import annotations

import atexit
import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lumrec.run.errors import UserError


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device: str | torch.device | None = None, *, threads: int = 0) -> torch.device:
    """Initialises the process group and the number of torch threads; returns the device of this process.

    Under torchrun the group comes from its environment variables; otherwise it is a group of one process, in memory. A
    second call only changes the threads. `device` is "cpu", "cuda" (the card `LOCAL_RANK`) or a device; None takes CUDA
    if torch has it. `threads` 0 keeps torch's number. Raises UserError where CUDA is requested but not available.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"device {str(device)!r} was asked for, but this torch ({torch.__version__}) sees no CUDA device"
            )
        if kind.index is None:
            kind = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(kind)
    if dist.is_initialized():
        return kind
    # gloo in addition to nccl: checkpoints and small Python objects go through the CPU.
    backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(_destroy)
    return kind


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


Value = TypeVar("Value")


def on_rank_zero(make: Callable[[], Value]) -> Value:
    """The result of `make` on rank 0, on every rank; its exceptions are raised on every rank too. Collective."""
    if world_size() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gathered(value: Value) -> list[Value]:
    """The `value` of each rank, in the order of the ranks, on every rank. Collective."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def check_shared(folder: Path) -> None:
    """Raises UserError, on every rank, where `folder` is not one folder that all nodes of the job share. Collective."""
    if world_size() == int(os.environ.get("LOCAL_WORLD_SIZE", world_size())):
        return

    def make_token() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=".shared-", dir=folder)
        os.close(handle)
        return path

    token = Path(on_rank_zero(make_token))
    try:
        is_there = token.name in os.listdir(folder)  # a network file system looks again for a list
    except OSError:
        is_there = False
    without = {host for host in gathered("" if is_there else socket.gethostname()) if host}
    if rank() == 0:
        token.unlink()
    if without:
        raise UserError(
            f"{folder.absolute()} is not shared by all nodes of this job: {', '.join(sorted(without))} cannot see what "
            "rank 0 writes there; give runs_dir=<a folder that every node mounts at the same path>"
        )


def barrier() -> None:
    """Waits until every rank has called it. Collective."""
    if world_size() > 1:
        dist.barrier()
