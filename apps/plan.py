"""Plans the pre-training of a LUM on a cluster, without data or GPUs: memory, time, and what limits it.

torchx run apps/plan.py --config ml-1m --nodes 1 --gpus 8 --gpu h100
torchx run apps/plan.py --config paper-scale --nodes 32 model.num_layers=68
torchx run apps/plan.py --json --config ml-1m --gpu cpu pretrain.train.fsdp=true
"""

import torchx.specs as specs


def plan(
    *words: str, config: str = "ml-1m", nodes: str = "", gpus: str = "", gpu: str = "", json: bool = False
) -> specs.AppDef:
    """Plans the pre-training of a LUM on a cluster, without data or GPUs: memory, time, and what limits it.

    TorchRec's planner places the tables on the GPUs that are named; bytes, FLOPs and the time of a step follow from the
    model and the size of the log (plan.users, plan.events, plan.items, or the prepared data's). Writes
    runs/<name>-plan, whose plan.json pre-training takes as pretrain.train.sharding.
    Example: torchx run apps/plan.py --config ml-1m --nodes 1 --gpus 8 --gpu h100

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
        nodes: machines, the same as plan.nodes=
        gpus: GPUs of each machine, the same as plan.gpus=
        gpu: a100-40g, a100-80g, h100, h200, b200, l40s or cpu, the same as plan.gpu=
        json: print the result as JSON
    """
    from lumrec.launch.torchx import single_app

    given = {"nodes": nodes, "gpus": gpus, "gpu": gpu, "json": "true" if json else ""}
    return single_app(
        "plan", [*words, *(f"plan.{key}={value}" for key, value in given.items() if value)], config=config
    )


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("plan")
