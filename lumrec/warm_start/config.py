"""Which production checkpoint a stage begins from."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchrec.distributed.model_parallel import DistributedModelParallel

from lumrec.run.distributed import rank
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import sha256
from lumrec.run.limits import setting
from lumrec.train.checkpoint import best_checkpoint
from lumrec.warm_start.apply import warm_start
from lumrec.warm_start.audit import Audit
from lumrec.warm_start.rules import read_rules
from lumrec.warm_start.scores import Expected
from lumrec.warm_start.sources import Source, open_source

logger = logging.getLogger(__name__)


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

    def check_inputs(self, at: str) -> None:
        """Raises MissingFileError or UserError for what can be known of the files before data are read: one that is not
        there, rules that cannot be. `at`: the section, with a dot. Target vocabularies may be made with the data.
        """
        if not self.source:
            return
        if not Path(self.source).exists():
            raise MissingFileError(
                f"{at}source: there is no {self.source}; expected a DCP folder or a checkpoint file (from {Path.cwd()})"
            )
        rules = read_rules(self.rules)
        beside = [rules.optimizer_source, *(rule.source_vocabulary for rule in rules.rules)]
        files = [(self.rules, Path(rules.folder) / name) for name in beside if name]
        for key, path in [*([(f"{at}scores", Path(self.scores))] if self.scores else []), *files]:
            if not path.exists():
                raise MissingFileError(f"{key}: there is no {path} (from {Path.cwd()})")

    def open(self) -> Source:
        """The source. Collective. Raises as `open_source` does."""
        is_run = (Path(self.source) / "checkpoints").is_dir()
        return open_source(best_checkpoint(self.source) if is_run else self.source)

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
        folder: Path | None = None,
        *,
        expected: Expected | None = None,
        score: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Audit:
        """Fills a model from what `open` gave, and leaves the audit in its run's folder (if any) and log. Collective.

        expected: scores that the filled model must have; score: gives its logits of rows. Raises as `warm_start` does.
        """
        check = None
        if expected is not None and score is not None:
            check = lambda model: expected.compared(score(expected.row_N))  # noqa: E731
        audit = warm_start(dmp, source, self.rules, check=check, tolerance=self.tolerance)
        if expected is not None:
            audit.checked = len(expected.row_N)  # each rank has compared all of them
        if rank() == 0 and folder is not None:
            logger.info("%s", audit.text())
            audit.save(folder)
        return audit
