"""What a job asks of a cluster: options that every component of several processes has, beside its own.

    torchx run -s slurm apps/pretrain.py -j 2x8 --gpu 8 --memory 200000 --max_restarts 3 --config ml-1m

TorchX loads this module with each app, so it imports nothing heavy.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torchx.specs as specs

OPTIONS: "dict[str, tuple[str | int, str]]" = {
    "gpu": (0, "GPUs of each node"),
    "cpu": (0, "cores of each node; 0 = what the scheduler gives"),
    "memory": (0, "MB of memory of each node; 0 = what the scheduler gives"),
    "h": ("", "a named resource of TorchX, such as aws_p4d.24xlarge, in place of gpu, cpu and memory"),
    "image": ("", "container image that has lumrec, or with Slurm the folder to start in; default: this folder"),
    "mounts": ("", "what to mount into the container, as TorchX writes it: type=bind,src=/data,dst=/data,readonly,..."),
    "env": ("", "environment variables of the processes: NAME=value,NAME=value"),
    "max_restarts": (0, "how often the processes are started again after one has failed; they continue the run"),
}


def on_cluster(component: Callable[..., specs.AppDef]) -> Callable[..., specs.AppDef]:
    """The component with OPTIONS as further keyword arguments, which `torchx run apps/<name>.py --help` lists.

    TorchX reads arguments from a function's signature and docstring, so both are extended.
    """

    @functools.wraps(component)
    def with_options(*words: str, **arguments: Any) -> specs.AppDef:
        asked: dict[str, Any] = {name: arguments.pop(name, default) for name, (default, _) in OPTIONS.items()}
        app = component(*words, **arguments)
        _apply(app.roles[0], **asked)
        return app

    own = inspect.signature(component)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type(default))
        for name, (default, _) in OPTIONS.items()
    ]
    with_options.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]
    lines = [f"    {name}: {text}" for name, (_, text) in OPTIONS.items()]
    with_options.__doc__ = "\n".join([inspect.getdoc(component) or "", *lines])
    return with_options


def _apply(
    role: specs.Role,
    *,
    gpu: int,
    cpu: int,
    memory: int,
    h: str,
    image: str,
    mounts: str,
    env: str,
    max_restarts: int,
) -> None:
    from lumrec.run.errors import UserError

    for name, number in {"gpu": gpu, "cpu": cpu, "memory": memory, "max_restarts": max_restarts}.items():
        if number < 0:
            raise UserError(f"--{name} is {number}; expected 0 or more")
    try:
        # TorchX takes -1 for "not asked for".
        role.resource = specs.resource(cpu=cpu or -1, gpu=gpu, memMB=memory or -1, h=h or None)
    except KeyError as error:
        raise UserError(f"--h is {h!r}, which TorchX does not know: {error.args[0]}") from None
    try:
        role.mounts = specs.parse_mounts(mounts.split(",")) if mounts else []
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"--mounts is {mounts!r} ({error}); expected type=bind,src=/data,dst=/data,readonly") from None
    role.image = image or role.image
    for pair in filter(None, env.split(",")):
        name, equals, value = pair.partition("=")
        if not (equals and name.isidentifier()):
            raise UserError(f"--env has {pair!r}; expected NAME=value,NAME=value")
        role.env[name] = value
    if max_restarts:
        launcher = " -m lumrec.launch.torchrun "
        role.args[1] = role.args[1].replace(launcher, f"{launcher}--max_restarts {max_restarts} ", 1)
