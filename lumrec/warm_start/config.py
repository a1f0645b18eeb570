"""Which production checkpoint a stage begins from."""

import logging
from dataclasses import dataclass
from pathlib import Path

from torchrec.distributed.model_parallel import DistributedModelParallel

from lumrec.errors import UserError
from lumrec.train.checkpoint import best_checkpoint
from lumrec.train.parallel import rank
from lumrec.warm_start.apply import warm_start
from lumrec.warm_start.audit import Audit
from lumrec.warm_start.sources import Source, open_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmStartConfig:
    """source: a DCP folder, a torch.save or a safetensors file, or a run folder of lumrec, of which the best checkpoint
    is taken; "" begins with fresh weights. rules: a YAML file.
    """

    source: str = ""
    rules: str = ""

    def check(self, at: str) -> None:
        """Raises UserError where one of the two is given without the other (`at`: the section, with a dot)."""
        if bool(self.source) != bool(self.rules):
            raise UserError(
                f"{at}source is {self.source!r} and {at}rules {self.rules!r}: a warm start needs both, a checkpoint "
                "and rules for its names, see docs/how-to/warm-start.md"
            )

    def open(self) -> Source:
        """The source. Collective. Raises as `open_source` does."""
        is_run = (Path(self.source) / "checkpoints").is_dir()
        return open_source(best_checkpoint(self.source) if is_run else self.source)

    def fill(self, dmp: DistributedModelParallel, source: Source, folder: Path) -> Audit:
        """Fills a model from what `open` gave, and leaves the audit in a run's folder and in its log. Collective."""
        audit = warm_start(dmp, source, self.rules)
        if rank() == 0:
            logger.info("%s", audit.text())
            audit.save(folder)
        return audit
