"""Scores a Parquet table of users, items, times and context with a scorer bundle, in several processes.

torchx run apps/score.py --config ml-1m --input candidates.parquet score.store=ml-1m-query score.state=ml-1m-user_state
torchx run apps/score.py --config ml-1m --bundle runs/ml-1m-rank-bundle --input candidates.parquet score.time=shown_at
"""

import torchx.specs as specs


def score(*words: str, config: str = "ml-1m", bundle: str = "", input: str = "") -> specs.AppDef:
    """Scores a Parquet table of users, items, times and context with a scorer bundle, in several processes.

    The output, scores.parquet in the run's folder, has the rows in the order of the input. Columns of context are found
    by the names of the features. A killed run continues.
    Example: torchx run apps/score.py --config ml-1m --input candidates.parquet score.state=ml-1m-user_state

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
        bundle: folder of the bundle, the same as score.bundle=
        input: Parquet file, or a folder of them, the same as score.input=
    """
    from lumrec.launch.torchx import single_app

    options = {"score.bundle": bundle, "score.input": input}
    given = [f"{key}={value}" for key, value in options.items() if value]
    return single_app("score", [*words, *given], config=config)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("score")
