"""Runs the benchmarks of this folder one after the other, each in its own process.

    python -m benchmarks [name …]        (make bench, make bench ARGS="pretrain shares")

    prepare    the log: simulator and prepare stage          query     step 2: group query
    packing    packs: padding saved, balance of ranks        rank      step 3: rankers
    pretrain   step 1: a training step of the LUM            losses    InfoNCE
    shares     what the parts of that step take              tables    embedding tables and their optimizer
    scaling    an event's cost as users, items, length and width grow
    warm_start memory of a warm start on two ranks           requests  serving: features of a request
    serve      the server under load: latency by rate, model and length of the history
    memory     a ranker's process: its memory and start as the log grows
    fresh      serving: from an event to the LUM's new answer

Each prints hardware, versions and settings, and its plain baseline beside it; `python benchmarks/<name>.py --help` has
the options of one.
"""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if not file.stem.startswith("_"))


def main(names: list[str]) -> int:
    """Exit code 1 where a benchmark fails, 2 where a name is none."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    failed = False
    for name in names or NAMES:
        print(f"== {name}", flush=True)
        failed |= subprocess.run([sys.executable, "-W", "ignore", str(FOLDER / f"{name}.py")]).returncode != 0
        print(flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
