"""Every file that a name, a folder or a glob leads to is read once, and what is skipped is reported."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import polars as pl
import pytest

from lumrec.data.own_log.check import Report, check
from lumrec.data.own_log.config import LogConfig
from lumrec.data.own_log.folders import find_files, partitions
from lumrec.data.own_log.read import find_tables, open_tables
from lumrec.data.sources.raw_log import DataSetMissing
from lumrec.experiments.config import load
from lumrec.run.errors import UserError

HEADER, ROW = "user_id,item_id,timestamp,label\n", "u,7,1714521600,1\n"


def csv(path: Path, text: str = HEADER + ROW) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def parquet(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    usual = {"user_id": ["u"], "item_id": [7], "timestamp": [1_714_521_600], "label": [1]}
    pl.DataFrame({**usual, **columns}).write_parquet(path)
    return path


def found(folder: Path, *patterns: str) -> list[str]:
    return [
        str(file.relative_to(folder))
        for file in find_files([str(folder / p) for p in patterns or [""]], "data.log.events")
    ]


def test_links_are_followed_and_what_is_read_already_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    csv(tmp_path / "log" / "a.csv")
    csv(tmp_path / "elsewhere" / "deep" / "b.csv")
    (tmp_path / "log" / "linked").symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "log") == ["a.csv", "linked/deep/b.csv"]
    (tmp_path / "log" / "0-again.csv").symlink_to("a.csv")
    (tmp_path / "log" / "today").symlink_to("linked")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "log")
    (tmp_path / "elsewhere" / "round").symlink_to("..")
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path / "log") == ["a.csv", "linked/deep/b.csv"]
    text = caplog.text
    assert "0-again.csv is the same file as" in text and "the link" in text and "today is skipped" in text
    assert "up is skipped" in text and "round is skipped" in text
    assert found(tmp_path / "log", "*", "a.csv", "**/*.csv") == ["a.csv", "linked/deep/b.csv"]
    (tmp_path / "log" / "gone.csv").symlink_to("nowhere.csv")
    with pytest.raises(UserError, match="gone.csv is no file: it is a link to nowhere.csv, which is not there"):
        found(tmp_path / "log")


def test_folders_of_a_glob_are_read_and_hidden_files_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("day-1/a.csv", "day-2/b.csv", "day-2/_SUCCESS", "day-2/.c.csv", "_temporary/d.csv", "_day=3/e.csv"):
        csv(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path, "day-*") == ["day-1/a.csv", "day-2/b.csv"]
    assert ".c.csv is skipped, as its name begins with ." in caplog.text and "_SUCCESS" not in caplog.text
    assert found(tmp_path) == ["_day=3/e.csv", "day-1/a.csv", "day-2/b.csv"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataSetMissing, match="none' is a folder without a file to read"):
        found(tmp_path, "none")
    os.mkfifo(tmp_path / "day-1" / "pipe.csv")
    with pytest.raises(UserError, match="pipe.csv is no file; remove it"):
        found(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path):
    csv(tmp_path / "closed" / "a.csv").parent.chmod(0)
    with pytest.raises(UserError, match="closed cannot be read"):
        found(tmp_path)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_folders_named_key_value_are_columns_of_text(tmp_path: Path, form: str):
    write = csv if form == "csv" else parquet
    for value in ("home", "010", "NO", "a%20b%2Fc", "__HIVE_DEFAULT_PARTITION__", "x=y"):
        write(tmp_path / f"scene={value}" / "day=2024-05-20" / f"part-0.{form}")
    write(tmp_path / f"whole.{form}")
    (tmp_path / "scratch").mkdir()
    config = LogConfig(events=[f"{tmp_path}/scene*", f"{tmp_path}/*.{form}"])
    table = open_tables(find_tables(config), config, tmp_path / "scratch").events
    frame = table.frame.sort("lumrec.row").select("scene", "day", "user_id", "lumrec.row").collect()
    assert frame["scene"].to_list() == ["010", "NO", None, "a b/c", "home", "x=y", None]
    assert frame["day"].to_list() == ["2024-05-20"] * 6 + [None]
    assert frame["lumrec.row"].to_list() == list(range(7)) and frame["user_id"].null_count() == 0
    assert list(table.lacking) == ["scene", "day"]


def test_a_single_file_in_such_a_folder_has_the_column_and_check_knows_it(tmp_path: Path):
    for scene in ("home", "search"):
        items = {"user_id": ["u", "v"] * 4, "item_id": list(range(8)), "label": [0, 1] * 4}
        parquet(tmp_path / "hive" / f"scene={scene}" / "part-0.parquet", **items, timestamp=[1_714_521_600] * 8)
    (tmp_path / "scratch").mkdir()
    report = Report()
    check(load(None, [f"data.log.events={tmp_path / 'hive'}"]), tmp_path / "scratch", report)
    assert "scene: {role: condition}" in report.yaml
    one = tmp_path / "hive" / "scene=home" / "part-0.parquet"
    assert "scene" in find_tables(LogConfig(events=str(one))).events.schema


def test_a_column_that_is_in_the_file_too_is_refused(tmp_path: Path):
    parquet(tmp_path / "scene=home" / "a.parquet", scene=["home"])
    with pytest.raises(UserError, match="column 'scene' is in the file and in the name of its folder, scene=home"):
        find_tables(LogConfig(events=str(tmp_path / "scene=home")))
    parquet(tmp_path / "b.parquet", item_id=[1])
    parquet(tmp_path / "item_id=2" / "c.parquet").unlink()
    pl.DataFrame({"user_id": ["u"], "timestamp": [1_714_521_600], "label": [1]}).write_parquet(
        tmp_path / "item_id=2" / "c.parquet"
    )
    names = [str(tmp_path / "b.parquet"), str(tmp_path / "item_id=2")]
    with pytest.raises(UserError, match="'item_id' is Int64 in .*b.parquet, and the name of a folder of .*c.parquet"):
        find_tables(LogConfig(events=names))


def test_partitions_by_hand():
    assert partitions(Path("/a=b/x/=c/d=/e=f=g/h=1.parquet")) == {"a": "b", "d": None, "e": "f=g"}
    assert partitions(Path("log/plain.csv")) == {}


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        ("scene=a/scene=b", "its folders give column 'scene' two values, 'a' and 'b'"),
        ("scene=a/scene=__HIVE_DEFAULT_PARTITION__", "its folders give column 'scene' two values, 'a' and None"),
        ("scene=%FF", "the folder 'scene=%FF' is not UTF-8 once its %XX are decoded"),  # else the same value as %FE
    ],
)
def test_partitions_that_say_two_things_or_nothing_are_refused(tmp_path: Path, folders: str, says: str):
    csv(tmp_path / folders / "a.csv")
    with pytest.raises(UserError, match=says):
        find_tables(LogConfig(events=str(tmp_path)))
    assert partitions(Path("scene=a/x/scene=a/a.csv")) == {"scene": "a"}
