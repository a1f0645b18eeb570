"""Vocabularies that build on older ones: known values keep their rows, tables only grow."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumrec.data.config import DataConfig
from lumrec.data.manifest import PreparedDataError
from lumrec.data.own_log.config import LogConfig
from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import FeatureConfig, SchemaConfig
from lumrec.data.sources.raw_log import LabelConfig
from lumrec.data.vocabulary import build_vocabulary, encode, moved_values
from lumrec.run.errors import UserError

COUNTS = st.dictionaries(st.sampled_from([f"v{number}" for number in range(12)]), st.integers(1, 5))
DAY_1 = ["a,x,100000,1,home", "a,y,200000,0,home", "b,x,300000,1,search", "b,z,400000,1,home"]
DAY_2 = ["a,w,500000,1,voice", "c,w,600000,1,voice", "c,x,700000,0,home", "d,v,800000,1,home"]
SCHEMA = SchemaConfig(
    features={"item_id": FeatureConfig("item"), "user_id": FeatureConfig("user"), "scene": FeatureConfig("condition")}
)


def counts_frame(counts: dict[str, int]) -> pl.DataFrame:
    return pl.DataFrame(
        {"key": list(counts), "count": list(counts.values())}, schema={"key": pl.String, "count": pl.Int64}
    )


def rows(vocabulary: pl.DataFrame) -> dict[str, int]:
    return dict(vocabulary.select("key", "row").iter_rows())


@given(COUNTS, COUNTS, st.integers(1, 4))
def test_known_values_keep_their_rows_and_new_ones_stand_behind(before: dict, now: dict, min_count: int):
    older = build_vocabulary(counts_frame(before), 1)
    grown = build_vocabulary(counts_frame(now), min_count, older)
    assert grown.schema == older.schema
    assert grown["row"].to_list() == list(range(1, len(grown) + 1))
    assert rows(grown).items() >= rows(older).items()
    assert len(moved_values(older, grown)) == 0
    assert dict(grown.select("key", "count").iter_rows()) == {key: now.get(key, 0) for key in grown["key"]}
    new = {key: count for key, count in now.items() if key not in before and count >= min_count}
    assert grown["key"][len(older) :].to_list() == sorted(new, key=lambda key: (-new[key], key))


@given(COUNTS, st.integers(1, 4))
def test_without_an_older_one_nothing_is_other_than_it_was(counts: dict, min_count: int):
    vocabulary = build_vocabulary(counts_frame(counts), min_count)
    assert vocabulary.equals(build_vocabulary(counts_frame(counts), min_count, vocabulary.head(0)))
    known = [key for key, count in counts.items() if count >= min_count]
    assert vocabulary["key"].to_list() == sorted(known, key=lambda key: (-counts[key], key))


def test_values_that_moved_or_went_are_named():
    older = build_vocabulary(counts_frame({"a": 3, "b": 2, "c": 1}), 1)
    other = build_vocabulary(counts_frame({"a": 3, "c": 2}), 1)
    assert moved_values(older, other).rows() == [("b", 2, None), ("c", 3, 2)]


@pytest.fixture
def prepare_days(make_config: Callable, tmp_path: Path) -> Callable[..., Path]:
    """Prepares a log of these lines as the run `name`; gives back its folder."""

    def make(name: str, lines: list[str], **settings: object) -> Path:
        (tmp_path / f"{name}.csv").write_text("\n".join(["user_id,item_id,timestamp,label,scene", *lines]) + "\n")
        data = DataConfig(source="log", log=LogConfig(events=str(tmp_path / f"{name}.csv"), time_unit="s"))
        schema = settings.pop("schema", SCHEMA)
        config = make_config(replace(data, **{"split": replace(data.split, fractions=[1.0, 0.0, 0.0]), **settings}))
        path = Path(config.runs_dir) / name
        prepare(replace(config, schema=schema), path)
        return path

    return make


def vocabulary(folder: Path, table: str) -> dict[str, int]:
    return PreparedData.open(folder).vocabulary(table)


def test_a_log_that_went_on(prepare_days: Callable, capsys: pytest.CaptureFixture):
    old = prepare_days("day-1", DAY_1)
    new = prepare_days("day-2", DAY_2, vocabulary_from="day-1")  # without the events of day 1: x, y, z keep their rows
    assert vocabulary(old, "item_id") == {"x": 1, "y": 2, "z": 3}
    assert vocabulary(new, "item_id") == {"x": 1, "y": 2, "z": 3, "w": 4, "v": 5}
    assert vocabulary(new, "scene") == {"home": 1, "search": 2, "voice": 3}
    assert vocabulary(new, "user_id") == {"a": 1, "b": 2, "c": 3, "d": 4}
    data = PreparedData.open(new)
    assert data.table_rows == {"item_id": 6, "scene": 4, "user_id": 5}
    counts = dict(pl.read_parquet(new / "vocabulary" / "item_id.parquet").select("key", "count").iter_rows())
    assert counts == {"x": 1, "y": 0, "z": 0, "w": 2, "v": 1}
    said = data.manifest["vocabulary_from"]
    assert said["fingerprint"] == PreparedData.open(old).fingerprint
    assert said["tables"]["item_id"] == {"taken": 3, "found": 1, "new": 2}
    assert "item_id 3 taken (1 of them found here), 2 new" in capsys.readouterr().out
    items = dict(zip(data.item_keys(), data.item_columns["item_id"].values.tolist()))
    assert items == {"x": 1, "w": 4, "v": 5}


def test_min_count_is_for_new_values_alone(prepare_days: Callable):
    prepare_days("day-1", DAY_1)
    new = prepare_days("day-2", DAY_2, vocabulary_from="day-1", min_count=2)
    assert vocabulary(new, "item_id") == {"x": 1, "y": 2, "z": 3, "w": 4}


def test_a_new_table_and_one_that_is_gone(prepare_days: Callable):
    prepare_days("day-1", DAY_1)
    schema = SchemaConfig(
        features={"item_id": FeatureConfig("item"), "place": FeatureConfig("condition", column="scene")}
    )
    new = prepare_days("day-2", DAY_2, vocabulary_from="day-1", schema=schema)
    assert vocabulary(new, "place") == {"home": 1, "voice": 2}
    assert PreparedData.open(new).manifest["vocabulary_from"]["tables"]["place"] == {"taken": 0, "found": 0, "new": 2}


def test_a_folder_of_another_place_and_chains(prepare_days: Callable, tmp_path: Path):
    old = prepare_days("day-1", DAY_1)
    moved = old.rename(tmp_path / "elsewhere")
    second = prepare_days("day-2", DAY_2, vocabulary_from=str(moved))
    third = prepare_days("day-3", ["e,u,900000,1,home"], vocabulary_from="day-2")
    assert vocabulary(third, "item_id") == vocabulary(second, "item_id") | {"u": 6}


def test_the_folder_stands_until_the_older_one_changes(prepare_days: Callable, capsys: pytest.CaptureFixture):
    old = prepare_days("day-1", DAY_1)
    prepare_days("day-2", DAY_2, vocabulary_from="day-1")
    capsys.readouterr()
    prepare_days("day-2", DAY_2, vocabulary_from="day-1")
    assert "is prepared already" in capsys.readouterr().out
    for differs in ({}, {"vocabulary_from": "day-0"}):
        prepare_days("day-0", DAY_1)
        with pytest.raises(ValueError, match="vocabulary_from"):
            prepare_days("day-2", DAY_2, **differs)
    old.rename(old.with_name("day-1-as-it-was"))
    prepare_days("day-1", DAY_1[:2])
    with pytest.raises(ValueError, match=r"files\.data\.vocabulary_from"):
        prepare_days("day-2", DAY_2, vocabulary_from="day-1")


def test_requests_without_the_setting_are_as_before(prepare_days: Callable):
    folder = prepare_days("day-1", DAY_1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "vocabulary_from" not in manifest["request"]["data"] and "vocabulary_from" not in manifest


def test_what_cannot_be_built_on_is_refused(prepare_days: Callable):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare_days("day-2", DAY_2, vocabulary_from="nowhere")
    old = prepare_days("day-1", DAY_1)
    with pytest.raises(ValueError, match="is the folder to be made"):
        prepare_days("day-1", DAY_2, vocabulary_from="day-1")
    path = old / "vocabulary" / "item_id.parquet"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(PreparedDataError, match="item_id.parquet was changed or damaged"):
        prepare_days("day-2", DAY_2, vocabulary_from="day-1")


def test_a_log_without_any_item_of_the_earlier_one_is_refused(prepare_days: Callable):
    prepare_days("day-1", [f"a,{n},{n},{n % 2},home" for n in range(1, 20)])
    with pytest.raises(
        UserError, match=r"none of its 19 items is in .* this log \(there '\w+', say, and here 'p\w+'\)"
    ):
        prepare_days("day-2", [f"a,p{n},{n},1,home" for n in range(1, 20)], vocabulary_from="day-1")


@pytest.mark.parametrize(
    ("labels", "label", "said"),
    [
        ([0, 1], {}, ""),
        ([1] * 5, {}, ""),  # a few events may be of one class
        ([0] * 60, {}, "no event is positive, and 50.0% of those of the log in data.vocabulary_from are; say"),
        ([1] * 60, {}, "every event is positive, and 50.0% of those"),
        ([0, 1] * 30, {"at_least": 4.0}, "data.label has at_least=4.0; .* no event is positive"),
        ([1, 2, 3, 4, 5] * 12, {}, "48 of 60 events have another label"),
    ],
)
def test_labels_of_another_kind_than_the_earlier_log_has(prepare_days: Callable, labels: list, label: dict, said: str):
    def day(labels: list, first: int) -> list[str]:
        return [f"u{n % 5},i{n % 4},{first + n},{label},home" for n, label in enumerate(labels)]

    prepare_days("day-1", day([0, 1] * 30, 1_700_000_000))
    expected = pytest.raises(UserError, match=said) if said else contextlib.nullcontext()
    with expected:
        prepare_days("day-2", day(labels, 1_800_000_000), vocabulary_from="day-1", label=LabelConfig(**label))


def test_values_are_encoded_by_the_grown_vocabulary():
    older = build_vocabulary(counts_frame({"a": 2, "b": 1}), 1)
    grown = build_vocabulary(counts_frame({"c": 9}), 1, older)
    assert encode(pl.Series(["c", "b", "x", None]), grown, "id")[0].to_list() == [3, 2, 0, 0]
