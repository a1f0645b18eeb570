"""Settings of the log: where it comes from, its label, and how it is split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lumrec.data.drawn_rows import NegativeRowsConfig
from lumrec.data.own_log.config import LogConfig
from lumrec.data.served_config import ServedConfig
from lumrec.data.simulator.config import SimulatorConfig
from lumrec.data.sources.raw_log import LabelConfig
from lumrec.data.splits import SplitConfig
from lumrec.run.limits import count

# The module that reads each is in lumrec/data/sources/registry.py.
Source = Literal[
    "movielens-1m",
    "movielens-100k",
    "movielens-20m",
    "movielens-25m",
    "movielens-32m",
    "movielens-latest",
    "movielens-latest-small",
    "amazon-2014",
    "amazon-2018",
    "amazon-2023",
    "amazon-5core-sequences",
    "kuairand-pure",
    "kuairand-1k",
    "kuairand-27k",
    "log",
    "simulator",
    "served",
]


@dataclass(frozen=True)
class DataConfig:
    """Which log is read, and how it is split.

    source: which log; "log" is your own, "served" what a server has scored. See lumrec/data/sources/registry.py.
    path: folder of the published files; "" = look in LUMREC_DATA, then in the cache, then download.
    category: category of the Amazon reviews, such as Books or Beauty.
    allow_other_files: accept files whose checksum or counts are not the published ones.
    min_count: a value that occurs less often in the training split is treated as unknown (row 0 of its table).
    vocabulary_from: run name or folder of an earlier prepared log. Its values keep their rows, min_count applies to new
        values only, and a LUM of that log can continue training on this one (pretrain.start_from).
    max_list_length: rows with a longer list go into the quarantine.
    duplicates: of rows that are equal in every column that is read, "drop" quarantines all but the first, "keep" keeps
        them all.
    request: for source "log": a column of the events with one value for each request (or page) of a user. Rows of one
        request were shown together, whenever each was recorded: none sees another, and all have the time of the first.
        A row without a value was shown by itself. "" = rows of one user with the same time were shown together.
    negatives: rows drawn for rankers beside a log that has only positives (docs/how-to/own-data.md); null = none.
    """

    source: Source = "movielens-1m"
    path: str = ""
    category: str = ""
    label: LabelConfig = field(default_factory=LabelConfig)
    allow_other_files: bool = False
    split: SplitConfig = field(default_factory=SplitConfig)
    min_count: int = count(1, least=1)
    vocabulary_from: str = ""
    max_list_length: int = count(1000, least=1)
    duplicates: Literal["drop", "keep"] = "drop"
    request: str = ""
    negatives: NegativeRowsConfig | None = None
    log: LogConfig = field(default_factory=LogConfig)
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)
    served: ServedConfig = field(default_factory=ServedConfig)
