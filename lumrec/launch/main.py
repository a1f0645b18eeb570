"""The main of every app: environment check, arguments, logging, the stage, and errors reported in one sentence."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence

from lumrec.experiments.jobs import JobFailed
from lumrec.launch.environment import check_environment
from lumrec.run.failures import is_lost_peer, sentence, tell, terminal
from lumrec.run.interrupt import Interrupted
from lumrec.run.logs import rank, start_logging
from lumrec.run.printable import say
from lumrec.stages.registry import STAGES, Stage

# Experiments run stages: their `run` takes the root config.
EXPERIMENTS = {
    "pipeline": "lumrec.experiments.pipeline",
    "tune": "lumrec.experiments.tune",
    "reproduce": "lumrec.experiments.paper_tables",
}
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
    message, no trace; see lumrec/run/failures.py).

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
    known = STAGES.get(stage, Stage(stage))
    if known.check:
        parser.add_argument("--check", action="store_true", help="report what it would do, write nothing")
    for option, key in known.options.items():
        parser.add_argument(f"--{option}", metavar="KEY", help=f"the same as {key}=")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over the file, such as model.dim=64"
    )
    given = parser.parse_args(arguments)
    checking = getattr(given, "check", False)
    check_environment()
    start_logging()
    try:
        if stage in TABLES:
            chosen = {name: getattr(given, name) for name in TABLES[stage] if name in given}
            result = importlib.import_module(EXPERIMENTS[stage]).run(given.overrides, **chosen)
        else:
            options = [(key, getattr(given, option)) for option, key in known.options.items()]
            overrides = [*given.overrides, *(f"{key}={value}" for key, value in options if value)]
            config = importlib.import_module("lumrec.experiments.config").load(given.config, overrides)
            if checking:
                result = importlib.import_module(known.check).run(config)
            elif stage in STAGES:
                result = known.run(config)
            else:
                result = importlib.import_module(EXPERIMENTS[stage]).run(config)
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
    if rank() == 0 and known.headline:
        say(f"{stage} finished: {headline(known.headline, result)}")


def headline(shown: Sequence[str], result: dict[str, float | str]) -> str:
    """The figures of a result that say how a stage went; the others are in its result.json."""
    names = [name for name in result if name in shown or name.split("@")[0] in shown]
    figures = [result[name] for name in names]
    texts = [f"{value:.5g}" if isinstance(value, float) else str(value) for value in figures]
    return ", ".join(f"{name} {text}" for name, text in zip(names, texts))
