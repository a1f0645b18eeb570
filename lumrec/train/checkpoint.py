"""Checkpoints that survive a kill at any moment: tensors by DCP, the rest as JSON, published by one rename.

    checkpoints/step-00000200/
        .metadata, __0_0.distcp …   model and optimizer, sharded (torch.distributed.checkpoint)
        rank-0.json …               loader position and random states of each rank
        meta.json                   step, fingerprint, parameter shapes, sharding, loop state, best step, checksums
        COMPLETE                    checksum of meta.json; written last, before the folder gets its name

The tensors can be read with another number of ranks and another sharding plan. So can the optimizer's state, with one
exception (see `Checkpointer`). A folder without a valid COMPLETE is ignored. Nothing in a checkpoint is executed,
whoever wrote it (see checkpoint_reader.py).
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizerWrapper

from lumrec.run.distributed import barrier, gathered, rank, world_size
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.files import full_disk_told, read_json, remove_folder, sha256, sync_file, sync_folder, write_atomically
from lumrec.train.checkpoint_meta import (
    FORMAT,
    Fingerprint,
    best_checkpoint,
    best_of,
    check_fingerprint,
    complete_checkpoints,
    read_meta,
    some,
    step_folder,
    unusable,
)
from lumrec.train.checkpoint_reader import Reader, load_tensors
from lumrec.train.optimizers import TableAndDenseOptimizer, table_shardings
from lumrec.train.parallel import refuse_managed_collisions

__all__ = [
    "Checkpointer",
    "Loaded",
    "best_checkpoint",
    "complete_checkpoints",
    "load_weights",
    "read_meta",
    "verified_meta",
]

logger = logging.getLogger(__name__)
ROOM = "earlier checkpoints are unchanged. Free some space and run the same command again: it continues from the last"
OPTIMIZER_STATE = ("keep", "drop")


class Loaded(NamedTuple):
    """A checkpoint that was loaded: its step, the loop's state (the same on all ranks) and this rank's own state.

    same_ranks: whether it was saved by as many ranks as load it now. If not, every rank gets rank 0's `local`.
    """

    step: int
    state: dict[str, Any]
    local: dict[str, Any]
    same_ranks: bool


class Checkpointer:
    """Saves and restores one training run.

    `fingerprint` (name → value) identifies the data, schema and model settings that a checkpoint belongs to; a
    checkpoint with a different one is refused. The newest `keep` checkpoints are kept, and the best checkpoint that
    each of them names.

    `optimizer_state` decides what happens to a table's optimizer state that does not fit this run: "keep" refuses to
    load, "drop" resets that state. State does not fit after a change of the table optimizer, or when row-wise Adagrad
    moves to or from column_wise (it has one sum per row and shard). All other state fits every sharding.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: DistributedModelParallel,
        optimizer: TableAndDenseOptimizer,
        fingerprint: Fingerprint | None = None,
        keep: int = 2,
        optimizer_state: str = "keep",
    ) -> None:
        if keep < 1:
            raise UserError(f"keep_checkpoints={keep} must be 1 or more: a run resumes from its newest checkpoint")
        if optimizer_state not in OPTIMIZER_STATE:
            raise UserError(f"optimizer_state={optimizer_state!r} is not one of {', '.join(OPTIMIZER_STATE)}")
        refuse_managed_collisions(model)
        self.folder = folder
        self._model = model
        self._optimizer = optimizer
        self._fingerprint = dict(fingerprint or {})
        self._keep = keep
        self._optimizer_state = optimizer_state

    def save(self, step: int, *, state: Mapping[str, Any], local: Mapping[str, Any], best_step: int) -> Path:
        """The folder of the new checkpoint, complete and on disk. Collective: every rank calls it at the same step.

        `state` (equal on all ranks) and `local` (of this rank) must be JSON-compatible.
        """
        path = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".tmp-{path.name}"
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        barrier()
        tensors = {"model": self._model.state_dict(), "optim": self._optimizer.state_tensors()}
        own = temporary / f"rank-{rank()}.json"
        with full_disk_told(self.folder, f"the checkpoint of step {step}", then=ROOM):
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True))
            own.write_text(json.dumps(local), encoding="utf-8")
            sync_file(own)
        mine = [own, *temporary.glob(f"__{rank()}_*.distcp"), *([temporary / ".metadata"] if rank() == 0 else [])]
        checksums = gathered({file.name: sha256(file) for file in mine})
        if rank() == 0:
            meta = {
                "format": FORMAT,
                "step": step,
                "best_step": best_step,
                "world_size": world_size(),
                "fingerprint": {name: str(value) for name, value in self._fingerprint.items()},
                "parameters": _shapes(self._model),
                "sharding": _sharding_types(self._model),
                "state": dict(state),
                "files": {name: digest for part in checksums for name, digest in part.items()},
            }
            with full_disk_told(self.folder, f"the checkpoint of step {step}", then=ROOM):
                write_atomically(temporary / "meta.json", json.dumps(meta))
                write_atomically(temporary / "COMPLETE", sha256(temporary / "meta.json"))
            if path.exists():
                remove_folder(path)
            os.replace(temporary, path)
            sync_folder(self.folder)
            self._remove_old()
        barrier()
        return path

    def load_latest(self) -> Loaded | None:
        """Restores model and optimizer from the newest complete checkpoint; None where there is none. Collective.

        A checkpoint that is half-written or corrupt is set aside under another name, with a warning. Raises UserError
        for one with another fingerprint or model, and for optimizer state that does not fit and is to be kept.
        """
        paths = sorted(self.folder.glob("step-*"), reverse=True)
        if rank() == 0:
            for left in self.folder.glob(".tmp-*"):
                logger.warning("checkpoint %s was not finished when its process ended: it is skipped", left)
        for path in paths:
            problem = _verify(path)
            if problem is None:
                return self._load(path)
            barrier()
            if rank() == 0:
                aside = path.with_name(f"corrupt-{path.name}")
                logger.warning("checkpoint %s is skipped: %s. It is kept as %s", path, problem, aside.name)
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
            barrier()
        return None

    def load_model(self, step: int) -> None:
        """Loads the weights of the checkpoint of `step` into the model; the optimizer stays as it is. Collective."""
        load_weights(self.folder / f"step-{step:08d}", self._model, fingerprint=self._fingerprint)

    def _load(self, path: Path) -> Loaded:
        meta = read_meta(path)
        check_fingerprint(path, meta, self._fingerprint)
        best = step_folder(path, meta["best_step"])
        if best != path and (problem := unusable(best)):
            raise UserError(
                f"{path} names {best.name} as the best checkpoint so far, but {problem}. Copy it back, or start the "
                "run again with overwrite=true"
            )
        _check_parameters(path, meta["parameters"], _shapes(self._model))
        stored = Reader(path).sizes()
        _create_state(self._optimizer)
        _drop_state_not_in(self._optimizer, stored)
        tensors = {"model": self._model.state_dict(), "optim": self._state_that_fits(path, meta, stored)}
        load_tensors(tensors, path, files=meta["files"])
        same_ranks = meta["world_size"] == world_size()
        own = path / f"rank-{rank() if same_ranks else 0}.json"
        if own.name not in meta["files"]:
            raise UserError(f"{path} is damaged: its meta.json does not list {own.name}")
        return Loaded(meta["step"], meta["state"], read_json(own), same_ranks)

    def _state_that_fits(
        self, path: Path, meta: Mapping[str, Any], stored: Mapping[str, list[int]]
    ) -> dict[str, dict[str, Any]]:
        """The optimizer's tensors that the checkpoint can fill; the others keep their fresh values. Collective."""
        state, tables = self._optimizer.state_tensors(), self._optimizer.table_names
        of_this_rank = {
            f"optim.{name}.{entry}": list(value.size())
            for name in tables
            for entry, value in state.get(name, {}).items()
        }
        ours = {key: size for part in gathered(of_this_rank) for key, size in part.items()}
        there, here = meta.get("sharding", {}), _sharding_types(self._model)
        unfit = {}
        for name in tables:
            keys = {key for key in (*stored, *ours) if key.startswith(f"optim.{name}.")}
            for key in sorted(keys):
                if stored.get(key) != ours.get(key):
                    unfit[name] = (
                        f"{key.removeprefix('optim.')} is {stored.get(key, 'absent')} in the checkpoint "
                        f"({there.get(name, 'unknown sharding')}), {ours.get(key, 'absent')} here ({here[name]})"
                    )
        if unfit and self._optimizer_state == "keep":
            raise UserError(
                f"{path} holds optimizer state that this run cannot continue from: {some(list(unfit.values()))}. Use "
                "the sharding and table_optimizer that it was saved with, or set <stage>.train.optimizer_state=drop to "
                "reset that state"
            )
        if unfit and rank() == 0:
            logger.warning("%s: optimizer state is reset (optimizer_state=drop): %s", path, some(list(unfit.values())))
        return {name: entries for name, entries in state.items() if name not in unfit}

    def _remove_old(self) -> None:
        complete = complete_checkpoints(self.folder)
        kept = complete[-self._keep :]
        best = {best_of(path) for path in kept}
        for path in complete:
            if path not in kept and path not in best:
                remove_folder(path)
        for left in self.folder.glob(".t*-*"):  # .tmp-… and .trash-… of processes that were killed
            shutil.rmtree(left, ignore_errors=True)


def load_weights(
    path: str | Path,
    target: nn.Module,
    mapping: Mapping[str, str] | None = None,
    *,
    fingerprint: Fingerprint | None = None,
) -> None:
    """Loads weights of the checkpoint folder `path` into `target` (plain, or sharded by DMP), in place. Collective.

    `mapping`: parameter name there → name in `target`; None loads every parameter and buffer of `target` under its own
    name. Each rank reads only the rows that it holds. `fingerprint`: a checkpoint with a different one is refused.
    Raises MissingFileError where `path` is no complete checkpoint, UserError where it is corrupt, or names are missing
    or shapes differ (nothing is loaded then).
    """
    path = Path(path)
    refuse_managed_collisions(target)
    meta = verified_meta(path)
    if fingerprint is not None:
        check_fingerprint(path, meta, fingerprint)
    ours = {name: value for name, value in target.state_dict().items() if hasattr(value, "size")}
    mapping = mapping if mapping is not None else {name: name for name in ours}
    _check_parameters(path, meta["parameters"], _shapes(target), mapping)
    tensors = {"model": {theirs: ours[name] for theirs, name in mapping.items()}}
    load_tensors(tensors, path, files=meta["files"])


def verified_meta(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint's meta.json, after all its files have been verified. Collective.

    Raises MissingFileError where `path` is no complete checkpoint, UserError where it is corrupt.
    """
    if not (path / "COMPLETE").is_file():
        raise MissingFileError(f"{path} is not a complete checkpoint (no COMPLETE in it)")
    problem = _verify(path)
    if problem is not None:
        raise UserError(f"checkpoint {path} is corrupt: {problem}")
    return read_meta(path)


def _verify(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Collective: each rank reads its share of the files."""
    problems = gathered(_verify_share(path))
    return next((problem for problem in problems if problem), None)


def _verify_share(path: Path) -> str | None:
    try:
        for name, digest in sorted(read_meta(path)["files"].items())[rank() :: world_size()]:
            if not (path / name).is_file():
                return f"{name} is missing"
            if sha256(path / name) != digest:
                return f"{name} does not have the checksum that meta.json states"
    except OSError as error:
        return f"{error.filename or path} cannot be read ({error.strerror or error})"
    except UserError as error:
        return str(error)
    return None


def _check_parameters(
    path: Path,
    theirs: Mapping[str, list[int]],
    ours: Mapping[str, list[int]],
    mapping: Mapping[str, str] | None = None,
) -> None:
    """Raises UserError for parameters of `mapping` (default: all of both) that are missing or of another shape."""
    pairs = mapping if mapping is not None else {name: name for name in (*theirs, *ours)}
    problems = []
    for their_name, our_name in pairs.items():
        if their_name not in theirs:
            problems.append(f"{their_name!r} (for {our_name!r}) is not in the checkpoint")
        elif our_name not in ours:
            problems.append(f"{our_name!r} (from {their_name!r}) is not in this model")
        elif list(theirs[their_name]) != list(ours[our_name]):
            problems.append(
                f"{their_name!r} is {theirs[their_name]} in the checkpoint, {our_name!r} is {ours[our_name]} here"
            )
    if problems:
        raise UserError(f"{path} does not fit this model: {some(problems)}")


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    """Global shape of every parameter and buffer, sharded or not."""
    return {name: list(value.size()) for name, value in model.state_dict().items() if hasattr(value, "size")}


def _sharding_types(model: DistributedModelParallel) -> dict[str, str]:
    return {name: sharding.sharding_type for name, sharding in table_shardings(model).items()}


def _create_state(optimizer: TableAndDenseOptimizer) -> None:
    """Makes the state of the dense optimizers, so that there are tensors to load into.

    This takes a step with zero gradients, which may change weights: load those afterwards.
    """
    for _, part in optimizer.optimizers:
        if isinstance(part, KeyedOptimizerWrapper):
            part.init_state()
            part.zero_grad(set_to_none=True)


def _drop_state_not_in(optimizer: TableAndDenseOptimizer, stored: Mapping[str, Any]) -> None:
    """Removes the state of dense parameters that have none in the checkpoint, because they never had a gradient."""
    for _, part in optimizer.optimizers:
        if not isinstance(part, KeyedOptimizerWrapper):
            continue
        for name, parameter in part.params.items():
            has_state = any(f"optim.{name}.{entry}" in stored for entry in part.state.get(parameter, {}))
            if not has_state and name not in optimizer.table_names:
                part.state.pop(parameter, None)  # type: ignore[attr-defined]
