"""Step 1: pre-trains a Large User Model (LUM) on the prepared log.

torchx run apps/pretrain.py --config ml-1m model.dim=32 pretrain.train.epochs=4
torchx run apps/pretrain.py -j 1x2 --config ml-1m
"""

import torchx.specs as specs

from lumrec.launch.cluster import on_cluster


@on_cluster
def pretrain(*words: str, config: str = "ml-1m", j: str = "1x1") -> specs.AppDef:
    """Step 1: pre-trains a Large User Model (LUM) on the prepared log.

    Next-condition-item prediction: at each condition token the model learns to distinguish the next item from others.
    Prepares the data first if that was not done. To continue a killed run, run the same command again.
    Example: torchx run apps/pretrain.py --config ml-1m model.dim=32 pretrain.train.epochs=4

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
        j: nodes x processes per node; 1:2x8 = on one to two nodes, whatever is there
    """
    from lumrec.launch.torchx import stage_app

    return stage_app("pretrain", words, config=config, j=j)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("pretrain")
