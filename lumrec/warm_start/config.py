"""Which production checkpoint a stage begins from."""

from dataclasses import dataclass
from pathlib import Path

from lumrec.train.checkpoint import best_checkpoint
from lumrec.warm_start.sources import Source, open_source


@dataclass(frozen=True)
class WarmStartConfig:
    """source: a DCP folder, a torch.save or a safetensors file, or a run folder of lumrec, of which the best checkpoint
    is taken; "" begins with fresh weights. rules: a YAML file.
    """

    source: str = ""
    rules: str = ""

    def open(self) -> Source:
        """The source. Collective. Raises ValueError where one of the two is not given, and as `open_source` does."""
        if not self.source or not self.rules:
            raise ValueError(
                f"warm_start.source is {self.source!r} and warm_start.rules {self.rules!r}: a warm start needs both, a "
                "checkpoint and rules for its names, see docs/how-to/warm-start.md"
            )
        is_run = (Path(self.source) / "checkpoints").is_dir()
        return open_source(best_checkpoint(self.source) if is_run else self.source)
