"""Searches the settings of rankers with the same number of trials without and with LUM knowledge.

torchx run apps/tune.py --config configs/ml-1m.yaml 'pipeline.rankers=[din]' tune.trials=8
"""

import torchx.specs as specs


def tune(*words: str, config: str = "configs/ml-1m.yaml") -> specs.AppDef:
    """Searches the settings of rankers with the same number of trials without and with LUM knowledge.

    Each trial is a whole training of one seed; the validation part chooses, and the test part is not touched. Ends with
    a table of the trials and the winners as a config's pipeline.tuned section (tuned.yaml). Finished trials stay.
    Example: torchx run apps/tune.py --config configs/ml-1m.yaml 'pipeline.rankers=[din]' tune.trials=8

    Args:
        words: settings over the config, key=value each, after all options; an unknown key names the nearest valid one
        config: YAML file with the settings
    """
    from lumrec.launch.torchx import single_app

    return single_app("tune", words, config=config)


def main() -> None:
    from lumrec.launch.main import run_stage

    run_stage("tune", __doc__)


if __name__ == "__main__":
    main()
