"""What a model would take from a production checkpoint, parameter by parameter; a dry run that changes nothing.

torchx run apps/warm_start.py --config configs/ml-1m.yaml rank.warm_start.source=prod/dcp rank.warm_start.rules=r.yaml
"""

import torchx.specs as specs


def warm_start(*words: str, config: str = "configs/ml-1m.yaml", j: str = "1x1") -> specs.AppDef:
    """What a model would take from a production checkpoint, parameter by parameter; a dry run that changes nothing.

    Reads rank.warm_start.source and rank.warm_start.rules (docs/how-to/warm-start.md); apps/rank.py with the same words
    then trains from there. For a LUM pretrain.warm_start.source and pretrain.warm_start.rules, and apps/pretrain.py.
    Example: torchx run apps/warm_start.py rank.warm_start.source=prod/dcp rank.warm_start.rules=rules.yaml

    Args:
        words: settings over the config, key=value each, after all options; an unknown key names the nearest valid one
        config: YAML file with the settings
        j: nodes x processes per node
    """
    from lumrec.launch.torchx import stage_app

    return stage_app("warm_start", words, config=config, j=j)


def main() -> None:
    from lumrec.launch.main import run_stage

    run_stage("warm_start", __doc__)


if __name__ == "__main__":
    main()
