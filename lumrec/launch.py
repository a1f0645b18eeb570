"""torchrun as the apps use it: threads shared among the processes, and a failed process told in its own words alone.

    python -m lumrec.launch --standalone --nproc-per-node 2 apps/pretrain.py --config configs/ml-1m.yaml

takes torchrun's arguments. It ends with the exit code of the first process that failed; that process has said why.
"""

from __future__ import annotations

import logging
import os
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
        codes = [failure.exitcode for failure in error.failures.values()]
        first = error.get_first_failure()[1].exitcode
        if first < 0:
            print(f"lumrec: a process was ended by signal {-first} (out of memory?)", file=sys.stderr)
        return first if first > 0 else next((code for code in codes if code > 0), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
