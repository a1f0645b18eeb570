"""Step 3 for retrieval: trains a two-tower model (EDB), without or with LUM knowledge.

torchx run apps/retrieve.py --config ml-1m-retrieve retrieve.knowledge=direct run=edb-lum
torchx run apps/retrieve.py -j 1x2 --config ml-1m-retrieve
"""

import torchx.specs as specs

from lumrec.launch.cluster import on_cluster


@on_cluster
def retrieve(*words: str, config: str = "ml-1m-retrieve", j: str = "1x1") -> specs.AppDef:
    """Step 3 for retrieval: trains a two-tower model (EDB), without or with LUM knowledge.

    retrieve.knowledge is none or direct: the LUM's answers enter the user tower, its item embeddings the item tower.
    Ends with HR@k and NDCG@k of the test part over the whole catalogue, by exact search and by FAISS.
    Example: torchx run apps/retrieve.py --config ml-1m-retrieve retrieve.knowledge=direct run=edb-lum

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
        j: nodes x processes per node; 1:2x8 = on one to two nodes, whatever is there
    """
    from lumrec.launch.torchx import stage_app

    return stage_app("retrieve", words, config=config, j=j)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("retrieve")
