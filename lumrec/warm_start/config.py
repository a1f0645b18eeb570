"""Which production checkpoint a stage begins from."""

import hashlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from torchrec.distributed.model_parallel import DistributedModelParallel

from lumrec.data.prepared import PreparedData
from lumrec.data.vocabulary import moved_values
from lumrec.run.distributed import on_rank_zero, rank
from lumrec.run.errors import UserError
from lumrec.run.files import check_file, check_outside, sha256
from lumrec.run.limits import setting
from lumrec.train.checkpoint import best_checkpoint
from lumrec.warm_start.apply import warm_start
from lumrec.warm_start.audit import Audit
from lumrec.warm_start.names import check_names, targets_of, with_second_source
from lumrec.warm_start.rules import read_rules
from lumrec.warm_start.scores import Expected, read_scores
from lumrec.warm_start.sources import Source, open_source
from lumrec.warm_start.vocabulary import read_vocabulary, short

logger = logging.getLogger(__name__)
_FILES = ("source_vocabulary", "target_vocabulary", "categories", "check")  # that a rule names


def _is_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _table_of(target: str) -> str:
    return f".{target}".split(".")[-2]


@dataclass(frozen=True)
class WarmStartConfig:
    """A production checkpoint to begin from (docs/how-to/warm-start.md).

    source: a DCP folder, a torch.save or a safetensors file, or a run folder of lumrec (its best checkpoint is used);
        "" begins with fresh weights.
    rules: YAML file that maps the parameters of the source to those of the model.
    scores: Parquet or CSV of raw ids and production's scores, which the filled ranker must reproduce (see
        lumrec/warm_start/scores.py).
    tolerance: largest difference allowed between these scores and the ranker's.
    """

    source: str = ""
    rules: str = ""
    scores: str = ""
    tolerance: float = setting(1e-5, least=0, most=1)

    def check(self, at: str) -> None:
        """Raises UserError where one setting is given without the other (`at`: the section, with a dot)."""
        if bool(self.source) != bool(self.rules):
            raise UserError(
                f"{at}source is {self.source!r} and {at}rules {self.rules!r}: a warm start needs both, a checkpoint "
                "and rules for its names, see docs/how-to/warm-start.md"
            )
        if self.scores and not self.source:
            raise UserError(f"{at}scores is {self.scores!r}, but {at}source is '': there is no warm start to check")
        if self.tolerance != WarmStartConfig.tolerance and not self.scores:
            raise UserError(
                f"{at}tolerance is {self.tolerance}, but {at}scores is '': there is nothing to compare (a check of "
                "rows has its own, in its rule)"
            )

    def check_inputs(self, at: str, prepared: Path, run: Path) -> None:
        """Raises MissingFileError or UserError for files that are missing, cannot be read, or lie in the folder of this
        run; reads no data.

        at: the section, with a dot. prepared: folder of the prepared data, which may be made later, with the
        vocabularies in it. run: folder of this run.
        """
        if not self.source:
            return
        check_file(self.source, f"{at}source", "a DCP folder or a checkpoint file", may_be_folder=True)
        rules = read_rules(self.rules)
        inputs = {f"{at}source": Path(self.source), f"{at}rules": Path(self.rules)}
        if rules.optimizer_source:
            key, path = f"{self.rules}: optimizer_source", Path(rules.folder) / rules.optimizer_source
            inputs[key] = check_file(path, key, "a checkpoint of the optimizer", may_be_folder=True)
        for rule in rules.rules:
            for name in _FILES:
                key, path = f"{self.rules}, rule {rule.source!r}: {name}", Path(rules.folder) / getattr(rule, name)
                is_made_later = name == "target_vocabulary" and not prepared.exists() and _is_in(path, prepared)
                if getattr(rule, name) and not is_made_later:
                    inputs[key] = check_file(path, key, "Parquet or CSV")
        if self.scores:
            inputs[f"{at}scores"] = Path(self.scores)
            read_scores(self.scores, f"{at}scores")
        for key, path in inputs.items():
            check_outside(path, key, run)

    def check_names(self, tables: Collection[str], before: str, prepared: Path) -> None:
        """Raises UserError for rules that name what the source or the model does not have, as far as this is known
        before there is a model. Reads the source's headers only.

        tables: of the model. before: what begins the name of its collection of tables. prepared: as in `check_inputs`.
        """
        if not self.source:
            return
        source, rules = with_second_source(self.open(verify=False), read_rules(self.rules), verify=False)
        check_names(source, rules, tables, before)
        for target, _, rule in targets_of(source, rules):
            path = Path(rules.folder) / rule.target_vocabulary
            if rule.target_vocabulary and _is_in(path, prepared):
                expected = prepared / "vocabulary" / f"{_table_of(target)}.parquet"
                if path.resolve() != expected.resolve():
                    raise UserError(
                        f"{self.rules}, rule {rule.source!r}: target_vocabulary is {rule.target_vocabulary}, but that "
                        f"of {target!r} is {expected}"
                    )

    def open(self, *, verify: bool = True) -> Source:
        """The source. Collective. Raises as `open_source` does."""
        is_run = (Path(self.source) / "checkpoints").is_dir()
        return open_source(best_checkpoint(self.source) if is_run else self.source, verify=verify)

    def fingerprint(self, source: Source) -> str:
        """Changes with what decides the weights: the source, the optimizer's, the rules and the files that they name.

        Collective. Raises as `read_rules` and `open_source` do.
        """
        rules = read_rules(self.rules)
        folder, digest = Path(rules.folder), hashlib.sha256(source.fingerprint().encode())
        names = [name for r in rules.rules for name in (r.source_vocabulary, r.target_vocabulary, r.categories) if name]
        for file in (Path(self.rules), *(folder / name for name in names)):
            digest.update(sha256(file).encode() if file.is_file() else b"absent")
        if rules.optimizer_source:
            digest.update(open_source(folder / rules.optimizer_source).fingerprint().encode())
        return digest.hexdigest()

    def fill(
        self,
        dmp: DistributedModelParallel,
        source: Source,
        data: PreparedData,
        folder: Path | None = None,
        *,
        dry_run: bool = False,
        expected: Expected | None = None,
        score: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Audit:
        """Fills a model of `data` from what `open` gave; leaves the audit in its run's folder (if any) and log.
        Collective.

        dry_run: only the audit. expected: scores that the filled model must have; score: gives its logits of rows.
        Raises as `warm_start` does, and UserError for vocabularies of other data.
        """
        on_rank_zero(lambda: self._check_vocabularies(source, data))
        check = None
        if expected is not None and score is not None:
            check = lambda model: expected.compared(score(expected.row_N))  # noqa: E731
        audit = warm_start(dmp, source, self.rules, check=check, tolerance=self.tolerance, dry_run=dry_run)
        if expected is not None:
            audit.checked = len(expected.row_N)  # each rank has compared all of them
        if rank() == 0 and folder is not None:
            logger.info("%s", audit.text())
            audit.save(folder)
        return audit

    def _check_vocabularies(self, source: Source, data: PreparedData) -> None:
        """Raises UserError where a rule's target_vocabulary gives a raw id another row than the data do."""
        source, rules = with_second_source(source, read_rules(self.rules), verify=False)
        for target, _, rule in targets_of(source, rules):
            table = _table_of(target)
            if not rule.target_vocabulary or table not in data.table_rows:
                continue
            path = Path(rules.folder) / rule.target_vocabulary
            given = read_vocabulary(path, rule.target_columns, data.table_rows[table], repr(target))
            known = pl.DataFrame(
                list(data.vocabulary(table).items()), {"key": pl.String, "row": pl.Int64}, orient="row"
            )
            moved = moved_values(given.with_columns(pl.col("key").cast(pl.String)), known)
            if len(moved):
                key, row, now = moved.row(0)
                raise UserError(
                    f"{self.rules}, rule {rule.source!r}: target_vocabulary {path} is not that of {data.path}: "
                    f"{len(moved):,} of {len(given):,} raw ids have another row there ({short(key)} has row {row} in "
                    f"the one, {'none' if now is None else f'row {now}'} in the other). Expected "
                    f"{data.path / 'vocabulary' / f'{table}.parquet'}"
                )
