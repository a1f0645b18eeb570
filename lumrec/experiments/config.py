"""The root config: the settings that all stages share, and one section for each stage and experiment.

Each section is a dataclass beside the code that it configures. Only the entry points and the experiments know the root
config: a stage takes the common settings and its own section.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lumrec.data.common import Common
from lumrec.experiments.settings import PipelineConfig, TuneConfig, WarmUpConfig
from lumrec.models.lum import ModelConfig
from lumrec.run import config_file
from lumrec.run.errors import UserError
from lumrec.serving.settings import ServeConfig
from lumrec.stages.export import ExportConfig
from lumrec.stages.plan import PlanConfig
from lumrec.stages.pretrain import PretrainConfig
from lumrec.stages.query import QueryConfig
from lumrec.stages.rank import RankConfig
from lumrec.stages.refresh import RefreshConfig
from lumrec.stages.retrieve import RetrieveConfig
from lumrec.stages.score import ScoreConfig
from lumrec.stages.show_user import ShowUserConfig
from lumrec.stages.user_state import UserStateConfig


@dataclass(frozen=True)
class Config(Common):
    """Settings of a run: the common ones (see Common), and a section for each stage and experiment."""

    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    query: QueryConfig = field(default_factory=QueryConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    show_user: ShowUserConfig = field(default_factory=ShowUserConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    retrieve: RetrieveConfig = field(default_factory=RetrieveConfig)
    user_state: UserStateConfig = field(default_factory=UserStateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    warm_up: WarmUpConfig = field(default_factory=WarmUpConfig)

    def check(self, at: str) -> None:
        """Raises UserError for invalid folder names, and for sections that contradict one another."""
        super().check(at)
        pack, window = self.pretrain.packing.events_per_pack, self.model.max_events
        if pack < window:
            raise UserError(
                f"pretrain.packing.events_per_pack is {pack}, less than model.max_events {window}, so a pack cannot "
                "hold a full window; raise the first or lower the second"
            )


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file or of a name such as "ml-1m" (None: the defaults), with `key=value` overrides.

    Raises like `config_file.load`.
    """
    config = config_file.load(Config, path, overrides)
    if config.name:
        return config
    return dataclasses.replace(config, name=Path(path).stem if path is not None else "lumrec")


load = load_config  # the name by which lumrec itself imports it
