"""The command `lumrec`, and the main of each app: arguments, environment check, logging, the stage, its errors."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lumrec
from lumrec.experiments.jobs import JobFailed, script_of
from lumrec.launch import torchrun
from lumrec.launch.commands import COMMANDS, SWITCHES, TOOLS, Description, describe
from lumrec.launch.environment import check_environment
from lumrec.run.errors import UserError, did_you_mean
from lumrec.run.failures import is_lost_peer, sentence, tell, terminal
from lumrec.run.interrupt import Interrupted
from lumrec.run.logs import rank, start_logging
from lumrec.run.printable import say
from lumrec.run.shipped import shipped_configs
from lumrec.stages.registry import STAGES

USAGE = """\
usage: lumrec COMMAND [--config NAME] [key=value ...]

The Large User Model (LUM) as a recommender stack on TorchRec.

commands:
{commands}
  configs     Lists the configs that --config finds by name.

lumrec COMMAND --help explains a command. A first try, in a minute:
  lumrec prepare --config simulator data.simulator.num_users=1000
"""
KEYS = """\
keys: {sections}. Later settings win: defaults, the YAML file, key=value.
An unknown key is an error that names the nearest valid one. What each key means is on the page "Configuration" of the
documentation, and in the docstring of its section: python -m pydoc lumrec.stages.rank.RankConfig
"""
EXIT_CODES = """\
exit codes: 0 finished, or finished before with the same settings; 1 a bug or a failed job; 2 an error in a setting, an
input or the installation, in one sentence (LUMREC_TRACEBACK=1 adds the trace); 128 + n stopped by signal n."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `lumrec`: `lumrec pretrain --config ml-1m model.dim=64` runs a stage or an experiment."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with terminal():
        if name in COMMANDS:
            run_command(name, rest, prog=f"lumrec {name}")
        elif name in ("-h", "--help"):
            summaries = {each: describe(each).summary for each in COMMANDS} | {each: TOOLS[each][1] for each in TOOLS}
            say(USAGE.format(commands="\n".join(f"  {each:<12}{text}" for each, text in summaries.items())))
        elif name in TOOLS:
            check_environment()
            importlib.import_module(TOOLS[name][0]).main(rest)
        elif name == "--version":
            say(f"lumrec {lumrec.__version__}")
        elif name == "configs":
            say("\n".join(f"{each:<34}{_first_sentence(path)}" for each, path in shipped_configs().items()))
        else:
            near = did_you_mean(name, [*COMMANDS, *TOOLS, "configs"])
            say(f"lumrec: there is no command {name!r}{near}; lumrec --help lists them", file=sys.stderr)
            sys.exit(2)


def _first_sentence(config: Path) -> str:
    """What a config is for: the first sentence of the comment at its top, as far as the terminal is wide."""
    comment = re.match(r"(?:# \S.*\n)*", config.read_text(encoding="utf-8"))
    text = " ".join(line.removeprefix("# ") for line in comment[0].splitlines()) if comment else ""
    sentence = re.split(r"(?<=\.) (?=[A-Z])", text)[0]
    return textwrap.shorten(sentence, max(40, shutil.get_terminal_size((120, 24)).columns - 34), placeholder=" …")


def run_command(name: str, arguments: Sequence[str] | None = None, *, prog: str = "") -> None:
    """Runs a command with its options and key=value overrides; without `prog` as the main of its app.

    Exits with 2 for an error of the user's or the machine's: one sentence and no trace (lumrec/run/failures.py), unless
    LUMREC_TRACEBACK=1.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    about = describe(name)
    given = _parser(name, about, prog or f"apps/{name}.py").parse_intermixed_args(words)
    with terminal():
        check_environment()
        start_logging()
        try:
            nodes, processes = torchrun.nodes_and_processes(getattr(given, "j", "1x1"))
            if nodes > 1:
                raise UserError(f"-j {given.j} is several machines: use torchx run apps/{name}.py, or torchrun on each")
            call = _to_run(name, given, about)
            if processes > 1 and "RANK" not in os.environ:
                torchrun_words = ["--standalone", "--nproc-per-node", str(processes), script_of(name), *words]
                sys.exit(torchrun.main(torchrun_words))
            result = call()
        except BaseException as error:  # torch's CheckpointException is no Exception
            _report(error)
        if rank() == 0 and COMMANDS[name].headline:
            say(f"{name} finished: {headline(COMMANDS[name].headline, result)}")


def _parser(name: str, about: Description, prog: str) -> argparse.ArgumentParser:
    command = COMMANDS[name]
    examples = about.with_lumrec if prog.startswith("lumrec") else about.examples
    sections = " and ".join(command.sections) or ("data" if name in STAGES else "all sections")
    keys = KEYS.format(sections=f"{sections}, and those at the top (run, runs_dir, seed, inputs, data, schema)")
    parser = argparse.ArgumentParser(
        prog=prog,
        description=f"{about.summary}\n\n{about.text}",
        epilog=f"examples:\n{textwrap.indent(examples, '  ')}\n\n{keys}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, says in about.arguments.items():
        if option == "config":
            says = "a name (see: lumrec configs) or a YAML file; without it the defaults of the code"
            parser.add_argument("--config", metavar="NAME", help=says)
        elif option == "j":
            parser.add_argument("-j", metavar="1xN", default="1x1", help="1 node x N processes, run by torchrun")
        elif f"--{option}" in SWITCHES:
            parser.add_argument(f"--{option}", action="store_true", default=argparse.SUPPRESS, help=says)
        elif option != "words":
            parser.add_argument(f"--{option}", metavar="VALUE", default=argparse.SUPPRESS, help=says)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as model.dim=64")
    return parser


def _to_run(name: str, given: argparse.Namespace, about: Description) -> Callable[[], dict[str, Any]]:
    """The call that runs the command in this process. The config has been read by then, so that a mistake in it is
    reported before any process is started."""
    command = COMMANDS[name]
    options = {option: getattr(given, option) for option in about.arguments if option in given}
    if "config" not in options:  # chooses its configs by its options
        return partial(command.module.run, given.overrides, **options)
    load = importlib.import_module("lumrec.experiments.config").load  # loads torch and Polars: not for --help
    overrides = [f"{key}={options[option]}" for option, key in command.options.items() if option in options]
    config = load(given.config, [*given.overrides, *overrides])
    return partial(importlib.import_module(command.check).run if options.get("check") else command.run, config)


def _report(error: BaseException) -> None:
    """Ends the program: says what went wrong, in one sentence unless it is a bug, and gives the exit code."""
    if isinstance(error, Interrupted):
        if rank() == 0:
            say(f"lumrec: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        sys.exit(130)
    if isinstance(error, JobFailed):  # the failed stage has given its own error
        say(f"lumrec: {error}", file=sys.stderr)
        sys.exit(1)
    if isinstance(error, (BrokenPipeError, SystemExit)):
        raise error
    said = sentence(error)
    if os.environ.get("LUMREC_TRACEBACK") == "1" or not (said or is_lost_peer(error)):
        traceback.print_exception(error)
    elif said:
        tell(said)
    else:
        time.sleep(5.0)  # the launcher ends this process, and reports which one ended first
        tell("another process of this job has ended")
    sys.exit(2 if said else 1)


def headline(shown: Sequence[str], result: dict[str, float | str]) -> str:
    """The figures of a result that say how a stage went; the others are in its result.json."""
    names = [name for name in result if name in shown or name.split("@")[0] in shown]
    figures = [result[name] for name in names]
    texts = [f"{value:.5g}" if isinstance(value, float) else str(value) for value in figures]
    return ", ".join(f"{name} {text}" for name, text in zip(names, texts))


if __name__ == "__main__":
    main()
