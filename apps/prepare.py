"""Data: a raw log becomes the prepared folder that every later stage reads.

torchx run apps/prepare.py --config configs/ml-1m.yaml data.split.kind=leave_one_out
"""

import torchx.specs as specs


def prepare(*words: str, config: str = "configs/ml-1m.yaml", j: str = "1x1") -> specs.AppDef:
    """Data: a raw log becomes the prepared folder that every later stage reads.

    Checks and sorts the log (MovieLens-1M or the simulator), splits it, builds vocabularies from the training part, and
    writes runs/<name>-prepare with a manifest of checksums. Rows that cannot be used go to quarantine.parquet.
    Example: torchx run apps/prepare.py --config configs/ml-1m.yaml data.split.kind=leave_one_out

    Args:
        words: settings over the config, key=value each, after all options; an unknown key names the nearest valid one
        config: YAML file with the settings
        j: nodes x processes per node
    """
    from lumrec.torchx_run import stage_app

    return stage_app("prepare", words, config=config, j=j)


def main() -> None:
    from lumrec.stages import run_stage

    run_stage("prepare", __doc__)


if __name__ == "__main__":
    main()
