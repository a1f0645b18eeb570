"""What a checkpoint or a vocabulary can have wrong: told in a sentence; neither it nor the model is changed."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import polars as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from digests import digests
from safetensors.torch import save_file
from takeover import ROWS, TABLES, dlrm, rules
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from lumrec.train.checkpoint_reader import metadata_of
from lumrec.warm_start import open_source, warm_start

ITEM = f"model.{TABLES}.item.weight"


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., None]:
    """Asserts that a source is refused with these words, everything staying as it is."""

    def refused(source: Path, said: str, rules: object, model: nn.Module | None = None) -> None:
        model = model or dlrm()
        before, bytes_before = {n: v.clone() for n, v in model.state_dict().items()}, digests(tmp_path)
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            warm_start(model, source, rules)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert digests(tmp_path) == bytes_before

    return refused


@pytest.fixture
def copied(production: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(production / "rowwise_adagrad", tmp_path / "production"))


@pytest.fixture
def tensors(copied: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(copied / "model.pt", weights_only=True)["model"]
    return {f"model.{name}": value for name, value in saved.items()}


def cut(file: Path, left: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * left)])


@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.999])
def test_cut_off(copied, tensors, refused, left):
    save_file(tensors, copied / "model.safetensors")
    for name in ("model.pt", "model.safetensors", "dcp/__1_0.distcp"):
        cut(copied / name, left)
    refused(copied / "model.pt", "cannot be read as an archive of torch.save|is no archive of", rules())
    refused(copied / "model.safetensors", "is cut off", rules())
    refused(copied / "dcp", r"is cut off: __1_0.distcp has [\d,]+ bytes", rules())
    cut(copied / "dcp" / ".metadata", left)
    refused(copied / "dcp", "metadata was not written by", rules())


def test_files_that_are_missing(copied, refused):
    (copied / "dcp" / "__0_0.distcp").unlink()
    refused(copied / "dcp", "__0_0.distcp is missing", rules())
    (copied / "dcp" / ".metadata").unlink()
    refused(copied / "dcp", "no .metadata, so it is no complete DCP checkpoint", rules())
    refused(copied / "nowhere", "there is no .*nowhere", rules())


def test_wrong_versions(copied, refused):
    metadata = metadata_of(copied / "dcp")
    metadata.version = "9.0"
    (copied / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(copied / "dcp", "DCP checkpoint of version '9.0'; this lumrec reads 1.0.0", rules())
    with zipfile.ZipFile(copied / "model.pt") as old, zipfile.ZipFile(copied / "new.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"999\n" if name.endswith("/version") else old.read(name))
    refused(copied / "new.pt", "version 999", rules())


def test_a_lumrec_checkpoint_is_verified(tmp_path, refused):
    from lumrec.run.files import sha256

    folder = tmp_path / "step-00000001"
    dcp.save({"model": {"weight": torch.ones(2, 2)}}, checkpoint_id=folder, no_dist=True)
    files = {file.name: sha256(file) for file in folder.iterdir()}
    meta = dict.fromkeys(("step", "best_step", "world_size"), 1) | dict.fromkeys(("fingerprint", "parameters"), {})
    meta |= {"state": {}, "sharding": {}, "files": files}
    for number in (1, 99):
        (folder / "meta.json").write_text(json.dumps(meta | {"format": number}))
        (folder / "COMPLETE").write_text(sha256(folder / "meta.json"))
        model = nn.Linear(2, 2, bias=False)
        if number == 1:
            warm_start(model, folder, {"source_prefix": "model.", "rules": [{"source": "weight"}]})
            assert torch.equal(model.weight.detach(), torch.ones(2, 2))
        else:
            refused(folder, "its format is 99, this lumrec reads format 1", {"rules": []}, model)
    (folder / "COMPLETE").unlink()
    refused(folder, "is not a complete checkpoint", {"rules": []}, nn.Linear(2, 2))


def test_code_is_never_run(tmp_path, refused):
    torch.save(dlrm(), tmp_path / "whole.pt")
    refused(
        tmp_path / "whole.pt",
        r"more than tensors and plain values.*could run code.*Save only \{name: tensor\}",
        rules(),
    )
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", "from before torch 1.6", rules())
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "holds list; expected a state dict", rules())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite(tensors, refused, tmp_path, value):
    tensors[ITEM][17, 3] = value
    save_file(tensors, tmp_path / "nan.safetensors")
    given = rules() | {"optimizer_prefix": ""}
    refused(tmp_path / "nan.safetensors", r"not finite in 1 rows from row 17 on", given)
    refused(tmp_path / "nan.safetensors", "optimizer_prefix 'optim.state.' begins no name of .*nan.safetens", rules())


def test_a_bad_row_that_nobody_takes_does_not_matter(tmp_path):
    torch.save({"weight": torch.tensor([[1.0], [torch.nan], [3.0]])}, tmp_path / "old.pt")
    for name, keys in (("old", "abc"), ("new", "cax")):
        pl.DataFrame({"key": list(keys), "row": [0, 1, 2]}).write_csv(tmp_path / f"{name}.csv")
    rule = {"source": "weight", "rows": "remap", "source_vocabulary": "old.csv", "target_vocabulary": "new.csv"}
    model = nn.Embedding(3, 1)
    warm_start(model, tmp_path / "old.pt", {"folder": str(tmp_path), "rules": [rule | {"new_rows": "mean"}]})
    assert model.weight.flatten().tolist() == [3, 1, 2]


def test_tables_that_are_not_as_said(copied, tensors, refused, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    said = content.replace(b'"shape":[50,8]', b'"shape":[50,9]', 1)
    (tmp_path / "model.safetensors").write_bytes(said)
    refused(tmp_path / "model.safetensors", r"said to be \[50, 9\].*narrower or shorter than said", rules())
    metadata = metadata_of(copied / "dcp")
    metadata.state_dict_metadata[ITEM].size = torch.Size([60, 8])
    (copied / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(copied / "dcp", r"said to be \[60, 8\] \(480 numbers\), but its pieces hold 400", rules())
    metadata.state_dict_metadata[ITEM].size = torch.Size([40, 8])
    (copied / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(copied / "dcp", r"said to be \[40, 8\], but holds a piece of \[50, 8\]", rules())


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ({"key": ["a", "b", "a"], "row": [0, 1, 2]}, "key 'a' occurs 2 times"),
        ({"key": ["a", "b", "c"], "row": [0, 1, 1]}, "row 1 occurs 2 times"),
        ({"key": ["a", "b"], "row": [0, 50]}, "'b' has row 50 .* has 50 rows: it is shorter than the vocabulary says"),
        ({"key": ["a", "b"], "row": [0, -1]}, "'b' has row -1"),
        ({"key": ["a", None], "row": [0, 1]}, "1 entries lack their raw id or their row"),
        ({"key": ["a"], "row": ["first"]}, "expected row numbers"),
        ({"id": ["a"], "row": [0]}, "has no column 'key'; it has id, row"),
        ({"key": ["z"], "row": [0]}, "not one raw id is in both "),
        (None, "there is no .*broken"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_vocabularies_that_are_wrong(copied, refused, tmp_path, frame, said, suffix):
    broken, good = tmp_path / f"broken.{suffix}", tmp_path / "good.csv"
    pl.DataFrame({"key": ["a", "b"], "row": [0, 1]}).write_csv(good)
    if frame is not None:
        pl.DataFrame(frame).write_csv(broken) if suffix == "csv" else pl.DataFrame(frame).write_parquet(broken)
    item = {"source": f"{TABLES}.item.weight", "rows": "remap", "new_rows": "mean"}
    item |= {"source_vocabulary": str(broken), "target_vocabulary": str(good)}
    given = rules(exclude=["*item.weight"])
    refused(copied / "dcp", said, {**given, "rules": [*given["rules"], item]}, dlrm(rows={**ROWS, "item": 60}))


def test_a_column_that_is_there_twice(tmp_path, refused):
    (tmp_path / "ours.csv").write_text("key,row\na,1\n")
    (tmp_path / "theirs.csv").write_text("key,key,row\na,b,1\n")
    torch.save({"weight": torch.ones(4, 3)}, tmp_path / "table.pt")
    rule = {"source": "weight", "rows": "remap", "new_rows": "zero"}
    rule |= {"source_vocabulary": "theirs.csv", "target_vocabulary": "ours.csv"}
    given = {"folder": str(tmp_path), "rules": [rule]}
    refused(tmp_path / "table.pt", "has the column 'key' twice", given, nn.Embedding(4, 3))


@pytest.mark.parametrize(
    ("table", "rule", "said"),
    [
        (torch.empty(0, 3), {"rows": "grow", "new_rows": "zero"}, r"is \[0, 3\] and holds no numbers"),
        (torch.empty(4, 0), {"columns": "pad_zero"}, r"is \[4, 0\] and holds no numbers"),
        (torch.ones(4, 3).to(torch.float8_e4m3fn), {}, "8-bit floats are not read; save them as bfloat16"),
        (torch.ones(4, 3).long(), {"dtype": "cast"}, "numbers of different kinds are not converted"),
    ],
)
def test_tables_without_numbers_that_ours_could_be(tmp_path, refused, table, rule, said):
    torch.save({"weight": table}, tmp_path / "table.pt")
    refused(tmp_path / "table.pt", said, {"rules": [{"source": "weight", **rule}]}, nn.Embedding(4, 3))


def test_a_changed_shard_changes_the_fingerprint_of_its_index(tmp_path):
    index, shard = tmp_path / "m.safetensors.index.json", tmp_path / "m-1.safetensors"
    index.write_text(json.dumps({"weight_map": {"weight": shard.name}}))
    save_file({"weight": torch.ones(2, 3)}, shard)
    before = open_source(index).fingerprint()
    save_file({"weight": torch.zeros(2, 3)}, shard)
    assert open_source(index).fingerprint() != before


def test_a_dcp_file_that_holds_another_tensor(copied, refused):
    """Two tensors' places in the metadata are exchanged."""
    metadata = metadata_of(copied / "dcp")
    user = f"model.{TABLES}.user.weight"
    places = {index.fqn: index for index in metadata.storage_data}
    one, two = places[ITEM], places[user]
    data = metadata.storage_data
    data[one], data[two] = data[two], data[one]
    (copied / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(copied / "dcp", r"holds \(\(40, 8\), torch.float32\) .* its .metadata says \(\(50, 8\)", rules())


class OfDebian12(pickle.Pickler):
    """Pickles an enum as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, x: object) -> object:
        return (getattr, (type(x), x.name)) if isinstance(x, Enum) else NotImplemented


def test_metadata_of_an_older_python_is_read(copied):
    metadata = metadata_of(copied / "dcp")
    with open(copied / "dcp" / ".metadata", "wb") as file:
        OfDebian12(file).dump(metadata)
    assert b"getattr" in (copied / "dcp" / ".metadata").read_bytes()
    assert metadata_of(copied / "dcp") == metadata


class Reaches:
    def __init__(self, owner: object) -> None:
        self.owner = owner

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, (self.owner, "__class__")


@pytest.mark.parametrize("owner", [Metadata, torch.Size, torch.Size([2])])
def test_getattr_reaches_enums_alone(copied, refused, owner):
    metadata = metadata_of(copied / "dcp")
    metadata.planner_data = Reaches(owner)
    (copied / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(copied / "dcp", "getattr of .* has no place in a checkpoint's metadata", rules())


def test_strided_tensors_are_read_right(tmp_path):
    """torch.save keeps a view's strides and its whole storage."""
    whole = torch.randn(6, 10)
    saved = {
        "t": whole.t(),
        "part": whole[1:5, 2:7],
        "row": whole[3],
        "step": torch.tensor(7),
        "none": torch.empty(0, 3),
    }
    torch.save(saved, tmp_path / "views.pt")
    source = open_source(tmp_path / "views.pt")
    for name, value in saved.items():
        expected = value.reshape(1) if not value.dim() else value
        for first in range(len(expected)):
            for last in range(first, len(expected) + 1):
                assert torch.equal(source.read(name, first, last), expected[first:last]), (name, first, last)
