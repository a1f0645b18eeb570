"""Runs all steps: prepare, pretrain, query, rank without and with knowledge, report.

torchx run apps/pipeline.py --config quickstart run=first
"""

import torchx.specs as specs


def pipeline(*words: str, config: str = "quickstart") -> specs.AppDef:
    """Runs all steps: prepare, pretrain, query, rank without and with knowledge, report.

    Each stage is a TorchX job, in a folder under runs/<run>/; finished stages are not run again. Ends with a table on
    the terminal and an HTML report.
    Example: torchx run apps/pipeline.py --config quickstart run=first

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
    """
    from lumrec.launch.torchx import single_app

    return single_app("pipeline", words, config=config)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("pipeline")
