"""Step 2: asks the LUM what each user would take under each condition, into the knowledge store.

torchx run apps/query.py --config configs/ml-1m.yaml inputs.lums=[ml-1m-pretrain]
torchx run apps/query.py -j 1x2 --config configs/ml-1m.yaml

Run again over newer data, it asks only about users with another history. Beside it:
python -m lumrec.knowledge.forget RUNS_DIR KEY ...                   removes users for good (right to be forgotten)
python -m lumrec.knowledge.parquet export RUN_FOLDER FOLDER   users and items as Parquet; import makes a store of it
"""

import torchx.specs as specs


def query(*words: str, config: str = "configs/ml-1m.yaml", j: str = "1x1") -> specs.AppDef:
    """Step 2: asks the LUM what each user would take under each condition, into the knowledge store.

    Group query: the history of a user is read once and all conditions are asked of it, for every user (serving) and for
    every training row (with the history before that row).
    Example: torchx run apps/query.py --config configs/ml-1m.yaml inputs.lums=[ml-1m-pretrain]

    Args:
        words: settings over the config, key=value each, after all options; an unknown key names the nearest valid one
        config: YAML file with the settings
        j: nodes x processes per node
    """
    from lumrec.launch.torchx import stage_app

    return stage_app("query", words, config=config, j=j)


def main() -> None:
    from lumrec.launch.main import run_stage

    run_stage("query", __doc__)


if __name__ == "__main__":
    main()
