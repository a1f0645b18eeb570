"""Step 3: trains a ranker (DIN or DLRM), without or with LUM knowledge.

torchx run apps/rank.py --config configs/ml-1m.yaml rank.model=din rank.knowledge=both
torchx run apps/rank.py -j 1x2 --config configs/ml-1m.yaml
"""

import torchx.specs as specs


def rank(*words: str, config: str = "configs/ml-1m.yaml", j: str = "1x1") -> specs.AppDef:
    """Step 3: trains a ranker (DIN or DLRM), without or with LUM knowledge.

    Knowledge is none, direct (the LUM outputs as features), matching (similarities between outputs and the target item)
    or both. Ends with AUC, gAUC, log loss, normalized entropy and calibration on the test part.
    Example: torchx run apps/rank.py --config configs/ml-1m.yaml rank.model=din rank.knowledge=both

    Args:
        words: settings over the config, key=value each, after all options; an unknown key names the nearest valid one
        config: YAML file with the settings
        j: nodes x processes per node
    """
    from lumrec.launch.torchx import stage_app

    return stage_app("rank", words, config=config, j=j)


def main() -> None:
    from lumrec.launch.main import run_stage

    run_stage("rank", __doc__)


if __name__ == "__main__":
    main()
