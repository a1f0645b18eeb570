"""The main of every app: environment check, arguments, logging, the stage, and errors told in a sentence."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence

from lumrec.environment import check_environment
from lumrec.failures import is_lost_peer, sentence, tell, terminal
from lumrec.jobs import JobFailed
from lumrec.printable import PrintableFormatter, say
from lumrec.train.interrupt import Interrupted

STAGES = {
    "prepare": "lumrec.data.prepare",
    "pretrain": "lumrec.train.pretrain",
    "query": "lumrec.query.stage",
    "inspect": "lumrec.query.inspect",
    "rank": "lumrec.train.rank",
    "retrieve": "lumrec.train.retrieve",
    "warm_start": "lumrec.warm_start.stage",
    "pipeline": "lumrec.pipeline",
    "tune": "lumrec.tune",
    "reproduce": "lumrec.reproduce",
}
# Figures that a stage does not print by itself.
HEADLINES = {
    "pretrain": ("loss", "hr", "ndcg", "events_per_s", "wall_s"),
    "query": ("conditions", "users", "users_absent", "rows", "bytes", "answers_per_s", "wall_s"),
    "rank": ("auc", "gauc", "log_loss", "ne", "calibration", "rows_per_s", "wall_s", "note", "undefined"),
    "retrieve": ("hr", "ndcg", "ann/recall", "ann/ms_per_user", "rows_per_s", "wall_s"),
}
# What `--check` runs in place of the stage: it tells what the stage would do, and writes nothing.
CHECKS = {"prepare": "lumrec.data.check"}
# An option of an app that stands for a key: --user 42 is inspect.user=42.
OPTIONS = {"inspect": {"user": "inspect.user"}}
# Apps that choose among several configs by options of their own, and take words over all of them.
TABLES = {
    "reproduce": {
        "table": "4 or 5 of the paper (default 4), retrieval (towers), or hazard (in-sample, cross-fitted, time split)",
        "dataset": "ml-1m (default), ml-1m-plain (rankers without statistics), kuairand, beauty or simulator",
        "rows": "of table 5: some of scratch, utilization, tokenization, with commas; or warm-up",
        "out": "folder of the files (default docs/results)",
    }
}


def run_stage(stage: str, description: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a stage with --config and key=value words. Exits with 2 for an error of the user's or the machine's (one
    message, no trace; see lumrec/failures.py).

    LUMREC_TRACEBACK=1 shows the trace of such an error too.
    """
    with terminal():
        _run_stage(stage, description, arguments)


def _run_stage(stage: str, description: str, arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog=f"apps/{stage}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if stage in TABLES:
        for option, says in TABLES[stage].items():
            parser.add_argument(f"--{option}", default=argparse.SUPPRESS, help=says)
    else:
        parser.add_argument("--config", metavar="YAML", help="settings; without it the defaults of the code")
    if stage in CHECKS:
        parser.add_argument("--check", action="store_true", help="tell what it would do, write nothing")
    for option, key in OPTIONS.get(stage, {}).items():
        parser.add_argument(f"--{option}", metavar="KEY", help=f"the same as {key}=")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings over the file, such as model.dim=64")
    given = parser.parse_args(arguments)
    checking = getattr(given, "check", False)
    check_environment()
    start_logging()
    try:
        from lumrec.config import load

        run = importlib.import_module((CHECKS if checking else STAGES)[stage]).run
        if stage in TABLES:
            result = run(given.words, **{name: getattr(given, name) for name in TABLES[stage] if name in given})
        else:
            options = [(key, getattr(given, option)) for option, key in OPTIONS.get(stage, {}).items()]
            words = [*given.words, *(f"{key}={value}" for key, value in options if value)]
            result = run(load(given.config, words))
    except Interrupted as stop:
        if rank() == 0:
            say(f"lumrec: {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except JobFailed as failure:  # the failed stage has told its own error
        say(f"lumrec: {failure}", file=sys.stderr)
        sys.exit(1)
    except (BrokenPipeError, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        said = sentence(error)
        if os.environ.get("LUMREC_TRACEBACK") == "1" or not (said or is_lost_peer(error)):
            traceback.print_exc()
        elif said:
            tell(said)
        else:
            time.sleep(5.0)  # the launcher ends this process, and says which one was the first to end
            tell("another process of this job has ended")
        sys.exit(2 if said else 1)
    if rank() == 0 and stage in HEADLINES:
        say(f"{stage} finished: {headline(stage, result)}")


def rank() -> int:
    """This process's rank as torchrun gave it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def start_logging() -> None:
    """Log lines with the time on rank 0; warnings alone on the other ranks."""
    logging.basicConfig(
        level=logging.INFO if rank() == 0 else logging.WARNING,
        force=True,  # libraries that are imported by now may have put a handler of their own
    )
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for name in ("torchrec", "torch", "fsspec", "matplotlib", "urllib3", "faiss"):
        logging.getLogger(name).setLevel(logging.WARNING)


def headline(stage: str, result: dict[str, float | str]) -> str:
    """The figures of a result that say how a stage went; the others stand in its result.json."""
    names = [name for name in result if name in HEADLINES[stage] or name.split("@")[0] in HEADLINES[stage]]
    figures = [result[name] for name in names]
    texts = [f"{value:.5g}" if isinstance(value, float) else str(value) for value in figures]
    return ", ".join(f"{name} {text}" for name, text in zip(names, texts))
