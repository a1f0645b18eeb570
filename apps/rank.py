"""Step 3: trains a ranker (DIN, DIEN, SIM, TWIN or DLRM), without or with LUM knowledge.

torchx run apps/rank.py --config ml-1m rank.model=din rank.knowledge=both
torchx run apps/rank.py -j 1x2 --config ml-1m
"""

import torchx.specs as specs

from lumrec.launch.cluster import on_cluster


@on_cluster
def rank(*words: str, config: str = "ml-1m", j: str = "1x1") -> specs.AppDef:
    """Step 3: trains a ranker (DIN, DIEN, SIM, TWIN or DLRM), without or with LUM knowledge.

    rank.knowledge is none, direct (the LUM's answers as features), matching (similarities between answers and the
    target item) or both. Ends with AUC, gAUC, log loss, normalized entropy and calibration on the test part.
    Example: torchx run apps/rank.py --config ml-1m rank.model=din rank.knowledge=both

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
        j: nodes x processes per node; 1:2x8 = on one to two nodes, whatever is there
    """
    from lumrec.launch.torchx import stage_app

    return stage_app("rank", words, config=config, j=j)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("rank")
