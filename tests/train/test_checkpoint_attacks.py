"""Checkpoints made to do harm, by someone who can write every file of a run and knows the checksums.

Each is refused in one sentence; nothing that a file holds is executed, and no weight changes.
"""

import collections
import io
import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import metadata as dcp_metadata
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

from lumrec.run.errors import UserError
from lumrec.run.files import sha256
from lumrec.train.checkpoint import load_weights
from lumrec.train.checkpoint_meta import best_checkpoint, read_meta
from lumrec.train.checkpoint_reader import Reader, load_tensors, metadata_of
from lumrec.train.state import TrainState
from lumrec.warm_start import open_source

WEIGHT = "model.weight"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step-00000003"
    dcp.save({"model": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}}, checkpoint_id=folder, no_dist=True)
    (folder / "rank-0.json").write_text("{}")
    seal(folder)
    return folder


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    """A copy that may be attacked."""
    return Path(shutil.copytree(honest, tmp_path / "run" / "checkpoints" / honest.name))


def seal(folder: Path, **changes: Any) -> None:
    """Writes meta.json and COMPLETE with checksums that are right."""
    files = {file.name: sha256(file) for file in folder.iterdir() if file.name not in ("meta.json", "COMPLETE")}
    step = int(folder.name.removeprefix("step-"))
    meta = {"format": 1, "step": step, "best_step": step, "world_size": 1, "fingerprint": {}, "sharding": {}}
    meta |= {"parameters": {"weight": [2, 3], "bias": [2]}, "state": {}, "files": files}
    seal_as(folder, json.dumps({**meta, **changes}))


def seal_as(folder: Path, meta: str) -> None:
    (folder / "meta.json").write_text(meta)
    (folder / "COMPLETE").write_text(sha256(folder / "meta.json"))


def refused(folder: Path, said: str) -> None:
    """By all that reads checkpoints: training and its readers, and the warm start."""
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    for read in (lambda: load_weights(folder, model), lambda: open_source(folder).read(WEIGHT, 0, 2)):
        with pytest.raises(UserError, match=said):
            read()
    assert torch.equal(model.weight, before)
    assert not (folder / "ran").exists()


def describe(folder: Path, change: Callable[[Metadata], Any]) -> None:
    """Writes .metadata anew, changed."""
    metadata = metadata_of(folder)
    made = change(metadata)
    (folder / ".metadata").write_bytes(made if isinstance(made, bytes) else pickle.dumps(metadata))
    seal(folder)


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "ran"),)


def test_what_is_honest_is_read(folder):
    model = nn.Linear(3, 2)
    load_weights(folder, model)
    assert torch.equal(model.weight.detach(), torch.ones(2, 3))
    assert torch.equal(open_source(folder).read(WEIGHT, 0, 2), torch.ones(2, 3))


# Names: a pickle may import what it likes, unless each name is looked at.
NAMES = [
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "__import__"),
    ("subprocess", "Popen"),
    ("torch.distributed.checkpoint.filesystem", "os.system"),
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("torch", "load"),
    ("torch", "hub.load"),
    ("torch.serialization", "load"),
    ("torch._C", "_jit_pass_inline"),
    ("importlib", "import_module"),
    ("functools", "partial"),
    ("operator", "attrgetter"),
    ("collections", "namedtuple"),
    ("pathlib", "Path.touch"),
    ("pathlib", "Path"),
]


@pytest.mark.parametrize(("module", "name"), NAMES)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_name_that_dcp_does_not_write(folder, module, name, protocol):
    if protocol == 2:
        named = f"c{module}\n{name}\n".encode()
    else:
        named = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93"
    call = b"\x80" + bytes([protocol]) + named + b"(X\x04\x00\x00\x00truetR."
    describe(folder, lambda _: call)
    refused(folder, f"{module}.{name} has no place in a checkpoint's metadata")


@pytest.mark.parametrize("where", ["state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"])
def test_an_object_that_runs_when_unpickled(folder, where):
    describe(folder, lambda metadata: setattr(metadata, where, Runs(folder)))
    refused(folder, "posix.mkdir has no place in a checkpoint's metadata")


def slot_state(name: bytes, state: bytes) -> bytes:
    """BUILD on a class: pickle sets its attributes."""
    module = dcp_metadata.__name__.encode()
    return b"c" + module + b"\n" + name + b"\nN}" + state + b"\x86b0"


@pytest.mark.parametrize("target", [b"StorageMeta", b"_MEM_FORMAT_ENCODING", b"TensorStorageMetadata", b"Metadata"])
def test_attributes_set_on_a_class(folder, target):
    """So DCP's own classes could be made to say, to a check, what is not there."""
    honest = pickle.dumps(metadata_of(folder), protocol=2)[2:]
    describe(folder, lambda _: b"\x80\x02" + slot_state(target, b"X\x05\x00\x00\x00itemsNs") + honest)
    refused(folder, r"metadata\.\w+ where Object was expected")
    assert not hasattr(getattr(dcp_metadata, target.decode()), "items") or target == b"_MEM_FORMAT_ENCODING"


def test_a_state_given_twice(folder):
    honest = pickle.dumps(metadata_of(folder), protocol=3)
    describe(folder, lambda _: honest[:-1] + b"}b.")
    refused(folder, "gets a state twice")


def test_bytes_that_dcp_would_unpickle(folder):
    saved = io.BytesIO()
    torch.save(Runs(folder), saved)
    (folder / "__9_9.distcp").write_bytes(saved.getvalue())

    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[WEIGHT] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(WEIGHT)] = _StorageInfo("__9_9.distcp", 0, len(saved.getvalue()))

    describe(folder, change)
    with pytest.raises(UserError, match="'model.weight', which is no tensor"):
        load_weights(folder, nn.Linear(3, 2))
    source = open_source(folder)
    assert source.others == (WEIGHT,) and WEIGHT not in source.tensors  # named, and never opened
    assert not (folder / "ran").exists()


def test_dcps_planner_is_never_asked_to_unpickle(folder, monkeypatch):
    """Should a description ever pass the checks, the planner still refuses what is no tensor."""
    describe(folder, lambda metadata: metadata.state_dict_metadata.update({WEIGHT: BytesStorageMetadata()}))
    saved = io.BytesIO()
    torch.save(Runs(folder), saved)
    (folder / "__0_0.distcp").write_bytes(saved.getvalue())
    info = _StorageInfo("__0_0.distcp", 0, len(saved.getvalue()))
    passed = Metadata({WEIGHT: BytesStorageMetadata()}, storage_data={MetadataIndex(WEIGHT): info})
    monkeypatch.setattr(Reader, "read_metadata", lambda self, *args, **kwargs: passed)
    with pytest.raises(UserError, match="nothing but tensors is loaded"):
        load_tensors({"model": {"weight": 0}}, folder, files=["__0_0.distcp"])
    assert not (folder / "ran").exists()


OTHER_TYPES = [
    lambda metadata: setattr(metadata, "state_dict_metadata", list(metadata.state_dict_metadata)),
    lambda metadata: setattr(metadata, "state_dict_metadata", None),
    lambda metadata: setattr(metadata, "state_dict_metadata", StorageMeta()),
    lambda metadata: setattr(metadata, "state_dict_metadata", collections.OrderedDict(metadata.state_dict_metadata)),
    lambda metadata: metadata.state_dict_metadata.update({WEIGHT: None}),
    lambda metadata: metadata.state_dict_metadata.update({WEIGHT: StorageMeta()}),
    lambda metadata: metadata.state_dict_metadata.update({7: metadata.state_dict_metadata[WEIGHT]}),
    lambda metadata: setattr(metadata.state_dict_metadata[WEIGHT], "properties", StorageMeta()),
    lambda metadata: setattr(metadata.state_dict_metadata[WEIGHT], "chunks", ()),
    lambda metadata: setattr(metadata.state_dict_metadata[WEIGHT], "size", [2, 3]),
    lambda metadata: setattr(metadata.state_dict_metadata[WEIGHT], "size", (2, 3)),
    lambda metadata: setattr(metadata, "storage_data", None),
    lambda metadata: setattr(metadata, "storage_data", [1]),
    lambda metadata: metadata.storage_data.update({"name": None}),
    lambda metadata: metadata.storage_data.update({MetadataIndex(WEIGHT, [0, 0]): ("__0_0.distcp", 0, 1)}),
    lambda metadata: pickle.dumps(5),
    lambda metadata: pickle.dumps(metadata, protocol=0),
    lambda metadata: b"",
    lambda metadata: b"\x80\x04.",
    lambda metadata: b"\x80\x04N",
    lambda metadata: b"\x80\x04h\x07.",
    lambda metadata: b"\x80\x04" + b"(" * 1000 + b"t" * 1000 + b".",
    lambda metadata: b"\x80\x04r\xff\xff\xff\xff.",
    lambda metadata: b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    lambda metadata: b"\x80\x04\x82\x01.",
    lambda metadata: b"\x80\x04X\x01\x00\x00\x00aQ.",
    lambda metadata: b"\xff" * 100,
]


@pytest.mark.parametrize("change", OTHER_TYPES)
def test_another_type_where_dcp_has_one(folder, change):
    describe(folder, change)
    refused(folder, "metadata was not written by lumrec or by DCP of this version")


def of_weight(metadata: Metadata) -> TensorStorageMetadata:
    entry = metadata.state_dict_metadata[WEIGHT]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


SIZES = [
    ((2, 2**62), (2, 3), "more numbers than there can be"),
    ((2**40, 2**40), (2**40, 2**40), "bytes hold it"),
    ((2, 4), (2, 4), r"is \[2, 3\] in the checkpoint|its .metadata says|could not be loaded"),
    ((2, 3), (1, 3), "its pieces hold 3"),
    ((2, 3), (2, 4), "holds a piece of"),
    ((2,), (2, 3), "holds a piece of"),
    ((), (2, 3), "holds a piece of"),
]


@pytest.mark.parametrize(("size", "piece", "said"), SIZES)
def test_sizes_that_are_not_those_of_the_file(folder, size, piece, said):
    def change(metadata: Metadata) -> None:
        of_weight(metadata).size = torch.Size(size)
        of_weight(metadata).chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size(piece))]

    describe(folder, change)
    refused(folder, said)


@pytest.mark.parametrize("number", [-1, 2**63, 2**100, True, 1.0, "2", None])
@pytest.mark.parametrize("where", ["size", "offset", "length"])
def test_numbers_that_are_no_sizes(folder, number, where):
    """By the bytes of the pickle, since torch.Size itself would refuse most of them."""

    class Size:
        def __reduce__(self) -> Any:
            return torch.Size, ((number, 3),)

    def change(metadata: Metadata) -> None:
        if where == "size":
            of_weight(metadata).size = Size()  # type: ignore[assignment]
        else:
            setattr(metadata.storage_data[MetadataIndex(WEIGHT, [0, 0])], where, number)

    describe(folder, change)
    refused(folder, "was not written by")


def test_pieces_that_overlap_and_leave_a_hole(folder):
    """The hole would keep what the model had before: random weights, silently."""

    def change(metadata: Metadata) -> None:
        entry, index = of_weight(metadata), MetadataIndex(WEIGHT, [0, 0])
        places = [(0, 0), (0, 1)]
        entry.size = torch.Size([2, 6])
        entry.chunks = [ChunkStorageMetadata(torch.Size(place), torch.Size([2, 3])) for place in places]
        info = metadata.storage_data[index]
        metadata.storage_data |= {MetadataIndex(WEIGHT, place): info for place in places}

    describe(folder, change)
    refused(folder, "two of its pieces overlap")


PATHS = ["/etc/passwd", "../step-00000003/__0_0.distcp", "a/../../x", "./__0_0.distcp", "", "a\0b", "a\nb", "x" * 5000]


@pytest.mark.parametrize("path", PATHS)
def test_a_file_outside_of_the_folder(folder, path):
    index = MetadataIndex(WEIGHT, [0, 0])
    describe(folder, lambda metadata: setattr(metadata.storage_data[index], "relative_path", path))
    refused(folder, "no name of a file in this folder")


def test_a_link_that_leads_out_of_the_folder(folder, tmp_path):
    shutil.move(folder / "__0_0.distcp", tmp_path / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    seal(folder)
    refused(folder, "a link that leads out of the folder")


def test_a_file_that_the_checksums_do_not_cover(folder):
    shutil.copy(folder / "__0_0.distcp", folder / "other.distcp")
    index = MetadataIndex(WEIGHT, [0, 0])
    describe(folder, lambda metadata: setattr(metadata.storage_data[index], "relative_path", "other.distcp"))
    meta = json.loads((folder / "meta.json").read_text())
    del meta["files"]["other.distcp"]
    seal_as(folder, json.dumps(meta))
    with pytest.raises(UserError, match=r"is in other.distcp, which its meta.json does not list"):
        load_weights(folder, nn.Linear(3, 2))


def test_tensor_files_that_are_not_as_torch_writes_them(folder):
    index = MetadataIndex(WEIGHT, [0, 0])
    info = metadata_of(folder).storage_data[index]
    content = (folder / "__0_0.distcp").read_bytes()
    part = content[info.offset : info.offset + info.length]
    compressed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(part)) as old, zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    code, legacy = io.BytesIO(), io.BytesIO()
    torch.save(Runs(folder), code)
    torch.save(torch.ones(2, 3), legacy, _use_new_zipfile_serialization=False)
    for saved in (
        compressed.getvalue(),
        code.getvalue(),
        legacy.getvalue(),
        pickle.dumps(Runs(folder)),
        b"\0" * 4096,
        part[: len(part) // 2],
    ):
        (folder / "__1_0.distcp").write_bytes(saved.ljust(24, b"\0"))
        length = max(24, len(saved))

        def change(metadata: Metadata, length: int = length) -> None:
            metadata.storage_data[index] = _StorageInfo("__1_0.distcp", 0, length)

        describe(folder, change)
        refused(
            folder,
            "compressed, as torch.save never writes it|could run code|could not be loaded|as an archive of torch.save",
        )


META = {
    "cut": lambda meta: json.dumps(meta)[:-9],
    "empty": lambda meta: "",
    "a list": lambda meta: json.dumps([meta]),
    "a number": lambda meta: "7",
    "null": lambda meta: "null",
    "deep": lambda meta: "[" * 100_000,
    "NaN step": lambda meta: json.dumps({**meta, "step": math.nan}),
    "infinite best step": lambda meta: json.dumps({**meta, "best_step": math.inf}),
    "huge step": lambda meta: json.dumps({**meta, "step": 10**300}),
    "long number": lambda meta: '{"format": ' + "9" * 10_000 + "}",
    "negative step": lambda meta: json.dumps({**meta, "best_step": -3}),
    "a truth value": lambda meta: json.dumps({**meta, "world_size": True}),
    "a text": lambda meta: json.dumps({**meta, "step": "3"}),
    "files as a list": lambda meta: json.dumps({**meta, "files": [*meta["files"]]}),
    "a file elsewhere": lambda meta: json.dumps({**meta, "files": {**meta["files"], "../../x": "0"}}),
    "an absolute file": lambda meta: json.dumps({**meta, "files": {**meta["files"], "/dev/zero": "0"}}),
    "a checksum as a number": lambda meta: json.dumps({**meta, "files": {".metadata": 0}}),
    "parameters as a list": lambda meta: json.dumps({**meta, "parameters": [["weight", [2, 3]]]}),
    "a size as a text": lambda meta: json.dumps({**meta, "parameters": {"weight": "23", "bias": [2]}}),
    "a fractional size": lambda meta: json.dumps({**meta, "parameters": {"weight": [2.0, 3], "bias": [2]}}),
    "fingerprint as a text": lambda meta: json.dumps({**meta, "fingerprint": "data"}),
    "fingerprint of numbers": lambda meta: json.dumps({**meta, "fingerprint": {"data": 5}}),
    "state as null": lambda meta: json.dumps({**meta, "state": None}),
    "sharding as a list": lambda meta: json.dumps({**meta, "sharding": []}),
    "another format": lambda meta: json.dumps({**meta, "format": [1]}),
}


@pytest.mark.parametrize("change", META.values(), ids=META)
def test_a_meta_json_that_is_not_as_it_is_written(folder, change):
    seal_as(folder, change(json.loads((folder / "meta.json").read_text())))
    refused(folder, "meta.json")
    with pytest.raises(UserError, match="meta.json"):
        best_checkpoint(folder.parents[1])


@pytest.mark.parametrize("name", ["COMPLETE", "meta.json", ".metadata", "__0_0.distcp", "rank-0.json"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"{"])
def test_a_file_that_is_missing_empty_cut_or_no_text(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    refused(folder, rf"{name}|no COMPLETE")


STATES = [
    {"step": "1"},
    {"step": -1},
    {"step": 2**60},
    {"stopped": 1},
    {"window": [1]},
    {"best_metrics": {"auc": "x"}},
    {"loss": None},
    {"other": 1},
    {"best_value": "x"},
    {"epoch": 1.5},
]


@pytest.mark.parametrize("state", STATES)
def test_a_state_that_no_training_has(state):
    with pytest.raises(UserError, match="the checkpoint's state has"):
        TrainState.of(state)


def test_a_state_that_training_has():
    state = TrainState(step=3, best_value=None, best_metrics={"auc": 1.0}, window={"loss": math.nan})
    assert TrainState.of(json.loads(json.dumps(vars(state)))).step == 3


class TestTheBestCheckpoint:
    """Readers take the best one or none."""

    @pytest.fixture
    def run(self, folder: Path) -> Path:
        """Steps 2, 3 and 4; 3 is the best."""
        for step in (2, 4):
            shutil.copytree(folder, folder.with_name(f"step-0000000{step}"))
        for step in (2, 3, 4):
            seal(folder.with_name(f"step-0000000{step}"), best_step=3)
        run = folder.parents[1]
        (run / "result.json").write_text('{"best_step": 3}')
        return run

    def test_it_is_named_by_the_newest(self, run):
        assert best_checkpoint(run).name == "step-00000003"

    @pytest.mark.parametrize("name", ["COMPLETE", "meta.json"])
    @pytest.mark.parametrize("step", [3, 4])
    def test_nothing_is_taken_in_its_place(self, run, name, step):
        """Of the best one, or of the newest, which names it."""
        (run / "checkpoints" / f"step-0000000{step}" / name).write_text("cut")
        other = 4 if step == 3 else 3
        with pytest.raises(UserError, match=rf"step-0000000{step}.*step-0000000{other} is complete.* not used"):
            best_checkpoint(run)
        (run / "checkpoints" / f"step-0000000{step}" / name).unlink()
        with pytest.raises(UserError, match=rf"step-0000000{step}.*step-0000000{other} is complete.* not used"):
            best_checkpoint(run)

    def test_the_best_one_is_gone(self, run):
        shutil.rmtree(run / "checkpoints" / "step-00000003")
        with pytest.raises(UserError, match=r"step-00000003 holds the best weights.*step-00000004 is complete"):
            best_checkpoint(run)

    def test_another_one_under_its_name(self, run):
        shutil.rmtree(run / "checkpoints" / "step-00000003")
        shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000003")
        with pytest.raises(UserError, match="step-00000003 holds step 2"):
            best_checkpoint(run)

    def test_the_result_names_another(self, run):
        (run / "result.json").write_text('{"best_step": 4}')
        with pytest.raises(UserError, match="weights of step 4 were the best, .*names step-00000003"):
            best_checkpoint(run)
        (run / "result.json").write_text('{"best_')
        with pytest.raises(UserError, match="result.json is damaged or cut off: it is not JSON"):
            best_checkpoint(run)

    def test_a_run_without_any(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
            best_checkpoint(tmp_path)


def test_what_is_read_is_what_the_checksum_covers(folder):
    assert read_meta(folder)["step"] == 3
    (folder / "meta.json").write_text((folder / "meta.json").read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(UserError, match="does not have the checksum that COMPLETE states"):
        read_meta(folder)


def test_metadata_with_a_layout_and_properties_of_any_kind(folder):
    """What DCP skips is skipped here as well, and what it would use is checked."""
    describe(folder, lambda metadata: setattr(of_weight(metadata), "properties", TensorProperties(requires_grad=True)))
    model = nn.Linear(3, 2)
    load_weights(folder, model)
    assert torch.equal(model.weight.detach(), torch.ones(2, 3))
