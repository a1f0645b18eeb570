"""Step 1: pre-trains a Large User Model (LUM) on the prepared log.

torchx run apps/pretrain.py --config configs/ml-1m.yaml model.dim=32 pretrain.train.epochs=4
torchx run apps/pretrain.py -j 1x2 --config configs/ml-1m.yaml
"""

import torchx.specs as specs


def pretrain(*words: str, config: str = "configs/ml-1m.yaml", j: str = "1x1") -> specs.AppDef:
    """Step 1: pre-trains a Large User Model (LUM) on the prepared log.

    Next-condition-item prediction: at each condition token the model tells the item that follows from others. Prepares
    the data first where that was not done. A killed run continues with the same command.
    Example: torchx run apps/pretrain.py --config configs/ml-1m.yaml model.dim=32 pretrain.train.epochs=4

    Args:
        words: settings over the config, key=value each, after all options; an unknown key names the nearest valid one
        config: YAML file with the settings
        j: nodes x processes per node
    """
    from lumrec.launch.torchx import stage_app

    return stage_app("pretrain", words, config=config, j=j)


def main() -> None:
    from lumrec.launch.main import run_stage

    run_stage("pretrain", __doc__)


if __name__ == "__main__":
    main()
