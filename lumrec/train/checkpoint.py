"""Checkpoints that a kill cannot break: tensors by DCP, all else as JSON, published by one rename.

    checkpoints/step-00000200/
        .metadata, __0_0.distcp …   model and optimizer, sharded (torch.distributed.checkpoint)
        rank-0.json …               loader position and random states of each rank
        meta.json                   step, fingerprint, parameter shapes, loop state, best step, checksums
        COMPLETE                    checksum of meta.json; written last, before the folder gets its name

A folder without a right COMPLETE does not count. Nothing is unpickled but DCP's own metadata, by an unpickler that
knows only DCP's classes.
"""

import base64
import json
import logging
import os
import pickle
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from lumrec.train.files import remove_folder, sha256, sync_file, sync_folder, write_atomically
from lumrec.train.parallel import rank, world_size

logger = logging.getLogger(__name__)
FORMAT = 1


class Loaded(NamedTuple):
    """A checkpoint that was loaded: its step, the loop's state (the same on all ranks) and this rank's own state."""

    step: int
    state: dict[str, Any]
    local: dict[str, Any]


class Checkpointer:
    """Saves and restores one training run.

    `fingerprint` says what the checkpoint belongs to (data, schema, model settings; text by name): a checkpoint with
    another one is refused. The newest `keep` checkpoints stay, and beside them the best of each.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: nn.Module,
        optimizer: CombinedOptimizer,
        fingerprint: Mapping[str, str] | None = None,
        keep: int = 2,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep_checkpoints={keep} must be 1 or more: a run resumes from its newest checkpoint")
        self.folder = folder
        self._model = model
        self._optimizer = optimizer
        self._fingerprint = dict(fingerprint or {})
        self._keep = keep

    def save(self, step: int, *, state: Mapping[str, Any], local: Mapping[str, Any], best_step: int) -> Path:
        """The folder of the new checkpoint, complete and on disk. Collective: every rank calls it at the same step.

        `state` (equal on all ranks) and `local` (of this rank) hold what JSON can hold.
        """
        path = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".tmp-{path.name}"
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        _barrier()
        tensors = {"model": self._model.state_dict(), "optim": _tensors_only(self._optimizer.state_dict()["state"])}
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True))
        own = temporary / f"rank-{rank()}.json"
        own.write_text(json.dumps(local), encoding="utf-8")
        sync_file(own)
        mine = [own, *temporary.glob(f"__{rank()}_*.distcp"), *([temporary / ".metadata"] if rank() == 0 else [])]
        checksums = _gathered({file.name: sha256(file) for file in mine})
        if rank() == 0:
            meta = {
                "format": FORMAT,
                "step": step,
                "best_step": best_step,
                "world_size": world_size(),
                "fingerprint": self._fingerprint,
                "parameters": _shapes(self._model),
                "state": dict(state),
                "files": {name: digest for part in checksums for name, digest in part.items()},
            }
            write_atomically(temporary / "meta.json", json.dumps(meta))
            write_atomically(temporary / "COMPLETE", sha256(temporary / "meta.json"))
            if path.exists():
                remove_folder(path)
            os.replace(temporary, path)
            sync_folder(self.folder)
            self._remove_old()
        _barrier()
        return path

    def load_latest(self) -> Loaded | None:
        """Restores model and optimizer from the newest complete checkpoint; None where there is none. Collective.

        A checkpoint that is half-written or corrupt is set aside under another name, with a warning. Raises ValueError
        for one of another fingerprint or model, or of another number of processes.
        """
        paths = sorted(self.folder.glob("step-*"), reverse=True)
        if rank() == 0:
            for left in self.folder.glob(".tmp-*"):
                logger.warning("checkpoint %s was not finished when its process ended: it is skipped", left)
        for path in paths:
            problem = _verify(path)
            if problem is None:
                return self._load(path)
            _barrier()
            if rank() == 0:
                aside = path.with_name(f"corrupt-{path.name}")
                logger.warning("checkpoint %s is skipped: %s. It is kept as %s", path, problem, aside.name)
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
            _barrier()
        return None

    def load_model(self, step: int) -> None:
        """Loads the weights of the checkpoint of `step` into the model; the optimizer stays as it is. Collective."""
        load_weights(self.folder / f"step-{step:08d}", self._model, fingerprint=self._fingerprint)

    def _load(self, path: Path) -> Loaded:
        meta = read_meta(path)
        _check_fingerprint(path, meta, self._fingerprint)
        _check_parameters(path, meta["parameters"], _shapes(self._model))
        if meta["world_size"] != world_size():
            raise ValueError(
                f"{path} was saved by {meta['world_size']} process(es), this run has {world_size()}: resume with the "
                "same number, or start another run (its weights can be loaded with load_weights)"
            )
        reader = _Reader(path)
        _create_state(self._optimizer)
        _drop_state_not_in(self._optimizer, reader.read_metadata().state_dict_metadata)
        optim = _tensors_only(self._optimizer.state_dict()["state"])
        _dcp_load({"model": self._model.state_dict(), "optim": optim}, reader, path)
        local = json.loads((path / f"rank-{rank()}.json").read_text(encoding="utf-8"))
        return Loaded(meta["step"], meta["state"], local)

    def _remove_old(self) -> None:
        complete = complete_checkpoints(self.folder)
        kept = complete[-self._keep :]
        best = {f"step-{read_meta(path)['best_step']:08d}" for path in kept}
        for path in complete:
            if path not in kept and path.name not in best:
                remove_folder(path)
        for left in self.folder.glob(".t*-*"):  # .tmp-… and .trash-… of processes that were killed
            shutil.rmtree(left, ignore_errors=True)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The folders that hold a COMPLETE marker, oldest first; their contents are not verified here."""
    return sorted(path for path in folder.glob("step-*") if (path / "COMPLETE").exists())


def best_checkpoint(run: str | Path) -> Path:
    """The best checkpoint of a run folder, as its newest complete checkpoint names it.

    Raises FileNotFoundError where the run has none.
    """
    complete = complete_checkpoints(Path(run) / "checkpoints")
    if complete:
        best = complete[-1].with_name(f"step-{read_meta(complete[-1])['best_step']:08d}")
        if (best / "COMPLETE").exists():
            return best
    raise FileNotFoundError(f"{Path(run) / 'checkpoints'} holds no complete checkpoint: has this run trained already?")


def load_weights(
    path: str | Path,
    target: nn.Module,
    mapping: Mapping[str, str] | None = None,
    *,
    fingerprint: Mapping[str, str] | None = None,
) -> None:
    """Loads weights of the checkpoint folder `path` into `target` (plain, or sharded by DMP), in place. Collective.

    `mapping`: parameter name there → name in `target`; None loads every parameter and buffer of `target` under its own
    name. Each rank reads only the rows that it holds. `fingerprint`: refuse a checkpoint of another one. Raises
    FileNotFoundError where `path` is no complete checkpoint, ValueError where it is corrupt, or names are missing
    or shapes differ (nothing is loaded then).
    """
    path = Path(path)
    if not (path / "COMPLETE").exists():
        raise FileNotFoundError(f"{path} is not a complete checkpoint (no COMPLETE in it)")
    problem = _verify(path)
    if problem is not None:
        raise ValueError(f"checkpoint {path} is corrupt: {problem}")
    meta = read_meta(path)
    if fingerprint is not None:
        _check_fingerprint(path, meta, fingerprint)
    ours = {name: value for name, value in target.state_dict().items() if hasattr(value, "size")}
    mapping = mapping if mapping is not None else {name: name for name in ours}
    _check_parameters(path, meta["parameters"], _shapes(target), mapping)
    _dcp_load({"model": {theirs: ours[name] for theirs, name in mapping.items()}}, _Reader(path), path)


class _Reader(dcp.FileSystemReader):
    """DCP's reader with a metadata file that cannot run code, and tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            try:
                metadata = _MetadataUnpickler(file).load()
            except pickle.UnpicklingError as error:
                raise ValueError(f"{self.path}/.metadata was not written by lumrec: {error}") from error
        others = [
            name for name, entry in metadata.state_dict_metadata.items() if not isinstance(entry, TensorStorageMetadata)
        ]
        if others:
            raise ValueError(f"{self.path} holds {others[0]!r}, which is no tensor: it was not written by lumrec")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _PLAIN = {
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
    }

    def find_class(self, module: str, name: str) -> Any:
        known = module in self._MODULES or (module, name) in self._PLAIN
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def random_state() -> dict[str, Any]:
    """State of every global random generator (torch on CPU and CUDA, numpy, python), as JSON can hold it."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "torch": _encode(torch.get_rng_state()),
        "numpy": [name, base64.b64encode(np.asarray(keys).tobytes()).decode(), position, has_gauss, gauss],
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Sets every generator back to what `random_state` gave."""
    torch.set_rng_state(_decode(state["torch"]))
    name, keys, position, has_gauss, gauss = state["numpy"]
    words = np.frombuffer(base64.b64decode(keys), dtype=np.uint32)
    np.random.set_state((name, words, position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state:
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _verify(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Collective: each rank reads its share of the files."""
    problems = _gathered(_verify_share(path))
    return next((problem for problem in problems if problem), None)


def _verify_share(path: Path) -> str | None:
    try:
        if sha256(path / "meta.json") != (path / "COMPLETE").read_text(encoding="utf-8").strip():
            return "meta.json does not have the checksum that COMPLETE states"
        meta = read_meta(path)
        if meta["format"] != FORMAT:
            return f"its format is {meta['format']}, this lumrec reads format {FORMAT}"
        for name, digest in sorted(meta["files"].items())[rank() :: world_size()]:
            if sha256(path / name) != digest:
                return f"{name} does not have the checksum that meta.json states"
    except OSError as error:
        return f"{error.filename or path} cannot be read ({error.strerror or error})"
    return None


def read_meta(path: Path) -> dict[str, Any]:
    """The meta.json of a checkpoint folder."""
    return json.loads((path / "meta.json").read_text(encoding="utf-8"))


def _check_fingerprint(path: Path, meta: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    stored = meta["fingerprint"]
    # A name that only one side has was not recorded by the version that wrote it.
    for name in sorted({*stored} & {*expected}):
        if stored.get(name) != expected.get(name):
            raise ValueError(
                f"{path} is a checkpoint of another {name}: it was made with {stored.get(name)!r}, this run has "
                f"{expected.get(name)!r}. Use the data and settings that it was made with, or start another run"
            )


def _check_parameters(
    path: Path,
    theirs: Mapping[str, list[int]],
    ours: Mapping[str, list[int]],
    mapping: Mapping[str, str] | None = None,
) -> None:
    """Raises ValueError for parameters of `mapping` (default: all of both) that are missing or of another shape."""
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
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"{path} does not fit this model: " + "; ".join(problems[:6]) + more)


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    """Global shape of every parameter and buffer, sharded or not."""
    return {name: list(value.size()) for name, value in model.state_dict().items() if hasattr(value, "size")}


def _tensors_only(state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Optimizer state without parameters that have none (DCP would pickle an empty dictionary)."""
    return {name: dict(entries) for name, entries in state.items() if entries}


def _create_state(optimizer: CombinedOptimizer) -> None:
    """Lets dense optimizers make their state, so that there is something to load into.

    That takes a step with zero gradients, which may move weights: load them afterwards.
    """
    for _, part in optimizer.optimizers:
        if isinstance(part, KeyedOptimizerWrapper):
            part.init_state()
            part.zero_grad(set_to_none=True)


def _drop_state_not_in(optimizer: CombinedOptimizer, stored: Mapping[str, Any]) -> None:
    """A parameter that never had a gradient has no stored state, and shall have none again."""
    for _, part in optimizer.optimizers:
        if not isinstance(part, KeyedOptimizerWrapper):
            continue
        for name, parameter in part.params.items():
            if not any(f"optim.{name}.{entry}" in stored for entry in part.state.get(parameter, {})):
                part.state.pop(parameter, None)  # type: ignore[attr-defined]


def _dcp_load(tensors: dict[str, Any], reader: _Reader, path: Path) -> None:
    try:
        dcp.load(tensors, storage_reader=reader)
    except CheckpointException as error:  # a BaseException, which callers would not expect
        first = next(iter(error.failures.values()))[0]
        raise ValueError(f"{path} could not be loaded: {first}") from error


def _barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def _gathered(value: Any) -> list[Any]:
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
