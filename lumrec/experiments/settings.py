"""Settings of the experiments: pipeline, tuning and warm-up rows."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from lumrec.data.splits import MOST_FOLDS
from lumrec.experiments.jobs import LOCAL
from lumrec.models.ranker_config import RANKERS, RankerName
from lumrec.run import limits
from lumrec.run.errors import UserError, did_you_mean
from lumrec.run.limits import count, setting

# none: the plain ranker with fresh tables. tables: it starts with the LUM's tables and reads nothing else from the LUM.
Knowledge = Literal["none", "tables", "direct", "matching", "both"]
KNOWLEDGE = get_args(Knowledge)
APPS = ("all", "prepare", "pretrain", "query", "rank", "retrieve", "warm_start")
DECIDED = ("rank.model=", "rank.knowledge=", "rank.tables=")


@dataclass(frozen=True)
class PipelineConfig:
    """What the pipeline runs and compares.

    dataset: "" = as in `data`; auto = MovieLens-1M if it is found or can be downloaded, otherwise the simulator.
    folds: number of folds of users for cross-fitting: each user's answers come from a LUM that was not trained on that
        user; 1 = one LUM of all users (in-sample).
    rankers: rankers to train; every combination of rankers, knowledge and seeds is trained.
    knowledge: none (the base; always with fresh tables), tables (the base with the LUM's tables, the control if
        rank.tables is lum), direct, matching, both.
    seeds: seeds of the rankers.
    tuned: settings for a ranker ("din"), or for a ranker with a kind of knowledge ("din/both", which take precedence),
        each a list of key=value; apps/tune.py finds them.
    jobs: stages that run at the same time; 0 = one for each core.
    scheduler: TorchX's scheduler that runs the stages: local_cwd = processes on this machine, slurm, kubernetes, ...
    scheduler_args: its settings, as after -cfg of `torchx run`: "partition=gpu,time=600".
    job_options: options of the stages' jobs by app, or of all ("all"), each a list of name=value, such as
        pretrain: [j=2x8, gpu=8]; `torchx run apps/pretrain.py --help` lists them.
    """

    dataset: Literal["", "auto"] = ""
    folds: int = count(2, least=1, most=MOST_FOLDS)
    rankers: list[RankerName] = field(default_factory=lambda: ["din"])
    knowledge: list[Knowledge] = field(default_factory=lambda: ["none", "direct", "matching", "both"])
    seeds: list[int] = setting(lambda: [0], least=0, most=limits.MOST_SEED)
    tuned: dict[str, list[str]] = field(default_factory=dict)
    jobs: int = count(0, most=4096)
    scheduler: str = LOCAL
    scheduler_args: str = ""
    job_options: dict[str, list[str]] = field(default_factory=dict)

    def check(self, at: str) -> None:
        """Raises UserError for settings that cannot work (`at`: the section, with a dot)."""
        for name in ("rankers", "knowledge", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UserError(f"{at}{name}: got {list(given)}, expected one or more, without repetitions")
        for name, overrides in self.tuned.items():
            ranker, slash, kind = name.partition("/")
            if ranker not in RANKERS or (slash and kind not in KNOWLEDGE):
                raise UserError(
                    f"{at}tuned.{name}: expected a ranker, such as din, or with knowledge, such as din/both"
                )
            wrong = [word for word in overrides if not word.startswith("rank.") or word.startswith(DECIDED)]
            if wrong:
                raise UserError(
                    f"{at}tuned.{name}: got {wrong[0]!r}; expected settings of rank, without {', '.join(DECIDED)}, "
                    "which the pipeline sets"
                )
        for app, options in self.job_options.items():
            if app not in APPS:
                raise UserError(f"{at}job_options.{app}: expected one of {', '.join(APPS)}{did_you_mean(app, APPS)}")
            if wrong := [word for word in options if not re.fullmatch(r"(?!config=|check=)\w+=.*", word, re.DOTALL)]:
                raise UserError(f"{at}job_options.{app}: got {wrong[0]!r}; expected name=value, such as j=2x8")


@dataclass(frozen=True)
class TuneConfig:
    """Search of settings for pipeline.rankers and pipeline.knowledge; each trial uses the first of pipeline.seeds.

    trials: number of trials for each ranker with each kind of knowledge. The first is the config itself; the others are
        drawn without repetition, and are the same for all.
    seed: seed of the draws.
    space: settings to vary, each "key=a|b|c"; all values are equally likely.
    """

    trials: int = count(8, least=1, most=100_000)
    seed: int = limits.seed()
    space: list[str] = field(
        default_factory=lambda: [
            "rank.train.epochs=1|2|3|4",
            "rank.train.optimizer.table_lr=0.05|0.1|0.2|0.4",
            "rank.train.optimizer.dense_lr=0.001|0.002|0.004|0.008",
            "rank.dropout=0.0|0.1|0.3",
        ]
    )

    def check(self, at: str) -> None:
        """Raises UserError for a space that trials cannot be drawn from (`at`: the section, with a dot)."""
        draw(self)


def draw(config: TuneConfig) -> list[list[str]]:
    """The overrides of each trial, the first without any. Raises UserError for an invalid or too small space."""
    choices = []
    for entry in config.space:
        key, equals, values = entry.partition("=")
        options = values.split("|")
        if not (equals and key and all(options)) or len(set(options)) < len(options):
            raise UserError(f"tune.space: got {entry!r}; expected key=a|b|c with different values")
        choices.append([f"{key}={option}" for option in options])
    size = math.prod(len(options) for options in choices) if choices else 0
    if not 1 <= config.trials <= size + 1:
        raise UserError(
            f"tune.trials is {config.trials}; expected at most {size + 1}: the config itself and the {size} "
            "combinations of tune.space"
        )
    random = np.random.default_rng(config.seed)
    indices = random.choice(size, config.trials - 1, replace=False).tolist() if size else []
    shape = tuple(len(options) for options in choices)
    drawn = [np.unravel_index(index, shape) for index in indices]
    return [[], *([options[i] for options, i in zip(choices, at, strict=True)] for at in drawn)]


@dataclass(frozen=True)
class WarmUpConfig:
    """The warm-up rows of Table 5.

    share: share of the training part, from the earliest on, that the online model and the LUM are trained on; the
        study's rankers train on the rest.
    engineered: features of the schema that, like rank.statistics, only the "feature" rows and the online model read.
    """

    share: float = setting(0.75, above=0, below=1)
    engineered: list[str] = field(default_factory=list)
