"""Tunes the settings of rankers, with the same number of trials without and with LUM knowledge.

torchx run apps/tune.py --config ml-1m 'pipeline.rankers=[din]' tune.trials=8
"""

import torchx.specs as specs


def tune(*words: str, config: str = "ml-1m") -> specs.AppDef:
    """Tunes the settings of rankers, with the same number of trials without and with LUM knowledge.

    Each trial trains one seed. The best trial is chosen on the validation part; the test part is not used. Ends with a
    table of the trials and with tuned.yaml, which holds the best settings as a config's pipeline.tuned section.
    Finished trials are not run again.
    Example: torchx run apps/tune.py --config ml-1m 'pipeline.rankers=[din]' tune.trials=8

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
    """
    from lumrec.launch.torchx import single_app

    return single_app("tune", words, config=config)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("tune")
