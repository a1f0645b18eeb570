"""One value in two forms is refused with both named; what a column of numbers holds is one text, nulls or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.data.forms import as_text, mixed_forms, one_form
from lumrec.data.own_log.config import LogConfig
from lumrec.data.own_log.read import read
from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.sources.raw_log import LabelConfig
from lumrec.experiments.config import load
from lumrec.run.errors import UserError

SCHEMA = "schema.features={item_id: {role: item}, scene: {role: context}}"


FOR_IDS = (("scene", "column 'scene'"), ("item_id", "data.log.item"), ("user_id", "data.log.user"))


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., PreparedData]:
    """Prepares logs of one folder; keywords are words of the config."""

    def make(folder: Path, *words: str, run: str = "p") -> PreparedData:
        made = [f"data.log.events={folder}", f"runs_dir={tmp_path}", "data.source=log", SCHEMA]
        split = ["data.split={kind: user, fractions: [1, 0, 0]}"]
        prepare(load(None, [*made, *split, *words]), tmp_path / "runs" / run)
        return PreparedData.open(tmp_path / "runs" / run)

    return make


def write_log(folder: Path, name: str = "a.csv", **columns: list) -> Path:
    """A log of as many rows as the columns have; those not given are good ones."""
    num = len(next(iter(columns.values())))
    usual = {"user_id": ["u", "v"] * num, "item_id": ["i"] * num, "scene": ["home"] * num, "label": ["1", "0"] * num}
    usual = {key: values[:num] for key, values in usual.items()} | {
        "timestamp": list(range(1_714_521_600, 1_714_521_600 + num))
    }
    folder.mkdir(parents=True, exist_ok=True)
    frame = pl.DataFrame({**usual, **columns})
    frame.write_csv(folder / name) if name.endswith("csv") else frame.write_parquet(folder / name)
    return folder


@pytest.mark.parametrize(
    ("one", "other"),
    [("54", "54.0"), ("1", "1.0"), ("007", "7"), (" 7", "7"), ("7 ", "7"), ("+7", "7"), ("7e0", "7"), ("-0", "0"),
     ("1.5", "1.50"), ("True", "true"), ("home", "home "), ("\u00e9", "e\u0301"),
     ("home", "ho\u200bme"), ("home", "\ufeffhome"), ("home", "home\xa0"), ("a b", "a\xa0b"), ("54", "\uff15\uff14"),
     ("\uff21", "A"), ("4\u034f1", "41"), ("\u2764\ufe0f", "\u2764"), ("41,0", "41")],
)  # fmt: skip
def test_two_forms_of_one_value_are_refused_with_both_named(tmp_path: Path, prepared: Callable, one: str, other: str):
    assert mixed_forms(pl.Series([one, "x", other])) == (one, other)
    for column, key in FOR_IDS if one == "54" else FOR_IDS[:1]:
        folder = write_log(tmp_path / column, "a.csv", **{column: [one, "x"]})
        write_log(folder, "b.csv", **{column: [other, "y"]})
        with pytest.raises(UserError, match=f"{key}: .*two forms") as error:
            prepared(folder)
        assert ascii(one) in str(error.value) and ascii(other) in str(error.value)
        data = prepared(folder, f"data.log.exact={column}", run=f"{column}-exact")
        if column == "scene":
            assert {one, other} <= set(data.vocabulary("scene"))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.text("0123456789.-+eE x", max_size=6), unique=True))
def test_a_common_form_is_one_number_and_no_two_numbers_have_one(texts: list[str]):
    forms = pl.Series(texts, dtype=pl.String).to_frame("").select(one_form(pl.first())).to_series().to_list()
    for text, form in zip(texts, forms):
        try:
            number = float(text)
        except ValueError:
            continue
        assert float(form) == number or "e" in text.lower()
    found = mixed_forms(pl.Series(texts, dtype=pl.String))
    assert (found is None) == (len(set(forms)) == len(forms))


def test_values_that_differ_in_more_than_form_are_left_alone():
    assert (
        mixed_forms(pl.Series(["7", "70", "0.7", "-7", "7.01", "7a", "a7", "Home", "home", "", "1e999", "0x7", "1_0"]))
        is None
    )
    assert mixed_forms(pl.Series(["7", "8"]), pl.Series(["7", "8", "9.0"])) is None
    assert mixed_forms(pl.Series(["7", "9"]), pl.Series(["7", "8", "9.0"])) == ("9", "9.0")


def test_an_items_file_in_another_form_than_the_events(tmp_path: Path, prepared: Callable):
    folder = write_log(tmp_path / "log", item_id=["54", "a"])
    (tmp_path / "items.csv").write_text("item_id\n54.0\na\n")
    with pytest.raises(UserError, match="data.log.item: '54' and '54.0' are two forms of one id"):
        prepared(folder, f"data.log.items={tmp_path / 'items.csv'}")


def test_a_newer_log_in_another_form_than_the_vocabulary_it_takes_over(tmp_path: Path, prepared: Callable):
    prepared(write_log(tmp_path / "old", scene=["1", "2"]), run="old")
    new = write_log(tmp_path / "new", scene=["1.0", "3"])
    with pytest.raises(UserError, match=r"'scene': this log has '1.0', and .*data.vocabulary_from.* '1'"):
        prepared(new, f"data.vocabulary_from={tmp_path / 'runs' / 'old'}", run="new")


def test_nulls_do_not_change_the_form_of_whole_numbers_in_parquet(tmp_path: Path, prepared: Callable):
    """Whole numbers in one file; floats in another, as some are missing; both match the text of an older log."""
    prepared(write_log(tmp_path / "old", scene=["54", "7"]), run="old")
    folder = write_log(tmp_path / "log", "a.parquet", scene=[54, 7], user_id=[1, 2])
    write_log(folder, "b.parquet", scene=[54.0, None, 0.5, float("nan")], user_id=[1, 2, 3, 4])
    data = prepared(folder, f"data.vocabulary_from={tmp_path / 'runs' / 'old'}", run="new")
    assert set(data.vocabulary("scene")) == {"54", "7", "0.5"}
    assert data.manifest["vocabulary_from"]["tables"]["scene"] == {"taken": 2, "found": 2, "new": 1}
    assert as_text(pl.Series("x", [1.0, -0.0, 0.1, None, 1e300])).to_list() == ["1", "0", "0.1", None, "1e+300"]
    write_log(folder, "c.parquet", scene=[2**53 + 1, 1], user_id=[1, 2])
    with pytest.raises(UserError, match="'scene' holds floats beyond 2\\^53, which cannot tell whole numbers apart"):
        prepared(folder, run="large")


def test_values_of_a_test_part_count_too(tmp_path: Path, prepared: Callable):
    folder = write_log(tmp_path / "log", user_id=["u"] * 10, scene=["1"] * 9 + ["1.0"])
    with pytest.raises(UserError, match="'1' and '1.0' are two forms|'1.0' and '1' are two forms"):
        prepared(folder, "data.split={kind: temporal, fractions: [0.8, 0.1, 0.1]}")


@pytest.mark.parametrize(
    ("column", "values", "positives"),
    [
        (["yes", "no"], ["yes"], [1.0, 0.0]),
        (["yes", "no"], ["Yes"], "'Yes' is in no row of column 'label' .did you mean 'yes'.*; it holds 'no', 'yes'"),
        ([" yes", "no"], ["yes"], "did you mean ' yes'"),
        (["yes", "no"], ["yes", "maybe"], "'maybe' is in no row"),
        ([True, False], ["true"], [1.0, 0.0]),
        ([True, False], ["True"], "did you mean 'true'"),
        ([5, 3], ["5"], [1.0, 0.0]),
        ([5, 3], ["5.0"], [1.0, 0.0]),
        ([5, 3], ["4"], "'4' is in no row of column 'label'; it holds '3.0', '5.0'"),
        ([5.0, 3.5], ["5", "3.5"], [1.0, 1.0]),
        ([5, 3], ["good"], "got 'good'; the label's column holds numbers"),
        (["007", "1"], ["007"], [1.0, 0.0]),
        (["007", "1"], ["7"], "'7' is in no row"),
    ],
)
def test_label_values_are_the_texts_of_the_file(tmp_path: Path, column: list, values: list[str], positives: object):
    folder = write_log(tmp_path / "log", "a.parquet", label=column)
    config = load(None, ["data.source=log", f"data.log.events={folder}", f"data.label.values=[{', '.join(values)}]"])
    if isinstance(positives, str):
        with pytest.raises(UserError, match=positives):
            read(config.data, seed=0, scratch=tmp_path)
    else:
        raw = read(config.data, seed=0, scratch=tmp_path)
        assert raw.events.collect()["label"].to_list() == positives


def test_a_label_under_which_nothing_is_positive_is_refused(tmp_path: Path, prepared: Callable):
    folder = write_log(tmp_path / "log", label=["1", "2", "3"])
    with pytest.raises(UserError, match="data.label has at_least=9.* no event is positive"):
        prepared(folder, "data.label.at_least=9")
    assert (LogConfig().exact, LabelConfig().values) == ([], [])
