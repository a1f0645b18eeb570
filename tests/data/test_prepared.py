"""Opening prepared folders: whole, cut, damaged, of another version."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from lumrec.data.config import DataConfig
from lumrec.data.manifest import PreparedDataError
from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import EVENT_ROLES, ROLES, features_by_role
from lumrec.data.simulator.config import SimulatorConfig

SMALL = DataConfig(source="simulator", simulator=SimulatorConfig(num_users=30, num_items=40, events_per_user=20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stage_config: type) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "whole"
    prepare(stage_config(data=SMALL, runs_dir=str(path.parent)), path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_arrays_and_columns(folder: Path):
    data = PreparedData.open(folder)
    events = pl.read_parquet(folder / "events")
    for name, dtype in (("user", np.int64), ("item", np.int64), ("timestamp", np.int64), ("order", np.int64),
                        ("label", np.float32), ("split", np.int8), ("probability", np.float32)):  # fmt: skip
        array = getattr(data, name)
        assert array.dtype == dtype
        assert array.tolist() == events[name].to_list()
        torch.from_numpy(array)
    assert data.user_offsets[0] == 0
    assert data.user_offsets[-1] == data.num_events == len(events)
    for user, (first, last) in enumerate(zip(data.user_offsets, data.user_offsets[1:])):
        assert (data.user[first:last] == user).all()
        assert (np.diff(data.timestamp[first:last]) >= 0).all()
    of_roles = {role: features_by_role(data.schema, role) for role in ROLES}
    assert list(data.event_columns) == [name for role in EVENT_ROLES for name in of_roles[role]]
    assert "query" in data.event_columns
    assert list(data.item_columns) == ["item_id", "categories", "price_bucket"]
    for name, values in data.dense.items():
        role = data.schema.features[name].role
        index = {"item": data.item, "user": data.user, "context": np.arange(data.num_events)}[role]
        assert values.dtype == np.float32
        # scaled by the training events
        assert values[index][data.split == 0].mean() == pytest.approx(0, abs=1e-3)
        assert values[index][data.split == 0].std() == pytest.approx(1, abs=1e-2)
    assert "price" in data.dense
    assert list(data.user_columns) == ["segment"]
    for columns, size in (
        (data.event_columns, data.num_events),
        (data.item_columns, data.num_items),
        (data.user_columns, data.num_users),
    ):
        for name, column in columns.items():
            assert len(column.values if column.offsets is None else column.offsets[1:]) == size
            assert column.values.dtype == torch.int64
            assert 0 <= column.values.min()
            assert column.values.max() < data.table_rows[data.schema.features[name].table]
    lengths = data.event_columns["query"].take(torch.arange(data.num_events))[1]
    assert lengths.tolist() == events["query"].list.len().to_list()
    assert data.item_counts.sum() == (data.split == 0).sum()
    assert data.item_titles() == data.item_keys()  # the simulator has no titles
    assert "probability" not in data.schema.features


def test_events_in_several_files(folder: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, stage_config: type):
    monkeypatch.setattr("lumrec.data.ingest.BLOCK_ROWS", 100)
    config = stage_config(data=SMALL, runs_dir=str(copy.parent), overwrite=True)
    prepare(config, copy)
    one, several = PreparedData.open(folder), PreparedData.open(copy)
    assert len(list((copy / "events").iterdir())) > 3
    assert (one.order == several.order).all()
    for name, column in one.event_columns.items():
        assert torch.equal(column.values, several.event_columns[name].values)


def test_unknown_table(folder: Path):
    with pytest.raises(ValueError, match="no table 'genre'; there are: item_id, categories"):
        PreparedData.open(folder).vocabulary("genre")


def test_missing_folder_names_the_command(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=f"torchx run apps/prepare.py .* runs_dir={tmp_path} run=none"):
        PreparedData.open(tmp_path / "none")


def test_half_written_folder(copy: Path):
    (copy / "manifest.json").unlink()
    with pytest.raises(PreparedDataError, match="has no manifest.json.*Prepare it again"):
        PreparedData.open(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_unreadable_manifest(copy: Path, content: bytes):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(PreparedDataError, match="manifest.json cannot be read"):
        PreparedData.open(copy)


def test_another_format_version(copy: Path):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(PreparedDataError, match="format version 99; this lumrec reads version 4"):
        PreparedData.open(copy)


@pytest.mark.parametrize("name", ["mapped/item.npy", "items.parquet", "vocabulary/item_id.parquet"])
def test_missing_cut_and_changed_files_are_named(copy: Path, name: str):
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(PreparedDataError, match=f"{name} was changed or damaged"):
        PreparedData.open(copy)
    if name == "items.parquet":  # the others are read on demand
        with pytest.raises(PreparedDataError, match=f"cannot read {name}"):
            PreparedData.open(copy, verify=False)
    (copy / name).write_bytes(whole[:100])
    with pytest.raises(PreparedDataError, match=f"{name} has 100 bytes.*cut off or changed"):
        PreparedData.open(copy, verify=False)
    (copy / name).unlink()
    with pytest.raises(PreparedDataError, match=f"{name} is missing"):
        PreparedData.open(copy, verify=False)


def test_files_that_the_manifest_does_not_list_are_not_read(copy: Path):
    shutil.copy(copy / "events" / "part-00000.parquet", copy / "events" / "part-00001.parquet")
    assert PreparedData.open(copy).num_events == PreparedData.open(copy, verify=False).num_events
    assert (PreparedData.open(copy).order == np.arange(PreparedData.open(copy).num_events)).all()
