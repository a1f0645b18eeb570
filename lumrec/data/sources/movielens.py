"""MovieLens-1M in its published layout: ratings.dat, users.dat, movies.dat with `::` between fields, latin-1.

    1::1193::5::978300760            user, movie, rating 1..5, seconds
    1::F::1::10::48067               user, gender, age, occupation, zip code
    1::Toy Story (1995)::Animation|Children's|Comedy

A rating of 4 or 5 is the positive label (as in DIN section 6.1, LUM section 4). Source: F. M. Harper, J. A. Konstan,
The MovieLens Datasets: History and Context, 2015; its licence forbids passing the files on.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Dict, List, Mapping, Tuple

import polars as pl

from lumrec.data.schema import FeatureConfig, SchemaConfig, TableConfig
from lumrec.data.sources.download import Archive, fetch_archive
from lumrec.data.sources.raw_log import LAST_POSSIBLE_TIME, DataSetMissing, RawLog, first_reason

log = logging.getLogger(__name__)

ARCHIVE = Archive(
    url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    page="https://grouplens.org/datasets/movielens/1m/",
    sha256="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    folder="ml-1m",
)
MD5 = {
    "ratings.dat": "a89aa3591bc97d6d4e0c89459ff39362",
    "movies.dat": "ef9fd9ff8d1b33faf73e2122c371e910",
    "users.dat": "681c0711d0d4548cd3d4718a49c2dcd8",
}
DEFAULT_SCHEMA = SchemaConfig(
    tables={"item_id": TableConfig(32), "genres": TableConfig(16)},
    features={
        "item_id": FeatureConfig("item"),
        "genres": FeatureConfig("item", kind="multi"),
        "year": FeatureConfig("item"),
        "feedback": FeatureConfig("condition", wish=True),
        "main_genre": FeatureConfig("condition", table="genres"),
        "rating": FeatureConfig("feedback"),
        "gender": FeatureConfig("user"),
        "age": FeatureConfig("user"),
        "occupation": FeatureConfig("user"),
        "hour": FeatureConfig("context"),
        "weekday": FeatureConfig("context"),
    },
)
_SEPARATOR = "\x01"  # never in the files; makes the CSV reader hand over whole lines


def resolve(path: str = "", *, archive: Archive = ARCHIVE) -> Tuple[Path, str]:
    """Folder of the data set and how it was found: `path`, else $LUMREC_DATA/ml-1m, else the cache, else a download.

    The cache is $LUMREC_CACHE or ~/.cache/lumrec. Raises DataSetMissing where the folder named does not hold the files,
    or nothing is found and the publisher cannot be reached; ValueError where the download has another checksum.
    """
    if path:
        return _complete(Path(path).expanduser(), "data.path"), "data.path"
    root = os.environ.get("LUMREC_DATA", "")
    if root and (Path(root) / archive.folder).is_dir():
        return _complete(Path(root) / archive.folder, "LUMREC_DATA"), "LUMREC_DATA"
    cached = cache_folder() / archive.folder
    if cached.is_dir():
        return _complete(cached, "the cache"), "cache"
    print(f"MovieLens-1M is neither in LUMREC_DATA nor in {cached}: downloading {archive.url}", flush=True)
    fetch_archive(archive, cached, files=list(MD5))
    return _complete(cached, "the download"), "download"


def cache_folder() -> Path:
    """Folder for data sets that were downloaded: $LUMREC_CACHE, else ~/.cache/lumrec."""
    return Path(os.environ.get("LUMREC_CACHE") or Path.home() / ".cache" / "lumrec")


def read(
    path: str = "", *, allow_other_files: bool = False, md5: Mapping[str, str] = MD5, archive: Archive = ARCHIVE
) -> RawLog:
    """The raw log of MovieLens-1M.

    Raises DataSetMissing (see `resolve`), and ValueError for a file with another checksum than the published one unless
    `allow_other_files`, which logs a warning instead.
    """
    folder, found = resolve(path, archive=archive)
    other = _other_files(folder, md5)
    if other and not allow_other_files:
        lines = "\n".join(f"  {folder / name}: md5 {got}, expected {md5[name]}" for name, got in other.items())
        raise ValueError(
            f"wrong checksum: these are not the published MovieLens-1M files:\n{lines}\n"
            f"Get {archive.url} and unpack it there, or set data.allow_other_files=true to use the files as they are "
            "(figures are then not comparable with published ones)."
        )
    if other:
        log.warning("data.allow_other_files: %s differ from the published MovieLens-1M", ", ".join(other))
    items = _items(folder / "movies.dat")
    return RawLog(
        events=_events(folder / "ratings.dat", items),
        items=items,
        users=_users(folder / "users.dat"),
        files=[folder / name for name in MD5],
        note=f"MovieLens-1M from {folder} ({found})" + (", NOT the published files" if other else ""),
        extra={"published_files": not other},
    )


def _complete(folder: Path, origin: str) -> Path:
    missing = [name for name in MD5 if not (folder / name).is_file()]
    if missing:
        state = "exists but lacks" if folder.is_dir() else "does not exist; expected there:"
        raise DataSetMissing(
            f"MovieLens-1M not found: the folder {folder} (from {origin}) {state} {', '.join(missing)}.\n{by_hand()}"
        )
    return folder


def by_hand(archive: Archive = ARCHIVE) -> str:
    """How to place the files without a download by lumrec."""
    return (
        f"Download {archive.url} (see {archive.page}), unpack it, and either set data.path to the folder that holds "
        f"ratings.dat, or put it at $LUMREC_DATA/{archive.folder} or {cache_folder() / archive.folder}.\n"
        "To go on without it: data.source=simulator."
    )


def _other_files(folder: Path, md5: Mapping[str, str]) -> Dict[str, str]:
    digests = {name: hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest() for name in md5}
    return {name: digest for name, digest in digests.items() if digest != md5[name]}


def _lines(path: Path, fields: List[str]) -> pl.LazyFrame:
    """Each line as `raw`, its number as `order`, its `::` fields by name (null where their number is another)."""
    text = path.read_bytes().decode("latin-1").replace(_SEPARATOR, "\ufffd")
    frame = pl.scan_csv(
        text.encode(),
        separator=_SEPARATOR,
        has_header=False,
        quote_char=None,
        schema={"raw": pl.String},
        row_index_name="order",
    )
    parts = pl.col("raw").str.split("::")
    return (
        frame.with_columns(pl.col("raw").fill_null("").str.strip_chars_end("\r"), pl.col("order").cast(pl.Int64))
        .with_columns(parts.alias("parts"), (parts.list.len() == len(fields)).alias("whole"))
        .with_columns(
            pl.when("whole").then(pl.col("parts").list.get(place, null_on_oob=True)).alias(name)
            for place, name in enumerate(fields)
        )
        .drop("parts")
    )


def _number_checks(*names: str) -> List[tuple]:
    """Checks of the text fields `names`; each must be a whole number."""
    checks = [(~pl.col("whole"), "wrong number of fields")]
    for name in names:
        checks.append((_is_null(name), f"{name} is missing"))
        checks.append((pl.col(name).cast(pl.Int64, strict=False).is_null(), f"{name} is not a whole number"))
    return checks


def _is_null(name: str) -> pl.Expr:
    return pl.col(name).str.strip_chars().is_in(["", "null", "NULL", "NaN", "nan", "None", r"\N"])


def _whole_number(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Int64, strict=False)


def _items(path: Path) -> pl.LazyFrame:
    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$")
    genres = pl.col("genres").str.split("|").list.eval(pl.element().filter(pl.element() != ""))
    return (
        _lines(path, ["item_id", "title", "genres"])
        .with_columns(first_reason(*_number_checks("item_id")).alias("reason"))
        .with_columns(_whole_number("item_id").cast(pl.String), year.alias("year"), genres.alias("genres"))
        .drop("whole")
    )


def _users(path: Path) -> pl.LazyFrame:
    return (
        _lines(path, ["user_id", "gender", "age", "occupation", "zip_code"])
        .with_columns(first_reason(*_number_checks("user_id")).alias("reason"))
        .with_columns(_whole_number("user_id").cast(pl.String))
        .drop("whole")
    )


def _events(path: Path, items: pl.LazyFrame) -> pl.LazyFrame:
    rating = pl.col("rating").cast(pl.Float64, strict=False)
    checks = _number_checks("user_id", "item_id", "timestamp") + [
        (_is_null("rating"), "rating is missing"),
        (rating.is_null(), "rating is not a number"),
        (~rating.is_in([1.0, 2.0, 3.0, 4.0, 5.0]), "rating outside 1..5"),
    ]
    main_genre = (
        items.filter(pl.col("reason").is_null())
        .unique("item_id", keep="first", maintain_order=True)
        .select("item_id", pl.col("genres").list.first().alias("main_genre"))
    )
    return (
        _lines(path, ["user_id", "item_id", "rating", "timestamp"])
        .with_columns(first_reason(*checks).alias("reason"))
        .with_columns(
            _whole_number("user_id").cast(pl.String),
            _whole_number("item_id").cast(pl.String),
            _whole_number("timestamp"),
            rating.alias("stars"),
        )
        .with_columns(
            pl.col("stars").cast(pl.Int8, strict=False).cast(pl.String).alias("rating"),
            (pl.col("stars") >= 4).cast(pl.Float32).alias("label"),
            pl.when(pl.col("stars") >= 4).then(pl.lit("like")).otherwise(pl.lit("dislike")).alias("feedback"),
            # a time outside the calendar is left out by prepare; it must not stop the conversion of the others
            pl.when(pl.col("timestamp").is_between(0, LAST_POSSIBLE_TIME)).then("timestamp").alias("sane_time"),
        )
        .with_columns(
            pl.from_epoch("sane_time", time_unit="s").dt.hour().cast(pl.String).alias("hour"),
            pl.from_epoch("sane_time", time_unit="s").dt.weekday().cast(pl.String).alias("weekday"),
        )
        .drop("stars", "sane_time", "whole")
        .join(main_genre, on="item_id", how="left", maintain_order="left")
    )
