"""Reads the tensors of a checkpoint, lumrec's or a foreign one, without running anything that it may hold.

torch.distributed.checkpoint (DCP) describes a checkpoint by a pickle, `.metadata`, and a pickle is a program. Here no
part of it is called, imported or set on an object: its opcodes are read as plain data (names, numbers, text, lists),
the data is checked type by type, and DCP gets a description that is built from what was checked. Then DCP may load
tensors only; what a checkpoint declares as "bytes" (which DCP would unpickle) is never opened.
"""

import math
import os
import pickletools
import re
import zipfile
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.utils import _ReaderView

from lumrec.run.errors import MissingFileError, UserError

DCP_VERSIONS = ("1.0.0",)
_LARGEST = 2**63 - 1
_FILE_NAME = re.compile(r"[\w.,=+@ -]{1,200}(/[\w.,=+@ -]{1,200})*", re.ASCII)


def load_tensors(tensors: dict[str, Any], folder: Path, *, files: Container[str]) -> None:
    """Fills the tensors of a nested dict, in place, from a checkpoint folder. Collective.

    files: names of the files that may be read. Raises UserError for tensors in other files, or that cannot be loaded.
    """
    reader = Reader(folder)
    # Read here, because the errors are clearer than DCP's: without .metadata it looks for one description per rank.
    for index, info in reader.read_metadata().storage_data.items():
        if info.relative_path not in files:
            raise UserError(f"{folder}: {index.fqn!r} is in {info.relative_path}, which its meta.json does not list")
    try:
        dcp.load(tensors, storage_reader=reader, planner=_TensorsOnly())
    except CheckpointException as error:  # a BaseException, which callers would not expect
        first = next(iter(error.failures.values()))[0]
        raise UserError(f"{folder} could not be loaded: {first}") from error


class Reader(dcp.FileSystemReader):
    """DCP's reader with a description that was checked, of a checkpoint that holds tensors only."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is not None:
            return self._metadata
        metadata = metadata_of(Path(self.path))
        others = [
            name for name, entry in metadata.state_dict_metadata.items() if not isinstance(entry, TensorStorageMetadata)
        ]
        if others:
            raise UserError(f"{self.path} holds {others[0]!r}, which is no tensor: it was not written by lumrec")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        self._metadata = metadata
        return metadata

    def sizes(self) -> dict[str, list[int]]:
        """Global size of every tensor by its name, such as "optim.<parameter>.<entry>"."""
        entries = self.read_metadata().state_dict_metadata.items()
        return {name: list(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        part = cast(IO[bytes], FileSlice(file, sinfo.offset, sinfo.length))
        check_archive(part, f"{self.path}/{sinfo.relative_path}")
        return part


class FileSlice(_ReaderView):
    """Bytes `offset` to `offset + length` of an open file, as a file that is read from 0 on."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_END:  # DCP's version moves in the wrong direction
            return super().seek(self.len + offset)
        return super().seek(offset, whence)


class _TensorsOnly(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> NoReturn:
        raise UserError(f"{read_item.dest_index.fqn!r} is no tensor, and nothing but tensors is loaded")


def check_archive(file: IO[bytes] | Path, what: str) -> None:
    """Raises UserError unless this is an uncompressed zip archive of torch.save, whose stated sizes are real ones."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise UserError(
            f"{what} cannot be read as an archive of torch.save; it may be cut off, or not a checkpoint: {error}"
        ) from None
    # torch would read a file that begins differently as a bare pickle.
    if not records or min(entry.header_offset for entry in records) != 0:
        raise UserError(f"{what} cannot be read as an archive of torch.save: its archive does not begin at byte 0")
    if compressed := [entry for entry in records if entry.compress_type != zipfile.ZIP_STORED]:
        raise UserError(
            f"{what} holds {compressed[0].filename!r} compressed, as torch.save never writes it; save the tensors again"
        )
    if not isinstance(file, Path):
        file.seek(0)


def metadata_of(folder: Path) -> Metadata:
    """DCP's description of a checkpoint, checked, whoever wrote it.

    Sizes are in range, every piece of a tensor is in a file of this folder, and no two pieces of a tensor overlap.
    Raises MissingFileError without `.metadata`, UserError where it holds anything that DCP does not write.
    """
    path = folder / ".metadata"
    if not path.is_file():
        raise MissingFileError(
            f"{folder} has no .metadata, so it is no complete DCP checkpoint: DCP writes that file last"
        )
    try:
        return _metadata(_parse(path.read_bytes()), folder)
    except (ValueError, IndexError, KeyError) as error:
        reason = str(error)[:300] if isinstance(error, ValueError) else "it is damaged"
        raise UserError(f"{path} was not written by lumrec or by DCP of this version: {reason}") from None


@dataclass(frozen=True, slots=True)
class _Name:
    """A class or function that the pickle names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class _Object:
    """An object that the pickle would create: its class or function, arguments and state. It is never created."""

    name: _Name
    arguments: Any
    state: Any = None


class _Pairs(list[Any]):
    """A dictionary of the pickle as key, value, key, value …"""


_DCP = "torch.distributed.checkpoint.metadata"
_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
_METADATA = _Name(_DCP, "Metadata")
_TENSOR = _Name(_DCP, "TensorStorageMetadata")
_BYTES = _Name(_DCP, "BytesStorageMetadata")
_CHUNK = _Name(_DCP, "ChunkStorageMetadata")
_PROPERTIES = _Name(_DCP, "TensorProperties")
_INDEX = _Name(_DCP, "MetadataIndex")
_STORAGE = _Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = _Name("torch", "Size")
_ENUM = _Name(_DCP, "_MEM_FORMAT_ENCODING")
_GETATTR = _Name("builtins", "getattr")  # how Python 3.11.0 to 3.11.3, as in Debian 12, pickles enums
_NAMES = {
    *(_METADATA, _TENSOR, _BYTES, _CHUNK, _PROPERTIES, _INDEX, _STORAGE, _SIZE, _ENUM, _GETATTR),
    # What follows is in the file, but not used.
    _Name(_DCP, "StorageMeta"),
    _Name("torch.serialization", "_get_layout"),
    _Name("pathlib", "PosixPath"),
    _Name("pathlib._local", "PosixPath"),
    _Name("collections", "OrderedDict"),
}

_WITH_VALUE = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NEW = {"EMPTY_DICT": _Pairs, "EMPTY_LIST": list}


def _parse(pickled: bytes) -> Any:
    """The pickle as plain data: text, numbers, None, tuples, lists, `_Pairs`, `_Name` and `_Object`.

    Raises ValueError, IndexError or KeyError for anything else.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        first = marks.pop()
        items = stack[first:]
        del stack[first:]
        return items

    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                number = int(opcode.name[-1])
                stack[-number:] = [tuple(stack[-number:])]
            case "APPEND" | "APPENDS":
                items = since_mark() if opcode.name == "APPENDS" else [stack.pop()]
                _exactly(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = since_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _exactly(stack[-1], _Pairs).extend(items)
            case "GLOBAL":
                stack.append(_name(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                stack[-2:] = [_name(*stack[-2:])]
            case "NEWOBJ" | "REDUCE":
                arguments = stack.pop()
                stack[-1] = _made(_exactly(stack[-1], _Name), arguments)
            case "BUILD":
                state = stack.pop()
                made = _exactly(stack[-1], _Object)
                if made.state is not None:
                    raise ValueError(f"{made.name} gets a state twice")
                made.state = state
            case name if name in _WITH_VALUE:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _NEW:
                stack.append(_NEW[name]())
            case name:
                raise ValueError(f"{name} has no place in a checkpoint's metadata")
    return stack[-1]


def _exactly(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{_shown(value)} where {kind.__name__.lstrip('_')} was expected")
    return value


def _shown(value: Any) -> str:
    return str(value) if type(value) in (_Name, str, int) else type(value).__name__.lstrip("_")


def _name(module: Any, name: Any) -> _Name:
    found = _Name(_exactly(module, str), _exactly(name, str))
    if found not in _NAMES and not _is_dtype(found):
        raise ValueError(f"{found} has no place in a checkpoint's metadata")
    return found


def _is_dtype(name: _Name) -> bool:
    return name.module == "torch" and name.name in _DTYPES


def _made(name: _Name, arguments: Any) -> _Object:
    if name == _GETATTR and not (type(arguments) is tuple and arguments[:1] == (_ENUM,)):
        owner = arguments[0] if type(arguments) is tuple and arguments else arguments
        raise ValueError(f"getattr of {_shown(owner)} has no place in a checkpoint's metadata")
    return _Object(name, arguments)


def _metadata(parsed: Any, folder: Path) -> Metadata:
    fields = _fields(parsed, _METADATA)
    version = fields.get("version")
    if version is not None and version not in DCP_VERSIONS:
        raise UserError(
            f"{folder} is a DCP checkpoint of version {_shown(version)!r}; this lumrec reads {DCP_VERSIONS[0]}"
        )
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for index, info in _items(fields["storage_data"]):
        at = _fields(index, _INDEX)
        offset = at.get("offset")
        key = MetadataIndex(_exactly(at["fqn"], str), None if offset is None else _size(offset))
        if key in storage:
            raise ValueError(f"two files hold {key.fqn!r} at {list(key.offset or ())}")
        storage[key] = _storage_info(info, folder, key.fqn)
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, entry in _items(fields["state_dict_metadata"]):
        if _exactly(name, str) in entries:
            raise ValueError(f"{name!r} is there twice")
        if _exactly(entry, _Object).name == _BYTES:
            entries[name] = BytesStorageMetadata()
        else:
            entries[name] = _tensor(name, entry, storage)
    return Metadata(entries, storage_data=storage, version=version)


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    pairs = _exactly(value, _Pairs)
    return zip(pairs[::2], pairs[1::2], strict=True)


def _fields(value: Any, name: _Name) -> dict[str, Any]:
    """The state of an instance of DCP's class `name`, by field."""
    made = _exactly(value, _Object)
    if made.name != name or made.arguments != ():
        raise ValueError(f"{made.name} where {name} was expected")
    return {_exactly(field, str): entry for field, entry in _items(made.state)}


def _size(value: Any) -> torch.Size:
    made = _exactly(value, _Object)
    if made.name != _SIZE or type(made.arguments) is not tuple or len(made.arguments) != 1:
        raise ValueError(f"{made.name} where a torch.Size was expected")
    return torch.Size([_number(number) for number in _exactly(made.arguments[0], tuple)])


def _number(value: Any) -> int:
    if not 0 <= _exactly(value, int) <= _LARGEST:
        raise ValueError(f"{value} where a size or a byte was expected")
    return int(value)


def _storage_info(value: Any, folder: Path, name: str) -> _StorageInfo:
    fields = _fields(value, _STORAGE)
    path = _exactly(fields["relative_path"], str)
    if not _FILE_NAME.fullmatch(path) or {".", ".."} & {*path.split("/")}:
        raise ValueError(f"{name!r} is said to be in the file {path!r:.80}, which is no name of a file in this folder")
    if not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path!r} is a link that leads out of the folder")
    if fields.get("transform_descriptors"):
        raise UserError(f"{folder}: {name!r} was written through an extension; save it without extensions")
    return _StorageInfo(path, _number(fields["offset"]), _number(fields["length"]))


def _tensor(name: str, value: Any, storage: dict[MetadataIndex, _StorageInfo]) -> TensorStorageMetadata:
    fields = _fields(value, _TENSOR)
    properties = _exactly(fields["properties"], _Object)
    if properties.name != _PROPERTIES or properties.arguments != () or len(_exactly(properties.state, tuple)) != 5:
        raise ValueError(f"{properties.name} where {_PROPERTIES} was expected")
    dtype_name = _exactly(properties.state[0], _Name)
    if not _is_dtype(dtype_name):
        raise ValueError(f"{dtype_name} where a dtype was expected")
    dtype: torch.dtype = getattr(torch, dtype_name.name)
    size = _size(fields["size"])
    chunks, seen = [], set()
    for chunk in _exactly(fields["chunks"], list):
        at = _fields(chunk, _CHUNK)
        offsets, sizes = _size(at["offsets"]), _size(at["sizes"])
        info = storage.get(MetadataIndex(name, offsets))
        if info is None or offsets in seen:
            raise ValueError(f"no file holds {name!r} at {list(offsets)}, or it is named twice")
        if math.prod(sizes) * dtype.itemsize > info.length:
            raise ValueError(
                f"{name!r} is said to hold {list(sizes)} numbers at {list(offsets)}, but {info.length:,} bytes hold it"
            )
        seen.add(offsets)
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    _check_cover(name, size, chunks)
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _check_cover(name: str, size: torch.Size, chunks: list[ChunkStorageMetadata]) -> None:
    """Raises ValueError unless the chunks are inside the tensor and fill it without overlap."""
    what = f"{name!r} is said to be {list(size)}"
    if math.prod(size) > _LARGEST:
        raise ValueError(f"{what}, more numbers than there can be")
    boxes = [(chunk.offsets, chunk.sizes) for chunk in chunks]
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(size) or any(o + n > m for o, n, m in zip(offsets, sizes, size)):
            raise ValueError(
                f"{what}, but holds a piece of {list(sizes)} at {list(offsets)}: the checkpoint is damaged, or was put "
                "together from two"
            )
    covered = sum(math.prod(sizes) for _, sizes in boxes)
    if covered != math.prod(size):
        raise ValueError(
            f"{what} ({math.prod(size):,} numbers), but its pieces hold {covered:,}: the table is narrower or shorter "
            "than said; save the checkpoint again"
        )
    boxes = sorted(box for box in boxes if math.prod(box[1]))
    for index, (offsets, sizes) in enumerate(boxes):
        for others, other_sizes in boxes[index + 1 :]:
            if others and others[0] >= offsets[0] + sizes[0]:
                break  # they begin after its last row, and so do all that follow
            if all(o < p + m and p < o + n for o, n, p, m in zip(offsets, sizes, others, other_sizes)):
                raise ValueError(f"{what}, but two of its pieces overlap, at {list(offsets)} and {list(others)}")
