"""Amazon reviews in the layouts of their releases, and lines of JSON of which some are broken."""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lumrec.data.config import DataConfig
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import SchemaConfig
from lumrec.data.sources import amazon, json_lines
from lumrec.data.sources.raw_log import DataSetMissing, LabelConfig, RawLog

BOOKS = DataConfig(category="Books", allow_other_files=True)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes files of lines, gzipped where the name says so."""

    def files(**lines: list[str]) -> Path:
        for name, content in lines.items():
            text = "".join(f"{line}\n" for line in content).encode()
            path = tmp_path / name
            path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
        return tmp_path

    return files


def read(data: DataConfig, tmp_path: Path) -> RawLog:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return amazon.read(data, seed=0, scratch=scratch)


def rows(frame: pl.LazyFrame | None, *columns: str) -> list[tuple]:
    assert frame is not None
    return frame.sort("order", nulls_last=True).select(columns).collect().rows()


RATINGS_2014 = ["A1,0001,5.0,1355616000", "A2,0001,3.0,1355702400", "A1,0002,4.0,1355788800", "A2,0003,1.0,1355875200"]
META_2014 = [
    "{'asin': '0001', 'title': \"Ann's book\", 'price': 12.99, 'brand': 'Penguin ', 'salesRank': {'Books': 7}, "
    "'categories': [['Books', 'Fiction', 'Poetry'], ['Books', 'Gifts']], 'related': {'also_bought': ['0002']}}",
    "{'asin': '0002', 'categories': [['Books']]}",
    "{'asin': '0009', 'title': 'Never rated', 'categories': []}",
]
BAD_META_2014 = [
    "{'asin': '0004', 'title': 'cut",
    "{'title': 'No key'}",
    "['asin', '0005']",
    "{'asin': ['0006']}",
    "__import__('pathlib').Path('evaluated').touch()",
    "",
]


def test_2014(write: Callable, make_config: Callable, open_log: Callable, tmp_path: Path):
    bad = {
        "A1,0001,5.0": "wrong number of fields",
        ",0001,5.0,1355616000": "user_id is missing",
        "A1,,5.0,1355616000": "item_id is missing",
        "A1,0001,,1355616000": "rating is missing",
        "A1,0001,five,1355616000": "rating is not a number",
        "A1,0001,6.0,1355616000": "rating outside 1..5",
        "A1,0001,4.5,1355616000": "rating outside 1..5",
        "A1,0001,5.0,": "timestamp is missing",
        "A1,0001,5.0,now": "timestamp is not a whole number",
        "A1,0001,5.0,0": "impossible time",
    }
    folder = write(**{"ratings_Books.csv": [*RATINGS_2014, *bad], "meta_Books.json.gz": [*META_2014, *BAD_META_2014]})
    data = open_log(make_config(replace(BOOKS, source="amazon-2014", path=str(folder))))
    assert data.user_keys() == ["A1", "A2"]
    # 0003 is not in the metadata, and stands behind it
    assert data.item_keys() == ["0001", "0002", "0009", "0003"]
    assert data.item_titles()[:1] == ["Ann's book"]
    assert data.label.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert data.timestamp.tolist() == [1355616000, 1355788800, 1355702400, 1355875200]
    assert known(data, "categories", data.item_columns) == [["Books", "Fiction", "Poetry", "Gifts"], ["Books"], [], []]
    assert known(data, "brand", data.item_columns) == [["Penguin"], ["unknown"], ["unknown"], ["unknown"]]
    assert known(data, "main_category", data.event_columns) == [["Fiction"], ["Books"], ["Fiction"], ["unknown"]]
    assert known(data, "rating", data.event_columns) == [["5"], ["4"], ["3"], ["1"]]
    quarantine = pl.read_parquet(data.path / "quarantine.parquet").sort("order")
    events, items = (quarantine.filter(pl.col("table") == table) for table in ("events", "items"))
    assert events["reason"].to_list() == list(bad.values())
    assert events["raw"].to_list()[:-1] == list(bad)[:-1]
    assert events["order"].to_list() == list(range(4, 14))
    assert items["reason"].to_list() == [
        "not an object as published",
        "item_id is missing",
        *["not an object as published"] * 4,
    ]
    assert items["order"].to_list() == list(range(3, 9))
    assert [raw for raw in items["raw"].to_list() if raw is not None] == [*BAD_META_2014[:1], *BAD_META_2014[2:]]
    assert not (tmp_path / "evaluated").exists() and not Path("evaluated").exists()


def known(data: PreparedData, feature: str, columns: dict) -> list[list[str]]:
    """The words of each entry of a feature, "unknown" where they did not occur in the training part."""
    words = {row: word for word, row in data.vocabulary(data.schema.features[feature].table).items()}
    column = columns[feature]
    entries = (
        column.values.reshape(-1, 1) if column.offsets is None else column.values.tensor_split(column.offsets[1:-1])
    )
    return [[words.get(row, "unknown") for row in entry.tolist()] for entry in entries]


def test_prices_are_numbers_or_missing(write: Callable, tmp_path: Path):
    prices = {
        '"$12.99"': 12.99,
        '"1,234.50"': 1234.5,
        '" $ 7 "': 7.0,
        "3": 3.0,
        "4.25": 4.25,
        '"$5.99 - $12.00"': None,
        '"from 7.99"': None,
        '"\\u2014"': None,
        '".a-box-inner{background-color:#fff}"': None,
        '""': None,
        "null": None,
    }
    meta = [f'{{"asin": "{place}", "price": {price}, "category": []}}' for place, price in enumerate(prices)]
    folder = write(**{"Books.json": [], "meta_Books.json": meta})
    raw = read(replace(BOOKS, source="amazon-2018", path=str(folder)), tmp_path)
    assert rows(raw.items, "price") == [(price,) for price in prices.values()]


def review_2018(user: str, item: str, overall: object, time: object, **more: object) -> str:
    review = {"overall": overall, "verified": True, "reviewerID": user, "asin": item, "unixReviewTime": time, **more}
    return json.dumps({**review, "reviewText": 'Said "so" \u00e9 {"asin": 1}', "style": {"Format:": " Kindle"}})


def test_2018(write: Callable, make_config: Callable, open_log: Callable):
    good = [review_2018("A1", "B1", 5.0, 1355616000, vote="1,234"), review_2018("A2", "B1", 2.0, 1355702400)]
    bad = {
        '{"overall": 5.0, "reviewerID": "A1"': "not a JSON object as published",
        '{"overall": 5.0, "reviewerID": ["A1"], "asin": "B1", "unixReviewTime": 1}': "not a JSON object as published",
        '["A1", "B1"]': "not a JSON object as published",
        good[0] + good[1]: "not a JSON object as published",
        "": "not a JSON object as published",
        review_2018("A1", "", 5.0, 1355616000): "item_id is missing",
        review_2018("A1", "B1", "good", 1355616000): "rating is not a number",
        review_2018("A1", "B1", 5.0, "yesterday"): "timestamp is not a whole number",
    }
    meta = [
        json.dumps(
            {
                "asin": "B1",
                "title": " Poems\n",
                "brand": "Visit Amazon's Page",
                "price": "$9.99",
                "category": ["Books", "Poetry &amp; Plays", "Books"],
                "rank": "7 in Books (",
                "also_buy": ["B2"],
            }
        ),
        '{"asin": "B2", "category": {"not": "a list"}}',
        '{"asin": "B1", "category": []}',
    ]
    folder = write(**{"Books.json.gz": [good[0], *bad, good[1]], "meta_Books.json.gz": meta})
    data = open_log(make_config(replace(BOOKS, source="amazon-2018", path=str(folder))))
    assert (data.user_keys(), data.item_keys(), data.item_titles()) == (["A1", "A2"], ["B1"], ["Poems"])
    assert data.order.tolist() == [0, len(bad) + 1]
    assert data.label.tolist() == [1.0, 0.0]
    assert known(data, "categories", data.item_columns) == [["Books", "Poetry &amp; Plays"]]
    quarantine = pl.read_parquet(data.path / "quarantine.parquet").sort("order")
    events = quarantine.filter(pl.col("table") == "events")
    assert events["reason"].to_list() == list(bad.values())
    assert events["raw"].to_list()[:5] == list(bad)[:5]
    assert json.loads(events["raw"].to_list()[6]) == {
        "user_id": "A1",
        "item_id": "B1",
        "rating": "good",
        "timestamp": "1355616000",
    }
    assert data.manifest["quarantine"]["items: not an object as published"] == 1
    assert data.manifest["quarantine"]["items: item_id occurs again"] == 1


def test_the_5_core_of_2018(write: Callable, tmp_path: Path):
    five, every = review_2018("A5", "B1", 5.0, 1355616000), review_2018("A1", "B1", 5.0, 1355616000)
    folder = write(**{"Books_5.json.gz": [five], "meta_Books.json.gz": ['{"asin": "B1", "brand": "Penguin"}']})
    data = replace(BOOKS, source="amazon-2018", path=str(folder))

    def users(category: str, scratch: str) -> list[tuple]:
        raw = read(replace(data, category=category), tmp_path / scratch)
        assert raw.files[1] == folder / "meta_Books.json.gz"
        assert rows(raw.items, "brand") == [("Penguin",)]
        assert raw.note.startswith(f"Amazon {category}: {raw.files[0].name} from {folder}")
        return rows(raw.events, "user_id")

    for name in "abc":
        (tmp_path / name).mkdir()
    assert users("Books", "a") == [("A5",)]  # there is only the 5-core
    write(**{"Books.json.gz": [every]})
    assert users("Books", "b") == [("A1",)]
    assert users("Books_5", "c") == [("A5",)]


def test_2023(write: Callable, make_config: Callable, open_log: Callable):
    def review(user: str, item: str, rating: float, time: int) -> str:
        fields = {"rating": rating, "title": "t", "text": "x", "images": [], "asin": "variant", "parent_asin": item}
        return json.dumps({**fields, "user_id": user, "timestamp": time, "helpful_vote": 0})

    meta = [
        {"main_category": "Books", "title": "One", "price": 9.5, "store": "S", "categories": ["Books", "Art"]},
        {"main_category": None, "title": "Two", "price": "from 3.00", "store": None, "categories": []},
    ]
    folder = write(
        **{
            "Books.jsonl": [review("U1", "P1", 4.0, 1588687728923), review("U1", "P2", 1.0, 1588687728922)],
            "meta_Books.jsonl": [json.dumps({**row, "parent_asin": f"P{n}"}) for n, row in enumerate(meta, 1)],
        }
    )
    data = open_log(make_config(replace(BOOKS, source="amazon-2023", path=str(folder))))
    assert [data.item_keys()[item] for item in data.item] == ["P2", "P1"]  # by milliseconds, within one second
    assert data.timestamp.tolist() == [1588687728] * 2
    assert data.label.tolist() == [0.0, 1.0]
    assert known(data, "main_category", data.event_columns) == [["unknown"], ["Art"]]
    assert known(data, "brand", data.item_columns) == [["S"], ["unknown"]]


@pytest.mark.parametrize(
    ("source", "name", "lines", "items"),
    [
        ("amazon-2014", "ratings_Books.csv", RATINGS_2014, ["0001", "0002", "0003"]),
        ("amazon-2018", "Books.json.gz", [review_2018("A1", "B1", 5.0, 1355616000)], ["B1"]),
        (
            "amazon-2023",
            "Books.jsonl.gz",
            ['{"user_id": "A1", "parent_asin": "B1", "rating": 5, "timestamp": 1355616000000}'],
            ["B1"],
        ),
        (amazon.SEQUENCES, "Books.seq_gap.txt", ["1 7 8\t0 60"], ["7", "8"]),
    ],
)
def test_without_metadata(
    write: Callable,
    make_config: Callable,
    open_log: Callable,
    source: str,
    name: str,
    lines: list[str],
    items: list[str],
):
    config = make_config(replace(BOOKS, source=source, path=str(write(**{name: lines}))))
    raw = read(config.data, Path(config.data.path))
    assert raw.items is None and raw.users is None
    assert "NO METADATA" in raw.note
    data = open_log(config)  # with the default schema, whose item features are then unknown
    assert data.item_keys() == items
    assert data.manifest["counts"]["events_quarantined"] == 0


def test_what_counts_as_positive(write: Callable, tmp_path: Path):
    data = replace(BOOKS, source="amazon-2014", path=str(write(**{"ratings_Books.csv": RATINGS_2014})))
    for label, expected in ((LabelConfig(), [1, 0, 1, 0]), (LabelConfig(at_least=5), [1, 0, 0, 0])):
        assert rows(read(replace(data, label=label), tmp_path).events, "label") == [(value,) for value in expected]
    with pytest.raises(ValueError, match="data.label.column: got 'vote'; the columns of amazon-2014 that can be"):
        read(replace(data, label=LabelConfig(column="vote")), tmp_path)


def test_categories_that_are_not_there(write: Callable, tmp_path: Path, nowhere: Path):
    folder = write(
        **{"Books.json.gz": [], "Toys_and_Games_5.json": [], "meta_Books.json.gz": [], "ratings_Music.csv": []}
    )
    data = replace(BOOKS, source="amazon-2018", path=str(folder))
    with pytest.raises(ValueError, match="data.category is not given.*holds: Books, Toys_and_Games, Toys_and_Games_5"):
        read(replace(data, category=""), tmp_path)
    with pytest.raises(DataSetMissing, match="lacks Beauty.json.gz; .* holds: Books, Toys_and_Games") as error:
        read(replace(data, category="Beauty"), tmp_path)
    for part in ("https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/", "LUMREC_DATA", str(nowhere / "amazon-2018")):
        assert part in str(error.value)
    with pytest.raises(DataSetMissing, match=r"there is no \$LUMREC_DATA/amazon-2023 or .*/amazon-2023") as error:
        read(replace(data, source="amazon-2023", path=""), tmp_path)
    assert "https://amazon-reviews-2023.github.io/" in str(error.value)


def test_a_cut_gzip(write: Callable, tmp_path: Path):
    folder = write(**{"Books.json.gz": [review_2018(f"A{n}", "B1", 5.0, 1355616000) for n in range(100)]})
    path = folder / "Books.json.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="Books.json.gz is cut or broken.*get it again"):
        read(replace(BOOKS, source="amazon-2018", path=str(folder)), tmp_path)


SEQUENCES = replace(BOOKS, source=amazon.SEQUENCES)


def test_sequences(write: Callable, make_config: Callable, open_log: Callable):
    bad = {
        "3 5 6\t0": "not as many times as items",
        "3\t0": "not as many times as items",
        "3 5 6": "wrong number of fields",
        "3 5\t0\t1": "wrong number of fields",
        "3 5 x\t0 1": "not whole numbers",
        "3 5 6\t0 -1": "not whole numbers",
        "": "wrong number of fields",
    }
    folder = write(
        **{
            "Books.seq_gap.txt": ["10 7 8 7\t0 60 0", *bad, "2 9\t5"],
            "Books_item2attributes.json": [json.dumps({"7": [3, 4], "8": [], "11": [5]})],
        }
    )
    data = open_log(make_config(replace(SEQUENCES, path=str(folder))))
    assert data.user_keys() == ["2", "10"]
    assert data.item_keys() == ["7", "8", "11", "9"]  # 9 has no attributes
    assert [data.item_keys()[item] for item in data.item] == ["9", "7", "8", "7"]
    start = 946_684_800
    assert data.timestamp.tolist() == [start + 5, start, start + 60, start + 60]
    assert data.label.tolist() == [1.0] * 4
    assert known(data, "attributes", data.item_columns) == [["3", "4"], [], ["unknown"], []]
    assert known(data, "attribute", data.event_columns) == [["unknown"], ["3"], ["unknown"], ["3"]]
    quarantine = pl.read_parquet(data.path / "quarantine.parquet").sort("order")
    assert quarantine["reason"].to_list() == list(bad.values())
    assert quarantine["raw"].to_list() == list(bad)
    assert data.manifest["absolute_time"] is False


def test_sequences_have_no_label_to_choose(write: Callable, tmp_path: Path):
    data = replace(SEQUENCES, path=str(write(**{"Books.seq_gap.txt": ["1 2\t0"]})), label=LabelConfig(at_least=4))
    with pytest.raises(ValueError, match="data.label: amazon-5core-sequences has no rating"):
        read(data, tmp_path)


@pytest.mark.parametrize("content", ["[1, 2]", '{"7": 3}', '{"x": [3]}', '{"7": [3]'])
def test_attributes_of_another_kind(write: Callable, tmp_path: Path, content: str):
    folder = write(**{"Books.seq_gap.txt": ["1 2\t0"], "Books_item2attributes.json": [content]})
    with pytest.raises(ValueError, match="Books_item2attributes.json: expected one JSON object, item → list"):
        read(replace(SEQUENCES, path=str(folder)), tmp_path)


def test_the_real_beauty(make_config: Callable, open_log: Callable):
    root = os.environ.get("LUMREC_DATA", "")
    path = Path(root) / "amazon-beauty-5core" / "Beauty.seq_gap.txt"
    if not root or not path.is_file():
        pytest.skip("LUMREC_DATA names no folder that holds amazon-beauty-5core/Beauty.seq_gap.txt")
    data = open_log(make_config(DataConfig(source=amazon.SEQUENCES, category="Beauty")))
    assert (data.num_events, data.num_users, data.num_items) == (198_502, 22_363, 12_101)
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    items = [item for line in lines for item in line[0].split()[1:]]
    keys = data.item_keys()
    assert [keys[item] for item in data.item] == items  # users stand in the file in their natural order
    assert data.manifest["source"]["expected"] == {"events_read": 198_502, "users": 22_363, "items_with_events": 12_101}


FIELDS = {"a": pl.String(), "b": pl.List(pl.String)}
OBJECTS = st.fixed_dictionaries({}, optional={"a": st.text(max_size=8), "b": st.lists(st.text(max_size=4), max_size=3)})
BROKEN = [
    '{"a": "x"}, {"a": "y"}',
    '{"other": [{"c": "x"}',
    '{"a": "z"}]}',
]  # three lines, and three objects when joined
GARBAGE = st.sampled_from([*BROKEN, "{", "}", "", " ", "[]", "null", '{"a": "x" "y"}', "{}"])


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.one_of(OBJECTS, GARBAGE), max_size=12), slice_lines=st.integers(1, 5))
@example(lines=BROKEN, slice_lines=5)
def test_each_line_is_decoded_by_itself(lines: list[dict | str], slice_lines: int):
    """Whatever stands beside it: a broken line must not swallow or shift the next ones."""
    # an empty object has no field: it tells nothing, and is left out like one that is broken
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "DECODED_LINES", slice_lines)
        found = json_lines.decode_json(pl.Series(text, dtype=pl.String), FIELDS).to_dicts()
    expected = [
        {"a": line.get("a"), "b": line.get("b"), "decoded": True}
        if isinstance(line, dict) and line
        else {"a": None, "b": None, "decoded": False}
        for line in lines
    ]
    assert found == expected


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x01"), max_size=6), max_size=10),
    block_bytes=st.integers(1, 40),
    kind=st.sampled_from(["json", "json.gz"]),
    ends=st.booleans(),
)
def test_blocks_cut_no_line(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], block_bytes: int, kind: str, ends: bool
):
    folder = tmp_path_factory.mktemp("blocks")
    text = "\n".join(json.dumps({"a": value}, ensure_ascii=False) for value in values) + (
        "\n" if ends and values else ""
    )
    path = folder / f"x.{kind}"
    path.write_bytes(gzip.compress(text.encode()) if kind == "json.gz" else text.encode())
    frame = json_lines.decode_file(
        path, {"a": pl.String()}, folder / "out", json_lines.decode_json, block_bytes=block_bytes
    ).collect()
    assert frame["a"].to_list() == values
    assert frame["order"].to_list() == list(range(len(values)))
    assert frame["raw"].null_count() == len(values)


def test_bytes_that_are_no_text(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": "caf\xe9"}\n{"a": "\xff"\n{"a": "x"}\x01\n')
    frame = json_lines.decode_file(path, {"a": pl.String()}, tmp_path / "out", json_lines.decode_json).collect()
    assert frame["a"].to_list()[:2] == ["caf\ufffd", None]
    assert frame["raw"].to_list()[:2] == [None, '{"a": "\ufffd"']


def test_schemas_name_what_the_sources_have():
    assert {*amazon.RELEASES, amazon.SEQUENCES} == set(amazon.DEFAULT_SCHEMAS)
    assert all(isinstance(schema, SchemaConfig) for schema in amazon.DEFAULT_SCHEMAS.values())
