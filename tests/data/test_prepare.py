"""The prepare stage: what may depend on what, determinism, and what happens to folders that stand already."""

import fcntl
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.data.config import DataConfig
from lumrec.data.convert import convert
from lumrec.data.manifest import PreparedDataError, write_manifest
from lumrec.data.open_log import read_source
from lumrec.data.prepare import open_or_prepare, prepare, warnings
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import FeatureConfig, SchemaConfig, validate
from lumrec.data.simulator.config import SimulatorConfig
from lumrec.data.simulator.simulate import DEFAULT_SCHEMAS
from lumrec.data.sources.raw_log import RawLog
from lumrec.data.splits import TEST, TRAIN, SplitConfig, user_fold
from lumrec.experiments.config import load
from lumrec.run.errors import UserError
from lumrec.stages.prepare import run
from lumrec.stages.registry import STAGES

SMALL = DataConfig(source="simulator", simulator=SimulatorConfig(num_users=40, num_items=50, events_per_user=20))
KINDS = ["temporal", "leave_one_out", "user", "time"]


def checksums(folder: Path) -> dict[str, str]:
    return {
        name: facts["sha256"] for name, facts in json.loads((folder / "manifest.json").read_text())["files"].items()
    }


def test_the_stage_makes_the_folder_and_its_result(make_config: Callable, capsys: pytest.CaptureFixture):
    config = make_config(SMALL)
    result = STAGES["prepare"].run(config)
    folder = config.prepared
    assert folder.name == "test-prepare"
    assert json.loads((folder / "result.json").read_text()) == result
    assert all(isinstance(value, (int, float, str)) for value in result.values())
    assert result["events"] == result["train_events"] + result["valid_events"] + result["test_events"]
    assert "best possible AUC on the test part 0." in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "events",
        "items.parquet",
        "manifest.json",
        "mapped",
        "quarantine.parquet",
        "result.json",
        "users.parquet",
        "vocabulary",
    ]
    assert os.listdir(config.runs_dir) == ["test-prepare"]


def test_only_rank_0_of_a_launched_job_prepares(make_config: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    config = make_config(SMALL)
    assert STAGES["prepare"].run(config) == {}
    assert not Path(config.runs_dir).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_config_gives_the_same_bytes(make_config: Callable, kind: str, tmp_path: Path):
    config = make_config(replace(SMALL, split=SplitConfig(kind)))
    first, second, other = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    prepare(config, first)
    prepare(config, second)
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()
    parts = {name.split("/")[0] for name in checksums(first)}
    assert parts == {"events", "mapped", "items.parquet", "users.parquet", "vocabulary", "quarantine.parquet"}
    prepare(replace(config, seed=1), other)
    assert checksums(other)["events/part-00000.parquet"] != checksums(first)["events/part-00000.parquet"]
    assert PreparedData.open(other).fingerprint != PreparedData.open(first).fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_feedback_of_the_test_part_change_nothing_else(make_config: Callable, kind: str, tmp_path: Path):
    """Leakage: shuffle what the test part would tell, and compare everything that training reads."""
    config = make_config(replace(SMALL, split=SplitConfig(kind)))
    (scratch := tmp_path / "source").mkdir()
    raw, schema = read_source(config.data, config.schema, seed=config.seed, scratch=scratch)
    before = convert_log(raw, config.data.split, schema, tmp_path / "before")
    in_test = pl.Series(np.isin(np.arange(before.num_events), before.order[before.split == TEST]))
    events = raw.events.collect()
    shuffled = np.random.default_rng(0).permutation(int(in_test.sum()))
    label = events["label"].to_numpy().copy()
    label[in_test.to_numpy()] = label[in_test.to_numpy()][shuffled]
    changed = events.with_columns(pl.Series("label", label))
    assert not changed["label"].equals(events["label"])
    after = convert_log(replace(raw, events=changed.lazy()), config.data.split, schema, tmp_path / "after")

    for table in before.table_rows:
        assert before.vocabulary(table) == after.vocabulary(table)
    assert (before.split == after.split).all()
    assert (before.item_counts == after.item_counts).all()
    for name in ("items.parquet", "users.parquet"):
        assert (before.path / name).read_bytes() == (after.path / name).read_bytes()
    rows = pl.read_parquet(before.path / "events"), pl.read_parquet(after.path / "events")
    assert rows[0].filter(pl.col("split") != TEST).equals(rows[1].filter(pl.col("split") != TEST))
    assert not rows[0].equals(rows[1])
    assert rows[0].drop("label", "feedback", "clicked").equals(rows[1].drop("label", "feedback", "clicked"))


def convert_log(raw: RawLog, split: SplitConfig, schema: SchemaConfig, folder: Path, **settings) -> PreparedData:
    folder.mkdir(exist_ok=True)
    content = convert(raw, schema, split, folder, **settings)
    write_manifest(folder, {"schema": asdict(schema), "split": {}, **content})
    return PreparedData.open(folder)


def test_vocabularies_hold_what_the_training_part_holds(make_config: Callable):
    schema = SchemaConfig(features={**DEFAULT_SCHEMAS["simulator"].features, "user_id": FeatureConfig("user")})
    config = make_config(replace(SMALL, split=SplitConfig("user", [0.5, 0.0, 0.5])))
    data = open_or_prepare(replace(config, schema=schema))
    trained = set(data.item[data.split == TRAIN].tolist())
    keys = data.item_keys()
    assert set(data.vocabulary("item_id")) == {keys[item] for item in trained}
    rows = data.item_columns["item_id"].values.tolist()
    for item, row in enumerate(rows):
        assert (row > 0) == (item in trained)
        assert row == data.vocabulary("item_id").get(keys[item], 0)
    # users of the test part are unknown, and so is what only they have
    users = {data.user_keys()[user] for user in data.user[data.split == TRAIN].tolist()}
    assert set(data.vocabulary("user_id")) == users
    frame = pl.read_parquet(data.path / "vocabulary" / "item_id.parquet")
    assert frame["row"].to_list() == list(range(1, len(frame) + 1))
    assert frame.equals(frame.sort(["count", "key"], descending=[True, False]))
    assert dict(zip(frame["key"], frame["count"])) == {keys[item]: data.item_counts[item] for item in trained}
    assert data.table_rows["item_id"] == len(frame) + 1


def test_min_count_makes_rare_values_unknown(make_config: Callable):
    data = open_or_prepare(make_config(replace(SMALL, min_count=12)))
    counts = pl.read_parquet(data.path / "vocabulary" / "item_id.parquet")["count"]
    assert counts.min() >= 12
    assert (data.item_columns["item_id"].values == 0).any()
    assert "data.min_count" not in "".join(warnings(data.manifest))
    none = open_or_prepare(make_config(replace(SMALL, min_count=10**6), name="none"))
    assert "no value of table 'item_id' occurs 1,000,000 times in the training part" in "".join(warnings(none.manifest))


def raw_log(events: list[tuple], items: dict, users: list[str]) -> RawLog:
    columns = {
        "user_id": pl.String,
        "item_id": pl.String,
        "time_us": pl.Int64,
        "label": pl.Float32,
        "words": pl.List(pl.String),
    }
    frame = pl.DataFrame(events, schema=columns, orient="row").with_columns(pl.col("time_us") * 1_000_000)
    return RawLog(
        events=frame.with_row_index("order").with_columns(pl.col("order").cast(pl.Int64)).lazy(),
        items=pl.DataFrame({"item_id": list(items), "tags": list(items.values())}).lazy(),
        users=pl.DataFrame({"user_id": users}).lazy(),
        files=[],
        note="a log made by the test",
    )


WORDS = st.lists(st.sampled_from(["a", "b", "c", "zz"]), max_size=3)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("12345"), st.sampled_from("xyz"), st.integers(1, 6), WORDS), min_size=1, max_size=25
    ),
    st.sampled_from(KINDS),
)
def test_any_small_log_is_read_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, events: list, kind: str):
    """Users with no, one or two events among them; empty lists; ties in time."""
    raw = raw_log(
        [(user, item, time, float(time % 2), words) for user, item, time, words in events],
        {"x": ["t", "u"], "y": [], "z": ["u"]},
        ["1", "2", "3", "4", "5"],
    )
    schema = SchemaConfig(
        features={
            "item_id": FeatureConfig("item"),
            "tags": FeatureConfig("item", kind="multi"),
            "words": FeatureConfig("condition", kind="multi"),
            "user_id": FeatureConfig("user"),
        }
    )
    data = convert_log(raw, SplitConfig(kind), validate(schema), tmp_path_factory.mktemp("log"), drop_duplicates=False)
    expected = sorted((int(user), time, row) for row, (user, _, time, _) in enumerate(events))
    assert list(zip(data.user + 1, data.timestamp, data.order)) == expected
    assert [data.item_keys()[item] for item in data.item] == [events[row][1] for row in data.order]
    assert data.label.tolist() == [events[row][2] % 2 for row in data.order]
    known = data.vocabulary("words")
    assert set(known) == {word for row in data.order[data.split == TRAIN] for word in events[row][3]}
    values, lengths = data.event_columns["words"].take(torch.arange(data.num_events))
    assert lengths.tolist() == [len(events[row][3]) for row in data.order]
    assert values.tolist() == [known.get(word, 0) for row in data.order for word in events[row][3]]
    assert data.user_offsets.tolist() == np.searchsorted(data.user, np.arange(6)).tolist()
    assert user_fold(data.user_keys(), 2).tolist() == user_fold(["1", "2", "3", "4", "5"], 2).tolist()


def test_a_log_without_a_declared_column_is_refused(make_config: Callable):
    for feature, message in (
        (
            FeatureConfig("context", column="device"),
            "events of this source have no column 'device'; they have: user_id,",
        ),
        (FeatureConfig("user", column="age"), "users of this source have no column 'age'; they have: user_id, segment"),
    ):
        schema = SchemaConfig(features={"item_id": FeatureConfig("item"), "new": feature})
        with pytest.raises(ValueError, match=f"schema.features.new: the {message}"):
            STAGES["prepare"].run(make_config(SMALL, schema=schema))


def test_bad_settings_are_refused(make_config: Callable):
    for data, message in (
        (
            replace(SMALL, source="movielens"),
            r"data.source: got 'movielens' \(did you mean 'movielens-1m'\?\), expected",
        ),
        (replace(SMALL, min_count=0), "data.min_count: got 0"),
        (replace(SMALL, split=SplitConfig("random")), "data.split.kind: got 'random'"),
        (replace(SMALL, max_list_length=0), "data.max_list_length: got 0"),
        (replace(SMALL, duplicates="all"), "data.duplicates: got 'all', expected one of drop, keep"),
        (replace(SMALL, simulator=SimulatorConfig(num_users=0)), "data.simulator.num_users: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            STAGES["prepare"].run(make_config(data))


def test_a_folder_that_stands_is_kept_or_refused_or_replaced(make_config: Callable, capsys: pytest.CaptureFixture):
    config = make_config(SMALL)
    first = STAGES["prepare"].run(config)
    folder = config.prepared
    made = os.stat(folder).st_ino
    assert STAGES["prepare"].run(config) == first
    assert os.stat(folder).st_ino == made
    assert "is prepared already" in capsys.readouterr().out
    other = replace(config, data=replace(SMALL, split=SplitConfig("leave_one_out")))
    with pytest.raises(ValueError, match="data.split.kind: 'temporal' in the folder, 'leave_one_out' asked for"):
        STAGES["prepare"].run(other)
    with pytest.raises(PreparedDataError, match="prepared with another config"):
        open_or_prepare(other)
    assert open_or_prepare(replace(other, inputs=replace(config.inputs, prepared="test-prepare"))).num_events
    assert STAGES["prepare"].run(replace(other, overwrite=True))["fingerprint"] != first["fingerprint"]
    assert open_or_prepare(other).manifest["split"]["kind"] == "leave_one_out"
    assert os.listdir(config.runs_dir) == ["test-prepare"]


def test_a_damaged_folder_is_told_and_prepared_again_with_overwrite(make_config: Callable):
    config = make_config(SMALL)
    STAGES["prepare"].run(config)
    path = config.prepared / "items.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(PreparedDataError, match="items.parquet was changed or damaged.*overwrite=true"):
        STAGES["prepare"].run(config)
    STAGES["prepare"].run(replace(config, overwrite=True))
    assert path.read_bytes() == whole


def test_a_folder_of_something_else_is_left_alone(make_config: Callable):
    config = make_config(SMALL, overwrite=True)
    folder = config.prepared
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("two years")
    with pytest.raises(ValueError, match="holds no prepared data"):
        STAGES["prepare"].run(config)
    assert (folder / "thesis.txt").read_text() == "two years"
    assert os.listdir(config.runs_dir) == ["test-prepare"]


def test_what_a_killed_process_left_is_removed(make_config: Callable):
    config = make_config(SMALL)
    left = Path(config.runs_dir) / ".test-prepare.preparing"
    (left / "events").mkdir(parents=True)
    (left / "events" / "part-00007.parquet").write_bytes(b"half")
    STAGES["prepare"].run(config)
    assert os.listdir(config.runs_dir) == ["test-prepare"]
    assert os.listdir(config.prepared / "events") == ["part-00000.parquet"]


def test_a_second_process_waits_for_the_first(make_config: Callable, capsys: pytest.CaptureFixture):
    config = make_config(SMALL)
    work = Path(config.runs_dir) / ".test-prepare.preparing"
    work.mkdir(parents=True)
    lock = os.open(work, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    thread = threading.Thread(target=run, args=(config,))
    thread.start()
    said = ""
    while "waiting for another process" not in said:
        said += capsys.readouterr().out
        time.sleep(0.01)
    assert thread.is_alive()
    assert not config.prepared.exists()
    os.close(lock)
    thread.join()
    assert PreparedData.open(config.prepared).num_users == 40


def test_the_default_folder_is_made_on_demand_and_a_named_one_is_not(
    make_config: Callable, capsys: pytest.CaptureFixture
):
    config = make_config(SMALL)
    with pytest.raises(FileNotFoundError, match="torchx run apps/prepare.py .* run=mine"):
        open_or_prepare(replace(config, inputs=replace(config.inputs, prepared="mine")))
    assert open_or_prepare(config).num_users == 40
    assert "preparing it now" in capsys.readouterr().out
    open_or_prepare(config)
    assert "preparing" not in capsys.readouterr().out


def test_only_what_prepare_made_is_replaced(make_config: Callable):
    config = make_config(SMALL, overwrite=True)
    folder = config.prepared
    for content in ('{"format": 2, "folder": "knowledge-0123456789abcdef-1"}', "{}", "cut"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text(content)
        (folder / "thesis.txt").write_text("two years")
        with pytest.raises(UserError, match="was not made by the prepare stage .*thesis.txt.*never replaced"):
            STAGES["prepare"].run(config)
        (folder / "thesis.txt").unlink()
        with pytest.raises(UserError, match="was not made by the prepare stage"):
            STAGES["prepare"].run(config)
    (folder / "manifest.json").unlink()
    STAGES["prepare"].run(config)
    (folder / "thesis.txt").write_text("two years")
    with pytest.raises(UserError, match="thesis.txt"):
        STAGES["prepare"].run(config)
    (folder / "thesis.txt").unlink()
    (folder / "manifest.json").write_text("cut")
    STAGES["prepare"].run(config)
    assert PreparedData.open(folder).num_users == 40


def test_a_link_is_kept_and_a_mount_refused(make_config: Callable, tmp_path: Path):
    config = make_config(SMALL)
    folder, real = config.prepared, tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(real)
    for overwrite in (False, True):
        STAGES["prepare"].run(replace(config, overwrite=overwrite))
        assert folder.is_symlink() and PreparedData.open(real).num_users == 40
    assert os.listdir(real.parent) == ["real"] and os.listdir(folder.parent) == ["test-prepare"]
    shutil.rmtree(real)
    with pytest.raises(UserError, match="is a link to .*real, which does not exist"):
        STAGES["prepare"].run(config)
    folder.unlink()
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting needs the rights of root")
    try:
        with pytest.raises(UserError, match="is a mount: .*Mount .* instead"):
            STAGES["prepare"].run(config)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_data_that_were_replaced_since_they_were_opened_are_not_mixed_with_the_new_ones(make_config: Callable):
    config = make_config(SMALL)
    STAGES["prepare"].run(config)
    data = PreparedData.open(config.prepared)
    assert data.vocabulary("item_id")
    STAGES["prepare"].run(replace(config, overwrite=True, data=replace(SMALL, min_count=3)))
    with pytest.raises(PreparedDataError, match="has changed since the data were opened: open them again"):
        data.vocabulary("item_id")


def test_a_full_disk_is_not_taken_for_a_damaged_log(make_config: Callable, tmp_path: Path):
    config = make_config(SMALL)
    runs = Path(config.runs_dir)
    runs.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(runs)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs the rights of root")
    try:
        with pytest.raises(UserError, match="no space left for what is prepared for test-prepare .*Make room"):
            STAGES["prepare"].run(config)
        assert os.listdir(runs) == []
        subprocess.run(["mount", "-o", "remount,size=8m", str(runs)], check=True)
        STAGES["prepare"].run(config)
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=True)


@pytest.mark.parametrize(
    "labels, said",
    [
        ([-1, 1], r"data.label has neither values .* 10 of 20 events have another label; say what is positive"),
        ([1, 2, 3, 4, 5], "16 of 20 events have another label"),
        ([1], "every event is positive.*data.log.all_positive=true"),
        ([0], "no event is positive"),
        ([5, 1, "good"], "at_least=4.0; in column 'label' of the log 6 of 20 events have another label"),
    ],
)
def test_labels_of_one_class_or_another_kind_are_refused(tmp_path, labels, said):
    """Else the rows that fit would be the only ones, all positive."""
    log = tmp_path / "log.csv"
    rows = [f"u{i % 4},i{i % 5},{1_700_000_000 + 60 * i},{labels[i % len(labels)]}" for i in range(20)]
    log.write_text("\n".join(["user,item,time,label", *rows]))
    words = ["data.source=log", f"data.log.events={log}", "data.log.user=user", "data.log.item=item"]
    words += ["data.label.at_least=4"] if "at_least" in said else []
    config = load(None, [*words, "data.log.timestamp=time", "schema.features={item_id: {role: item}}"])
    with pytest.raises(UserError, match=said):
        prepare(config, tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()
