"""Settings of the experiments: pipeline, tuning and warm-up rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from lumrec.data.splits import MOST_FOLDS
from lumrec.models.ranker_config import RANKERS, RankerName
from lumrec.run import limits
from lumrec.run.errors import UserError
from lumrec.run.limits import count, setting

# none: the plain ranker on fresh tables. tables: it starts with the LUM's tables and reads nothing else of the LUM.
Knowledge = Literal["none", "tables", "direct", "matching", "both"]
KNOWLEDGE = get_args(Knowledge)


DECIDED = ("rank.model=", "rank.knowledge=", "rank.tables=")


@dataclass(frozen=True)
class PipelineConfig:
    """What the pipeline runs and compares.

    dataset: "" = as in `data`; auto = MovieLens-1M where it is found or can be downloaded, else the simulator.
    folds: number of folds of users for cross-fitting: each user's answers come from a LUM that was not trained on that
        user; 1 = one LUM of all users (in-sample).
    rankers: rankers to train. Every combination of rankers, knowledge and seeds is trained.
    knowledge: none (the base; always on fresh tables), tables (the base on the LUM's tables: the control where
        rank.tables is lum), direct, matching, both.
    seeds: seeds of the rankers.
    tuned: settings of a ranker ("din"), or of one with a kind of knowledge ("din/both", over the former), as a list of
        key=value; apps/tune.py finds them.
    jobs: stages that run at the same time; 0 = one for each core.
    """

    dataset: Literal["", "auto"] = ""
    folds: int = count(2, least=1, most=MOST_FOLDS)
    rankers: list[RankerName] = field(default_factory=lambda: ["din"])
    knowledge: list[Knowledge] = field(default_factory=lambda: ["none", "direct", "matching", "both"])
    seeds: list[int] = setting(lambda: [0], least=0, most=limits.MOST_SEED)
    tuned: dict[str, list[str]] = field(default_factory=dict)
    jobs: int = count(0, most=4096)

    def check(self, at: str) -> None:
        """Raises UserError for settings that cannot work (`at`: the section, with a dot)."""
        for name in ("rankers", "knowledge", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UserError(f"{at}{name}: got {list(given)}, expected one or more, none of them twice")
        for name, words in self.tuned.items():
            ranker, slash, kind = name.partition("/")
            if ranker not in RANKERS or (slash and kind not in KNOWLEDGE):
                raise UserError(
                    f"{at}tuned.{name}: expected a ranker, such as din, or with knowledge, such as din/both"
                )
            wrong = [word for word in words if not word.startswith("rank.") or word.startswith(DECIDED)]
            if wrong:
                raise UserError(
                    f"{at}tuned.{name}: got {wrong[0]!r}; expected settings of rank, without {', '.join(DECIDED)}, "
                    "which the pipeline sets"
                )


@dataclass(frozen=True)
class TuneConfig:
    """A search of settings for pipeline.rankers and pipeline.knowledge, each trial with the first of pipeline.seeds.

    trials: number of trials for each ranker with each kind of knowledge. The first is the config itself; the others are
        drawn, none twice, and the same for all.
    seed: seed of the draws.
    space: settings that are varied, "key=a|b|c" each, with one value as likely as another.
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
    """The words of each trial; the first has none. Raises UserError for a space that is not "key=a|b" or too small."""
    choices = []
    for entry in config.space:
        key, equals, values = entry.partition("=")
        options = values.split("|")
        if not (equals and key and all(options)) or len(set(options)) < len(options):
            raise UserError(f"tune.space: got {entry!r}; expected key=a|b|c with different values")
        choices.append([f"{key}={option}" for option in options])
    size = math.prod(len(options) for options in choices) if choices else 0
    if not 1 <= config.trials <= size + 1:
        raise UserError(f"tune.trials is {config.trials}; tune.space has {size} combinations, and the first is none")
    random = np.random.default_rng(config.seed)
    places = random.choice(size, config.trials - 1, replace=False).tolist() if size else []
    shape = tuple(len(options) for options in choices)
    drawn = [np.unravel_index(place, shape) for place in places]
    return [[], *([options[i] for options, i in zip(choices, place, strict=True)] for place in drawn)]


@dataclass(frozen=True)
class WarmUpConfig:
    """The warm-up rows of Table 5.

    share: share of the training part, by time, from which the online model and the LUM learn; the study's rankers train
        on the rest.
    engineered: features of the schema that, like rank.statistics, are read only by "feature" and the online model.
    """

    share: float = setting(0.75, above=0, below=1)
    engineered: list[str] = field(default_factory=list)
