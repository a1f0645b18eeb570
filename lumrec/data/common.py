"""Settings that all stages share: the run, its seed and inputs, the log and the schema."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumrec.data.config import DataConfig
from lumrec.data.schema import SchemaConfig
from lumrec.data.splits import parse_fold
from lumrec.run import limits
from lumrec.run.errors import UserError

MOST_NESTED = 4  # a pipeline's stages lie in its folder, and a pipeline may lie in another


@dataclass(frozen=True)
class InputsConfig:
    """Run names of the stages whose output this stage reads.

    prepared: the prepared data; "" = "<name>-prepare".
    lums: one LUM, or one for each fold of users in order; [] = ["<name>-pretrain"].
    knowledge: the knowledge store; "" = "<name>-query".
    """

    prepared: str = ""
    lums: list[str] = field(default_factory=list)
    knowledge: str = ""


@dataclass(frozen=True)
class Common:
    """Settings that every stage reads in addition to its section.

    run: folder of this run under runs_dir; "" = "<name>-<stage>".
    name: name of the experiment; "" = the name of the YAML file.
    runs_dir: folder that holds all runs.
    seed: seed of every random draw that has no other seed.
    fold: "k/K" leaves the users of fold k out of pre-training (cross-fitting); "" = all users train.
    threads: CPU threads of each process; 0 = torch's choice.
    overwrite: replace a finished run in the same folder, or one that was made with another config.
    """

    run: str = ""
    name: str = ""
    runs_dir: str = "runs"
    seed: int = limits.seed()
    fold: str = ""
    threads: int = limits.count(0, most=4096)
    overwrite: bool = False
    inputs: InputsConfig = field(default_factory=InputsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    schema: SchemaConfig = field(default_factory=SchemaConfig)

    def check(self, at: str) -> None:
        """Raises UserError for names that no folder can have."""
        limits.check_run_name("run", self.run, parts=MOST_NESTED)
        limits.check_run_name("name", self.name)
        if not self.runs_dir:
            raise UserError("runs_dir: got '', expected the folder of the runs, such as runs")
        if not all(self.inputs.lums):
            raise UserError(f"inputs.lums: got {list(self.inputs.lums)}, expected the names of runs")
        parse_fold(self.fold)

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return Path(self.runs_dir)

    @property
    def prepared(self) -> Path:
        """The folder of the prepared data that this stage reads."""
        return self.runs / (self.inputs.prepared or f"{self.name}-prepare")

    @property
    def knowledge(self) -> Path:
        """The folder of the knowledge store that this stage reads."""
        return self.runs / (self.inputs.knowledge or f"{self.name}-query")

    @property
    def lums(self) -> list[str]:
        """Run names of the LUMs that this stage reads."""
        return list(self.inputs.lums) or [f"{self.name}-pretrain"]

    def run_name(self, stage: str) -> str:
        """`run`, or "<name>-<stage>" with "-kofK" behind it where a fold k/K is set."""
        return self.run or f"{self.name}-{stage}" + (f"-{self.fold.replace('/', 'of')}" if self.fold else "")

    def folder(self, stage: str) -> Path:
        """The folder that a run of `stage` writes."""
        return self.runs / self.run_name(stage)

    def find_run(self, name: str) -> Path:
        """The folder of a run, by its name under runs_dir; or, where there is none, the folder of that path."""
        return self.runs / name if (self.runs / name).exists() else Path(name)

    def settings(self, **sections: Any) -> Common:
        """The contents of a stage's config.yaml: these settings and the stage's sections, as one dataclass.

        Raises UserError for a value that cannot work (see lumrec/run/limits.py).
        """
        kinds = [(name, type(section), field(default_factory=type(section))) for name, section in sections.items()]
        both = dataclasses.make_dataclass("Settings", kinds, bases=(Common,), frozen=True)
        common = {each.name: getattr(self, each.name) for each in dataclasses.fields(Common)}
        settings = both(**common, **sections)
        limits.check(settings)
        return settings
