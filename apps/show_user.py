"""Shows one user: the last events and, for each condition, the items that the LUM ranks first, by title.

torchx run apps/show_user.py --config ml-1m --user 42 show_user.top=5
torchx run apps/show_user.py --config ml-1m --user 42 'query.conditions=[{feedback: like}]'
"""

import torchx.specs as specs


def show_user(*words: str, config: str = "ml-1m", user: str = "") -> specs.AppDef:
    """Shows one user: the last events and, for each condition, the items that the LUM ranks first, by title.

    Asks the LUM of inputs.lums under the conditions of query.conditions. If the LUMs are cross-fitted, the
    one that was not trained on this user answers.
    Example: torchx run apps/show_user.py --config ml-1m --user 42 show_user.top=5

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
        user: raw key of the user, the same as show_user.user=
    """
    from lumrec.launch.torchx import single_app

    return single_app("show_user", [*words, *([f"show_user.user={user}"] if user else [])], config=config)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("show_user")
