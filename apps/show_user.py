"""What the LUM knows of one user: the last events and, for each condition, the items that fit best, by title.

torchx run apps/show_user.py --config configs/ml-1m.yaml --user 42
torchx run apps/show_user.py --config configs/ml-1m.yaml --user 42 show_user.top=5 'query.conditions=[{feedback: like}]'
"""

import torchx.specs as specs


def show_user(*words: str, config: str = "configs/ml-1m.yaml", user: str = "") -> specs.AppDef:
    """What the LUM knows of one user: the last events and, for each condition, the items that fit best, by title.

    Asks the LUM of inputs.lums (of cross-fitted ones, the one not trained on the user) what query.conditions says.
    Example: torchx run apps/show_user.py --config configs/ml-1m.yaml --user 42 show_user.top=5

    Args:
        words: settings over the config, key=value each, after all options; an unknown key names the nearest valid
        config: YAML file with the settings
        user: raw key of the user, the same as show_user.user=
    """
    from lumrec.launch.torchx import single_app

    return single_app("show_user", [*words, *([f"show_user.user={user}"] if user else [])], config=config)


def main() -> None:
    from lumrec.launch.main import run_stage

    run_stage("show_user", __doc__)


if __name__ == "__main__":
    main()
