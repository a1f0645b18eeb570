"""KuaiRand: the published layouts, what is read of them and what is not, and the part of Pure that goes around."""

import gzip
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from lumrec.data.config import DataConfig
from lumrec.data.schema import FeatureConfig, SchemaConfig
from lumrec.data.sources import kuairand
from lumrec.data.sources.raw_log import DataSetMissing, LabelConfig, RawLog

PURE = DataConfig(source="kuairand-pure", allow_other_files=True)
HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USERS = """\
user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,follow_user_num_range,\
fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,register_days_range,\
onehot_feat0,onehot_feat1,onehot_feat2,onehot_feat3,onehot_feat4,onehot_feat5,onehot_feat6,onehot_feat7,onehot_feat8,\
onehot_feat9,onehot_feat10,onehot_feat11,onehot_feat12,onehot_feat13,onehot_feat14,onehot_feat15,onehot_feat16,onehot_feat17
7,full_active,0,1,1,514,500+,150,"[100,1k)",34,"[30,60)",799,730+,1,1,29,949,1.0,0,0,14,135,6,3,0,0.0,1.0,0.0,0.0,0.0,0.0
9,high_active,0,-124,1,457,"(250,500]",20,"[10,100)",3,"[1,5)",1474,730+,1,3,2,1160,,0,0,31,283,6,2,2,,,,,,
"""
VIDEOS = """\
video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,music_id,\
music_type,tag
20,100,NORMAL,2022-04-10,LongImport,0.0,87433.0,720.0,1280.0,9155697141,9.0,39
21,101,AD,2022-04-10,Kmovie,0.0,,720.0,1280.0,0,,"12,65"
22,100,NORMAL,2022-04-09,Web,0.0,10000.0,720.0,1280.0,1,4.0,
"""


def row(user: object, video: object, time_ms: object, *, click: object = 0, view: int = 0, play: int = 0, tab: int = 1):
    return f"{user},{video},20220408,900,{time_ms},{click},0,0,0,0,0,{view},{play},10000,0,0,0,0,{tab}"


EARLY = [row(9, 20, 1649379600123, click=1, play=9500), row(7, 22, 1649379600000, view=1, play=800, tab=0)]
LATER = [row(9, 21, 1650600000000, click=1, play=16000), row(9, 22, 1649379600123, play=4000, tab=14)]


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder


def log(rows: list[str]) -> str:
    return "\n".join([HEADER, *rows, ""])


@pytest.fixture
def pure(tmp_path: Path) -> Callable[..., Path]:
    """Writes KuaiRand-Pure as it is unpacked, data/ below the folder; keywords replace files."""

    def make(early: list[str] = EARLY, later: list[str] = LATER, **others: str) -> Path:
        files = {
            "log_standard_4_08_to_4_21_pure.csv": log(early),
            "log_standard_4_22_to_5_08_pure.csv": log(later),
            "log_random_4_22_to_5_08_pure.csv": log([row(7, 21, 1650600000000, click=1)]),
            "user_features_pure.csv": others.get("users", USERS),
            "video_features_basic_pure.csv": others.get("videos", VIDEOS),
            "video_features_statistic_pure.csv": "video_id,show_cnt\n20,1.5\n",
        }
        write(tmp_path / "KuaiRand-Pure" / "data", files)
        return tmp_path / "KuaiRand-Pure"

    return make


def read(data: DataConfig, tmp_path: Path) -> RawLog:
    return kuairand.read(data, seed=0, scratch=tmp_path)


def test_what_is_read(pure: Callable, make_config: Callable, open_log: Callable):
    data = open_log(make_config(replace(PURE, path=str(pure()))))
    assert data.user_keys() == ["7", "9"]
    assert data.item_keys() == ["20", "21", "22"]
    assert data.num_events == 4  # of the standard logs; the random one is left out
    # of user 9 two events have one time: they stay in the order of the files
    assert data.order.tolist() == [1, 0, 3, 2]
    assert data.timestamp.tolist() == [1649379600, 1649379600, 1649379600, 1650600000]
    assert data.label.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert data.item.tolist() == [2, 0, 2, 1]

    def values(feature: str) -> list[str]:
        words = {row: word for word, row in data.vocabulary(data.schema.features[feature].table).items()}
        columns = {**data.event_columns, **data.item_columns, **data.user_columns}
        return [words.get(row, "unknown") for row in columns[feature].values.tolist()]

    assert set(data.vocabulary("scenario")) <= {"0", "1", "14"}
    assert values("clicked") == ["0", "1", "0", "1"]
    assert values("watched") == ["skipped", "whole", "part", "again"]
    assert values("feedback") == ["dislike", "like", "dislike", "like"]
    assert values("hour")[0] == "9"  # 01:00 UTC is nine in the morning in Beijing
    assert values("author_id") == ["100", "101", "100"]
    assert values("tag") == ["39", "12", "65"]
    assert values("follow_user_num_range") == ["500+", "(250,500]"]
    assert values("onehot_feat6") == ["0", "0"]
    assert [name for name, feature in data.schema.features.items() if feature.kind == "dense"] == [
        "duration_s", "follow_user_num", "fans_user_num", "friend_user_num", "register_days",
    ]  # fmt: skip


def test_every_format_reads_the_same(pure: Callable, tmp_path: Path):
    folder = pure()
    expected = read(replace(PURE, path=str(folder)), tmp_path)
    for name, suffix in (("zipped", ".csv.gz"), ("parquet", ".parquet")):
        other = tmp_path / name
        other.mkdir()
        for path in (folder / "data").glob("*.csv"):
            if suffix == ".parquet":
                pl.read_csv(path).write_parquet(other / f"{path.stem}.parquet")
            elif "log" in path.name:
                (other / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            else:
                (other / path.name).write_bytes(path.read_bytes())
        found = read(replace(PURE, path=str(other)), tmp_path)
        assert found.events.collect().equals(expected.events.collect())
        for ours, theirs in ((found.items, expected.items), (found.users, expected.users)):
            assert ours is not None and theirs is not None
            columns = ["item_id", "tag", "duration_s"] if ours is found.items else ["user_id", "fans_user_num_range"]
            assert ours.select(columns).collect().equals(theirs.select(columns).collect())
        assert {path.suffix for path in found.files if "log" in path.name} == {"." + suffix.split(".")[-1]}


@pytest.mark.parametrize(("suffix", "parts"), [("1k", [""]), ("27k", ["_part1", "_part2"])])
def test_the_larger_versions(tmp_path: Path, suffix: str, parts: list[str]):
    source, times = f"kuairand-{suffix}", ("4_08_to_4_21", "4_22_to_5_08")
    names = [f"log_standard_{time}_{suffix}{part}.csv" for time in times for part in parts]
    logs = {name: log([row(7, 20, 1649379600000 + place)]) for place, name in enumerate(names)}
    features = {f"user_features_{suffix}.csv": USERS, f"video_features_basic_{suffix}.csv": VIDEOS}
    data = DataConfig(source=source, path=str(write(tmp_path / "x", {**logs, **features})))
    raw = read(data, tmp_path)
    events = raw.events.collect().sort("order")
    assert events["order"].to_list() == list(range(2 * len(parts)))
    assert events["time_us"].to_list() == [(1649379600000 + place) * 1000 for place in range(2 * len(parts))]
    assert raw.extra == {"expected": kuairand.RELEASES[source].expected}
    assert "PART" not in raw.note
    (tmp_path / "x" / list(logs)[-1]).unlink()
    with pytest.raises(DataSetMissing, match=f"lacks {list(logs)[-1]}"):
        read(data, tmp_path)
    part = read(replace(data, allow_other_files=True), tmp_path)
    assert part.note.startswith("a PART of") and "expected" not in part.extra


BAD_ROWS = {
    row("", 20, 1649379600000): "user_id is missing",
    row("me", 20, 1649379600000): "user_id is not a whole number",
    row(7, "", 1649379600000): "video_id is missing",
    row(7, "1.5", 1649379600000): "video_id is not a whole number",
    row(7, 20, ""): "time_ms is missing",
    row(7, 20, "today"): "time_ms is not a whole number",
    row(7, 20, 0): "impossible time",
    row(7, 20, 1649379600000) + ",1": "wrong number of fields",
    "7,20,20220408": "wrong number of fields",
    "": "wrong number of fields",
    row(7, 20, 1649379600000, click=""): "label is missing",
    row(7, 20, 1649379600000, click=2): "label is missing",
    row(7, 20, 1649379600000, click="yes"): "label is missing",
}


def test_rows_that_cannot_be_used(pure: Callable, make_config: Callable, open_log: Callable):
    folder = pure(later=[*BAD_ROWS, row(7, 999, 1649379600000), row(999, 20, 1649379600000), *LATER])
    data = open_log(make_config(replace(PURE, path=str(folder))))
    rows = pl.read_parquet(data.path / "quarantine.parquet").sort("order")
    assert rows["reason"].to_list() == [*BAD_ROWS.values(), "unknown item", "unknown user"]
    assert rows["raw"].to_list()[:-2] == list(BAD_ROWS)
    assert rows["order"].to_list() == list(range(2, 4 + len(BAD_ROWS)))
    assert data.num_events == 4


def test_bad_rows_of_a_parquet_log(pure: Callable, tmp_path: Path):
    folder = pure()
    path = folder / "data" / "log_standard_4_22_to_5_08_pure.csv"
    frame = pl.read_csv(path).with_columns(pl.when(pl.col("video_id") == 22).then("user_id").alias("user_id"))
    frame.write_parquet(path.with_suffix(".parquet"))
    path.unlink()
    events = read(replace(PURE, path=str(folder)), tmp_path).events.collect().sort("order")
    assert events["reason"].to_list() == [None, None, "user_id is missing", None]
    assert events["raw"].to_list()[2] == LATER[0].removeprefix("9")


def test_bad_rows_of_the_features(pure: Callable, make_config: Callable, open_log: Callable):
    videos = VIDEOS + "x,1,NORMAL,,,,,,,,,\n20,1,NORMAL,,,,,,,,,\n"
    data = open_log(make_config(replace(PURE, path=str(pure(videos=videos)))))
    assert data.item_keys() == ["20", "21", "22"]
    assert data.manifest["quarantine"] == {
        "items: item_id is not a whole number": 1,
        "items: item_id occurs again": 1,
    }


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (LabelConfig(), [1.0, 0.0, 1.0, 0.0]),
        (LabelConfig(column="long_view"), [0.0, 1.0, 0.0, 0.0]),
        (LabelConfig(column="play_time_ms", at_least=9000), [1.0, 0.0, 1.0, 0.0]),
        (LabelConfig(column="is_click", values=["0"]), [0.0, 1.0, 0.0, 1.0]),
    ],
)
def test_what_counts_as_positive(pure: Callable, tmp_path: Path, label: LabelConfig, expected: list[float]):
    raw = read(replace(PURE, path=str(pure()), label=label), tmp_path)
    assert raw.events.collect().sort("order")["label"].to_list() == expected
    assert {*kuairand.FLAGS, "play_time_ms", "watched"} <= set(raw.known_after)
    assert not {"tab", "duration_ms"} & set(raw.known_after)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            LabelConfig(column="tab"),
            "data.label.column: got 'tab'; the columns of kuairand-pure that can be a label: is",
        ),
        (LabelConfig(column="play_time_ms"), "play_time_ms is a time; say from which on it is positive: at_least"),
    ],
)
def test_labels_that_cannot_be(pure: Callable, tmp_path: Path, label: LabelConfig, message: str):
    with pytest.raises(ValueError, match=message):
        read(replace(PURE, path=str(pure()), label=label), tmp_path)


def test_an_outcome_is_no_context(pure: Callable, make_config: Callable, open_log: Callable):
    features = {"item_id": FeatureConfig("item"), "seen": FeatureConfig("context", column="long_view")}
    config = make_config(replace(PURE, path=str(pure())), schema=SchemaConfig(features=features))
    with pytest.raises(ValueError, match="schema.features.seen: column 'long_view' is known only after"):
        open_log(config)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "log_standard_4_08_to_4_21_pure.csv",
            HEADER.replace("tab", "page") + "\n",
            "the first line has no column tab",
        ),
        ("user_features_pure.csv", "user,age\n", "the first line has no column user_id"),
        ("video_features_basic_pure.csv", "video,tag\n", "the first line has no column video_id"),
    ],
)
def test_files_with_other_columns(pure: Callable, tmp_path: Path, name: str, text: str, message: str):
    folder = pure()
    (folder / "data" / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        read(replace(PURE, path=str(folder)), tmp_path)


def test_columns_may_stand_in_another_order(pure: Callable, tmp_path: Path):
    expected = read(replace(PURE, path=str(pure())), tmp_path).events.drop("raw").collect()
    path = tmp_path / "KuaiRand-Pure" / "data" / "log_standard_4_08_to_4_21_pure.csv"
    frame = pl.read_csv(path)
    frame.select(reversed(frame.columns)).write_csv(path)
    path = path.with_name("log_standard_4_22_to_5_08_pure.csv")
    assert read(replace(PURE, path=str(path.parent)), tmp_path).events.drop("raw").collect().equals(expected)


def test_the_late_part_stands_in_for_pure(
    pure: Callable, nowhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    whole = pure()
    late = write(
        tmp_path / "kuairand-pure-late", {"user_features_pure.csv": USERS, "video_features_basic_pure.csv": VIDEOS}
    )
    pl.read_csv(log(LATER).encode()).write_parquet(late / "log_standard_4_25_to_5_08_pure.parquet")
    monkeypatch.setenv("LUMREC_DATA", str(tmp_path))
    data = replace(PURE, allow_other_files=False)
    raw = read(data, tmp_path)
    assert (raw.files[0].parent, raw.note) == (whole / "data", f"KuaiRand-Pure from {whole} (LUMREC_DATA)")
    assert raw.extra == {"expected": kuairand.RELEASES["kuairand-pure"].expected}
    nowhere.mkdir()  # what was downloaded comes before the part, wherever that lies
    whole.rename(nowhere / "kuairand-pure")
    assert read(data, tmp_path).note == f"KuaiRand-Pure from {nowhere / 'kuairand-pure'} (cache)"
    (nowhere / "kuairand-pure").rename(tmp_path / "elsewhere")
    raw = read(data, tmp_path)
    assert raw.note == f"a PART of KuaiRand-Pure from {late} (LUMREC_DATA): log_standard_4_25_to_5_08_pure.parquet"
    assert len(raw.events.collect()) == 2
    assert "expected" not in raw.extra
    (late / "user_features_pure.csv").unlink()
    with pytest.raises(DataSetMissing, match="lacks user_features_pure.csv") as error:
        read(data, tmp_path)
    for part in ("https://zenodo.org/records/10439422", "data.path", "LUMREC_DATA", "data.source=simulator"):
        assert part in str(error.value)


def test_a_download_takes_what_is_read_alone():
    for source, release in kuairand.RELEASES.items():
        place = kuairand._place(release, allow_part=False)
        assert place.archive is not None
        assert place.archive.url == f"https://zenodo.org/records/10439422/files/{release.title}.tar.gz"
        assert place.archive.checksum.startswith("md5:") and len(place.archive.checksum) == 36
        assert place.folders[0] == source  # where the download goes is where it is looked for
        assert not [name for name in place.files if "random" in name or "statistic" in name]
        assert len(place.files) == (6 if source == "kuairand-27k" else 4)


def test_the_real_late_part(make_config: Callable, open_log: Callable):
    """Counts as in the files' own README."""
    root = os.environ.get("LUMREC_DATA", "")
    folder = Path(root) / "kuairand-pure-late"
    if not root or not folder.is_dir():
        pytest.skip("LUMREC_DATA names no folder that holds kuairand-pure-late/")
    data = open_log(make_config(DataConfig(source="kuairand-pure", path=str(folder))))
    counts = data.manifest["counts"]
    assert (counts["events_read"], counts["items_with_events"]) == (228_329, 6361)
    assert counts["users"] - counts["users_without_events"] == 25_156
    assert (counts["users"], counts["items"]) == (27_285, 7583)
    assert set(data.manifest["quarantine"]) == {"events: duplicate row"}
    rows = pl.read_parquet(folder / "log_standard_4_25_to_5_08_pure.parquet")
    assert counts["events_read"] - rows.n_unique() == 5460
    # what is left out beyond those was logged twice, in different hours (`hourmin`, which is not read)
    assert rows.n_unique(["user_id", "video_id", "time_ms"]) <= data.num_events <= rows.n_unique()
    assert len(data.vocabulary("scenario")) == 15
