"""torchrun as the apps use it: threads shared among the processes, and a failed process told in its own words alone.

    python -m lumrec.launch.torchrun --standalone --nproc-per-node 2 apps/pretrain.py --config configs/ml-1m.yaml

takes torchrun's arguments. It ends with the exit code of the first process that failed; that process has said why.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Runs the script under torch.distributed.run; gives the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = run.parse_args(list(arguments))
    if args.nproc_per_node.isdecimal():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(args.nproc_per_node))))
    # torchrun repeats a failure as a log line and a table; both lead away from the message of the process itself.
    for name in ("multiprocessing.api", "agent.server.api"):
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
    return 0


def _ended(rank: int, number: int) -> str:
    """What became of a process that a signal has ended, and what may have sent it."""
    name = signal.Signals(number).name if number in {each.value for each in signal.Signals} else "a signal"
    why = "which is a fault in native code, of lumrec or of a library, or was sent by somebody"
    if number == signal.SIGKILL:
        why = (
            "by the system where memory ran out, as a rule (lower the batch or pack size, or start fewer processes), "
            "or by somebody"
        )
    elif number == signal.SIGBUS:
        why = "as a rule because the shared memory (/dev/shm) or the disk of a mapped file is full"
    return f"rank {rank} was ended by {name} (signal {number}), {why}; the same command goes on from what is saved"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
