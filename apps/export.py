"""Exports a trained ranker as a scorer bundle: graph, tables, keys, statistics, golden rows in one folder.

torchx run apps/export.py --config ml-1m run=ml-1m-rank
torchx run apps/export.py --config ml-1m run=ml-1m-rank export.dtype=int8
"""

import torchx.specs as specs


def export(*words: str, config: str = "ml-1m") -> specs.AppDef:
    """Exports a trained ranker as a scorer bundle: graph, tables, keys, statistics, golden rows in one folder.

    run names the ranker's run; the bundle is published beside it, in <run>-bundle, whole or not at all, and is opened
    with lumrec.Scorer.open. export.dtype=float16 or int8 makes the tables smaller, export.compile=aoti compiles the
    graph for this kind of machine. MODEL_CARD.md in the bundle says what the ranker was trained on and how good it is.
    Example: torchx run apps/export.py --config ml-1m run=ml-1m-rank

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
    """
    from lumrec.launch.torchx import single_app

    return single_app("export", words, config=config)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("export")
