"""Which production checkpoint a stage begins from."""

from dataclasses import dataclass

from lumrec.warm_start.sources import Source, open_source


@dataclass(frozen=True)
class WarmStartConfig:
    """source: a DCP folder, a torch.save or a safetensors file; "" begins with fresh weights. rules: a YAML file."""

    source: str = ""
    rules: str = ""

    def open(self) -> Source:
        """The source. Collective. Raises ValueError where one of the two is not given, and as `open_source` does."""
        if not self.source or not self.rules:
            missing, given = ("source", "rules") if not self.source else ("rules", "source")
            raise ValueError(
                f"rank.warm_start.{missing} is not given{f', beside rank.warm_start.{given}' if self.source or self.rules else ''}: "
                "a warm start needs a checkpoint and rules for its names, see docs/how-to/warm-start.md"
            )
        return open_source(self.source)
