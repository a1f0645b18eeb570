"""What the LUM knows of one user: the last events and, for each condition, the items that fit best, by title.

torchx run apps/inspect.py --config configs/ml-1m.yaml --user 42
torchx run apps/inspect.py --config configs/ml-1m.yaml --user 42 inspect.top=5 'query.conditions=[{feedback: like}]'
"""

import sys

if __name__ == "inspect":
    # `python apps/query.py` puts this folder in front of the standard library, so whoever imports Python's own
    # `inspect` finds this file: give them the one that they mean.
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from os.path import abspath, dirname

    _spec = PathFinder.find_spec("inspect", [p for p in sys.path if abspath(p) != dirname(abspath(__file__))])
    sys.modules["inspect"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["inspect"])
else:
    import torchx.specs as specs

    def inspect(*words: str, config: str = "configs/ml-1m.yaml", user: str = "") -> specs.AppDef:
        """What the LUM knows of one user: the last events and, for each condition, the items that fit best, by title.

        Asks the LUM of inputs.lums (of cross-fitted ones, that which has not seen the user) what query.conditions says.
        Example: torchx run apps/inspect.py --config configs/ml-1m.yaml --user 42 inspect.top=5

        Args:
            words: settings over the config, key=value each, after all options; an unknown key names the nearest valid
            config: YAML file with the settings
            user: raw key of the user, the same as inspect.user=
        """
        from lumrec.torchx_run import single_app

        return single_app("inspect", [*words, *([f"inspect.user={user}"] if user else [])], config=config)

    def main() -> None:
        from lumrec.stages import run_stage

        run_stage("inspect", __doc__)

    if __name__ == "__main__":
        main()
