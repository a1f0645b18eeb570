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

import functools
import logging
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from lumrec.data.config import DataConfig
from lumrec.data.schema import FeatureConfig, SchemaConfig, TableConfig
from lumrec.data.sources.download import Archive
from lumrec.data.sources.lines import (
    check_header,
    number_checks,
    raw_of_bad_rows,
    scan_fields,
    scan_lines,
    whole_number,
    wrong_number_of_fields,
)
from lumrec.data.sources.published import COUNTED, Place, label_in_use
from lumrec.data.sources.published import resolve as resolve_place
from lumrec.data.sources.ratings import FIELDS, POSITIVE, rating_events
from lumrec.data.sources.raw_log import RawLog, first_reason, usable_rows
from lumrec.run.errors import UserError
from lumrec.run.files import checksum

log = logging.getLogger(__name__)

LAYOUTS = {
    "dat": ("ratings.dat", "movies.dat", "users.dat"),
    "u": ("u.data", "u.item", "u.user", "u.genre"),
    "csv": ("ratings.csv", "movies.csv"),
}


@dataclass(frozen=True)
class Release:
    """One published MovieLens. md5: of its files. expected: its counts, by the publisher or read from the files."""

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


def _release(
    name: str, layout: str, checksum: str, *counts: int, title: str = "", page: str = "", **md5: str
) -> Release:
    """counts: of COUNTED, as far as they are known. md5: of each file, by its name without the ending."""
    page = page or name.removeprefix("ml-")
    archive = Archive(
        url=f"https://files.grouplens.org/datasets/movielens/{name}.zip",
        page=f"https://grouplens.org/datasets/movielens/{page}/",
        checksum=checksum,
        folder=name,
    )
    digests = {f"{stem}.{layout}": digest for stem, digest in md5.items()}
    return Release(title or f"MovieLens-{page.upper()}", layout, archive, digests, dict(zip(COUNTED, counts)))


_SHA256_1M = "sha256:a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"
RELEASES = {
    "movielens-1m": _release(
        "ml-1m",
        "dat",
        _SHA256_1M,
        1_000_209,
        6040,
        3883,
        3706,
        ratings="a89aa3591bc97d6d4e0c89459ff39362",
        movies="ef9fd9ff8d1b33faf73e2122c371e910",
        users="681c0711d0d4548cd3d4718a49c2dcd8",
    ),
    "movielens-100k": _release("ml-100k", "u", "md5:0e33842e24a9c977be4e0107933c0723", 100_000, 943, 1682, 1682),
    "movielens-20m": _release(
        "ml-20m", "csv", "md5:cd245b17a1ae2cc31bb14903e1204af3", 20_000_263, 138_493, 27_278, 26_744
    ),
    "movielens-25m": _release(
        "ml-25m", "csv", "md5:6b51fb2759a8657d3bfcbfc42b592ada", 25_000_095, 162_541, 62_423, 59_047
    ),
    "movielens-32m": _release("ml-32m", "csv", "md5:d472be332d4daa821edc399621853b57", 32_000_204, 200_948, 87_585),
    "movielens-latest": _release("ml-latest", "csv", "", title="MovieLens latest"),
    "movielens-latest-small": _release("ml-latest-small", "csv", "", title="MovieLens latest small", page="latest"),
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
        tables=_TABLES, features={**_OF_ITEMS_AND_EVENTS, **(_OF_USERS if release.layout != "csv" else {}), **_OF_TIME}
    )
    for name, release in RELEASES.items()
}


def resolve(path: str = "", source: str = "movielens-1m") -> tuple[Path, str]:
    """Folder of the data set and how it was found; see `lumrec.data.sources.published.resolve`."""
    return resolve_place(RELEASES[source].place, path)


def read(data: DataConfig, *, seed: int, scratch: Path) -> RawLog:
    """The raw log of one of RELEASES. The CSV layout is read as a stream; `seed` and `scratch` are not used.

    Raises DataSetMissing (see `resolve`), and UserError for a label that is not made of the rating and for a file whose
    checksum is not the published one (with data.allow_other_files that is a warning in the log).
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
    main_genre = usable_rows(items).select("item_id", pl.col("genres").list.first().alias("main_genre"))
    extra: dict[str, object] = {"published_files": not other} if release.md5 else {}
    if release.expected and not other and not data.allow_other_files:
        extra["expected"] = release.expected
    return RawLog(
        events=rating_events(
            events, label, wrong_number_of_fields(), ids=pl.Int64(), half_stars=release.layout == "csv"
        ).join(main_genre, on="item_id", how="left"),
        items=items,
        users=users,
        files=[folder / name for name in release.files],
        note=f"{release.title} from {folder} ({found})" + (", NOT the published files" if other else ""),
        known_after=("rating",),
        extra=extra,
    )


def _other_files(release: Release, folder: Path) -> dict[str, str]:
    """md5 of the files whose md5 is not the published one."""
    digests = {name: checksum(folder / name, "md5") for name in release.md5}
    return {name: digest for name, digest in digests.items() if digest != release.md5[name]}


def _read_dat(folder: Path) -> tuple[pl.LazyFrame, pl.LazyFrame, pl.LazyFrame]:
    """Ratings as text, the catalogue, the users, of the layout with `::`."""
    fields = functools.partial(scan_fields, separator="::", encoding="latin-1")
    items = fields(folder / "movies.dat", ["item_id", "title", "genres"]).with_columns(_genres(pl.col("genres")))
    users = fields(folder / "users.dat", ["user_id", "gender", "age", "occupation", "zip_code"])
    return fields(folder / "ratings.dat", FIELDS), _catalogue(items, "item_id"), _catalogue(users, "user_id")


def _read_u(folder: Path) -> tuple[pl.LazyFrame, pl.LazyFrame, pl.LazyFrame]:
    """Ratings as text, the catalogue, the users, of MovieLens-100K."""
    fields = functools.partial(scan_fields, separator="|", encoding="latin-1")
    listed = fields(folder / "u.genre", ["genre", "index"]).filter("whole").with_columns(whole_number("index"))
    genres = listed.sort("index").select("genre").collect().to_series().to_list()
    flags = [f"flag_{index}" for index in range(len(genres))]
    items = fields(folder / "u.item", ["item_id", "title", "released", "released_on_video", "address", *flags])
    has = [pl.when(pl.col(flag) == "1").then(pl.lit(genre)) for flag, genre in zip(flags, genres)]
    items = items.with_columns(pl.concat_list(has).list.drop_nulls().alias("genres")).drop(*flags, "released_on_video")
    users = fields(folder / "u.user", ["user_id", "age", "gender", "occupation", "zip_code"])
    ratings = fields(folder / "u.data", FIELDS, separator="\t")
    return ratings, _catalogue(items, "item_id"), _catalogue(users, "user_id")


def _read_csv(folder: Path) -> tuple[pl.LazyFrame, pl.LazyFrame, None]:
    """Ratings as text and the catalogue of the layout with headers; ratings are read as a stream."""
    check_header(folder / "ratings.csv", ["userId", "movieId", "rating", "timestamp"])
    check_header(folder / "movies.csv", ["movieId", "title", "genres"])
    quoted, plain = r'"(?:[^"]|"")*"', r'[^",][^,]*|'
    line = rf'^([^,]*),({quoted}|{plain}),({quoted}|[^",]*)$'
    fields = pl.col("raw").str.extract_groups(line).struct.rename_fields(["item_id", "title", "genres"])
    items = (
        scan_lines(folder / "movies.csv", skip_lines=1)
        .with_columns(fields.alias("fields"))
        .unnest("fields")
        .with_columns(pl.col("item_id").is_not_null().alias("whole"), *map(_unquoted, ("title", "genres")))
        .with_columns(_genres(pl.col("genres")))
    )
    return scan_fields(folder / "ratings.csv", FIELDS, skip_lines=1), _catalogue(items, "item_id"), None


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
