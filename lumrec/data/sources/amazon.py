"""Amazon reviews, one category at a time (data.category), in the layouts of their releases.

    amazon-2014  ratings_Books.csv       A10000012B7CGYKOMPQ4L,000100039X,5.0,1355616000    user, item, rating, seconds
                 meta_Books.json.gz      {'asin': '000100039X', 'categories': [['Books', …]], …}   Python dicts
    amazon-2018  Books.json.gz           {"overall": 5.0, "reviewerID": …, "asin": …, "unixReviewTime": …}   seconds
                 meta_Books.json.gz      {"asin": …, "brand": …, "category": […], "price": "$12.99"}
    amazon-2023  Books.jsonl.gz          {"rating": 5.0, "user_id": …, "parent_asin": …, "timestamp": …}   milliseconds
                 meta_Books.jsonl.gz     {"parent_asin": …, "store": …, "categories": […], "price": 12.99}
    amazon-5core-sequences               sequences made of the 2014 release, 5 events a user and an item at least
                 Beauty.seq_gap.txt      1 1 2 3<TAB>0 0 9244800    user, items in order, seconds since the one before
                 Beauty_item2attributes.json   {"1": [17, 4], …}

Files may be unpacked. Of 2018, data.category=Books_5 is the publisher's 5-core (Books_5.json.gz); Books is
Books.json.gz, or else Books_5.json.gz. A rating of 4 or more is positive; data.label.at_least changes that. Items of
the log that the metadata lacks are kept, with no feature but their id. The sequences have no ratings, so every event is
positive, and no dates, so times of different users cannot be compared.

Sources: J. McAuley et al., Image-based Recommendations on Styles and Substitutes, SIGIR 2015; J. Ni et al., Justifying
Recommendations using Distantly-Labeled Reviews, EMNLP 2019; Y. Hou et al., Bridging Language and Items for Retrieval
and Recommendation, 2024 (arXiv 2403.03952). There are no published checksums, hence no download.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from lumrec.data.config import DataConfig
from lumrec.data.schema import FeatureConfig, SchemaConfig, TableConfig
from lumrec.data.sources.json_lines import Decode, decode_file, decode_json, decode_python
from lumrec.data.sources.lines import is_missing, raw_of_bad_rows, scan_fields, wrong_number_of_fields
from lumrec.data.sources.published import Place, find_folder, label_in_use, resolve
from lumrec.data.sources.ratings import FIELDS, POSITIVE, rating_events
from lumrec.data.sources.raw_log import LabelConfig, RawLog, first_reason, microseconds, usable_rows
from lumrec.run.errors import UserError

SEQUENCES = "amazon-5core-sequences"
META_FIELDS = ("item_id", "title", "brand", "price", "categories")
START_S = 946_684_800  # 2000-01-01 UTC: where the clock of every user of the sequences begins
PRICE = r"^\s*\$?\s*(\d[\d,]*(?:\.\d+)?)\s*$"
# Counts in S. Zhou et al., S3-Rec, CIKM 2020, table 1.
EXPECTED = {(SEQUENCES, "Beauty"): {"events_read": 198_502, "users": 22_363, "items_with_events": 12_101}}


@dataclass(frozen=True)
class Release:
    """One release. ratings, meta: file names, {} for the category, first choice first. meta_fields, rating_fields: the
    publisher's names of META_FIELDS and FIELDS; without rating_fields the ratings are CSV. unit: of the times.
    decode_meta: how a line of the metadata is read.
    """

    page: str
    ratings: tuple[str, ...]
    meta: tuple[str, ...]
    meta_fields: tuple[str, ...]
    rating_fields: tuple[str, ...] = ()
    unit: str = "s"
    decode_meta: Decode = decode_json


RELEASES = {
    "amazon-2014": Release(
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
        ratings=("ratings_{}.csv", "ratings_{}.csv.gz"),
        meta=("meta_{}.json.gz", "meta_{}.json"),
        meta_fields=("asin", "title", "brand", "price", "categories"),
        decode_meta=decode_python,
    ),
    "amazon-2018": Release(
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/",
        ratings=("{}.json.gz", "{}.json", "{}_5.json.gz", "{}_5.json"),
        meta=("meta_{}.json.gz", "meta_{}.json"),
        meta_fields=("asin", "title", "brand", "price", "category"),
        rating_fields=("reviewerID", "asin", "overall", "unixReviewTime"),
    ),
    "amazon-2023": Release(
        "https://amazon-reviews-2023.github.io/",
        ratings=("{}.jsonl.gz", "{}.jsonl"),
        meta=("meta_{}.jsonl.gz", "meta_{}.jsonl"),
        meta_fields=("parent_asin", "title", "store", "price", "categories"),
        rating_fields=("user_id", "parent_asin", "rating", "timestamp"),
        unit="ms",
    ),
}

_REVIEWS = SchemaConfig(
    tables={"item_id": TableConfig(32), "categories": TableConfig(16)},
    features={
        "item_id": FeatureConfig("item"),
        "categories": FeatureConfig("item", kind="multi"),
        "brand": FeatureConfig("item"),
        "price": FeatureConfig("item", kind="dense", scale="log"),
        "feedback": FeatureConfig("condition", wish=True),
        "main_category": FeatureConfig("condition", table="categories"),
        "rating": FeatureConfig("feedback"),
        "weekday": FeatureConfig("context"),
    },
)
DEFAULT_SCHEMAS = {
    **{name: _REVIEWS for name in RELEASES},
    SEQUENCES: SchemaConfig(
        tables={"item_id": TableConfig(32), "attributes": TableConfig(16)},
        features={
            "item_id": FeatureConfig("item"),
            "attributes": FeatureConfig("item", kind="multi"),
            "attribute": FeatureConfig("condition", table="attributes"),
        },
    ),
}


def read(data: DataConfig, *, seed: int, scratch: Path) -> RawLog:
    """The raw log of one category; JSON is decoded into Parquet in `scratch` first. `seed` is not used.

    Raises DataSetMissing where the category's files are not found (it lists the categories that are there), UserError
    for a missing data.category and for a label that is not made of the rating.
    """
    if data.source == SEQUENCES:
        return _read_sequences(data)
    release = RELEASES[data.source]
    label = label_in_use(data.label, POSITIVE, columns=["rating"], source=data.source)
    folder, found = _find(data, (data.source,), release.page, release.ratings)
    path = _first(folder, release.ratings, data.category)
    meta = _first(folder, release.meta, data.category.removesuffix("_5"))
    assert path is not None
    if release.rating_fields:
        rows = _decoded(path, FIELDS, release.rating_fields, scratch / "ratings", decode_json)
        rows = rows.with_columns(pl.coalesce("raw", pl.struct(FIELDS).struct.json_encode()).alias("raw"))
        malformed = (~pl.col("decoded"), "not a JSON object as published")
    else:
        rows, malformed = scan_fields(path, FIELDS), wrong_number_of_fields()
    events = rating_events(rows, label, malformed, unit=release.unit)
    items = None
    if meta is not None:
        rows = _decoded(meta, META_FIELDS, release.meta_fields, scratch / "meta", release.decode_meta)
        items = _catalogue(rows)
    return _raw_log(data, events, items, [path, *([meta] if meta else [])], f"{path.name} from {folder} ({found})")


def _raw_log(
    data: DataConfig, events: pl.LazyFrame, items: pl.LazyFrame | None, files: list[Path], note: str
) -> RawLog:
    """The log with the main category (or attribute) of each event's item, and with items that the metadata lacks."""
    many, main = ("attributes", "attribute") if data.source == SEQUENCES else ("categories", "main_category")
    if items is None:
        # Empty columns, so that the default schema can be read: it then knows the items only by their ids.
        empty = [pl.lit([], dtype=pl.List(pl.String)).alias(many), pl.lit(None, pl.String).alias(main)]
        if data.source != SEQUENCES:
            empty += [pl.lit(None, pl.String).alias("brand"), pl.lit(None, pl.Float64).alias("price")]
        events = events.with_columns(empty)
        note += f"; NO METADATA beside it: items have no {many} or other feature but their id"
    else:
        known = usable_rows(items)
        events = events.join(known.select("item_id", main), on="item_id", how="left")
        used = events.filter(pl.col("reason").is_null()).select("item_id").unique()
        lacking = used.join(known, on="item_id", how="anti").sort("item_id")
        items = pl.concat([items, lacking], how="diagonal").with_columns(pl.col(many).fill_null([]))
    expected = None if data.allow_other_files else EXPECTED.get((data.source, data.category))
    return RawLog(
        events=events,
        items=items,
        users=None,
        files=files,
        note=f"Amazon {data.category}: {note}",
        known_after=() if data.source == SEQUENCES else ("rating",),
        absolute_time=data.source != SEQUENCES,
        extra={"expected": expected} if expected else {},
    )


def _find(data: DataConfig, folders: tuple[str, ...], page: str, names: tuple[str, ...]) -> tuple[Path, str]:
    """The folder that holds the category's ratings, and how it was found."""
    there = find_folder(data.path, folders)
    categories = _categories(there[0], names) if there else []
    listed = f"; {there[0]} holds: {', '.join(categories)}" if there and categories else ""
    if not data.category:
        raise UserError(f"data.category is not given; {data.source} is read by category (Books, Beauty, …){listed}")

    def missing(folder: Path) -> list[str]:
        return [] if _first(folder, names, data.category) else [names[0].format(data.category) + listed]

    place = Place(
        f"{data.source}, category {data.category}", folders, (names[0].format(data.category),), page, missing=missing
    )
    return resolve(place, data.path)


def _categories(folder: Path, names: tuple[str, ...]) -> list[str]:
    """Categories whose ratings are in the folder."""
    patterns = [re.compile(re.escape(name).replace(r"\{\}", r"(?!meta_)(.+)") + "$") for name in names]
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted({found[1] for file in files for pattern in patterns if (found := pattern.match(file))})


def _first(folder: Path, names: tuple[str, ...], category: str) -> Path | None:
    paths = [folder / name.format(category) for name in names]
    return next((path for path in paths if path.is_file()), None)


def _decoded(path: Path, ours: Sequence[str], theirs: Sequence[str], into: Path, decode: Decode) -> pl.LazyFrame:
    """Lines of objects, the fields `theirs` by the names `ours`; `categories` is a list, everything else text."""
    kinds = {
        name: pl.List(pl.String) if our == "categories" else pl.String() for our, name in zip(ours, theirs, strict=True)
    }
    return decode_file(path, kinds, into, decode).rename(dict(zip(theirs, ours)))


def _catalogue(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Items of decoded metadata. main_category: the one below the root ("Books"), where there is one."""
    categories = pl.col("categories").list.eval(pl.element().str.strip_chars())
    categories = categories.list.eval(pl.element().filter(pl.element() != "")).list.unique(maintain_order=True)
    checks = ((~pl.col("decoded"), "not an object as published"), (is_missing("item_id"), "item_id is missing"))
    brand = pl.col("brand").str.strip_chars()
    return rows.select(
        "item_id",
        "order",
        pl.col("title").str.strip_chars(),
        pl.when(brand != "").then(brand).alias("brand"),
        pl.col("price").str.extract(PRICE).str.replace_all(",", "").cast(pl.Float64, strict=False).alias("price"),
        categories.fill_null([]).alias("categories"),
        pl.coalesce(categories.list.get(1, null_on_oob=True), categories.list.first()).alias("main_category"),
        first_reason(*checks).alias("reason"),
        "raw",
    ).with_columns(raw_of_bad_rows())


def _read_sequences(data: DataConfig) -> RawLog:
    if data.label != LabelConfig():
        raise UserError(f"data.label: {SEQUENCES} has no rating, every event is positive; leave data.label out")
    folders = (f"amazon-{data.category.lower()}-5core", SEQUENCES) if data.category else (SEQUENCES,)
    page = f"{RELEASES['amazon-2014'].page} (the 5-core there, made into sequences)"
    folder, found = _find(data, folders, page, ("{}.seq_gap.txt",))
    path = folder / f"{data.category}.seq_gap.txt"
    attributes = folder / f"{data.category}_item2attributes.json"
    items = _attributes(attributes) if attributes.is_file() else None
    files = [path, *([attributes] if items is not None else [])]
    return _raw_log(data, _sequences(path), items, files, f"{path.name} from {folder} ({found})")


def _sequences(path: Path) -> pl.LazyFrame:
    """One row for each item of each line, one for each line that cannot be used."""
    numbers = r"^\d+( \d+)*$"
    listed, gaps = (
        pl.col(name).str.split(" ").list.eval(pl.element().cast(pl.Int64, strict=False)) for name in ("items", "gaps")
    )
    user, items = listed.list.first(), listed.list.slice(1)
    checks = (
        wrong_number_of_fields(),
        (~(pl.col("items").str.contains(numbers) & pl.col("gaps").str.contains(numbers)), "not whole numbers"),
        (items.list.len() != gaps.list.len(), "not as many times as items"),
    )
    usable = pl.col("reason").is_null()
    lines = (
        scan_fields(path, ["items", "gaps"], separator="\t")
        .with_columns(first_reason(*checks).alias("reason"))
        .select(
            pl.when(usable).then(user).alias("user_id"),
            pl.when(usable).then(items).alias("item_id"),
            pl.when(usable).then(gaps.list.eval(pl.element().cum_sum())).alias("after_s"),
            "reason",
            raw_of_bad_rows(),
        )
    )
    read = pl.concat_str("user_id", "item_id", "after_s", separator=" ")
    return (
        lines.explode("item_id", "after_s")
        .with_row_index("order")
        .select(
            "user_id",
            "item_id",
            pl.col("order").cast(pl.Int64),
            microseconds(START_S + pl.col("after_s"), "s").alias("time_us"),
            pl.lit(1.0, pl.Float32).alias("label"),
            "reason",
            pl.coalesce("raw", read).alias("raw"),
        )
    )


def _attributes(path: Path) -> pl.LazyFrame:
    """Items of a file item → attributes, in its order. Raises UserError where it is something else."""
    try:
        content = json.loads(path.read_bytes())
        columns = {
            "item_id": [int(item) for item in content],
            "attributes": [list(map(str, of)) for of in content.values()],
        }
        items = pl.LazyFrame(columns, schema={"item_id": pl.Int64, "attributes": pl.List(pl.String)})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path}: expected one JSON object, item → list of attributes; {error}") from error
    return items.with_columns(
        pl.col("attributes").list.first().alias("attribute"), pl.lit(None, pl.String).alias("reason")
    )
