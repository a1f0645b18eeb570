"""Checkpoint files made to do harm: refused in one sentence; nothing in them is executed, no weight is changed."""

import collections
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lumrec.run.errors import UserError
from lumrec.warm_start import open_source


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "ran"),)


def refused(path: Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        source = open_source(path)
        for name, stored in source.tensors.items():
            source.read(name, 0, (stored.size or (1,))[0])
    assert "\n" not in str(caught.value)
    assert not (path.parent / "ran").exists()


def safetensors(path: Path, header: Any, data: bytes = b"\0" * 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


WEIGHT = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def test_what_is_honest_is_read(tmp_path):
    source = open_source(safetensors(tmp_path / "model.safetensors", {"__metadata__": {"a": "b"}, "weight": WEIGHT}))
    assert source.read("weight", 0, 2).tolist() == [[0, 0, 0]] * 2


SAFETENSORS: dict[str, tuple[Any, str]] = {
    "a list": ([], "its header is a list"),
    "a number": (5, "its header is a int"),
    "null": (None, "its header is a NoneType"),
    "no JSON": (b"{'a': 1}", "not JSON"),
    "no UTF-8": (b'{"\xff": 1}', "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "a long number": (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    "a name twice": (b'{"a": 1, "a": 2}', "a name is there twice"),
    "an entry as a list": ({"w": [1]}, "no entry of safetensors"),
    "an entry without a shape": ({"w": {"dtype": "F32", "data_offsets": [0, 24]}}, "no entry of safetensors"),
    "more than an entry has": ({"w": {**WEIGHT, "code": "x"}}, "no entry of safetensors"),
    "a negative shape": ({"w": {**WEIGHT, "shape": [-2, -3]}}, "expected numbers from 0"),
    "a fractional shape": ({"w": {**WEIGHT, "shape": [2.0, 3]}}, "expected numbers from 0"),
    "a shape of truth values": ({"w": {**WEIGHT, "shape": [True, 6]}}, "expected numbers from 0"),
    "a shape of text": ({"w": {**WEIGHT, "shape": "23"}}, "expected numbers from 0"),
    "an endless shape": ({"w": {**WEIGHT, "shape": [2**62, 2**62]}}, "said to be"),
    "a shape beyond 64 bits": ({"w": {**WEIGHT, "shape": [2**64]}}, "expected numbers from 0"),
    "a shape of zeros and more": ({"w": {**WEIGHT, "shape": [0, 2**62]}}, "said to be"),
    "offsets the wrong way": ({"w": {**WEIGHT, "data_offsets": [24, 0]}}, "expected numbers from 0"),
    "negative offsets": ({"w": {**WEIGHT, "data_offsets": [-24, 0]}}, "expected numbers from 0"),
    "one offset": ({"w": {**WEIGHT, "data_offsets": [24]}}, "expected numbers from 0"),
    "offsets as null": ({"w": {**WEIGHT, "data_offsets": None}}, "expected numbers from 0"),
    "past the end": ({"w": {**WEIGHT, "shape": [2, 4], "data_offsets": [0, 32]}}, "is cut off"),
    "overlapping": ({"a": WEIGHT, "b": WEIGHT}, "tensors overlap, or leave gaps"),
    "a gap": ({"a": {**WEIGHT, "shape": [5], "data_offsets": [4, 24]}}, "tensors overlap, or leave gaps"),
    "more bytes than tensors": ({"a": {**WEIGHT, "shape": [5], "data_offsets": [0, 20]}}, "its tensors end at byte"),
    "dtype of code": ({"w": {**WEIGHT, "dtype": "os.system"}}, "is of dtype os.system"),
    "dtype as a list": ({"w": {**WEIGHT, "dtype": ["F32"]}}, "is of dtype"),
    "dtype NaN": (b'{"w": {"dtype": NaN, "shape": [2, 3], "data_offsets": [0, 24]}}', "is of dtype"),
    "shape NaN": (b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 24]}}', "expected numbers from 0"),
    "shape infinite": (b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 24]}}', "numbers from 0"),
}


@pytest.mark.parametrize(("header", "said"), SAFETENSORS.values(), ids=SAFETENSORS)
def test_safetensors(tmp_path, header, said):
    refused(safetensors(tmp_path / "model.safetensors", header), said)


@pytest.mark.parametrize("length", [0, 1, 7, 2**31, 2**63, 2**64 - 1])
def test_the_length_of_a_safetensors_header(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    refused(path, "cut off in its header|not JSON")
    path.write_bytes(struct.pack("<Q", length)[:5])
    refused(path, "cut off in its header")


def saved(path: Path, content: Any, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


def repacked(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with changed records."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in records.items():
            new.writestr(name, change(name, content))
    return path


def pickled(path: Path, content: bytes) -> Path:
    """An archive of torch.save with another pickle in it."""
    saved(path, {"weight": torch.ones(2, 3)})
    return repacked(path, lambda name, record: content if name.endswith("data.pkl") else record)


def call(module: str, name: str, argument: str) -> bytes:
    return (
        f"\x80\x02c{module}\n{name}\nX".encode("latin-1")
        + struct.pack("<I", len(argument))
        + argument.encode()
        + b"\x85R."
    )


CALLS = [
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("subprocess", "check_output"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("torch.serialization", "load"),
    ("torch._utils", "_import_dotted_name"),
    ("numpy", "load"),
    ("pickle", "loads"),
    ("pathlib", "PosixPath"),
    ("torch.utils.cpp_extension", "load_inline"),
    ("lumrec.run.files", "remove_folder"),
]


@pytest.mark.parametrize(("module", "name"), CALLS)
def test_a_name_in_torch_saves_pickle(tmp_path, module, name):
    refused(pickled(tmp_path / "model.pt", call(module, name, "true")), "could run code")


def nested(depth: int) -> Any:
    value: Any = torch.ones(1)
    for _ in range(depth):
        value = {"a": value}
    return value


def endless() -> dict[str, Any]:
    content: dict[str, Any] = {"weight": torch.ones(1)}
    content["self"] = content
    return content


def laughs(levels: int = 30) -> dict[str, Any]:
    value: list[Any] = [0]
    for _ in range(levels):
        value = [value, value]
    return {"weight": torch.ones(1), "more": value}


TORCH_SAVE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a pickle and no archive": (
        lambda p: p if p.write_bytes(b"PK" + pickle.dumps(Runs(p.parent))) else p,
        "torch.save",
    ),
    "a pickle": (lambda p: p if p.write_bytes(pickle.dumps(Runs(p.parent))) else p, "is no archive of torch.save"),
    "an object": (lambda p: saved(p, {"a": torch.ones(1), "b": Runs(p.parent)}), "could run code"),
    "a key that is an object": (lambda p: saved(p, {Path("x"): torch.ones(1)}), "could run code"),
    "the old format": (lambda p: saved(p, {"a": 1}, _use_new_zipfile_serialization=False), "no archive of torch.save"),
    "compressed": (
        lambda p: repacked(saved(p, {"a": torch.ones(9)}), lambda name, record: record, zipfile.ZIP_DEFLATED),
        "compressed, as torch.save never writes it",
    ),
    "a bomb": (
        lambda p: repacked(
            saved(p, {"a": torch.ones(9)}),
            lambda name, record: b"\0" * 50_000_000 if name.endswith("data.pkl") else record,
            zipfile.ZIP_DEFLATED,
        ),
        "compressed, as torch.save never writes it",
    ),
    "an empty archive": (lambda p: zipfile.ZipFile(p, "w").close() or p, "cannot be read|no archive"),
    "another archive": (lambda p: zipfile.ZipFile(p, "w").writestr("x/data.pkl", b"") or p, "cannot be read"),
    "no pickle": (lambda p: pickled(p, b""), "cannot be read"),
    "a cut pickle": (lambda p: pickled(p, b"\x80\x02}"), "cannot be read"),
    "a number": (lambda p: pickled(p, b"\x80\x02K\x05."), "holds int; expected a state dict"),
    "an unknown opcode": (lambda p: pickled(p, b"\x80\x02\xfe."), "could run code|cannot be read"),
    "much memory": (
        lambda p: pickled(p, b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + struct.pack("<Q", 2**62) + b"\x85R."),
        "cannot be read|holds bytearray",
    ),
    "endless": (lambda p: saved(p, endless()), "nested deeper than 64"),
    "deep": (lambda p: saved(p, nested(200)), "nested deeper than 64"),
    "a billion laughs": (lambda p: saved(p, laughs()), "holds more than"),
    "meta": (lambda p: saved(p, {"a": torch.ones(2, device="meta")}), "without its own numbers"),
    "sparse": (lambda p: saved(p, {"a": torch.ones(2, 2).to_sparse()}), "save it as a plain one|cannot be read"),
    "expanded": (lambda p: saved(p, {"a": torch.ones(1).expand(2**40)}), "expanded or damaged"),
    "conjugate": (lambda p: saved(p, {"a": torch.ones(2, dtype=torch.complex64).conj()}), "without numbers|plain"),
    "a folder as a file": (lambda p: p.mkdir() or p, "no .metadata"),
    "TorchScript": (
        lambda p: torch.jit.script(torch.nn.Linear(2, 2)).save(str(p)) or p,
        "cannot be read|could run code|compressed",
    ),
    "something before the archive": (
        lambda p: p if p.write_bytes(pickle.dumps(Runs(p.parent)) + saved(p, {"a": 1}).read_bytes()) else p,
        "no archive of torch.save",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "said"), TORCH_SAVE.values(), ids=TORCH_SAVE)
def test_torch_save(tmp_path, make, said):
    refused(make(tmp_path / "model.pt"), said)


def test_a_storage_that_is_shorter_than_its_tensor(tmp_path):
    path = saved(tmp_path / "model.pt", {"weight": torch.ones(200, 3)})
    repacked(path, lambda name, record: record[:40] if "/data/" in name else record)
    refused(path, "ends .* bytes too early|cannot be read|more numbers than the file")


def test_a_strided_tensor_that_reaches_past_its_storage(tmp_path):
    """By a pickle of hand: size 3 × 3 with strides that lead out of the file."""
    saved(tmp_path / "model.pt", {"weight": torch.ones(2, 3)})
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        content = archive.read(name)
    assert b"K\x02K\x03\x86" in content and b"K\x03K\x01\x86" in content
    changed = content.replace(b"K\x03K\x01\x86", b"M\xff\xffK\x01\x86")
    repacked(tmp_path / "model.pt", lambda n, record: changed if n == name else record)
    refused(tmp_path / "model.pt", "cannot be read|cut off|bytes too early")


def test_what_pickle_says_of_ordered_dicts(tmp_path):
    """A state dict of torch is an OrderedDict with _metadata, which is set as an attribute and not read as a tensor."""
    content = collections.OrderedDict(weight=torch.ones(2))
    content._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    torch.save(content, buffer)
    (tmp_path / "model.pt").write_bytes(buffer.getvalue())
    assert list(open_source(tmp_path / "model.pt").tensors) == ["weight"]
