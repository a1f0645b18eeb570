"""Checkpoints to start from, read slice by slice: DCP folders, torch.save files, safetensors. Nothing is unpickled.

All three keep a tensor's numbers as plain bytes in a file, whole or in pieces. A source is the list of these pieces, so
that a rank reads the rows that it needs and no more, whatever wrote the file and however it was sharded. Files are
opened for reading only.
"""

import functools
import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import IOBase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from lumrec.errors import MissingFileError, UserError
from lumrec.train.checkpoint import verified_meta
from lumrec.train.checkpoint_reader import metadata_of

SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DCP_VERSIONS = ("1.0.0",)
_ENDS_BYTES = 1 << 16


class Place(NamedTuple):
    """Where a piece's first number lies: file, byte; and how its numbers follow one another, in numbers."""

    file: Path
    byte: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A block of a tensor. `place` opens the file's header when it is asked for the first time."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Callable[[], Place]


class Stored(NamedTuple):
    """A tensor of a source: its whole size, dtype, and the pieces that cover it."""

    size: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Source:
    """A checkpoint: its tensors by name ("model.over_arch.0.weight"), and names of what is no tensor and never read."""

    path: Path
    kind: str
    tensors: Mapping[str, Stored]
    others: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Changes with the names, lengths, first or last bytes of its files: cheap, for files that nobody forges."""
        digest = hashlib.sha256()
        for file in sorted(f for f in self.path.rglob("*") if f.is_file()) if self.path.is_dir() else [self.path]:
            length = file.stat().st_size
            digest.update(f"{file.name} {length}\n".encode())
            with open(file, "rb") as opened:
                digest.update(opened.read(_ENDS_BYTES))
                opened.seek(max(0, length - _ENDS_BYTES))
                digest.update(opened.read())
        return digest.hexdigest()

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Rows first … last-1 of a tensor, all columns, in its own dtype; a scalar counts as one row.

        Raises UserError where the file is shorter than its header says.
        """
        stored = self.tensors[name]
        size = stored.size or (1,)
        rows = torch.empty((last - first, *size[1:]), dtype=stored.dtype)
        for piece in stored.pieces:
            offsets, sizes = piece.offsets or (0,), piece.sizes or (1,)
            start, stop = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
            if start >= stop or not math.prod(sizes):
                continue
            place, what, block = piece.place(), f"{self.path}: {name!r}", rows[start - first : stop - first]
            strides, sizes = place.strides or (1,), (stop - start, *sizes[1:])
            if sizes[1:] == size[1:] and _is_contiguous(sizes, strides):
                _read_into(block, place, start - offsets[0], what)
            else:
                # What lies between the block's first and last number is read too.
                flat = torch.empty(sum((n - 1) * step for n, step in zip(sizes, strides)) + 1, dtype=stored.dtype)
                _read_into(flat, place, start - offsets[0], what)
                for axis, (offset, length) in enumerate(zip(offsets[1:], sizes[1:]), start=1):
                    block = block.narrow(axis, offset, length)
                block.copy_(flat.as_strided(sizes, strides))
        return rows


def _is_contiguous(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return all(
        stride == math.prod(sizes[axis + 1 :]) for axis, stride in enumerate(strides) if sizes[axis] > 1 or axis == 0
    )


def _read_into(block: Tensor, place: Place, first_row: int, what: str) -> None:
    """Fills a contiguous tensor with the bytes from a row of a piece on."""
    view, got = memoryview(block.view(-1).view(torch.uint8).numpy()), 0  # type: ignore[arg-type]
    with open(place.file, "rb", buffering=0) as file:
        file.seek(place.byte + first_row * (place.strides[0] if place.strides else 0) * block.element_size())
        while got < len(view) and (more := file.readinto(view[got:])):
            got += more
    if got < len(view):
        raise UserError(f"{what} is cut off: {place.file} ends {len(view) - got:,} bytes too early; copy it again")


def open_source(path: str | Path, *, verify: bool = True) -> Source:
    """The checkpoint in `path`: a DCP folder, a safetensors file, or a torch.save file. Collective.

    Headers alone are read, and all files must be as long as these say; a checkpoint that lumrec wrote is verified by
    its checksums too (not with verify=False). Raises MissingFileError where there is none; UserError, which says what
    was got and how to mend it, for a file that is cut off, of an unknown version, or that could be read only by running
    code that it holds.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"warm_start.source: there is no {path}; expected a DCP folder or a checkpoint file")
    if path.is_dir():
        source = _open_dcp(path, verify)
    elif path.suffix == ".safetensors":
        source = _open_safetensors(path)
    else:
        source = _open_torch_save(path)
    for name, stored in source.tensors.items():
        _check_pieces(f"{path}: {name!r}", stored)
    return source


def _check_pieces(what: str, stored: Stored) -> None:
    covered = 0
    for piece in stored.pieces:
        inside = len(piece.sizes) == len(stored.size) and all(
            0 <= offset and offset + length <= size
            for offset, length, size in zip(piece.offsets, piece.sizes, stored.size)
        )
        if not inside:
            raise UserError(
                f"{what} is said to be {list(stored.size)}, but holds a piece of {list(piece.sizes)} at "
                f"{list(piece.offsets)}: the checkpoint is damaged, or was put together from two"
            )
        covered += math.prod(piece.sizes)
    if covered != math.prod(stored.size):
        raise UserError(
            f"{what} is said to be {list(stored.size)} ({math.prod(stored.size):,} numbers), but its pieces hold "
            f"{covered:,}: the table is narrower or shorter than said; save the checkpoint again"
        )


def _open_dcp(folder: Path, verify: bool) -> Source:
    if verify and (
        (folder / "meta.json").exists() or (folder / "COMPLETE").exists()
    ):  # lumrec's own: checksums and format
        verified_meta(folder)
    if not (folder / ".metadata").is_file():
        raise MissingFileError(
            f"{folder} has no .metadata, so it is no complete DCP checkpoint: DCP writes that file last"
        )
    metadata = metadata_of(folder)
    version = getattr(metadata, "version", None)
    if version is not None and version not in DCP_VERSIONS:
        raise UserError(f"{folder} is a DCP checkpoint of version {version!r}; this lumrec reads {DCP_VERSIONS[0]}")
    places = {}
    lengths: dict[str, int] = {}
    for index, info in (metadata.storage_data or {}).items():
        entry = metadata.state_dict_metadata.get(index.fqn)
        if not isinstance(entry, TensorStorageMetadata):
            continue
        if getattr(info, "transform_descriptors", None):
            raise UserError(
                f"{folder}: {index.fqn!r} was written through an extension ({info.transform_descriptors[0]!r}); save "
                "it without extensions"
            )
        file = folder / info.relative_path
        if info.relative_path not in lengths:
            lengths[info.relative_path] = file.stat().st_size if file.is_file() else -1
        if lengths[info.relative_path] < info.offset + info.length:
            there = f"has {lengths[info.relative_path]:,} bytes" if file.is_file() else "is missing"
            raise UserError(
                f"{folder} is cut off: {file.name} {there}, but {index.fqn!r} ends at byte "
                f"{info.offset + info.length:,}; copy the checkpoint again"
            )
        places[index.fqn, tuple(index.offset or ())] = (file, info.offset, info.length)
    place_in = functools.cache(_place_in)  # for this source: another one may come to lie at the same path
    tensors, others = {}, []
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            others.append(name)
            continue
        pieces = []
        for chunk in entry.chunks:
            place = places.get((name, tuple(chunk.offsets)))
            if place is None:
                raise UserError(f"{folder}: no file holds {name!r} at {list(chunk.offsets)}; save the checkpoint again")
            sizes, dtype = tuple(chunk.sizes), entry.properties.dtype
            pieces.append(Piece(tuple(chunk.offsets), sizes, functools.partial(place_in, *place, sizes, dtype)))
        tensors[name] = Stored(tuple(entry.size), entry.properties.dtype, tuple(pieces))
    return Source(folder, "dcp", tensors, tuple(others))


def _place_in(file: Path, offset: int, length: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Place:
    """Where a DCP file has the tensor that was saved at byte `offset`. Raises UserError where that is another one."""
    with open(file, "rb") as opened:
        tensor = _headers(file, _create_file_view(opened, offset, length))
    found = (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
    if found != (sizes, dtype):
        raise UserError(
            f"{file} holds {found} at byte {offset:,}, but its .metadata says {(sizes, dtype)}: it is damaged"
        )
    return _place_of(file, tensor, offset)


def _place_of(file: Path, tensor: Tensor, offset: int = 0) -> Place:
    start = tensor.untyped_storage()._checkpoint_offset  # set by torch.load in a FakeTensorMode
    assert start is not None
    byte = offset + start + int(tensor.storage_offset()) * tensor.element_size()
    return Place(file, byte, tuple(tensor.stride()))


def _same(place: Place) -> Place:
    return place


def _headers(path: Path, file: IOBase | Path) -> Any:
    """What torch.save wrote, its tensors without their numbers: they know the byte at which these begin."""
    try:
        with FakeTensorMode():
            return torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), str(error)
        )
        raise UserError(
            f"{path} holds more than tensors and plain values, and reading that could run code which it brings "
            f"({reason.strip()[:200]}). Save {{name: tensor}} alone, such as model.state_dict(); a "
            "sharded model by DCP"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as torch.save of this version writes it; it may be cut off or no checkpoint: "
            f"{str(error).splitlines()[0][:200]}"
        ) from None


def _open_torch_save(path: Path) -> Source:
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            raise UserError(
                f"{path} is no archive of torch.save (zip), nor named .safetensors: it is of another kind, cut off at "
                "its start, or from before torch 1.6; load it where it was made and save it again"
            )
    content = _headers(path, path)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds {type(content).__name__}; expected a state dict: {{name: tensor}}, nested or not"
        )
    tensors, others = {}, []
    for name, value in _leaves(content):
        if not isinstance(value, Tensor):
            others.append(name)
            continue
        if value.layout != torch.strided or value.is_quantized:
            raise UserError(f"{path}: {name!r} is a {value.layout} or quantized tensor; save it as a plain one")
        place = _place_of(path, value)
        tensors[name] = Stored(
            tuple(value.shape),
            value.dtype,
            (Piece((0,) * value.dim(), tuple(value.shape), functools.partial(_same, place)),),
        )
    return Source(path, "torch.save", tensors, tuple(others))


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of all that nested mappings and lists hold."""
    if isinstance(value, Mapping):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(place), inner) for place, inner in enumerate(value)]
    else:
        return [(prefix, value)]
    return [leaf for key, inner in items for leaf in _leaves(inner, f"{prefix}.{key}" if prefix else key)]


def _open_safetensors(path: Path) -> Source:
    length = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        header_length = struct.unpack("<Q", start)[0] if len(start) == 8 else length
        if 8 + header_length > length:
            raise UserError(f"{path} is cut off in its header, or no safetensors file; copy it again")
        try:
            header = json.loads(file.read(header_length))
        except ValueError as error:
            raise UserError(f"{path} is no safetensors file: its header is not JSON ({error})") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype, size = SAFETENSORS_TYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            raise UserError(
                f"{path}: {name!r} is of dtype {entry['dtype']}; expected one of {', '.join(SAFETENSORS_TYPES)}"
            )
        begin, end = (8 + header_length + byte for byte in entry["data_offsets"])
        if end > length:
            raise UserError(f"{path} is cut off: it has {length:,} bytes, and {name!r} ends at byte {end:,}")
        if end - begin != math.prod(size) * torch.empty(0, dtype=dtype).element_size():
            raise UserError(
                f"{path}: {name!r} is said to be {list(size)} of {entry['dtype']}, but {end - begin:,} bytes hold it: "
                "the table is narrower or shorter than said; save it again"
            )
        strides = tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))
        place = Place(path, begin, strides)
        tensors[name] = Stored(size, dtype, (Piece((0,) * len(size), size, functools.partial(_same, place)),))
    return Source(path, "safetensors", tensors)
