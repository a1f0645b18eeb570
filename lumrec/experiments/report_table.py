"""Compares rankers without and with LUM knowledge: rows of figures, verdicts, and a text table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lumrec.data.splits import SplitConfig
from lumrec.experiments.config import Config
from lumrec.experiments.report_gains import BETTER, NOISE, WORSE, notes_of
from lumrec.models.ranker_config import RANKERS
from lumrec.run.printable import text_table

METRICS = {"auc": "AUC", "gauc": "gAUC", "log_loss": "log loss"}
LABELS = {
    "none": "base",
    "tables": "+ LUM's tables",
    "direct": "+ direct features",
    "matching": "+ interest matching",
    "both": "+ both",
}
# Completes the sentence "DIN gains 0.0034 AUC from …".
GIVEN = {
    "tables": "the LUM's embedding tables",
    "direct": "the LUM's direct features",
    "matching": "interest matching with the LUM",
    "both": "the LUM (direct features and interest matching)",
}
RANKER_NAMES = {name: name.upper() for name in RANKERS}
ONE_SEED = "One seed: the variation between seeds is not measured."


class Figure(NamedTuple):
    """A metric's mean over seeds and its standard deviation (None for one seed).

    gain: the difference from the base, None without one. low, high: its 95 % interval over users. gain_sd: its standard
    deviation over the seeds. verdict: see report_gains.gains.
    """

    value: float
    sd: float | None
    gain: float | None
    low: float | None = None
    high: float | None = None
    gain_sd: float | None = None
    verdict: str = ""

    @property
    def text(self) -> str:
        """0.7988 ± 0.0004."""
        return f"{self.value:.4f}" + ("" if self.sd is None else f" ± {self.sd:.4f}")

    @property
    def interval(self) -> str:
        """[+0.0050, +0.0075]; [–] where there is none."""
        return "[–]" if self.low is None or self.high is None else f"[{self.low:+.4f}, {self.high:+.4f}]"


class Row(NamedTuple):
    """One ranker with one kind of knowledge; a metric that could not be computed is not in `figures`."""

    ranker: str
    knowledge: str
    figures: dict[str, Figure]

    @property
    def name(self) -> str:
        """DIN base, DIN + both."""
        return f"{RANKER_NAMES.get(self.ranker, self.ranker)} {LABELS[self.knowledge]}"


class Verdict(NamedTuple):
    """A sentence about what a kind of knowledge gives a ranker. verdict: see report_gains.gains."""

    verdict: str
    text: str


def rows(config: Config, result: Mapping[str, float | str]) -> list[Row]:
    """The rows of the comparison from a pipeline's flat result, in the order of the config."""

    def number(name: str) -> float | None:
        value = result.get(name)
        return float(value) if isinstance(value, (int, float)) else None

    table = []
    for ranker in config.pipeline.rankers:
        for kind in config.pipeline.knowledge:
            figures = {}
            for metric in METRICS:
                value, base = number(f"rank/{ranker}/{kind}/{metric}"), number(f"rank/{ranker}/none/{metric}")
                if value is not None:
                    key = f"rank/{ranker}/{kind}/{metric}"
                    gain = number(f"{key}_gain")
                    if gain is None and base is not None and kind != "none":
                        gain = value - base
                    low, high, gain_sd = (number(f"{key}_{name}") for name in ("gain_low", "gain_high", "gain_sd"))
                    said = str(result.get(f"{key}_verdict", ""))
                    figures[metric] = Figure(value, number(f"{key}_sd"), gain, low, high, gain_sd, said)
            table.append(Row(ranker, kind, figures))
    return table


def verdicts(config: Config, table: Sequence[Row]) -> list[Verdict]:
    """For each ranker and kind of knowledge, a sentence about its gain in AUC; [] where there is no base."""
    seeds = config.pipeline.seeds
    over = f"over {len(seeds)} seeds" if len(seeds) > 1 else "with one seed"
    said = []
    for row in table:
        figure = row.figures.get("auc")
        if figure is None or figure.gain is None or not figure.verdict:
            continue
        ranker, given = RANKER_NAMES.get(row.ranker, row.ranker), GIVEN[row.knowledge]
        if figure.verdict in (BETTER, WORSE):
            sign = 1 if figure.verdict == BETTER else -1
            low, high = sorted((sign * (figure.low or 0.0), sign * (figure.high or 0.0)))
            does = "gains" if sign == 1 else "loses"
            text = f"{ranker} {does} {sign * figure.gain:.4f} AUC [{low:.4f}, {high:.4f}] from {given} {over}: "
            text += "more than chance."
        else:
            text = f"{ranker} with {given}: {figure.gain:+.4f} AUC {figure.interval} {over}: "
            text += "no more than chance." if figure.verdict == NOISE else f"cannot be judged ({figure.verdict})."
        said.append(Verdict(figure.verdict, text))
    return said


def comparison(config: Config, result: Mapping[str, float | str]) -> str:
    """The table for the terminal."""
    seeds, folds = config.pipeline.seeds, config.pipeline.folds
    head = [
        f"{result['dataset']}, {config.data.split.kind} split, {test_part(result)}",
        f"LUM knowledge cross-fitted over {folds} folds of users" if folds > 1 else "LUM knowledge in-sample (folds=1)",
        f"mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}",
    ]
    table = rows(config, result)
    body = [[row.name, *(spoken(row.figures.get(metric)) for metric in METRICS)] for row in table]
    lines = ["; ".join(head), *text_table([["", *METRICS.values()], *body])]
    lines += ["", *gain_lines(table)] + [f"! {note}" for note in notes_of(result)]
    lines += lum_alone(result) + treatment(config)
    if "prepare/best_auc" in result:
        lines.append(
            f"best possible AUC {float(result['prepare/best_auc']):.4f} (the true click probabilities of the simulator)"
        )
    popularity_auc, negatives = result.get("prepare/popularity_auc"), config.data.negatives
    if negatives is not None and isinstance(popularity_auc, float):
        lines.append(
            f"negatives drawn ({negatives.sampling}): item popularity without a model has AUC {popularity_auc:.4f}"
        )
    return "\n".join(lines)


def split_text(split: SplitConfig) -> str:
    """Such as "user split (rotation 0.36)"."""
    moved = ", ".join(f"{key} {value}" for key, value in (("seed", split.seed), ("rotation", split.rotation)) if value)
    return f"{split.kind} split{f' ({moved})' if moved else ''}"


def test_part(result: Mapping[str, float | str]) -> str:
    """The test part, with its rows and users where they are known."""
    rows, users = result.get("rank/test_rows"), result.get("rank/test_users")
    if not (isinstance(rows, (int, float)) and isinstance(users, (int, float))):
        return "test part"
    return f"{rows:,.0f} test rows of {users:,.0f} users"


def gain_lines(table: Sequence[Row]) -> list[str]:
    """A line for each metric of each row that has a gain over a base; [] if there is none."""
    cells, is_one_seed = [], True
    for row in table:
        name = row.name
        for metric, figure in row.figures.items():
            if figure.gain is not None and figure.verdict:
                interval = f"{figure.gain:+.4f} {figure.interval}"
                is_one_seed = is_one_seed and figure.gain_sd is None
                spread = "" if figure.gain_sd is None else f"± {figure.gain_sd:.4f} over seeds"
                cells.append([name, METRICS[metric], interval, spread, figure.verdict])
                name = ""
    if not cells:
        return []
    title = "gain over the base, 95 % interval over users (the same users for both)"
    return [title, *text_table(cells), *([ONE_SEED] if is_one_seed else [])]


def lum_alone(result: Mapping[str, float | str]) -> list[str]:
    """A sentence about how well the LUM's answers rank without a ranker; [] where the LUM was not asked."""
    auc, gauc = result.get("query/test/lum_auc"), result.get("query/test/lum_gauc")
    if not (isinstance(auc, float) and isinstance(gauc, float)):
        return []
    return [f"The LUM's answers without a ranker: AUC {auc:.4f}, gAUC {gauc:.4f}."]


def treatment(config: Config) -> list[str]:
    """Sentences about what the rows with knowledge have that the paper's do not."""
    said = []
    if config.rank.tables == "lum":
        said.append("Rows with knowledge start from the LUM's tables, the base from fresh ones.")
    if config.pretrain.contrast.feature:
        said.append("The LUM learned with counterfactual contrast, an extension that the paper does not have.")
    return said


def spoken(figure: Figure | None) -> str:
    """0.7988 ± 0.0004 (+0.0053); "–" where there is none."""
    if figure is None:
        return "–"
    return figure.text if figure.gain is None else f"{figure.text} ({figure.gain:+.4f})"


def what_next(folder: Path, page: Path, config: Config) -> str:
    """The paths of the results, and commands to try next."""
    movielens = "torchx run apps/pipeline.py --config configs/ml-1m"
    tries = {
        "both rankers, three seeds": f"{movielens}.yaml",
        "split by time": f"{movielens}-temporal.yaml",
        "the LUM without a ranker": "torchx run apps/pretrain.py --config configs/ml-1m-leave-one-out.yaml",
        "other settings": f"{movielens}.yaml run=mine model.dim=96",
    }
    if config.data.source != "movielens-1m":
        again = "the same command with run=more 'pipeline.rankers=[din,dlrm]' 'pipeline.seeds=[0,1,2]'"
        tries = {"two rankers, three seeds": again}
    if config.data.source == "log":
        tries["the answers for one user"] = "torchx run apps/show_user.py --config <this config> --user <id>"
    else:
        tries["your own log"] = "torchx run apps/prepare.py --check data.log.events=<files>   (docs/how-to/own-data.md)"
    return "\n".join(
        [
            f"report   {page}",
            f"numbers  {folder / 'result.json'}",
            f"curves   tensorboard --logdir {folder}",
            "",
            "what to run next",
            *(f"  {what:27} {command}" for what, command in tries.items()),
        ]
    )
