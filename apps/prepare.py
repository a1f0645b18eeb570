"""Prepares a log: from raw events to the folder that every later stage reads.

torchx run apps/prepare.py --config ml-1m data.split.kind=leave_one_out
torchx run apps/prepare.py --check data.log.events=clicks.csv
"""

import torchx.specs as specs

from lumrec.launch.cluster import on_cluster


@on_cluster
def prepare(*words: str, config: str = "", check: bool = False, j: str = "1x1") -> specs.AppDef:
    """Prepares a log: from raw events to the folder that every later stage reads.

    Checks and sorts the log (a published data set, your own Parquet or CSV, or the simulator), splits it, builds
    vocabularies from the training part, and writes runs/<name>-prepare with a manifest of checksums. Rows that cannot
    be used go to quarantine.parquet. --check writes nothing: it reports what is in the log and suggests a config.
    Example: torchx run apps/prepare.py --config ml-1m data.split.kind=leave_one_out

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file; default ml-1m; with --check only the
            built-in defaults
        check: report what is in the log and what preparing would do, and write nothing
        j: nodes x processes per node; 1:2x8 = on one to two nodes, whatever is there
    """
    from lumrec.launch.torchx import stage_app

    config = config or ("" if check else "ml-1m")
    return stage_app("prepare", words, config=config, j=j, switches=["--check"] if check else [])


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("prepare")
