"""Settings of each ranker, searched with the same effort without and with knowledge: a plain seeded random search.

Every ranker with every kind of knowledge gets the same trials, each the whole training of one seed, and the validation
part chooses; no trial touches the test part. The stages before it are the pipeline's, in the same run folder::

    runs/<run>/  prepare/ lum-0of2/ lum-1of2/ query/  trial-din-none-0/ …  trials.json tuned.yaml
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, List

import numpy as np

from lumrec import limits, pipeline
from lumrec.errors import UserError
from lumrec.limits import count
from lumrec.pipeline import Stage, say, write_json
from lumrec.train.files import write_atomically
from lumrec.typed_yaml import dump

if TYPE_CHECKING:
    from lumrec.config import Config


@dataclass(frozen=True)
class TuneConfig:
    """A search; what it covers are pipeline.rankers and pipeline.knowledge, each trial with the first pipeline.seeds.

    trials: for each ranker with each kind of knowledge; the first is the config as it stands, the others are drawn,
    none twice, and the same for all. seed: of the draws. space: the settings that are varied, "key=a|b|c" each, with
    one value as likely as another.
    """

    trials: int = count(8, least=1, most=100_000)
    seed: int = limits.seed()
    space: List[str] = field(
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


def run(config: Config) -> dict[str, float | str]:
    """Runs the trials that are not finished yet, and gives for each "<ranker>/<knowledge>": "…/valid/<metric>" of the
    best and of the first trial ("…/first/valid/<metric>"), and its number ("…/trial").

    Writes trials.json (every trial with its words and figures) and tuned.yaml, a config's `pipeline.tuned` section.
    Raises UserError for a space that cannot be drawn from and as the pipeline does.
    """
    words = draw(config.tune)
    pipeline.check(config)
    config, note = pipeline.resolve_dataset(config)
    folder = Path(config.runs_dir) / config.run
    stages = plan(config, words)
    pipeline.make(config, stages, note)

    trials = [_trial(stage, words, config) for stage in stages if stage.name.startswith("trial-")]
    write_json(folder / "trials.json", trials)
    result: dict[str, float | str] = {}
    tuned = {}
    for name in dict.fromkeys(trial["name"] for trial in trials):
        of_name = [trial for trial in trials if trial["name"] == name]
        best = max(of_name, key=lambda trial: _goodness(trial, config.rank.select))
        tuned[name] = best["words"]
        result[f"{name}/trial"] = best["trial"]
        for origin, trial in (("", best), ("first/", of_name[0])):
            result |= {f"{name}/{origin}{key}": value for key, value in trial.items() if key.startswith("valid/")}
    text = dump({"pipeline": {"tuned": tuned}}, width=120)
    head = f"# Chosen by {config.rank.select} of the validation part among {config.tune.trials} trials each, seed "
    write_atomically(folder / "tuned.yaml", f"{head}{config.pipeline.seeds[0]} (apps/tune.py).\n{text}")
    say(f"\n{table(trials, tuned)}\n\nevery trial  {folder / 'trials.json'}\nthe winners  {folder / 'tuned.yaml'}")
    return result


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


def plan(config: Config, words: list[list[str]]) -> list[Stage]:
    """The pipeline's stages up to the knowledge, and the trials in place of its rankers."""
    from lumrec.config import with_words

    one_seed = dataclasses.replace(config.pipeline, seeds=config.pipeline.seeds[:1])
    stages = []
    for stage in pipeline.plan(dataclasses.replace(config, pipeline=one_seed)):
        if stage.app != "rank":
            stages.append(stage)
            continue
        _, ranker, kind, _ = stage.name.split("-")
        for place, of_trial in enumerate(words):
            name = f"trial-{ranker}-{kind}-{place}"
            trial = with_words(stage.config, [*of_trial, "rank.test=false"], origin="tune.space")
            trial = dataclasses.replace(trial, run=f"{config.run}/{name}", pipeline=config.pipeline)
            stages.append(dataclasses.replace(stage, name=name, config=trial))
    return stages


def table(trials: list[dict[str, Any]], tuned: dict[str, list[str]]) -> str:
    """The trials for the terminal, the winners marked."""
    lines = [f"{'':22}{'AUC':>8}{'gAUC':>8}{'log loss':>10}  of the validation part"]
    for trial in trials:
        figures = [trial[f"valid/{metric}"] for metric in ("auc", "gauc", "log_loss")]
        numbers = f"{figures[0]:8.4f}{figures[1]:8.4f}{figures[2]:10.4f}"
        mark = "best " if tuned[trial["name"]] == trial["words"] else ""
        settings = " ".join(word.removeprefix("rank.").removeprefix("train.") for word in trial["words"])
        lines.append(f"{trial['name']:18}{trial['trial']:4}{numbers}  {mark}{settings or 'the config as it stands'}")
    return "\n".join(lines)


def _trial(stage: Stage, words: list[list[str]], config: Config) -> dict[str, Any]:
    _, ranker, kind, place = stage.name.split("-")
    # Settings that the config has for this ranker already are a part of every trial, and stay with the winner.
    before = [*config.pipeline.tuned.get(ranker, []), *config.pipeline.tuned.get(f"{ranker}/{kind}", [])]
    keys = {word.partition("=")[0] for word in words[int(place)]}
    kept = [word for word in before if word.partition("=")[0] not in keys]
    figures = {key: value for key, value in pipeline.read_result(stage).items() if key.startswith("valid/")}
    return {
        "name": f"{ranker}/{kind}",
        "trial": int(place),
        "words": [*kept, *words[int(place)]],
        **figures,
        "wall_s": pipeline.read_result(stage)["wall_s"],
    }


def _goodness(trial: dict[str, Any], select: str) -> float:
    sign = -1.0 if select.startswith("-") else 1.0
    value = trial.get(f"valid/{select.removeprefix('-')}")
    return -math.inf if value is None else sign * value
