"""Keeps a knowledge store fresh: asks the LUM again about users with new events, while servers run.

torchx run apps/refresh.py --config ml-1m
torchx run apps/refresh.py --follow --config ml-1m refresh.state=redis://localhost:6379/0#ml-1m
"""

import torchx.specs as specs


def refresh(*words: str, config: str = "ml-1m", follow: bool = False) -> specs.AppDef:
    """Keeps a knowledge store fresh: asks the LUM again about users with new events, while servers run.

    Reads the user state to which a server appends events (lumrec user_state), asks the LUMs of inputs.lums, and puts
    the answers over those of the published store (inputs.knowledge), where readers look first. Only the new events of
    a user are computed. What was published does not change. Without --follow it ends when every user with new events
    has been answered.
    Example: torchx run apps/refresh.py --follow --config ml-1m

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
        follow: go on as new events come, until the process is stopped
    """
    from lumrec.launch.torchx import single_app

    return single_app("refresh", [*words, *(["refresh.follow=true"] if follow else [])], config=config)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("refresh")
