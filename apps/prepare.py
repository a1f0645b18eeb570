"""Data: a raw log becomes the prepared folder that every later stage reads.

torchx run apps/prepare.py --config configs/ml-1m.yaml data.split.kind=leave_one_out
torchx run apps/prepare.py --check data.log.events=clicks.csv
"""

import torchx.specs as specs


def prepare(*words: str, config: str = "", check: bool = False, j: str = "1x1") -> specs.AppDef:
    """Data: a raw log becomes the prepared folder that every later stage reads.

    Checks and sorts the log (a published data set, Parquet or CSV of your own, or the simulator), splits it, builds
    vocabularies from the training part, and writes runs/<name>-prepare with a manifest of checksums. Rows that cannot
    be used go to quarantine.parquet. --check writes nothing: it tells what is in the log and suggests a config.
    Example: torchx run apps/prepare.py --config configs/ml-1m.yaml data.split.kind=leave_one_out
    Example: torchx run apps/prepare.py --check data.log.events=clicks.csv

    Args:
        words: settings over the config, key=value each, after all options; an unknown key names the nearest valid one
        config: YAML file with the settings; without it configs/ml-1m.yaml, or with --check the defaults of the code
        check: tell what is in the log and what preparing would do, write nothing
        j: nodes x processes per node
    """
    from lumrec.launch.torchx import stage_app

    config = config or ("" if check else "configs/ml-1m.yaml")
    return stage_app("prepare", words, config=config, j=j, switches=["--check"] if check else [])


def main() -> None:
    from lumrec.launch.main import run_stage

    run_stage("prepare", __doc__)


if __name__ == "__main__":
    main()
