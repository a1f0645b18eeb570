"""All steps: prepare, pre-train, query, rank without and with knowledge, report.

torchx run apps/pipeline.py --config configs/quickstart.yaml run=quickstart
"""

import torchx.specs as specs


def pipeline(*words: str, config: str = "configs/quickstart.yaml") -> specs.AppDef:
    """All steps: prepare, pre-train, query, rank without and with knowledge, report.

    Each stage runs as a TorchX job of its own under runs/<run>/; finished stages are not run again. Ends with a table
    on the terminal and an HTML report.
    Example: torchx run apps/pipeline.py --config configs/quickstart.yaml run=quickstart

    Args:
        words: settings over the config, key=value each, after all options; an unknown key names the nearest valid one
        config: YAML file with the settings
    """
    from lumrec.launch.torchx import single_app

    return single_app("pipeline", words, config=config)


def main() -> None:
    from lumrec.launch.main import run_stage

    run_stage("pipeline", __doc__)


if __name__ == "__main__":
    main()
