"""A pipeline whose stages need not each start an interpreter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from forks import ForkServer

from lumrec.experiments import pipeline
from lumrec.experiments.jobs import Job, JobFailed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stages_in_forks(forks: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline's stages, with the words of their jobs, in forks of one process; by TorchX each takes 8 s to start."""

    def run_jobs(jobs: Sequence[Job], **_: Any) -> dict[str, float]:
        for job in jobs:
            app, _, processes, *words = job.command[job.command.index("local_cwd") + 1 :]
            assert processes == "1x1"
            stage = forks.start_script(ROOT / app.rpartition(":")[0], *words)
            if stage.wait() != [0]:
                raise JobFailed(stage.text())
            if job.then is not None:
                job.then()
        return {job.name: 1.0 for job in jobs}

    monkeypatch.setattr(pipeline, "run_jobs", run_jobs)
