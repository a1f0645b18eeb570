"""Builds the state of all users that a server scores with: their last events and counters, by raw key.

torchx run apps/user_state.py --config ml-1m run=ml-1m-rank
torchx run apps/user_state.py --config ml-1m run=ml-1m-rank user_state.place=redis://localhost:6379/0#ml-1m
"""

import torchx.specs as specs


def user_state(*words: str, config: str = "ml-1m") -> specs.AppDef:
    """Builds the state of all users that a server scores with: their last events and counters, by raw key.

    run names the ranker's run; the state is published beside it, in <run>-user_state, whole or not at all, or in the
    Redis of user_state.place. A server appends new events to it. With overwrite=true it is built from the log
    again: afterwards append the events since last_event_at again; those that it already has do not count twice.
    Example: torchx run apps/user_state.py --config ml-1m run=ml-1m-rank

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
    """
    from lumrec.launch.torchx import single_app

    return single_app("user_state", words, config=config)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("user_state")
