"""Reads a checkpoint's tensors through torch.distributed.checkpoint (DCP) without running any code that it may hold."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata


class Reader(dcp.FileSystemReader):
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

    def sizes(self) -> dict[str, list[int]]:
        """Global size of every tensor by its name, such as "optim.<parameter>.<entry>"."""
        entries = self.read_metadata().state_dict_metadata.items()
        return {name: list(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


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


class OverlapPlanner(dcp.DefaultLoadPlanner):
    """DCP's planner without its check that sizes agree: what it reads are intersections of the two tensors' shards."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        entries = dict(metadata.state_dict_metadata)
        for name, tensor in state_dict.items():
            entry = entries[name]
            assert isinstance(entry, TensorStorageMetadata)
            entries[name] = replace(entry, size=tensor.size())
        super().set_up_planner(state_dict, replace(metadata, state_dict_metadata=entries), is_coordinator)
