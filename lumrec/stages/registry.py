"""All stages: the module of each, the sections of the config that it takes, and the figures that its app prints."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that --help loads neither Polars nor torch
    from lumrec.data.common import Common


@dataclass(frozen=True)
class Stage:
    """A stage is the module lumrec/stages/<name>.py, or the one at `path`, with `run(common, *sections)`.

    The module may have `check_inputs(common, **sections)`, `check_schema(common, schema, **sections)` and
    `check_data(common, data, **sections)`, which find what is wrong with the settings before the stage begins; `run`
    itself calls the first two before it opens or writes anything. checked_with: sections that these take; () = the same
    as `sections`. headline: figures of its result that the app prints at the end. check: module whose `run` answers
    `--check` and writes nothing. options: option of the app → config key.
    """

    name: str
    sections: tuple[str, ...] = ()
    checked_with: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()
    check: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    path: str = ""

    @property
    def module(self) -> ModuleType:
        """The module, imported at the first use."""
        return importlib.import_module(self.path or f"lumrec.stages.{self.name}")

    def settings(self, config: Common) -> Common:
        """The part of a root config that the stage's config.yaml holds."""
        return config.settings(**self._sections(config, self.sections))

    def run(self, config: Common) -> dict[str, Any]:
        """Runs the stage with its sections of a root config."""
        result: dict[str, Any] = self.module.run(config, *(getattr(config, name) for name in self.sections))
        return result

    def check_schema(self, config: Common, schema: Any) -> None:
        """Raises UserError where the stage's sections name something that the schema does not have."""
        if check := getattr(self.module, "check_schema", None):
            check(config, schema, **self._sections(config, self.checked_with or self.sections))

    def check_inputs(self, config: Common) -> None:
        """Raises UserError where a file or run that the stage's sections name is missing or invalid."""
        if check := getattr(self.module, "check_inputs", None):
            check(config, **self._sections(config, self.checked_with or self.sections))

    def check_data(self, config: Common, data: Any) -> None:
        """Raises UserError where the prepared data lack something that the stage's sections need."""
        if check := getattr(self.module, "check_data", None):
            check(config, data, **self._sections(config, self.checked_with or self.sections))

    @staticmethod
    def _sections(config: Common, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(config, name) for name in names}


STAGES = {
    stage.name: stage
    for stage in (
        Stage("prepare", check="lumrec.data.own_log.check"),
        Stage(
            "plan",
            ("model", "pretrain", "query", "plan"),
            options={"nodes": "plan.nodes", "gpus": "plan.gpus", "gpu": "plan.gpu", "json": "plan.json"},
        ),
        Stage("pretrain", ("model", "pretrain"), headline=("loss", "hr", "ndcg", "events_per_s", "wall_s")),
        Stage(
            "query",
            ("query",),
            checked_with=("model", "query"),
            headline=("conditions", "users", "users_absent", "rows", "bytes", "answers_per_s", "wall_s"),
        ),
        Stage(
            "refresh",
            ("refresh",),
            headline=("users", "p50_s", "p95_s", "most_s", "wall_s"),
            options={"follow": "refresh.follow"},
        ),
        Stage("show_user", ("show_user", "query"), options={"user": "show_user.user"}),
        Stage(
            "rank",
            ("rank",),
            headline=("auc", "gauc", "log_loss", "ne", "calibration", "rows_per_s", "wall_s", "note", "undefined"),
        ),
        Stage(
            "retrieve",
            ("retrieve",),
            headline=("hr", "ndcg", "ann/recall", "ann/ms_per_user", "rows_per_s", "wall_s"),
        ),
        Stage("user_state", ("user_state",), headline=("users", "keep", "last_event_at", "users_per_s", "wall_s")),
        Stage(
            "serve",
            ("serve",),
            options={"bundle": "serve.bundle", "store": "serve.store", "state": "serve.state"},
        ),
        Stage("warm_start", ("model", "pretrain", "rank")),
        Stage("export", ("export",), headline=("bundle", "bytes", "golden_difference", "sha256", "wall_s")),
        Stage(
            "score",
            ("score",),
            headline=("output", "rows", "users_unknown", "items_unknown", "without_knowledge", "rows_per_s", "wall_s"),
            options={"bundle": "score.bundle", "input": "score.input"},
        ),
    )
}
