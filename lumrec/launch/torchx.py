"""The apps in TorchX: `torchx run apps/pretrain.py` without ":pretrain", and the job that each app describes.

TorchX loads this module whenever its command line starts, so it imports nothing heavy.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torchx.specs as specs
from torchx.cli.cmd_run import CmdRun
from torchx.components.dist import ddp
from torchx.runner import Runner, config
from torchx.schedulers.local_scheduler import SignalException
from torchx.util.types import to_dict

from lumrec.experiments.jobs import SAME_WITHOUT, script_of
from lumrec.launch.commands import COMMANDS, SWITCHES
from lumrec.launch.torchrun import nodes_and_processes
from lumrec.run.errors import UserError, did_you_mean


class CmdRunFile(CmdRun):
    """`torchx run` for which apps/pretrain.py means apps/pretrain.py:pretrain.

    Where the working directory has no such file, it is the app that comes with lumrec.
    Without -s, and without a .torchxconfig that names another scheduler, jobs are processes on this machine.
    """

    def add_arguments(self, subparser: argparse.ArgumentParser) -> None:
        super().add_arguments(subparser)
        if config.get_config("cli", "run", "scheduler") is None:
            subparser.set_defaults(scheduler="local_cwd")

    def run(self, args: argparse.Namespace) -> None:
        words = args.component_name_and_args
        first = 1 if words[:1] == ["--"] else 0
        if len(words) > first and words[first].endswith(".py"):
            file = Path(words[first])
            if not file.is_file() and file.parent == Path("apps") and file.stem in COMMANDS:
                file = Path(script_of(file.stem))
            if not file.is_file():
                near = did_you_mean(file.stem, COMMANDS)
                print(f"torchx run: there is no file {file} (from {Path.cwd()}){near}", file=sys.stderr)
                sys.exit(2)
            words[first] = f"{file}:{file.stem}"
            words[first + 1 :] = with_values(words[first + 1 :])
        try:
            super().run(args)
        except UserError as error:
            print(f"torchx run: {error}", file=sys.stderr)
            sys.exit(2)
        except IsADirectoryError as error:
            print(
                f"torchx run: TorchX cannot copy {error.filename}, a link to a folder, to the job's folder: leave "
                "job_dir out (jobs start in this folder, which the nodes share), or install lumrec's wheel",
                file=sys.stderr,
            )
            sys.exit(2)
        except subprocess.CalledProcessError as error:
            print(
                f"torchx run: {shlex.join(map(str, error.cmd))} failed: {error.stderr or 'its message is above'}",
                file=sys.stderr,
            )
            sys.exit(1)
        except SignalException as stop:
            print("torchx run: stopped; the same command continues an unfinished run", file=sys.stderr)
            sys.exit(128 + int(stop.sigval))

    def _run(self, runner: Runner, args: argparse.Namespace) -> None:
        """As in TorchX, which ignores a setting of the scheduler that there is not."""
        known = [name for name, _ in runner.scheduler_run_opts(args.scheduler)]
        for name in to_dict(args.scheduler_args or ""):
            if name not in known:
                near = did_you_mean(name, known) or f"; it has: {', '.join(known)}"
                raise UserError(f"-cfg: {args.scheduler} has no setting {name!r}{near}")
        super()._run(runner, args)

    def _wait_and_exit(self, runner: Runner, app_handle: str, log: bool) -> None:
        """As in TorchX, but a failed job ends with one line: the job's own output above says what went wrong."""
        log_thread = self._start_log_thread(runner, app_handle) if log else None
        status = runner.wait(app_handle, wait_interval=0.2)
        if log_thread:
            log_thread.join()
        if status is None or status.state != specs.AppState.SUCCEEDED:
            print(f"torchx run: job {app_handle} {status.state if status else 'lost'}", file=sys.stderr)
            sys.exit(1)


def with_values(words: Sequence[str]) -> "list[str]":
    """The words with "--check" as "--check True": TorchX gives every option a value.

    >>> with_values(["--check", "--config", "my.yaml"])
    ['--check', 'True', '--config', 'my.yaml']
    """
    valued = []
    for word, following in zip(words, [*words[1:], ""]):
        valued.append(word)
        if word in SWITCHES and following.lower() not in ("true", "false"):
            valued.append("True")
    return valued


def stage_app(stage: str, words: Sequence[str], *, config: str, j: str, switches: Sequence[str] = ()) -> specs.AppDef:
    """The job that runs apps/<stage>.py under torchrun, `j` = nodes x processes per node; prints its plain command.

    words: key=value overrides. config: "" = no --config. switches: options without a value, such as --check.
    Raises UserError for a word that is not key=value and for another form of `j`.
    """
    arguments, script = _arguments(stage, words, config, switches)
    num_nodes, num_processes = nodes_and_processes(j)
    if num_nodes == 1:
        plain = ["torchrun", "--standalone", "--nproc-per-node", str(num_processes), script, *arguments]
        print(SAME_WITHOUT + shlex.join(plain), file=sys.stderr)
    # The lines of several processes begin with their rank.
    tee = 3 if num_nodes * num_processes > 1 else 0
    app = ddp(*literal(arguments), script=literal([script])[0], name=f"/{stage}", j=j, tee=tee)
    command = app.roles[0].args[1]
    assert command.startswith("torchrun ")
    # The launching interpreter comes first on PATH; where its folder does not exist (a container), the image's does.
    path = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$$PATH"
    app.roles[0].args[1] = f"{path} exec python -m lumrec.launch.torchrun {command.removeprefix('torchrun ')}"
    return app


def single_app(
    stage: str, words: Sequence[str], *, config: str = "", options: Mapping[str, str] | None = None
) -> specs.AppDef:
    """The job that runs apps/<stage>.py as one plain process; prints its command.

    options: of the app, by name without dashes; those with an empty value are left out.
    """
    given = [text for name, value in (options or {}).items() if value for text in (f"--{name}", value)]
    arguments, script = _arguments(stage, words, config, given)
    print(SAME_WITHOUT + shlex.join(["python", script, *arguments]), file=sys.stderr)
    role = specs.Role(name=stage, image="", entrypoint=sys.executable, args=literal([script, *arguments]))
    return specs.AppDef(name=stage, roles=[role])


def _arguments(stage: str, words: Sequence[str], config: str, switches: Sequence[str] = ()) -> "tuple[list[str], str]":
    """Arguments of the app, and its path."""
    for word in words:
        if "=" not in word:
            raise UserError(f"got {word!r}; expected key=value, with --config and -j before the first such word")
    arguments = [*switches, *(["--config", config] if config else []), *words]
    return arguments, script_of(stage)


def literal(arguments: Sequence[str]) -> "list[str]":
    """The arguments with each $ doubled: a TorchX role replaces $app_id and the like, and $$ by $.

    >>> literal(["show_user.user=$$"])
    ['show_user.user=$$$$']
    """
    return [argument.replace("$", "$$") for argument in arguments]
