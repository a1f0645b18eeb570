"""MovieLens: the published layouts, every reason to leave a row out, and where the files come from."""

import csv
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.data.config import DataConfig
from lumrec.data.schema import validate
from lumrec.data.sources import movielens
from lumrec.data.sources.raw_log import DataSetMissing, LabelConfig
from lumrec.data.splits import SplitConfig
from lumrec.experiments.config import load

ANY = DataConfig(allow_other_files=True)


@pytest.fixture
def published() -> DataConfig:
    """The real data set, where this machine has it."""
    root = os.environ.get("LUMREC_DATA", "")
    if not root or not (Path(root) / "ml-1m" / "ratings.dat").is_file():
        pytest.skip("LUMREC_DATA names no folder that holds ml-1m/ratings.dat")
    return DataConfig()


def test_the_published_data_set(published: DataConfig, make_config: Callable, open_log: Callable):
    """Counts, and every rating, against a plain reading of the file and NumPy's stable sort."""
    data = open_log(make_config(published))
    counts = data.manifest["counts"]
    assert (data.num_events, data.num_users, data.num_items) == (1_000_209, 6040, 3883)
    assert (counts["items_with_events"], counts["events_quarantined"]) == (3706, 0)
    assert (counts["valid_events"], counts["test_events"]) == (99_727, 91_814)
    assert data.manifest["source"]["published_files"] is True
    assert data.item_titles()[0] == "Toy Story (1995)"
    assert "Misérables, Les (1995)" in data.item_titles()
    assert sorted(data.vocabulary("genres").values()) == list(range(1, 19))
    # the first event of user 1, by hand: the earliest timestamp (978300019), row 32 of ratings.dat
    assert (data.timestamp[0], data.order[0], data.item_keys()[data.item[0]]) == (978300019, 31, "3186")

    text = (Path(os.environ["LUMREC_DATA"]) / "ml-1m" / "ratings.dat").read_text().replace("::", " ")
    user, item, rating, timestamp = np.array(text.split(), dtype=np.int64).reshape(-1, 4).T
    order = np.lexsort((timestamp, user))
    assert (data.order == order).all()
    assert (data.timestamp == timestamp[order]).all()
    assert (np.array(data.user_keys(), dtype=np.int64)[data.user] == user[order]).all()
    assert (np.array(data.item_keys(), dtype=np.int64)[data.item] == item[order]).all()
    assert (data.label == (rating[order] >= 4)).all()
    row = data.vocabulary("rating")
    stars = {value: int(key) for key, value in row.items()}
    assert [stars[value] for value in data.event_columns["rating"].values.tolist()] == rating[order].tolist()


def test_layout_titles_years_and_genres(movielens_folder: Callable, make_config: Callable, open_log: Callable):
    folder = movielens_folder(["1::10::5::978300760", "1::7::2::978300761"])
    data = open_log(make_config(replace(ANY, path=str(folder))))
    assert data.item_titles() == [
        "Toy Story (1995)",
        "Jumanji (1995)",
        "Misérables, Les (1995)",
        "No Year",
        "Never Rated (2000)",
    ]
    assert data.item_keys() == ["1", "2", "10", "7", "99"]
    assert data.item.tolist() == [2, 3]
    assert data.label.tolist() == [1.0, 0.0]
    # ratings 5 and 2; items 1, 2 and 99 do not occur in the training part, so their years and genres are unknown
    assert data.vocabulary("rating") == {"2": 1, "5": 2}
    assert data.vocabulary("year") == {"1995": 1}
    assert data.vocabulary("genres") == {"Comedy": 1, "Drama": 2, "Musical": 3}
    assert data.item_columns["year"].values.tolist() == [1, 1, 1, 0, 0]
    genres = data.item_columns["genres"]
    assert genres.offsets is not None
    assert [part.tolist() for part in genres.values.tensor_split(genres.offsets[1:-1])] == [
        [0, 0, 1],
        [0, 0, 0],
        [2, 3],
        [1],
        [0],
    ]
    assert data.event_columns["main_genre"].values.tolist() == [2, 1]
    assert data.event_columns["feedback"].values.tolist() == [2, 1]  # like, dislike
    assert data.vocabulary("hour") == {"22": 1}  # 2000-12-31 22:12:40 UTC, a Sunday
    assert data.vocabulary("weekday") == {"7": 1}


BAD_ROWS = {
    "1::1::5": "wrong number of fields",
    "1::1::5::978300760::0": "wrong number of fields",
    "": "wrong number of fields",
    "one::1::5::978300760": "user_id is not a whole number",
    "1::1.5::5::978300760": "item_id is not a whole number",
    "1::1::5::yesterday": "timestamp is not a whole number",
    "1::1::five::978300760": "rating is not a number",
    "::1::5::978300760": "user_id is missing",
    "1::null::5::978300760": "item_id is missing",
    "1::1::::978300760": "rating is missing",
    "1::1::5::": "timestamp is missing",
    "1::1::0::978300760": "rating outside 1..5",
    "1::1::6::978300760": "rating outside 1..5",
    "1::1::4.5::978300760": "rating outside 1..5",
    "1::1::nan::978300760": "rating is missing",
    "1::12345::5::978300760": "unknown item",
    "12345::1::5::978300760": "unknown user",
    "1::1::5::0": "impossible time",
    "1::1::5::-978300760": "impossible time",
    "1::1::5::978300760000": "impossible time",
}
GOOD_ROWS = ["1::1::5::978300760", "2::2::3::978300761\r"]  # a line may end in \r\n


def test_every_bad_row_is_quarantined_with_its_reason(
    movielens_folder: Callable, make_config: Callable, capsys: pytest.CaptureFixture, open_log: Callable
):
    folder = movielens_folder([GOOD_ROWS[0], *BAD_ROWS, GOOD_ROWS[1]])
    data = open_log(make_config(replace(ANY, path=str(folder))))
    rows = pl.read_parquet(data.path / "quarantine.parquet")
    assert rows["table"].unique().to_list() == ["events"]
    rows = rows.sort("order")
    assert rows["reason"].to_list() == list(BAD_ROWS.values())
    # what the catalogue does not know is found later, when the row is no longer there as it was read
    as_read = rows.filter(~pl.col("reason").str.starts_with("unknown"))["raw"].to_list()
    assert as_read == [raw for raw, why in BAD_ROWS.items() if not why.startswith("unknown")]
    assert rows["order"].to_list() == list(range(1, len(BAD_ROWS) + 1))
    counts = data.manifest["counts"]
    assert counts["events_read"] == len(BAD_ROWS) + 2
    assert (counts["events"], counts["events_quarantined"]) == (2, len(BAD_ROWS))
    assert data.order.tolist() == [0, len(BAD_ROWS) + 1]
    assert sum(data.manifest["quarantine"].values()) == len(BAD_ROWS)
    shown = capsys.readouterr().out
    assert f"quarantined: {len(BAD_ROWS)} of {len(BAD_ROWS) + 2} events" in shown
    assert "3 events: rating outside 1..5" in shown


def test_bad_rows_of_the_catalogue(movielens_folder: Callable, make_config: Callable, open_log: Callable):
    folder = movielens_folder(
        ["1::1::5::978300760", "1::3::5::978300761", "2::1::5::978300762"],
        movies=["1::Toy Story (1995)::Comedy", "1::Again (1996)::Drama", "x::Y (1997)::Drama", "3::No genre"],
        users=["1::F::1::10::48067", "2::M::56", "::M::1::1::1"],
    )
    data = open_log(make_config(replace(ANY, path=str(folder))))
    assert data.item_titles() == ["Toy Story (1995)"]
    assert data.manifest["quarantine"] == {
        "events: unknown item": 1,
        "events: unknown user": 1,
        "items: item_id is not a whole number": 1,
        "items: item_id occurs again": 1,
        "items: wrong number of fields": 1,
        "users: user_id is missing": 1,
        "users: wrong number of fields": 1,
    }


def test_a_log_without_a_usable_row_is_an_error(movielens_folder: Callable, make_config: Callable, open_log: Callable):
    config = make_config(replace(ANY, path=str(movielens_folder(["1::1::9::978300760"]))))
    with pytest.raises(ValueError, match="no usable event.*1 read.*rating outside 1..5"):
        open_log(config)
    assert not list(Path(config.runs_dir).iterdir())


def test_ties_keep_the_order_of_the_file(movielens_folder: Callable, make_config: Callable, open_log: Callable):
    ratings = [f"{user}::{item}::4::97830000{time}" for time in (2, 1) for item in (10, 1, 7, 2) for user in (2, 1)]
    data = open_log(make_config(replace(ANY, path=str(movielens_folder(ratings)))))
    keys = [data.item_keys()[item] for item in data.item]
    assert keys == ["10", "1", "7", "2"] * 4
    for first, last in zip(data.user_offsets, data.user_offsets[1:]):
        assert list(zip(data.timestamp[first:last], data.order[first:last])) == sorted(
            zip(data.timestamp[first:last], data.order[first:last])
        )
    assert data.user_keys() == ["1", "2", "10", "11"]
    assert data.user_offsets.tolist() == [0, 8, 16, 16, 16]  # users 10 and 11 have no event


def test_files_with_another_checksum(movielens_folder: Callable, make_config: Callable, open_log: Callable):
    folder = movielens_folder(["1::1::5::978300760"])
    with pytest.raises(ValueError, match="wrong checksum") as error:
        open_log(make_config(DataConfig(path=str(folder))))
    for part in ("ratings.dat: md5", "expected a89aa3591bc97d6d4e0c89459ff39362", "data.allow_other_files=true"):
        assert part in str(error.value)
    data = open_log(make_config(DataConfig(path=str(folder), allow_other_files=True)))
    assert data.manifest["source"]["published_files"] is False


def test_a_prepared_folder_of_other_files_is_refused(
    movielens_folder: Callable, make_config: Callable, open_log: Callable
):
    config = make_config(replace(ANY, path=str(movielens_folder(["1::1::5::978300760"]))))
    open_log(config)
    movielens_folder(["1::1::4::978300760"])
    with pytest.raises(ValueError, match=r"from other files:\n  files.ratings.dat: (.|\n)*overwrite=true"):
        open_log(config)
    assert open_log(replace(config, overwrite=True)).vocabulary("rating") == {"4": 1}


def test_folders_are_found_in_order(movielens_folder: Callable, nowhere: Path, monkeypatch: pytest.MonkeyPatch):
    folder = movielens_folder(["1::1::5::978300760"])
    assert movielens.resolve(str(folder)) == (folder, "data.path")
    monkeypatch.setenv("LUMREC_DATA", str(folder.parent))
    assert movielens.resolve() == (folder, "LUMREC_DATA")
    monkeypatch.delenv("LUMREC_DATA")
    nowhere.mkdir()
    folder.rename(nowhere / "ml-1m")
    assert movielens.resolve() == (nowhere / "ml-1m", "cache")


@pytest.mark.parametrize("source", movielens.RELEASES)
def test_a_missing_data_set_says_what_to_do(nowhere: Path, tmp_path: Path, source: str):
    release = movielens.RELEASES[source]
    for path, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, f"lacks {', '.join(release.files)}"),
    ):
        with pytest.raises(DataSetMissing, match=message) as error:
            movielens.read(DataConfig(source=source, path=str(path)), seed=0, scratch=tmp_path)
        for part in (release.title, release.archive.url, "data.path", "LUMREC_DATA", "data.source=simulator"):
            assert part in str(error.value)


def test_an_unreachable_publisher_says_where_to_put_the_files(nowhere: Path, monkeypatch: pytest.MonkeyPatch):
    release = movielens.RELEASES["movielens-20m"]
    archive = replace(release.archive, url="http://127.0.0.1:1/ml-20m.zip", timeout_s=120.0)
    monkeypatch.setitem(movielens.RELEASES, "movielens-20m", replace(release, archive=archive))
    with pytest.raises(DataSetMissing, match="could not download") as error:
        movielens.resolve(source="movielens-20m")
    for part in (archive.url, str(nowhere / "ml-20m"), "data.path", "LUMREC_DATA", "data.source=simulator"):
        assert part in str(error.value)
    assert not list(nowhere.iterdir())


@pytest.fixture
def movielens_100k(tmp_path: Path) -> Callable[..., Path]:
    """Writes a log in the layout of MovieLens-100K."""
    flags = "|".join(["0"] * 19)

    def item(key: str, title: str, *genres: int) -> str:
        marks = "|".join("1" if place in genres else "0" for place in range(19))
        return f"{key}|{title}|01-Jan-1995||http://example.org/{key}|{marks}"

    def write(ratings: list[str], more_items: list[str] = []) -> Path:  # noqa: B006
        genres = (
            "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|"
            "Musical|Mystery|Romance|Sci-Fi|Thriller|War|Western"
        ).split("|")
        lines = {
            "u.data": ratings,
            "u.item": [
                item("1", "Toy Story (1995)", 5, 3, 4),
                item("2", "Mis\xe9rables, Les (1995)", 8),
                f"267|unknown||||{flags}",
                *more_items,
            ],
            "u.user": ["1|24|M|technician|85711", "2|53|F|other|94043"],
            "u.genre": [*(f"{genre}|{place}" for place, genre in enumerate(genres)), ""],
        }
        for name, content in lines.items():
            (tmp_path / name).write_bytes("".join(line + "\n" for line in content).encode("latin-1"))
        return tmp_path

    return write


def test_the_layout_of_100k(movielens_100k: Callable, make_config: Callable, open_log: Callable):
    folder = movielens_100k(
        ["2\t2\t3\t881250950", "1\t1\t5\t881250949", "1\t1\t9\t881250949", "1 1 5 881250949"],
        more_items=["4|Too few|01-Jan-1995"],
    )
    data = open_log(make_config(replace(ANY, source="movielens-100k", path=str(folder))))
    assert data.item_titles() == ["Toy Story (1995)", "Misérables, Les (1995)", "unknown"]
    # Animation and Drama twice, as the items' genres and the events' main genres
    assert data.vocabulary("genres") == {"Animation": 1, "Drama": 2, "Children's": 3, "Comedy": 4}
    genres = data.item_columns["genres"]
    assert genres.offsets is not None
    assert [part.tolist() for part in genres.values.tensor_split(genres.offsets[1:-1])] == [[1, 3, 4], [2], []]
    assert data.event_columns["main_genre"].values.tolist() == [1, 2]
    assert data.item_columns["year"].values.tolist() == [1, 1, 0]
    assert data.vocabulary("age") == {"24": 1, "53": 2}
    assert data.label.tolist() == [1.0, 0.0]
    assert data.manifest["quarantine"] == {
        "events: rating outside 1..5": 1,
        "events: wrong number of fields": 1,
        "items: wrong number of fields": 1,
    }


MOVIES_CSV = """\
movieId,title,genres
1,Toy Story (1995),Adventure|Comedy
11,"American President, The (1995)",Comedy|Drama
12,\"""Great Performances"" Cats (1998)",Musical
13,Misérables (2012),(no genres listed)
"""


@pytest.fixture
def movielens_csv(tmp_path: Path) -> Callable[..., Path]:
    """Writes a log in the layout of MovieLens-20M and later."""

    def write(ratings: list[str], movies: str = MOVIES_CSV, header: str = "userId,movieId,rating,timestamp") -> Path:
        (tmp_path / "ratings.csv").write_text("".join(f"{line}\n" for line in [header, *ratings]))
        (tmp_path / "movies.csv").write_text(movies)
        return tmp_path

    return write


BAD_CSV_ROWS = {
    "1,1,4.2,978300760": "rating outside 0.5..5",
    "1,1,0,978300760": "rating outside 0.5..5",
    "1,1,5.5,978300760": "rating outside 0.5..5",
    "1,1,,978300760": "rating is missing",
    "1,1,good,978300760": "rating is not a number",
    "1,1,4.0": "wrong number of fields",
    "1,1,4.0,978300760,": "wrong number of fields",
    '1,"1",4.0,978300760': "item_id is not a whole number",
    "1,1,4.0,978300760\x01": "timestamp is not a whole number",
    "1,77,4.0,978300760": "unknown item",
    "1,1,4.0,0": "impossible time",
    "": "wrong number of fields",
}


@pytest.mark.parametrize("source", [name for name, r in movielens.RELEASES.items() if r.layout == "csv"])
def test_the_layout_with_headers(movielens_csv: Callable, make_config: Callable, open_log: Callable, source: str):
    good = ["9,12,3.5,978300760", "9,11,4.0,978300761\r", "2,13,0.5,978300762", "10,1,5.0,978300763"]
    folder = movielens_csv([*good, *(row.replace("\x01", "\x01and more") for row in BAD_CSV_ROWS)])
    data = open_log(make_config(replace(ANY, source=source, path=str(folder), split=SplitConfig("leave_one_out"))))
    assert data.item_titles() == [
        "Toy Story (1995)",
        "American President, The (1995)",
        '"Great Performances" Cats (1998)',
        "Misérables (2012)",
    ]
    # there is no file of users: they are taken from the rows that could be read, in natural order
    assert data.user_keys() == ["1", "2", "9", "10"]
    assert data.order.tolist() == [2, 0, 1, 3]
    assert data.label.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert data.vocabulary("rating") == {"0.5": 1, "3.5": 2, "4.0": 3, "5.0": 4}
    assert data.vocabulary("genres") == {"Comedy": 1, "Adventure": 2, "Musical": 3, "Drama": 4}
    rows = pl.read_parquet(data.path / "quarantine.parquet").filter(pl.col("table") == "events").sort("order")
    assert rows["reason"].to_list() == list(BAD_CSV_ROWS.values())
    assert rows["order"].to_list() == list(range(4, 4 + len(BAD_CSV_ROWS)))
    source_wrote = [raw for raw, why in BAD_CSV_ROWS.items() if why != "unknown item"]
    assert rows.filter(pl.col("reason") != "unknown item")["raw"].to_list() == source_wrote


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (LabelConfig(), [0.0, 1.0, 1.0]),
        (LabelConfig(at_least=4.5), [0.0, 0.0, 1.0]),
        (LabelConfig(column="rating", at_least=3.5), [1.0, 1.0, 1.0]),
        (LabelConfig(values=["3.5", "5.0"]), [1.0, 0.0, 1.0]),
    ],
)
def test_what_counts_as_positive(
    movielens_csv: Callable, make_config: Callable, open_log: Callable, label: LabelConfig, expected: list[float]
):
    folder = movielens_csv(["1,1,3.5,978300760", "1,11,4.0,978300761", "1,12,5.0,978300762"])
    config = make_config(replace(ANY, source="movielens-20m", path=str(folder), label=label))
    assert open_log(config).label.tolist() == expected


def test_a_label_of_something_else(movielens_csv: Callable, tmp_path: Path):
    data = replace(ANY, source="movielens-20m", path=str(movielens_csv([])), label=LabelConfig(column="clicked"))
    with pytest.raises(ValueError, match="data.label.column: got 'clicked'.*movielens-20m that can be a label: rating"):
        movielens.read(data, seed=0, scratch=tmp_path)


def test_a_csv_with_other_columns(movielens_csv: Callable, tmp_path: Path):
    data = replace(ANY, source="movielens-20m", path=str(movielens_csv([], header="user,movieId,rating,timestamp")))
    with pytest.raises(ValueError, match="ratings.csv: the first line has no column userId; it reads 'user,movieId"):
        movielens.read(data, seed=0, scratch=tmp_path)


def test_published_counts_are_compared(
    movielens_csv: Callable, make_config: Callable, open_log: Callable, movielens_folder: Callable
):
    """Where there is no checksum of the files, a lost line shows in the counts."""
    folder = movielens_csv(["1,1,3.5,978300760"])
    with pytest.raises(ValueError, match="MovieLens-20M .*1 events read.*20,000,263.*data.allow_other_files"):
        open_log(make_config(DataConfig(source="movielens-20m", path=str(folder))))
    assert open_log(make_config(replace(ANY, source="movielens-20m", path=str(folder)))).num_events == 1


@settings(max_examples=15, deadline=None)
@given(
    titles=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x01\x00"), max_size=12), max_size=8)
)
def test_every_title_that_csv_can_hold(tmp_path_factory: pytest.TempPathFactory, titles: list[str]):
    folder = tmp_path_factory.mktemp("titles")
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")
    with open(folder / "movies.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["movieId", "title", "genres"], *([n, title, "A|B"] for n, title in enumerate(titles))])
    raw = movielens.read(replace(ANY, source="movielens-latest", path=str(folder)), seed=0, scratch=folder)
    assert raw.items is not None
    items = raw.items.collect()
    assert items["reason"].to_list() == [None] * len(titles)
    assert items["title"].to_list() == titles
    assert items["genres"].to_list() == [["A", "B"]] * len(titles)


def test_a_default_schema_is_one_for_every_release():
    for source, release in movielens.RELEASES.items():
        features = movielens.DEFAULT_SCHEMAS[source].features
        assert ("gender" in features) == (release.layout != "csv")
        assert [name for name, feature in features.items() if feature.role == "feedback"] == ["rating"]
    ours = movielens.DEFAULT_SCHEMAS["movielens-1m"]
    configured = load(Path(__file__).parents[3] / "configs" / "ml-1m.yaml").schema
    assert validate(ours) == validate(configured)
