"""Run folders of the small configs in these tests."""

from typing import Any

from lumrec.run.folder import RunFolder


def settings_of(config: Any, stage: str) -> Any:
    """What config.yaml of a run of `stage` holds."""
    return config.settings(**({stage: getattr(config, stage)} if hasattr(config, stage) else {}))


def create_run(config: Any, stage: str, **options: Any) -> RunFolder:
    """`RunFolder.create` as a stage calls it."""
    return RunFolder.create(config.folder(stage), stage, settings_of(config, stage), **options)
