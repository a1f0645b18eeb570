"""Dry run: lists what a model would take from a production checkpoint, parameter by parameter.

torchx run apps/warm_start.py --config ml-1m rank.warm_start.source=prod/dcp rank.warm_start.rules=r.yaml
"""

import torchx.specs as specs

from lumrec.launch.cluster import on_cluster


@on_cluster
def warm_start(*words: str, config: str = "ml-1m", j: str = "1x1") -> specs.AppDef:
    """Dry run: lists what a model would take from a production checkpoint, parameter by parameter.

    Changes nothing. Reads rank.warm_start.source and rank.warm_start.rules (docs/how-to/warm-start.md); apps/rank.py
    with the same settings then trains from there. For a LUM, give pretrain.warm_start.source and
    pretrain.warm_start.rules, and train with apps/pretrain.py.
    Example: torchx run apps/warm_start.py --config ml-1m rank.warm_start.source=prod/dcp rank.warm_start.rules=r.yaml

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
        j: nodes x processes per node; 1:2x8 = on one to two nodes, whatever is there
    """
    from lumrec.launch.torchx import stage_app

    return stage_app("warm_start", words, config=config, j=j)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("warm_start")
