"""MovieLens-1M: the published layout, every reason to leave a row out, and where the files come from."""

import functools
import hashlib
import http.server
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lumrec.data.prepare import DataConfig, prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.sources import movielens
from lumrec.data.sources.raw_log import DataSetMissing
from lumrec.data.splits import SplitConfig

ANY = DataConfig(allow_other_files=True)


@pytest.fixture
def published() -> DataConfig:
    """The real data set, where this machine has it."""
    root = os.environ.get("LUMREC_DATA", "")
    if not root or not (Path(root) / "ml-1m" / "ratings.dat").is_file():
        pytest.skip("LUMREC_DATA names no folder that holds ml-1m/ratings.dat")
    return DataConfig()


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No data set on this machine; gives back the cache folder."""
    monkeypatch.delenv("LUMREC_DATA", raising=False)
    monkeypatch.setenv("LUMREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def open_log(config) -> PreparedData:
    prepare(config, Path(config.runs_dir) / "prepared")
    return PreparedData.open(Path(config.runs_dir) / "prepared")


@pytest.mark.parametrize(("kind", "valid", "test"), [("temporal", 100_273, 97_383), ("leave_one_out", 6040, 6040)])
def test_the_published_data_set(published: DataConfig, make_config: Callable, kind: str, valid: int, test: int):
    data = open_log(make_config(replace(published, split=SplitConfig(kind))))
    counts = data.manifest["counts"]
    assert (data.num_events, data.num_users, data.num_items) == (1_000_209, 6040, 3883)
    assert (counts["items_with_events"], counts["events_quarantined"]) == (3706, 0)
    assert (counts["valid_events"], counts["test_events"]) == (valid, test)
    assert data.manifest["source"]["published_files"] is True
    assert data.item_titles()[0] == "Toy Story (1995)"
    assert "Misérables, Les (1995)" in data.item_titles()
    assert sorted(data.vocabulary("genres").values()) == list(range(1, 19))
    # the first event of user 1, by hand: the earliest timestamp (978300019), row 32 of ratings.dat
    assert (data.timestamp[0], data.order[0], data.item_keys()[data.item[0]]) == (978300019, 31, "3186")


def test_every_rating_of_the_published_data_set(published: DataConfig, make_config: Callable):
    """Against a plain reading of the file and NumPy's stable sort."""
    text = (Path(os.environ["LUMREC_DATA"]) / "ml-1m" / "ratings.dat").read_text().replace("::", " ")
    user, item, rating, timestamp = np.array(text.split(), dtype=np.int64).reshape(-1, 4).T
    order = np.lexsort((timestamp, user))
    data = open_log(make_config(published))
    assert (data.order == order).all()
    assert (data.timestamp == timestamp[order]).all()
    assert (np.array(data.user_keys(), dtype=np.int64)[data.user] == user[order]).all()
    assert (np.array(data.item_keys(), dtype=np.int64)[data.item] == item[order]).all()
    assert (data.label == (rating[order] >= 4)).all()
    row = data.vocabulary("rating")
    stars = {value: int(key) for key, value in row.items()}
    assert [stars[value] for value in data.event_columns["rating"].values.tolist()] == rating[order].tolist()


def test_layout_titles_years_and_genres(movielens_folder: Callable, make_config: Callable):
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
    movielens_folder: Callable, make_config: Callable, capsys: pytest.CaptureFixture
):
    folder = movielens_folder([GOOD_ROWS[0], *BAD_ROWS, GOOD_ROWS[1]])
    data = open_log(make_config(replace(ANY, path=str(folder))))
    rows = pl.read_parquet(data.path / "quarantine.parquet")
    assert rows["table"].unique().to_list() == ["events"]
    assert dict(zip(rows["raw"], rows["reason"])) == BAD_ROWS
    assert rows["order"].to_list() == list(range(1, len(BAD_ROWS) + 1))
    counts = data.manifest["counts"]
    assert counts["events_read"] == len(BAD_ROWS) + 2
    assert (counts["events"], counts["events_quarantined"]) == (2, len(BAD_ROWS))
    assert data.order.tolist() == [0, len(BAD_ROWS) + 1]
    assert sum(data.manifest["quarantine"].values()) == len(BAD_ROWS)
    shown = capsys.readouterr().out
    assert f"quarantined: {len(BAD_ROWS)} of {len(BAD_ROWS) + 2} events" in shown
    assert "3 events: rating outside 1..5" in shown


def test_bad_rows_of_the_catalogue(movielens_folder: Callable, make_config: Callable):
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


def test_a_log_without_a_usable_row_is_an_error(movielens_folder: Callable, make_config: Callable):
    config = make_config(replace(ANY, path=str(movielens_folder(["1::1::9::978300760"]))))
    with pytest.raises(ValueError, match="no usable event.*1 read.*rating outside 1..5"):
        open_log(config)
    assert not list(Path(config.runs_dir).iterdir())


def test_ties_keep_the_order_of_the_file(movielens_folder: Callable, make_config: Callable):
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


def test_files_with_another_checksum(movielens_folder: Callable, make_config: Callable):
    folder = movielens_folder(["1::1::5::978300760"])
    with pytest.raises(ValueError, match="wrong checksum") as error:
        open_log(make_config(DataConfig(path=str(folder))))
    for part in ("ratings.dat: md5", "expected a89aa3591bc97d6d4e0c89459ff39362", "data.allow_other_files=true"):
        assert part in str(error.value)
    data = open_log(make_config(DataConfig(path=str(folder), allow_other_files=True)))
    assert data.manifest["source"]["published_files"] is False


def test_a_prepared_folder_of_other_files_is_refused(movielens_folder: Callable, make_config: Callable):
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


def test_a_missing_data_set_says_what_to_do(nowhere: Path, tmp_path: Path):
    for path, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "lacks ratings.dat, movies.dat, users.dat"),
    ):
        with pytest.raises(DataSetMissing, match=message) as error:
            movielens.read(str(path))
        for part in (movielens.ARCHIVE.url, "data.path", "LUMREC_DATA", "data.source=simulator"):
            assert part in str(error.value)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def publisher(movielens_folder: Callable, tmp_path: Path) -> Iterator[movielens.Archive]:
    """A server on this machine that offers a small log as ml-1m.zip."""
    folder = movielens_folder(["1::1::5::978300760"])
    served = tmp_path / "served"
    served.mkdir()
    with zipfile.ZipFile(served / "ml-1m.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"ml-1m/{file.name}")
    digest = hashlib.sha256((served / "ml-1m.zip").read_bytes()).hexdigest()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(served))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/ml-1m.zip"
        yield replace(movielens.ARCHIVE, url=url, sha256=digest, timeout_s=5.0)
        server.shutdown()


def test_download(publisher: movielens.Archive, nowhere: Path, capfd: pytest.CaptureFixture):
    assert movielens.resolve(archive=publisher) == (nowhere / "ml-1m", "download")
    assert sorted(file.name for file in (nowhere / "ml-1m").iterdir()) == ["movies.dat", "ratings.dat", "users.dat"]
    assert [file.name for file in nowhere.iterdir()] == ["ml-1m"]
    shown = capfd.readouterr()
    assert publisher.url in shown.out
    assert shown.err == ""  # no progress bar where there is no terminal
    assert movielens.resolve(archive=publisher)[1] == "cache"


def test_a_download_with_another_checksum_is_not_kept(publisher: movielens.Archive, nowhere: Path):
    with pytest.raises(ValueError, match="wrong checksum.*expected 0000; nothing was kept"):
        movielens.resolve(archive=replace(publisher, sha256="0000"))
    assert not list(nowhere.iterdir())


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/ml-1m.zip", "http://unknown.invalid/ml-1m.zip"])
def test_an_unreachable_publisher_says_where_to_put_the_files(nowhere: Path, url: str):
    with pytest.raises(DataSetMissing, match="could not download") as error:
        movielens.resolve(archive=replace(movielens.ARCHIVE, url=url, timeout_s=5.0))
    for part in (url, str(nowhere / "ml-1m"), "data.path", "LUMREC_DATA", "data.source=simulator"):
        assert part in str(error.value)
    assert not list(nowhere.iterdir())
