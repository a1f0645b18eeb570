"""Writes the reference of the command line from what the apps say of themselves."""

from __future__ import annotations

from lumrec.launch.commands import COMMANDS, describe

HEAD = """# Command line

`lumrec <command> …` runs a command on this machine, as one process or as several (`-j 1x2`). `torchx run
apps/<command>.py …` runs the same as a TorchX job, from a checkout or wherever lumrec is installed. Settings come last,
as `key=value` over the config of `--config`: a YAML file (`my.yaml`), or the name of a config that comes with lumrec
(`ml-1m`; `lumrec configs` lists them). All keys are in [Configuration](configuration.md).

| exit code | meaning |
|---|---|
| 0 | finished, or already finished with the same settings |
| 2 | an error in a setting or an input, in one sentence (`LUMREC_TRACEBACK=1` adds the trace) |
| other | a bug, with its traceback |
"""


def page() -> str:
    """The page, in Markdown."""
    return "\n".join([HEAD, *(_command(name) for name in COMMANDS)])


def _command(name: str) -> str:
    about = describe(name)
    heading = [f"## {name} {{ #{name} }}", "", about.summary, "", about.text]
    lines = [*heading, "", "```", about.with_lumrec, "```", ""]
    for argument, text in about.arguments.items():
        shown = {"words": "key=value …", "j": "-j"}.get(argument, f"--{argument}")
        lines += [f"`{shown}`", f":   {text}", ""]
    return "\n".join(lines)
