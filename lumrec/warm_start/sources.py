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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import IOBase
from operator import itemgetter
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lumrec.run.errors import UserError
from lumrec.run.files import check_file
from lumrec.train.checkpoint import verified_meta
from lumrec.train.checkpoint_reader import FileSlice, check_archive, metadata_of

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
_ENDS_BYTES = 1 << 16
_MAX_HEADER = 100_000_000  # of safetensors, as its own library has it
_MAX_DEPTH, _MAX_VALUES = 64, 5_000_000


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
    """A tensor of a source: its whole size, dtype, and the pieces that cover it.

    decode: gives the rows first … last-1 of what is worked out from other tensors, and has no pieces.
    """

    size: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    decode: Callable[[int, int], Tensor] | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint: its tensors by name ("model.over_arch.0.weight"), and names of what is no tensor and never read.

    values: text and whole numbers among the latter, where the header holds them (torch.save).
    """

    path: Path
    kind: str
    tensors: Mapping[str, Stored]
    others: tuple[str, ...] = ()
    values: Mapping[str, str | int] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Changes with the names, lengths, first or last bytes of its files: cheap, for files that nobody forges."""
        digest = hashlib.sha256()
        if self.path.is_dir():
            files = {file for file in self.path.rglob("*") if file.is_file()}
        else:  # an index of safetensors files names others
            files = {self.path, *(piece.place().file for stored in self.tensors.values() for piece in stored.pieces)}
        for file in sorted(files):
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
        if stored.decode is not None:
            return stored.decode(first, last)
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


def open_source(path: str | Path, *, verify: bool = True, key: str = "warm_start.source") -> Source:
    """The checkpoint in `path`: a DCP folder, a safetensors file or its index, or a torch.save file. Collective.

    Only headers are read, and all files must be as long as these say; a checkpoint that lumrec wrote is verified by
    its checksums too (not with verify=False). key: the setting that names it, for errors. Raises MissingFileError where
    there is none; UserError, which says what was got and how to mend it, for a file that is cut off, of an unknown
    version, or that could be read only by running code that it holds.
    """
    path = check_file(path, key, "a DCP folder or a checkpoint file", may_be_folder=True)
    if path.is_dir():
        return _open_dcp(path, verify)
    if path.name.endswith(".safetensors.index.json"):
        return _open_safetensors_index(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return _open_torch_save(path)


def _open_dcp(folder: Path, verify: bool) -> Source:
    if verify and (
        (folder / "meta.json").exists() or (folder / "COMPLETE").exists()
    ):  # lumrec's own: checksums and format
        verified_meta(folder)
    metadata = metadata_of(folder)
    places = {}
    lengths: dict[str, int] = {}
    for index, info in metadata.storage_data.items():
        entry = metadata.state_dict_metadata.get(index.fqn)
        if not isinstance(entry, TensorStorageMetadata):
            continue
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
            place = places[name, tuple(chunk.offsets)]
            sizes, dtype = tuple(chunk.sizes), entry.properties.dtype
            pieces.append(Piece(tuple(chunk.offsets), sizes, functools.partial(place_in, *place, sizes, dtype)))
        tensors[name] = Stored(tuple(entry.size), entry.properties.dtype, tuple(pieces))
    return Source(folder, "dcp", tensors, tuple(others))


def _place_in(file: Path, offset: int, length: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Place:
    """Where a DCP file has the tensor that was saved at byte `offset`. Raises UserError where that is another one."""
    with open(file, "rb") as opened:
        tensor = _headers(file, FileSlice(opened, offset, length))
    found = (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
    if found != (sizes, dtype):
        raise UserError(
            f"{file} holds {found} at byte {offset:,}, but its .metadata says {(sizes, dtype)}: it is damaged"
        )
    return _place_of(file, tensor, offset)


def _place_of(file: Path, tensor: Tensor, offset: int = 0) -> Place:
    start = tensor.untyped_storage()._checkpoint_offset  # set by torch.load in a FakeTensorMode
    if start is None or tensor.is_conj() or tensor.is_neg():
        raise UserError(f"{file} holds a tensor without its own numbers ({tensor.device}); save plain tensors")
    byte = offset + start + int(tensor.storage_offset()) * tensor.element_size()
    return Place(file, byte, tuple(tensor.stride()))


def _same(place: Place) -> Place:
    return place


def _headers(path: Path, file: IOBase | Path) -> Any:
    """What torch.save wrote, its tensors without their numbers: they know the byte at which these begin."""
    check_archive(file, str(path))  # type: ignore[arg-type]
    try:
        with FakeTensorMode():
            return torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), str(error)
        )
        raise UserError(
            f"{path} holds more than tensors and plain values, and reading that could run code which it brings "
            f"({reason.strip()[:200]}). Save only {{name: tensor}}, such as model.state_dict(); a "
            "sharded model by DCP"
        ) from None
    except Exception as error:  # a damaged file can make torch's reader raise almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as torch.save of this version writes it; it may be cut off or no checkpoint: "
            f"{reason[:200]}"
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
    length = path.stat().st_size
    tensors: dict[str, Stored] = {}
    values: dict[str, Any] = {}
    for name, value in _leaves(path, content):
        if name in tensors or name in values:
            raise UserError(
                f"{path} holds two values that are called {name!r}, nested in different ways: give each its own name"
            )
        if not isinstance(value, Tensor):
            values[name] = value
            continue
        if value.layout != torch.strided or value.is_quantized:
            raise UserError(f"{path}: {name!r} is a {value.layout} or quantized tensor; save it as a plain one")
        place, size = _place_of(path, value), tuple(value.shape)
        if math.prod(size) * value.dtype.itemsize > length:
            raise UserError(
                f"{path}: {name!r} is said to be {list(size)}, more numbers than the file has bytes for: it is "
                "expanded or damaged; save it as .contiguous()"
            )
        pieces = (Piece((0,) * len(size), size, functools.partial(_same, place)),)
        tensors[name] = Stored(size, value.dtype, pieces)
    plain = {name: value for name, value in values.items() if isinstance(value, (str, int))}
    return Source(path, "torch.save", tensors, tuple(values), plain)


def _leaves(path: Path, content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that nested mappings and lists hold. Raises UserError for a bottomless one."""
    stack: list[tuple[str, Any, int]] = [("", content, 0)]
    num_values = 0
    while stack:
        prefix, value, depth = stack.pop()
        num_values += 1
        if depth > _MAX_DEPTH or num_values > _MAX_VALUES:
            raise UserError(
                f"{path} holds more than {_MAX_VALUES:,} values, or nested deeper than {_MAX_DEPTH} times; save "
                "{name: tensor} only, such as model.state_dict()"
            )
        if isinstance(value, (Mapping, list, tuple)):
            items = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
            dot = f"{prefix}." if prefix else ""
            stack += [(f"{dot}{key}", inner, depth + 1) for key, inner in reversed(items)]
        else:
            yield prefix, value


def _open_safetensors(path: Path) -> Source:
    length = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        header_length = struct.unpack("<Q", start)[0] if len(start) == 8 else length
        if 8 + header_length > length:
            raise UserError(f"{path} is cut off in its header, or no safetensors file; copy it again")
        if header_length > _MAX_HEADER:
            raise UserError(f"{path} is no safetensors file: its header has {header_length:,} bytes")
        try:
            header = json.loads(file.read(header_length), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is no safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is no safetensors file: its header is a {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors, end_before = {}, 8 + header_length
    entries = [_safetensors_entry(path, name, entry, 8 + header_length, length) for name, entry in header.items()]
    for name, dtype, size, begin, end in sorted(entries, key=itemgetter(3, 4)):
        if begin != end_before:
            raise UserError(
                f"{path}: {name!r} begins at byte {begin:,}, expected {end_before:,}: tensors overlap, or leave gaps"
            )
        end_before = end
        strides = tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))
        place = Place(path, begin, strides)
        tensors[name] = Stored(size, dtype, (Piece((0,) * len(size), size, functools.partial(_same, place)),))
    if end_before != length:
        raise UserError(f"{path}: its tensors end at byte {end_before:,}, the file at {length:,}; save it again")
    return Source(path, "safetensors", tensors)


def _open_safetensors_index(path: Path) -> Source:
    """The tensors of the files beside `path` that it names ("weight_map": tensor → file)."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
        file_of = {name: str(file) for name, file in index["weight_map"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(
            f'{path} is no index of safetensors files; expected {{"weight_map": {{tensor: file, …}}}}'
        ) from None
    files = {}
    for name in sorted(set(file_of.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{path} names the file {name!r}; expected names of .safetensors files in its own folder")
        part = check_file(path.parent / name, str(path), "a part of this checkpoint; copy all of it")
        files[name] = _open_safetensors(part).tensors
    tensors = {}
    for name, file in file_of.items():
        if name not in files[file]:
            raise UserError(f"{path} says that {file} holds {name!r}, which it does not: they are of two checkpoints")
        tensors[name] = files[file][name]
    for file, inside in files.items():
        if left := sorted(name for name in inside if file_of.get(name) != file):
            raise UserError(f"{file} holds {left[0]!r}, of which {path} knows nothing: they are of two checkpoints")
    return Source(path, "safetensors", tensors)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name is there twice")
    return content


def _safetensors_entry(
    path: Path, name: str, entry: Any, start: int, length: int
) -> tuple[str, torch.dtype, tuple[int, ...], int, int]:
    """Name, dtype, size, first byte and byte after the last one, of an entry of the header. Raises UserError."""
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise UserError(f"{path}: {name!r} is no entry of safetensors; expected dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_are_numbers(shape) and _are_numbers(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise UserError(
            f"{path}: {name!r} has the shape {shape!r:.100} and bytes {offsets!r:.100}; expected numbers from 0"
        )
    dtype = SAFETENSORS_TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise UserError(
            f"{path}: {name!r} is of dtype {entry['dtype']}; expected one of {', '.join(SAFETENSORS_TYPES)}"
        )
    begin, end = start + offsets[0], start + offsets[1]
    if end > length:
        raise UserError(f"{path} is cut off: it has {length:,} bytes, and {name!r} ends at byte {end:,}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: {name!r} is said to be {shape} of {entry['dtype']}, but {end - begin:,} bytes hold it: the table "
            "is narrower or shorter than said; save it again"
        )
    return name, dtype, tuple(shape), begin, end


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
