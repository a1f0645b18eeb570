"""Reads a checkpoint's tensors through torch.distributed.checkpoint (DCP) without running any code that it may hold."""

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from lumrec.errors import UserError


class Reader(dcp.FileSystemReader):
    """DCP's reader with a metadata file that cannot run code, and tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = metadata_of(Path(self.path))
        others = [
            name for name, entry in metadata.state_dict_metadata.items() if not isinstance(entry, TensorStorageMetadata)
        ]
        if others:
            raise UserError(f"{self.path} holds {others[0]!r}, which is no tensor: it was not written by lumrec")
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def sizes(self) -> dict[str, list[int]]:
        """Global size of every tensor by its name, such as "optim.<parameter>.<entry>"."""
        entries = self.read_metadata().state_dict_metadata.items()
        return {name: list(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def metadata_of(folder: Path) -> Metadata:
    """DCP's metadata of a checkpoint, whoever wrote it. Raises UserError where it holds anything but DCP's classes."""
    with open(folder / ".metadata", "rb") as file:
        try:
            metadata = _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError) as error:
            raise UserError(
                f"{folder}/.metadata was not written by lumrec or by DCP of this version: {error}"
            ) from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"{folder}/.metadata holds {type(metadata).__name__}; expected DCP's Metadata")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    # Class by class: these modules import others (os among them), which a name such as "os.system" would reach.
    _CLASSES = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "pathlib": {"PosixPath"},
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3, as in Debian 12, pickles enums
            return _enum_member
        if name in self._CLASSES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def _enum_member(owner: Any, name: str) -> Enum:
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise pickle.UnpicklingError(f"getattr of {owner!r} has no place in a checkpoint's metadata")
    return owner[name]
