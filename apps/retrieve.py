"""Step 3 for retrieval: trains a two-tower model (EDB), without or with LUM knowledge.

torchx run apps/retrieve.py --config configs/ml-1m-retrieve.yaml
torchx run apps/retrieve.py -j 1x2 --config configs/ml-1m-retrieve.yaml retrieve.knowledge=direct run=edb-lum
"""

import torchx.specs as specs


def retrieve(*words: str, config: str = "configs/ml-1m-retrieve.yaml", j: str = "1x1") -> specs.AppDef:
    """Step 3 for retrieval: trains a two-tower model (EDB), without or with LUM knowledge.

    Knowledge is none, or direct: the LUM outputs enter the user tower, its item embeddings the item tower. Ends with
    HR@k and NDCG@k of the test part over the whole catalogue, exact and by a FAISS index.
    Example: torchx run apps/retrieve.py --config configs/ml-1m-retrieve.yaml retrieve.knowledge=direct

    Args:
        words: settings over the config, key=value each, after all options; an unknown key names the nearest valid one
        config: YAML file with the settings
        j: nodes x processes per node
    """
    from lumrec.launch.torchx import stage_app

    return stage_app("retrieve", words, config=config, j=j)


def main() -> None:
    from lumrec.launch.main import run_stage

    run_stage("retrieve", __doc__)


if __name__ == "__main__":
    main()
