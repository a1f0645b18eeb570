"""torchrun as the apps use it: the cores are shared among the processes, and a failure is reported once.

    python -m lumrec.launch.torchrun --standalone --nproc-per-node 2 apps/pretrain.py --config configs/ml-1m.yaml

takes torchrun's arguments. It ends with the exit code of the process that failed first, which has said why itself.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Sequence

from lumrec.run.errors import UserError


def nodes_and_processes(j: str) -> tuple[int, int]:
    """Most nodes, and processes per node, of "1x2" or "1:2x8" (one to two nodes). Raises UserError for other text."""
    match = re.fullmatch(r"(?:0*([1-9]\d*):)?0*([1-9]\d*)x0*([1-9]\d*)", j, re.ASCII) if len(j) <= 20 else None
    if match is None or int(match[1] or 1) > int(match[2]):
        raise UserError(f"-j is {j!r}; expected nodes x processes per node, such as 1x2, or 1:2x8 for one to two nodes")
    return int(match[2]), int(match[3])


def main(arguments: Sequence[str]) -> int:
    """Exit code of a script that torch.distributed.run has run."""
    # Of the socket's retries while nodes look for each other; read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed import DistNetworkError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    args = run.parse_args(list(arguments))
    if args.nproc_per_node.isdecimal():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(args.nproc_per_node))))
    # torchrun repeats a failure as a log line and a table, and logs how its nodes lose each other after one; these hide
    # the message of the process itself.
    for name in ("multiprocessing.api", "multiprocessing.tail_log", "agent.server.api", "rendezvous"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        run.run(args)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        # When one ends, the launcher ends the others with SIGTERM.
        killed = [rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
        failed = [code for code in codes.values() if code > 0]
        if killed or not failed:
            rank = killed[0] if killed else next(iter(codes))
            print(f"lumrec: {_ended(rank, -codes[rank])}", file=sys.stderr, flush=True)
            return 1
        first = error.get_first_failure()[1].exitcode
        return first if first > 0 else failed[0]
    except (DistNetworkError, RendezvousConnectionError):
        where = f" ({args.rdzv_endpoint})" if args.rdzv_endpoint else ""
        print(
            f"lumrec: the node where the others meet{where} cannot be reached or has ended; its output says why",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return 0


def _ended(rank: int, number: int) -> str:
    """One sentence: which signal ended a process, what usually sends it, and what to do."""
    name = signal.Signals(number).name if number in {each.value for each in signal.Signals} else "a signal"
    why = "either a fault in native code, of lumrec or a library, or sent by somebody"
    if number == signal.SIGKILL:
        why = (
            "usually by the system because memory ran out (lower the batch or pack size, or start fewer processes), "
            "else by somebody"
        )
    elif number == signal.SIGBUS:
        why = "usually because the shared memory (/dev/shm) or the disk of a mapped file is full"
    return f"rank {rank} was ended by {name} (signal {number}), {why}; the same command continues from what is saved"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
