"""Exports a trained ranker, LUM or two towers as a bundle: graph, tables, keys, golden rows in one folder.

torchx run apps/export.py --config ml-1m run=ml-1m-rank
torchx run apps/export.py --config ml-1m run=ml-1m-rank export.dtype=int8
torchx run apps/export.py --config ml-1m run=ml-1m-pretrain
"""

import torchx.specs as specs


def export(*words: str, config: str = "ml-1m") -> specs.AppDef:
    """Exports a trained ranker, LUM or two towers as a bundle: graph, tables, keys, golden rows in one folder.

    run names the run of a ranker, a LUM or two towers; the bundle is published beside it, in <run>-bundle, whole or not
    at all. A ranker's is opened with lumrec.Scorer.open; the graphs of LUMs and towers run where only torch is.
    export.dtype=float16 or int8 makes the tables smaller, export.compile=aoti compiles a ranker's graph for this kind
    of machine. A ranker's MODEL_CARD.md says what it was trained on and how good it is.
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
