"""A run's folder `runs/<run>/`: resolved config, versions, metrics.jsonl, checkpoints and finally result.json.

Two files define a run's state: `config.yaml` (written first) and `result.json` (written last). A folder without the
latter is an unfinished run, which the same command continues. A folder is only emptied if its versions.json says that
the same stage made it. The folder itself is kept, as it may be a link or a mount.
"""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lumrec.run.changes import _AGAIN, config_differences, differing
from lumrec.run.distributed import check_shared, on_rank_zero, rank
from lumrec.run.errors import UserError
from lumrec.run.files import finite, locked, read_json, write_atomically
from lumrec.run.typed_yaml import to_yaml
from lumrec.run.versions import versions, warn_of_other_versions

logger = logging.getLogger(__name__)

# Files of a folder whose creation was interrupted before config.yaml was written.
_FIRST_FILES = {".lock", "versions.json", "inputs.json", ".versions.json.tmp", ".inputs.json.tmp", ".config.yaml.tmp"}
# Files of a run that failed before its first checkpoint.
_NO_WORK = ("config.yaml", "plan.", "metrics.jsonl", "tensorboard", "non-finite-", "warm_start.", ".clearing")
# Marks a folder that is being emptied: whatever else it contains, it is ours, and must not be continued.
_CLEARING = ".clearing"
_PROCESS = f"{os.getpid()} {uuid.uuid4().hex}"


def stage_of(folder: Path) -> str:
    """The stage that made a run folder; "" where it does not say so. Raises UserError for a damaged versions.json."""
    made_by = folder / "versions.json"
    return str(read_json(made_by, again="make the run again").get("stage", "")) if made_by.is_file() else ""


def check_stage(folder: Path, stage: str, what: str) -> None:
    """Raises UserError for the folder of another stage's run. what: that is expected, such as "a ranker"."""
    if (made_by := stage_of(folder)) not in (stage, ""):
        raise UserError(f"{folder} is a run of {made_by}, expected one of {stage}: give the run folder of {what}")


class RunFolder:
    """One run's folder. `RunFolder.create` makes it and finds out whether the run continues or is finished.

    path: the folder. finished: it has the result of this config. resumed: it continues an unfinished run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished = False
        self.resumed = False
        self._metrics: Any = None
        self._tensorboard: Any = None
        self._lock: Any = None

    @classmethod
    def create(
        cls,
        path: Path,
        stage: str,
        settings: Any,
        *,
        inputs: Mapping[str, str] | None = None,
        quiet: bool = False,
        keep: Sequence[str] = (),
    ) -> "RunFolder":
        """The folder `path` of a run of `stage`, made by rank 0 if it is new.

        settings: a dataclass of everything that determines the run's result; its field `overwrite`, if it has one,
        allows replacing a run. inputs: fingerprints of what the run reads (name → text); other inputs count as another
        config. quiet: do not log that a finished run is kept. keep: patterns of files that are kept when the run is
        made again, until the stage replaces them. An existing folder:

        - unfinished, same config: `resumed`; the loop continues from the last complete checkpoint.
        - finished, same config: `finished`; `result()` reads its result. With overwrite=true it is made again.
        - other config: UserError that names the keys; with overwrite=true, or without any work in it, made again.
        - not a run folder of this stage, one that contains other runs, or one that another process uses: UserError,
          also with overwrite=true.

        Configs are compared by `config_differences`. Every rank must call this, after `init_distributed`; an error of
        rank 0 is raised on all ranks, and so is UserError where the nodes of a job do not share the folder's parent.
        """
        run = cls(path)
        check_shared(path.parent)
        run.finished, run.resumed = on_rank_zero(
            lambda: run._open(settings, stage, dict(inputs or {}), quiet=quiet, keep=keep)
        )
        return run

    @classmethod
    def locked(cls, path: Path) -> "RunFolder":
        """The folder `path`, locked until `close`, for work without a config. Raises UserError if it is in use."""
        run = cls(path)
        run._take_lock()
        return run

    def _open(
        self, settings: Any, stage: str, inputs: dict[str, str], *, quiet: bool, keep: Sequence[str]
    ) -> tuple[bool, bool]:
        """Makes or checks the folder; returns (finished, resumed)."""
        path, config_path = self.path, self.path / "config.yaml"
        overwrite = getattr(settings, "overwrite", False)
        others = names_in(path) - _FIRST_FILES
        clearing = _CLEARING in others
        if others and not clearing:
            check_made_by(path, stage)
        self._take_lock()
        resumed = config_path.exists() and not clearing
        finished = resumed and (path / "result.json").exists()
        if resumed:
            try:
                made_from = read_json(path / "inputs.json", again=_AGAIN)
                differences = [
                    *config_differences(path, settings).values(),
                    *(f"input {key}: {old!r} → {new!r}" for key, old, new in differing(made_from, inputs)),
                ]
            except UserError as error:  # a damaged file
                if not overwrite:
                    raise
                differences = [str(error)]
            state = "a finished" if finished else "an unfinished"
            begun = has_work(path)
            if differences and begun and not overwrite:
                more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
                raise UserError(
                    f"{path} has {state} run with another config: {'; '.join(differences[:8])}{more}. Use "
                    "overwrite=true to replace it, or run=<name> for another folder"
                )
            if differences or (overwrite and finished):
                if begun:
                    logger.warning("overwrite=true: replacing %s run in %s", state, path)
                clearing = True
                resumed = finished = False
        if finished:
            if not quiet:
                logger.info("%s is finished with this config: its result is kept (overwrite=true replaces it)", path)
        elif resumed:
            logger.info("%s: continuing the unfinished run", path)
            warn_of_other_versions(path)
        else:
            if clearing:
                clear(path, keep=keep)
            made_by = {"stage": stage, "id": uuid.uuid4().hex, **versions()}
            write_atomically(path / "versions.json", json.dumps(made_by, indent=2) + "\n")
            write_atomically(path / "inputs.json", json.dumps(inputs, indent=2) + "\n")
            write_atomically(config_path, to_yaml(settings))
            (path / _CLEARING).unlink(missing_ok=True)
        return finished, resumed

    @property
    def id(self) -> str:
        """Id of the run; overwrite=true makes a new one. "" in a folder of an earlier version."""
        return str(read_json(self.path / "versions.json", again=_AGAIN).get("id", ""))

    def _take_lock(self) -> None:
        """Locks the folder against other processes, until this process ends, however it ends."""
        lock, self._lock = self.path / ".lock", contextlib.ExitStack()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(lock))
        except BlockingIOError:
            owner = lock.read_text(encoding="utf-8").strip()
            if owner != _PROCESS:  # an earlier run of this process may still have the lock
                pid = owner.partition(" ")[0] or "(unknown)"
                raise UserError(
                    f"{self.path} is being written by process {pid}: wait for it, end it, or choose another run=<name>"
                ) from None
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
                raise
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): make it a folder that this user can write, or "
                "choose another runs_dir=<folder>"
            ) from None
        lock.write_text(_PROCESS, encoding="utf-8")

    def log(self, step: int, **metrics: float | str | None) -> None:
        """Appends a line to metrics.jsonl and the numbers to TensorBoard; only on rank 0.

        A number that is not finite becomes null in the file (JSON has no NaN).
        """
        if rank() != 0:
            return
        if self._metrics is None:
            self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")
        self._metrics.write(json.dumps(finite({"step": step, **metrics})) + "\n")
        self._metrics.flush()
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            # Lines that a killed process wrote after its last checkpoint will be written again.
            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step if self.resumed else None)
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """Removes the lines of metrics.jsonl after `step`: a resumed run writes them again."""
        path = self.path / "metrics.jsonl"
        if rank() != 0 or not path.exists():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = [line for line in lines if _step_of(line) <= step]
        write_atomically(path, "".join(line + "\n" for line in kept))

    def finish(self, result: Mapping[str, float | str]) -> None:
        """Writes result.json (flat: metric name → number or text; a number that is not finite becomes null)."""
        if rank() == 0:
            nested = [name for name, value in result.items() if not isinstance(value, (int, float, str))]
            if nested:
                raise UserError(
                    f"a result is flat, name → number or text; {nested[0]!r} is a {type(result[nested[0]]).__name__}"
                )
            write_atomically(self.path / "result.json", json.dumps(finite(result), indent=2) + "\n")
        self.finished = True
        self.close()

    def result(self) -> dict[str, float | str]:
        """The result that `finish` stored; null is read as NaN."""
        stored = read_json(self.path / "result.json", again=_AGAIN)
        return {name: math.nan if value is None else value for name, value in stored.items()}

    def close(self) -> None:
        """Closes the files and unlocks the folder for other processes."""
        for file in (self._metrics, self._tensorboard, self._lock):
            if file is not None:
                file.close()
        self._metrics = self._tensorboard = self._lock = None


def check_made_by(path: Path, stage: str) -> None:
    """Raises UserError unless the folder `path` is a run folder that `stage` made."""
    names = names_in(path)
    lacks = [name for name in ("config.yaml", "versions.json") if name not in names]
    again = "remove the folder, or choose another run=<name>"
    versions = {} if lacks else read_json(path / "versions.json", again=again)
    made_by = versions.get("stage")
    if made_by not in (None, stage):
        raise UserError(
            f"{path} is a run of {made_by} and is never replaced by one of {stage}: choose another run=<name>, or "
            "remove it yourself"
        )
    if made_by is None and not {"commit", "platform"} <= versions.keys():  # runs of earlier versions have no stage
        why = f"no {lacks[0]}" if lacks else "its versions.json was not written by lumrec"
        raise UserError(
            f"{path} is not a run folder of {stage} ({why}), and is never replaced: choose another run=<name>, or "
            "remove it yourself"
        )


def clear(path: Path, *, keep: Sequence[str] = ()) -> None:
    """Empties a run folder that its caller has locked, except for the lock and what matches a pattern of `keep`.

    If it is killed, the rest does not count as a run, and `RunFolder.create` continues emptying. The folder itself is
    kept, as it may be a link or a mount. Raises UserError, before anything is removed, if it contains other runs.
    """
    inner = sorted(file.parent for name in ("config.yaml", "manifest.json") for file in path.glob(f"*/**/{name}"))
    if inner:
        raise UserError(
            f"{path} contains another run, {inner[0]}, which would be lost with it: move that, or choose another "
            "run=<name>"
        )
    write_atomically(path / _CLEARING, "")
    kept = {".lock", _CLEARING, *(entry.name for pattern in keep for entry in path.glob(pattern))}
    for entry in sorted(path.iterdir()):
        if entry.name in kept:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def names_in(path: Path) -> set[str]:
    """Names of the entries of a folder; none if it does not exist. Raises UserError for a file or a broken link."""
    try:
        return {entry.name for entry in path.iterdir()}
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(
                f"{path} is a link to {path.readlink()}, which does not exist: make it, or remove the link"
            ) from None
        return set()
    except NotADirectoryError:
        raise UserError(f"{path} is a file; expected a folder: choose another run=<name>") from None


def has_work(path: Path) -> bool:
    """Whether a run folder contains anything worth keeping: a checkpoint, a result, or other output of a stage.

    The files of a run that failed before its first checkpoint (settings, plan, log lines) do not count: it would start
    from the beginning anyway, so a corrected command may replace it.
    """
    left = {name for name in names_in(path) if not name.startswith(_NO_WORK)} - _FIRST_FILES
    return bool(left - {"checkpoints"}) or any(not name.startswith(".") for name in names_in(path / "checkpoints"))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that was cut off by the kill
        return math.inf
