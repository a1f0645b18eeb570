"""The scorer in force: a new version of the bundle, the store or the state takes its place while requests go on.

Opening happens beside the requests, in another thread; then one assignment puts a new scorer in force, so that a call
of the ranker reads the same bundle, store and state to its end. What cannot be opened is counted and logged: the bundle
before it stays in force, a store that cannot be read is absent knowledge, and without a state every user is unknown.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lumrec.run.errors import UserError
from lumrec.serving.metrics import Metrics

logger = logging.getLogger(__name__)
RETRY_S = 10.0  # what could not be opened is tried again after this time, even without a new version
REPEAT_S = 60.0  # between two log lines about the same failure


class Live:
    """Holds the scorer, and replaces it when a newer version of its bundle, store or state appears.

    openers: functions that open "bundle" (returns the scorer), "store" and "state" (both are called with the scorer);
    those left out are not read. versions: for each opener, a function whose value changes with each new version; None
    if there is none, and an OSError says why it cannot be seen. problems: name → why it cannot be read now.
    """

    def __init__(
        self,
        openers: Mapping[str, Callable[..., Any]],
        versions: Mapping[str, Callable[[], Any]],
        *,
        metrics: Metrics,
    ) -> None:
        """Raises what the bundle's opener raises, and UserErrors of the state's: both are mistakes in the command."""
        self._openers, self._versions, self._metrics = openers, versions, metrics
        self._seen = {what: self._version(what)[0] for what in versions}
        self.problems: dict[str, str] = {}
        self._retry_at: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._out_of_sight: set[str] = set()
        self._looking = threading.Lock()
        self.scorer = openers["bundle"]()
        self._opened("bundle", self.scorer.version)
        for what in self._others():
            self._renew(what, raised=UserError if what == "state" else ())

    def look(self) -> None:
        """Opens whatever has a new version, and tries again what could not be read."""
        with self._looking:
            if self._is_due("bundle"):
                self._renew_bundle()
            for what in self._others():
                if self._is_due(what):
                    self._renew(what)

    def note(self, what: str, problem: str) -> None:
        """Notes whether `what` could be read for a request ("" = it could); counts failures and logs changes."""
        if problem:
            self._metrics.failures.labels(what).inc()
            self._failed(what, UserError(problem))
        elif what in self.problems and what not in self._out_of_sight and getattr(self.scorer, what) is not None:
            self._opened(what, "as before")

    def _others(self) -> list[str]:
        return [what for what in ("store", "state") if what in self._openers and self._is_read(what)]

    def _is_read(self, what: str) -> bool:
        return what != "store" or self.scorer.needs_knowledge

    def _is_due(self, what: str) -> bool:
        (version, why), before = self._version(what), self._seen[what]
        self._seen[what] = version
        if version is None:
            if before is not None:
                self._out_of_sight.add(what)
                self._failed(what, UserError(why))
            return False
        self._out_of_sight.discard(what)
        if version != before:
            return True
        now = time.monotonic()
        if what not in self.problems or now < self._retry_at.get(what, 0.0):
            return False
        self._retry_at[what] = now + RETRY_S
        return True

    def _version(self, what: str) -> tuple[Any, str]:
        """The version at its place, or None and why there is none to be seen."""
        try:
            return self._versions[what](), "there is nothing at its place any more; what is open is served on"
        except OSError as error:
            return None, str(error)

    def _renew_bundle(self) -> None:
        before = self.scorer
        try:
            scorer = self._openers["bundle"]()
            if "state" in self._openers:
                scorer.state = self._fitting("state", scorer)
            if before.store is not None and not scorer.check_store(before.store):
                scorer.store = before.store
        except Exception as error:  # whatever is wrong with the new version, the old one serves on
            self._failed("bundle", error)
            return
        self.scorer = scorer
        self._opened("bundle", scorer.version)
        if scorer.store is None and "store" in self._others():
            self._renew("store")

    def _renew(self, what: str, *, raised: Any = ()) -> None:
        scorer = copy.copy(self.scorer)
        try:
            setattr(scorer, what, self._fitting(what, scorer))
        except raised:
            raise
        except Exception as error:  # a server answers without it, whatever is wrong with it
            setattr(scorer, what, None)
            self._failed(what, error)
        else:
            self._opened(what, _version_of(getattr(scorer, what)))
        self.scorer = scorer

    def _fitting(self, what: str, scorer: Any) -> Any:
        """The store or state, opened. Raises UserError where it does not fit the scorer's bundle."""
        opened = self._openers[what](scorer)
        if problem := getattr(scorer, f"check_{what}")(opened):
            raise UserError(problem)
        return opened

    def _opened(self, what: str, version: Any) -> None:
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
        now = time.monotonic()
        if now - self._told.get(what, -REPEAT_S) >= REPEAT_S:
            self._told[what] = now
            bug = None if isinstance(error, (UserError, OSError)) else error
            logger.error("the %s cannot be read: %s", what, problem, exc_info=bug)


def _version_of(opened: Any) -> str:
    """The version of a store or state, from its manifest or identity."""
    about = getattr(opened, "identity", None) or opened.manifest
    return str(about.get("version") or about.get("folder"))


def stamp_of(file: Path) -> tuple[int, int, int] | None:
    """A value that changes whenever the file is replaced; None if there is no file."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino, facts.st_size
