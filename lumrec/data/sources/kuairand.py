"""KuaiRand: impressions of short videos in the Kuaishou app in spring 2022, with scenarios and many kinds of feedback.

    data/log_standard_4_08_to_4_21_pure.csv    user_id,video_id,date,hourmin,time_ms,is_click,…,play_time_ms,…,tab
    data/log_standard_4_22_to_5_08_pure.csv    (27K: …_part1.csv and …_part2.csv)
    data/user_features_pure.csv                user_id,user_active_degree,…,register_days_range,onehot_feat0,…
    data/video_features_basic_pure.csv         video_id,author_id,video_type,…,tag

Each file as .csv, .csv.gz or .parquet, in the folder or in data/ below it. Pure holds the impressions of 7,583 videos,
so that users' histories have gaps; 1K has all impressions of 1,000 users; 27K all of 27,285.

What is read and what is not:
- only the standard logs, not log_random_…: those videos were shown at random, which is another policy;
- not video_features_statistic_…: those are averages over the whole month, so they reveal the future;
- user features are one snapshot for all impressions (follower counts, say), taken when the data was collected;
- times from time_ms; `hourmin` is the hour in which the row was logged, up to some hours later. Local time is UTC+8.

The label is is_click by default (of the single-column scenarios: played for more than 7 s, or to the end); any other
outcome can be one, data.label.column=long_view, or data.label: {column: play_time_ms, at_least: 30000}. Source: C. Gao
et al., KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos, CIKM 2022 (CC BY-SA 4.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from lumrec.data.config import DataConfig
from lumrec.data.schema import FeatureConfig, SchemaConfig, TableConfig
from lumrec.data.sources.download import Archive
from lumrec.data.sources.lines import check_header, number_checks, raw_of_bad_rows, scan_fields, wrong_number_of_fields
from lumrec.data.sources.published import COUNTED, Place, label_in_use, resolve
from lumrec.data.sources.raw_log import LabelConfig, RawLog, first_reason, microseconds, positive
from lumrec.run.errors import UserError

FORMATS = (".csv", ".csv.gz", ".parquet")
POSITIVE = LabelConfig(column="is_click")
FLAGS = ("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "is_profile_enter")
DURATIONS = ("play_time_ms", "profile_stay_time", "comment_stay_time")
KEYS = ("user_id", "video_id", "time_ms")
NEEDED = (*KEYS, *FLAGS, *DURATIONS, "duration_ms", "tab")
UTC_OFFSET_HOURS = 8.0  # Beijing
# `watched`: the share of the video that was played, at least; above 1 it was played again.
WATCHED = (("skipped", 0.0), ("part", 0.1), ("most", 0.5), ("whole", 0.95), ("again", 1.5))
LATE = "log_standard_4_25_to_5_08_pure"  # a part of Pure that is also passed on by itself


@dataclass(frozen=True)
class Release:
    """One of the three versions. logs: their file names without the ending. stand_ins: see Place."""

    title: str
    logs: tuple[str, ...]
    md5: str
    expected: dict[str, int]
    stand_ins: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        return self.title.removeprefix("KuaiRand-").lower()

    @property
    def stems(self) -> tuple[str, ...]:
        return (*self.logs, f"user_features_{self.suffix}", f"video_features_basic_{self.suffix}")


def _release(
    version: str, md5: str, *counts: int, parts: tuple[str, ...] = ("",), stand_ins: tuple[str, ...] = ()
) -> Release:
    times = ("4_08_to_4_21", "4_22_to_5_08")
    logs = tuple(f"log_standard_{time}_{version.lower()}{part}" for time in times for part in parts)
    return Release(f"KuaiRand-{version}", logs, md5, dict(zip(COUNTED, counts)), stand_ins)


# Counts: the publisher's table for "15 policies". For 27K it counts a few more items than there are in the logs.
RELEASES = {
    "kuairand-pure": _release(
        "Pure", "0820331067a3784d9691136f772b35a7", 1_436_609, 27_285, 7583, 7551, stand_ins=("kuairand-pure-late",)
    ),
    "kuairand-1k": _release("1K", "6b0b9c8222d67fcd4c676218edca3f1f", 11_713_045, 1000),
    "kuairand-27k": _release(
        "27K", "3e3c799a24e2d23a4d2c757fbf9adf59", 322_278_385, 27_285, parts=("_part1", "_part2")
    ),
}

_SCHEMA = SchemaConfig(
    tables={"item_id": TableConfig(32)},
    features={
        "item_id": FeatureConfig("item"),
        "author_id": FeatureConfig("item"),
        "tag": FeatureConfig("item", kind="multi"),
        "video_type": FeatureConfig("item"),
        "upload_type": FeatureConfig("item"),
        "music_id": FeatureConfig("item"),
        "duration_s": FeatureConfig("item", kind="dense", scale="log"),
        "scenario": FeatureConfig("condition", column="tab"),
        "feedback": FeatureConfig("condition", wish=True),
        "clicked": FeatureConfig("feedback", column="is_click"),
        "long_view": FeatureConfig("feedback"),
        "liked": FeatureConfig("feedback", column="is_like"),
        "watched": FeatureConfig("feedback"),
        "user_active_degree": FeatureConfig("user"),
        "is_live_streamer": FeatureConfig("user"),
        "is_video_author": FeatureConfig("user"),
        "follow_user_num_range": FeatureConfig("user"),
        "fans_user_num_range": FeatureConfig("user"),
        "friend_user_num_range": FeatureConfig("user"),
        "register_days_range": FeatureConfig("user"),
        **{f"onehot_feat{index}": FeatureConfig("user") for index in (0, 1, 2, 6, 7, 9, 10)},
        **{
            name: FeatureConfig("user", kind="dense", scale="log")
            for name in ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
        },
        "hour": FeatureConfig("context"),
        "weekday": FeatureConfig("context"),
    },
)
DEFAULT_SCHEMAS = {name: _SCHEMA for name in RELEASES}


def read(data: DataConfig, *, seed: int, scratch: Path) -> RawLog:
    """The raw log of one of RELEASES, as a stream; `seed` and `scratch` are not used.

    Where only the late part of KuaiRand-Pure is there (25 April to 8 May), that is read, and the note says so. With
    data.allow_other_files a folder with some of the logs is accepted.

    Raises DataSetMissing where the files are not found and cannot be downloaded, UserError for a file without a column
    that it is published with, and for a label that is not an outcome.
    """
    release = RELEASES[data.source]
    label = label_in_use(data.label, POSITIVE, columns=[*FLAGS, *DURATIONS], source=data.source)
    if label.column in DURATIONS and label.at_least is None and not label.values:
        raise UserError(f"data.label.column={label.column} is a time; say from which on it is positive: at_least")
    folder, found = resolve(_place(release, allow_part=data.allow_other_files), data.path)
    logs = _logs_to_read(folder, release, allow_part=data.allow_other_files)
    whole = len(logs) == len(release.logs)
    users, items = (_file(folder, stem) for stem in release.stems[-2:])
    assert users is not None and items is not None
    note = f"{release.title} from {folder} ({found})"
    if not whole:
        note = f"a PART of {note}: {', '.join(path.name for path in logs)}"
    return RawLog(
        events=_events(logs, label),
        items=_items(items),
        users=_features(users, "user_id", "user_id"),
        files=[*logs, users, items],
        note=note,
        known_after=(*FLAGS, *DURATIONS, "watched"),
        utc_offset_hours=UTC_OFFSET_HOURS,
        extra={"expected": release.expected} if whole and not data.allow_other_files else {"whole": whole},
    )


def _place(release: Release, *, allow_part: bool) -> Place:
    def missing(folder: Path) -> list[str]:
        enough = _logs_to_read(folder, release, allow_part=allow_part)
        needed = release.stems[len(release.logs) :] if enough else release.stems
        return [f"{stem}.csv" for stem in needed if not _file(folder, stem)]

    record, name = "https://zenodo.org/records/10439422", release.title
    archive = Archive(f"{record}/files/{name}.tar.gz", record, f"md5:{release.md5}", folder=f"{name}/data")
    files = tuple(f"{stem}.csv" for stem in release.stems)
    return Place(name, (name.lower(), name), files, record, archive, missing, release.stand_ins)


def _logs_to_read(folder: Path, release: Release, *, allow_part: bool) -> list[Path]:
    """All logs of the release; else, for Pure, only the late part; else, with `allow_part`, those that are there."""
    logs = [path for stem in release.logs if (path := _file(folder, stem))]
    if not logs and release.suffix == "pure" and (late := _file(folder, LATE)):
        return [late]
    return logs if allow_part or len(logs) == len(release.logs) else []


def _file(folder: Path, stem: str) -> Path | None:
    """The file of that name in one of FORMATS, in the folder or in its data/."""
    paths = [place / f"{stem}{ending}" for place in (folder, folder / "data") for ending in FORMATS]
    return next((path for path in paths if path.is_file()), None)


def _events(logs: list[Path], label: LabelConfig) -> pl.LazyFrame:
    """The rows of the logs, one log after the other."""
    frames, first = [], 0
    for path in logs:
        rows = _rows(path, first)
        frames.append(rows)
        if path is not logs[-1]:
            first += rows.select(pl.len()).collect(engine="streaming").item()
    number = {name: pl.col(name).cast(pl.Int64, strict=False) for name in NEEDED}
    played = pl.col("play_time_ms") / pl.when(pl.col("duration_ms") > 0).then("duration_ms")
    watched = first_reason(*((played >= share, word) for word, share in reversed(WATCHED)))
    reason = first_reason(wrong_number_of_fields(), *number_checks(*KEYS))
    return (
        pl.concat(frames)
        .with_columns(reason.alias("reason"), positive(number[label.column], pl.Int64(), label).alias("label"))
        .select(
            number["user_id"],
            number["video_id"].alias("item_id"),
            microseconds(number["time_ms"], "ms").alias("time_us"),
            "order",
            "label",
            *(number[name] for name in (*FLAGS, *DURATIONS, "duration_ms")),
            pl.col("tab").cast(pl.String),
            "reason",
            "raw",
        )
        .with_columns(watched.alias("watched"))
    )


def _rows(path: Path, first: int) -> pl.LazyFrame:
    """The needed columns of a log as text, with raw (as a line of CSV), order (from `first` on), whole."""
    if path.suffix != ".parquet":
        fields = scan_fields(path, check_header(path, NEEDED), skip_lines=1, first=first)
        return fields.select("raw", "order", "whole", *NEEDED)
    rows = pl.scan_parquet(path, row_index_name="order", row_index_offset=first)
    names = [name for name in rows.collect_schema().names() if name != "order"]
    if missing := [name for name in NEEDED if name not in names]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}")
    return rows.select(
        _as_line(names), pl.col("order").cast(pl.Int64), pl.lit(True).alias("whole"), pl.col(NEEDED).cast(pl.String)
    )


def _as_line(names: Sequence[str]) -> pl.Expr:
    return pl.concat_str([pl.col(name).cast(pl.String).fill_null("") for name in names], separator=",").alias("raw")


def _features(path: Path, key: str, ours: str) -> pl.LazyFrame:
    """A file of features: its columns as text (Parquet: as they are), the key as a whole number, raw and reason."""
    if path.suffix == ".parquet":
        rows = pl.scan_parquet(path)
    else:
        check_header(path, [key])
        rows = pl.scan_csv(path, infer_schema=False)
    names = rows.collect_schema().names()
    number = pl.col(key).cast(pl.Int64, strict=False)
    checks = ((pl.col(key).is_null(), f"{ours} is missing"), (number.is_null(), f"{ours} is not a whole number"))
    return (
        rows.with_columns(first_reason(*checks).alias("reason"), _as_line(names))
        .with_columns(raw_of_bad_rows(), number.alias(ours))
        .drop([] if ours == key else [key])
    )


def _items(path: Path) -> pl.LazyFrame:
    """Videos; `tag` as a list, `duration_s` where the length is known."""
    return _features(path, "video_id", "item_id").with_columns(
        pl.col("tag").cast(pl.String).fill_null("").str.split(",").list.eval(pl.element().filter(pl.element() != "")),
        (pl.col("video_duration").cast(pl.Float64, strict=False) / 1000).alias("duration_s"),
    )
