"""Reproduces the paper's tables of rankers on public data, and shows the paper's figures beside them.

torchx run apps/reproduce.py --table 4 --dataset ml-1m
torchx run apps/reproduce.py --table 5 --dataset ml-1m --rows utilization
torchx run apps/reproduce.py --table 5 --dataset simulator --rows warm-up
torchx run apps/reproduce.py --table retrieval --dataset ml-1m
"""

import torchx.specs as specs


def reproduce(
    *words: str, table: str = "4", dataset: str = "ml-1m", rows: str = "", out: str = "docs/results"
) -> specs.AppDef:
    """Reproduces the paper's tables of rankers on public data, and shows the paper's figures beside them.

    Writes a table (.md), its figures (.json) and a plot (.svg) into --out. Finished runs are not repeated.
    Example: torchx run apps/reproduce.py --table 4 --dataset ml-1m

    Args:
        words: settings that override configs/reproduce/<dataset>*.yaml, key=value each, after all options
        table: 4 (every ranker; the default), 5 (which part of the LUM helps), retrieval (two towers) or hazard
            (in-sample, cross-fitted, time split)
        dataset: ml-1m (the default), ml-1m-plain (rankers without statistics), kuairand, beauty or simulator
        rows: rows of table 5: scratch, utilization, tokenization, separated by commas (default: all three), or
            warm-up
        out: folder for the files (default docs/results)
    """
    from lumrec.launch.torchx import single_app

    options = {"table": table, "dataset": dataset, "rows": rows, "out": out}
    return single_app("reproduce", words, options=options)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("reproduce")
