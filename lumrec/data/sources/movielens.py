"""MovieLens in the three layouts in which it was published.

    movielens-1m        ratings.dat  1::1193::5::978300760        user, movie, rating 1..5, seconds; latin-1
                        users.dat    1::F::1::10::48067           user, gender, age, occupation, zip code
                        movies.dat   1::Toy Story (1995)::Animation|Children's|Comedy
    movielens-100k      u.data       196 242 3 881250949          the same, tabs between; latin-1
                        u.user       1|24|M|technician|85711      user, age, gender, occupation, zip code
                        u.item       1|Toy Story (1995)|01-Jan-1995||http://…|0|0|0|1|1|…  a flag for each genre
                        u.genre      Animation|3
    movielens-20m, …    ratings.csv  1,2,3.5,1112486027           a header, and ratings in half stars
                        movies.csv   11,"American President, The (1995)",Comedy|Drama|Romance

A rating of 4 or more is the positive label (as in DIN section 6.1, LUM section 4); data.label.at_least changes that.
The CSV layout has no file of users. Source: F. M. Harper, J. A. Konstan, The MovieLens Datasets: History and Context,
2015; its licence forbids passing the files on.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from lumrec.data.config import DataConfig
from lumrec.data.schema import FeatureConfig, SchemaConfig, TableConfig
from lumrec.data.sources.download import Archive
from lumrec.data.sources.lines import (
    check_header,
    is_missing,
    number_checks,
    raw_of_bad_rows,
    scan_fields,
    scan_lines,
    whole_number,
    wrong_number_of_fields,
)
from lumrec.data.sources.published import Place, label_in_use
from lumrec.data.sources.published import resolve as resolve_place
from lumrec.data.sources.raw_log import LabelConfig, RawLog, first_reason, microseconds, positive
from lumrec.run.errors import UserError
from lumrec.run.files import checksum

log = logging.getLogger(__name__)

LAYOUTS = {
    "dat": ("ratings.dat", "movies.dat", "users.dat"),
    "u": ("u.data", "u.item", "u.user", "u.genre"),
    "csv": ("ratings.csv", "movies.csv"),
}
POSITIVE = LabelConfig(column="rating", at_least=4.0)


@dataclass(frozen=True)
class Release:
    """One published MovieLens. md5: of its files. expected: counts by the publisher, or by readers of the files."""

    title: str
    layout: str
    archive: Archive
    md5: dict[str, str] = field(default_factory=dict)
    expected: dict[str, int] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        return LAYOUTS[self.layout]

    @property
    def place(self) -> Place:
        return Place(self.title, (self.archive.folder,), self.files, self.archive.page, self.archive)


def _archive(name: str, page: str, checksum: str) -> Archive:
    return Archive(
        url=f"https://files.grouplens.org/datasets/movielens/{name}.zip",
        page=f"https://grouplens.org/datasets/movielens/{page}/",
        checksum=checksum,
        folder=name,
    )


RELEASES = {
    "movielens-1m": Release(
        "MovieLens-1M",
        "dat",
        _archive("ml-1m", "1m", "sha256:a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),
        md5={
            "ratings.dat": "a89aa3591bc97d6d4e0c89459ff39362",
            "movies.dat": "ef9fd9ff8d1b33faf73e2122c371e910",
            "users.dat": "681c0711d0d4548cd3d4718a49c2dcd8",
        },
        expected={"events_read": 1_000_209, "users": 6040, "items": 3883, "items_with_events": 3706},
    ),
    "movielens-100k": Release(
        "MovieLens-100K",
        "u",
        _archive("ml-100k", "100k", "md5:0e33842e24a9c977be4e0107933c0723"),
        expected={"events_read": 100_000, "users": 943, "items": 1682, "items_with_events": 1682},
    ),
    "movielens-20m": Release(
        "MovieLens-20M",
        "csv",
        _archive("ml-20m", "20m", "md5:cd245b17a1ae2cc31bb14903e1204af3"),
        expected={"events_read": 20_000_263, "users": 138_493, "items": 27_278, "items_with_events": 26_744},
    ),
    "movielens-25m": Release(
        "MovieLens-25M",
        "csv",
        _archive("ml-25m", "25m", "md5:6b51fb2759a8657d3bfcbfc42b592ada"),
        expected={"events_read": 25_000_095, "users": 162_541, "items": 62_423, "items_with_events": 59_047},
    ),
    "movielens-32m": Release(
        "MovieLens-32M",
        "csv",
        _archive("ml-32m", "32m", "md5:d472be332d4daa821edc399621853b57"),
        expected={"events_read": 32_000_204, "users": 200_948, "items": 87_585},
    ),
    "movielens-latest": Release("MovieLens latest", "csv", _archive("ml-latest", "latest", "")),
    "movielens-latest-small": Release("MovieLens latest small", "csv", _archive("ml-latest-small", "latest", "")),
}

_OF_ITEMS_AND_EVENTS = {
    "item_id": FeatureConfig("item"),
    "genres": FeatureConfig("item", kind="multi"),
    "year": FeatureConfig("item"),
    "feedback": FeatureConfig("condition", wish=True),
    "main_genre": FeatureConfig("condition", table="genres"),
    "rating": FeatureConfig("feedback"),
}
_OF_USERS = {name: FeatureConfig("user") for name in ("gender", "age", "occupation")}
_OF_TIME = {"hour": FeatureConfig("context"), "weekday": FeatureConfig("context")}
_TABLES = {"item_id": TableConfig(32), "genres": TableConfig(16)}
DEFAULT_SCHEMAS = {
    name: SchemaConfig(
        tables=_TABLES,
        features={**_OF_ITEMS_AND_EVENTS, **(_OF_USERS if release.layout != "csv" else {}), **_OF_TIME},
    )
    for name, release in RELEASES.items()
}


def resolve(path: str = "", source: str = "movielens-1m") -> tuple[Path, str]:
    """Folder of the data set and how it was found: `path`, else $LUMREC_DATA/ml-…, else the cache, else a download.

    The cache is $LUMREC_CACHE or ~/.cache/lumrec. Raises DataSetMissing where the folder named does not hold the files,
    or nothing is found and the publisher cannot be reached; UserError where the download has another checksum.
    """
    return resolve_place(RELEASES[source].place, path)


def read(data: DataConfig, *, seed: int, scratch: Path) -> RawLog:
    """The raw log of one of RELEASES. Streamed from the files in the CSV layout; `seed` and `scratch` are not used.

    Raises DataSetMissing (see `resolve`), and UserError for a file with another checksum than the published one unless
    data.allow_other_files, which logs a warning instead, and for a label that is not made of the rating.
    """
    release = RELEASES[data.source]
    label = label_in_use(data.label, POSITIVE, columns=["rating"], source=data.source)
    folder, found = resolve(data.path, data.source)
    other = _other_files(release, folder)
    if other and not data.allow_other_files:
        lines = "\n".join(f"  {folder / name}: md5 {got}, expected {release.md5[name]}" for name, got in other.items())
        raise UserError(
            f"wrong checksum: these are not the published {release.title} files:\n{lines}\n"
            f"Get {release.archive.url} and unpack it there, or set data.allow_other_files=true to use the files as "
            "they are (figures are then not comparable with published ones)."
        )
    if other:
        log.warning("data.allow_other_files: %s differ from the published %s", ", ".join(other), release.title)
    events, items, users = {"dat": _read_dat, "u": _read_u, "csv": _read_csv}[release.layout](folder)
    extra: dict[str, object] = {"published_files": not other} if release.md5 else {}
    if release.expected and not other and not data.allow_other_files:
        extra["expected"] = release.expected
    return RawLog(
        events=_events(events, items, label, half_stars=release.layout == "csv"),
        items=items,
        users=users,
        files=[folder / name for name in release.files],
        note=f"{release.title} from {folder} ({found})" + (", NOT the published files" if other else ""),
        known_after=("rating",),
        extra=extra,
    )


def _other_files(release: Release, folder: Path) -> dict[str, str]:
    """md5 of the files that have another one than the published."""
    digests = {name: checksum(folder / name, "md5") for name in release.md5}
    return {name: digest for name, digest in digests.items() if digest != release.md5[name]}


Tables = tuple[pl.LazyFrame, pl.LazyFrame, pl.LazyFrame | None]
_RATING = ["user_id", "item_id", "rating", "timestamp"]


def _read_dat(folder: Path) -> Tables:
    """Ratings as text, the catalogue, the users, of the layout with `::`."""

    def fields(name: str, names: list[str]) -> pl.LazyFrame:
        return scan_fields(folder / name, names, separator="::", encoding="latin-1")

    items = fields("movies.dat", ["item_id", "title", "genres"]).with_columns(_genres(pl.col("genres")))
    users = fields("users.dat", ["user_id", "gender", "age", "occupation", "zip_code"])
    return fields("ratings.dat", _RATING), _catalogue(items, "item_id"), _catalogue(users, "user_id")


def _read_u(folder: Path) -> Tables:
    """Ratings as text, the catalogue, the users, of MovieLens-100K."""

    def fields(name: str, names: list[str], separator: str = "|") -> pl.LazyFrame:
        return scan_fields(folder / name, names, separator=separator, encoding="latin-1")

    listed = fields("u.genre", ["genre", "place"]).filter("whole").with_columns(whole_number("place")).sort("place")
    genres = listed.select("genre").collect().to_series().to_list()
    flags = [f"flag_{place}" for place in range(len(genres))]
    items = fields("u.item", ["item_id", "title", "released", "released_on_video", "address", *flags])
    has = [pl.when(pl.col(flag) == "1").then(pl.lit(genre)) for flag, genre in zip(flags, genres)]
    items = items.with_columns(pl.concat_list(has).list.drop_nulls().alias("genres")).drop(*flags, "released_on_video")
    users = fields("u.user", ["user_id", "age", "gender", "occupation", "zip_code"])
    return fields("u.data", _RATING, "\t"), _catalogue(items, "item_id"), _catalogue(users, "user_id")


def _read_csv(folder: Path) -> Tables:
    """Ratings as text and the catalogue of the layout with headers; ratings are read as a stream."""
    check_header(folder / "ratings.csv", ["userId", "movieId", "rating", "timestamp"])
    check_header(folder / "movies.csv", ["movieId", "title", "genres"])
    quoted, plain = r'"(?:[^"]|"")*"', r'[^",][^,]*|'
    line = rf'^([^,]*),({quoted}|{plain}),({quoted}|[^",]*)$'
    items = (
        scan_lines(folder / "movies.csv", skip_lines=1)
        .with_columns(
            pl.col("raw").str.extract_groups(line).struct.rename_fields(["item_id", "title", "genres"]).alias("parts")
        )
        .unnest("parts")
        .with_columns(pl.col("item_id").is_not_null().alias("whole"), *map(_unquoted, ("title", "genres")))
        .with_columns(_genres(pl.col("genres")))
    )
    return scan_fields(folder / "ratings.csv", _RATING, skip_lines=1), _catalogue(items, "item_id"), None


def _unquoted(name: str) -> pl.Expr:
    text = pl.col(name)
    inner = text.str.strip_prefix('"').str.strip_suffix('"').str.replace_all('""', '"', literal=True)
    return pl.when(text.str.starts_with('"')).then(inner).otherwise(text).alias(name)


def _genres(text: pl.Expr) -> pl.Expr:
    named = pl.element().filter(~pl.element().is_in(["", "(no genres listed)"]))
    return text.fill_null("").str.split("|").list.eval(named).alias("genres")


def _catalogue(rows: pl.LazyFrame, key: str) -> pl.LazyFrame:
    """Movies or users with the reason why a row cannot be used, and the year of a title that ends in one."""
    if key == "item_id":
        rows = rows.with_columns(pl.col("title").str.extract(r"\((\d{4})\)\s*$").alias("year"))
    return (
        rows.with_columns(first_reason(wrong_number_of_fields(), *number_checks(key)).alias("reason"))
        .with_columns(whole_number(key), raw_of_bad_rows())
        .drop("whole")
    )


def _events(ratings: pl.LazyFrame, items: pl.LazyFrame, label: LabelConfig, *, half_stars: bool) -> pl.LazyFrame:
    stars = pl.col("rating").cast(pl.Float64, strict=False)
    possible = [half / 2 for half in range(1, 11)] if half_stars else [1.0, 2.0, 3.0, 4.0, 5.0]
    checks = [
        wrong_number_of_fields(),
        *number_checks("user_id", "item_id", "timestamp"),
        (is_missing("rating"), "rating is missing"),
        (stars.is_null(), "rating is not a number"),
        (~stars.is_in(possible), f"rating outside {'0.5' if half_stars else '1'}..5"),
    ]
    main_genre = (
        items.filter(pl.col("reason").is_null())
        .unique("item_id", keep="first", maintain_order=True)
        .select("item_id", pl.col("genres").list.first().alias("main_genre"))
    )
    text = stars if half_stars else stars.cast(pl.Int8, strict=False)
    return (
        ratings.with_columns(first_reason(*checks).alias("reason"))
        .with_columns(
            whole_number("user_id"),
            whole_number("item_id"),
            microseconds(whole_number("timestamp"), "s").alias("time_us"),
            text.cast(pl.String).alias("rating"),
            positive(stars, pl.Float64(), label).alias("label"),
        )
        .drop("whole", "timestamp")
        .join(main_genre, on="item_id", how="left")
    )
