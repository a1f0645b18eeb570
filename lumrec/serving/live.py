"""The scorer in force: a new version of the bundle or the store takes its place while requests go on.

Opening happens beside the requests, in another thread; then one assignment puts the new one in force, between two calls
of the ranker. What cannot be opened is counted and logged, once for each version: the bundle before it stays in force,
and a store that cannot be read is absent knowledge.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumrec.run.errors import UserError
from lumrec.serving.metrics import Metrics

logger = logging.getLogger(__name__)
REPEAT_S = 60.0  # between two log lines about the same failure
Stamp = tuple[int, int, int] | None


class Live:
    """The scorer, and what looks for newer versions of what it reads.

    open_scorer, open_store: open the newest version; the store is opened only for a ranker that reads knowledge.
    stamps: of "bundle" and "store", something that changes with each new version.
    """

    def __init__(
        self,
        *,
        open_scorer: Callable[[], Any],
        open_store: Callable[[], Any],
        stamps: dict[str, Callable[[], Any]],
        metrics: Metrics,
    ) -> None:
        self._open_scorer, self._open_store, self._stamps, self._metrics = open_scorer, open_store, stamps, metrics
        self._seen = {what: stamp() for what, stamp in stamps.items()}
        self.problems: dict[str, str] = {}  # by what cannot be read: why
        self._told: dict[str, float] = {}
        self._looking = threading.Lock()
        self.scorer = open_scorer()
        self._metrics.readable.labels("bundle").set(1)
        self._renew_store()

    def look(self) -> None:
        """Opens what has a new version, and a store that could not be read before."""
        with self._looking:
            if self._changed("bundle"):
                self._renew_scorer()
            if self._changed("store") or self.scorer.store is None:
                self._renew_store()

    def note(self, what: str, problem: str) -> None:
        """Takes in whether `what` could be read for a request ("" = it could), counts it and logs what has changed."""
        if problem:
            self._metrics.failures.labels(what).inc()
            self._metrics.readable.labels(what).set(0)
            self.problems[what] = problem
            self._log(what, problem)
        elif what in self.problems and getattr(self.scorer, what) is not None:
            self._metrics.readable.labels(what).set(1)
            del self.problems[what]
            logger.info("the %s can be read again", what)

    def _changed(self, what: str) -> bool:
        stamp = self._stamps[what]()
        if stamp == self._seen[what] or stamp is None:
            return False
        self._seen[what] = stamp
        return True

    def _renew_scorer(self) -> None:
        before = self.scorer
        try:
            scorer = self._open_scorer()
        except Exception as error:  # whatever is wrong with the new version, the old one serves on
            self._failed("bundle", error)
            return
        if before.store is not None and not scorer.check_store(before.store):
            scorer.store = before.store
        self.scorer = scorer
        self._opened("bundle", scorer.version)

    def _renew_store(self) -> None:
        if not self.scorer.needs_knowledge:
            return
        try:
            store = self._open_store()
            if problem := self.scorer.check_store(store):
                raise UserError(problem)
        except Exception as error:  # a server answers without knowledge, whatever is wrong with it
            self._read(None)
            self._failed("store", error)
            return
        self._read(store)
        self._opened("store", str(store.manifest["folder"]))

    def _read(self, store: Any) -> None:
        """Lets a copy of the scorer take its place, so that a call that runs reads the same store to its end."""
        scorer = copy.copy(self.scorer)
        scorer.store = store
        self.scorer = scorer

    def _opened(self, what: str, version: str) -> None:
        self.problems.pop(what, None)
        self._told.pop(what, None)
        self._metrics.reloads.labels(what, "opened").inc()
        self._metrics.readable.labels(what).set(1)
        logger.info("serving the %s %s", what, version)

    def _failed(self, what: str, error: Exception) -> None:
        problem = " ".join(str(error).split()) or type(error).__name__
        if self.problems.get(what) != problem:
            self._metrics.reloads.labels(what, "failed").inc()
        self.problems[what] = problem
        self._metrics.readable.labels(what).set(0)
        self._log(what, problem, None if isinstance(error, (UserError, OSError)) else error)

    def _log(self, what: str, problem: str, bug: Exception | None = None) -> None:
        now = time.monotonic()
        if now - self._told.get(what, -REPEAT_S) >= REPEAT_S:
            self._told[what] = now
            logger.error("the %s cannot be read: %s", what, problem, exc_info=bug)


def stamp_of(file: Path) -> Stamp:
    """Changes whenever another file takes the place of this one; None where there is none."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino, facts.st_size
