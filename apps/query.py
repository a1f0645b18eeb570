"""Step 2: asks the LUM what each user would take under each condition, and stores the answers as knowledge.

torchx run apps/query.py --config ml-1m inputs.lums=[ml-1m-pretrain]
torchx run apps/query.py -j 1x2 --config ml-1m
python -m lumrec.knowledge.forget RUNS_DIR KEY ...            removes users for good (right to be forgotten)
python -m lumrec.knowledge.parquet export RUN_FOLDER FOLDER   exports users and items; import makes a store of them
"""

import torchx.specs as specs

from lumrec.launch.cluster import on_cluster


@on_cluster
def query(*words: str, config: str = "ml-1m", j: str = "1x1") -> specs.AppDef:
    """Step 2: asks the LUM what each user would take under each condition, and stores the answers as knowledge.

    Group query: the history of a user is read once, and all conditions are asked together. It is done for every user
    (serving) and for every training row (with the history before that row). When it runs again on newer data, it asks
    only about users whose history has changed.
    Example: torchx run apps/query.py --config ml-1m inputs.lums=[ml-1m-pretrain]

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
        j: nodes x processes per node; 1:2x8 = on one to two nodes, whatever is there
    """
    from lumrec.launch.torchx import stage_app

    return stage_app("query", words, config=config, j=j)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("query")
