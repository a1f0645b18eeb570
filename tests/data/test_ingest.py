"""Ingesting: which rows are left out and why, blocks of users, derived columns, what a feature must not tell."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.data import ingest as ingest_module
from lumrec.data.ingest import Ingested, ingest
from lumrec.data.log_columns import with_derived_columns
from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import FeatureConfig, SchemaConfig, validate
from lumrec.data.sources.raw_log import LabelConfig, RawLog, microseconds, positive
from lumrec.experiments.config import load
from lumrec.run.errors import UserError

SCHEMA = validate(
    SchemaConfig(
        features={
            "item_id": FeatureConfig("item"),
            "words": FeatureConfig("condition", kind="multi"),
            "device": FeatureConfig("context"),
        }
    )
)
COLUMNS = {
    "user_id": pl.String,
    "item_id": pl.String,
    "time_us": pl.Int64,
    "label": pl.Float32,
    "words": pl.List(pl.String),
    "device": pl.String,
}


def raw_log(rows: list[tuple], **fields) -> RawLog:
    frame = pl.DataFrame(rows, schema=COLUMNS, orient="row").with_row_index("order")
    events = frame.with_columns(pl.col("order").cast(pl.Int64)).lazy()
    return RawLog(**{"events": events, "items": None, "users": None, "files": [], "note": "a test's log", **fields})


def take(raw: RawLog, scratch: Path, **settings) -> tuple[pl.DataFrame, pl.DataFrame, Ingested]:
    """All blocks, the quarantine, and the result of `ingest`."""
    scratch.mkdir(parents=True, exist_ok=True)
    taken = ingest(raw, SCHEMA, **{"max_list_length": 3, "drop_duplicates": True, **settings}, scratch=scratch)
    return pl.read_parquet(taken.blocks), pl.read_parquet(taken.quarantine), taken


def test_every_row_is_kept_or_left_out_with_its_reason(tmp_path: Path):
    good = ("u", "i", 5_000_000, 1.0, ["a"], "phone")
    raw = raw_log(
        [
            good,
            (None, *good[1:]),
            ("u", "", *good[2:]),
            ("u", "i", None, *good[3:]),
            ("u", "i", 5_000_000, None, ["a"], "phone"),
            ("u", "i", 5_000_000, float("nan"), ["a"], "phone"),
            ("u", "i", 5_000_000, 0.5, ["a"], "phone"),
            ("u", "i", 5_000_000, 1.0, list("abcd"), "phone"),
            ("u", "other", *good[2:]),
            ("nobody", *good[1:]),
            good,
            ("u", "i", 5_000_001, 1.0, ["a"], "phone"),
        ],
        items=pl.LazyFrame({"item_id": ["i"]}),
        users=pl.LazyFrame({"user_id": ["t", "u"]}),
    )
    events, left_out, taken = take(raw, tmp_path)
    assert events["order"].to_list() == [0, 11]  # two moments within one second stay apart
    assert events["timestamp"].to_list() == [5, 5]
    assert events["user"].to_list() == [1, 1]
    assert dict(left_out.select("order", "reason").iter_rows()) == {
        1: "user_id is missing",
        2: "item_id is missing",
        3: "impossible time",
        4: "label is missing",
        5: "label is missing",
        6: "label is missing",
        7: "words: a list of over 3",
        8: "unknown item",
        9: "unknown user",
        10: "duplicate row",
    }
    assert set(left_out["table"]) == {"events"}
    assert all('"item_id"' in raw for raw in left_out["raw"])
    assert (taken.num_read, taken.num_events) == (12, 2)
    events, left_out, _ = take(raw, tmp_path / "kept", drop_duplicates=False)
    assert events["order"].to_list() == [0, 10, 11]
    assert len(events) + len(left_out) == 12


def test_reasons_of_the_source_come_first_and_keep_the_row_as_read(tmp_path: Path):
    raw = raw_log([("u", "i", 5_000_000, 1.0, [], "a"), ("u", None, None, None, [], "a")])
    reason = pl.when(pl.col("order") == 1).then(pl.lit("wrong number of fields"))
    raw = replace(raw, events=raw.events.with_columns(reason.alias("reason"), pl.lit("u::??").alias("raw")))
    _, left_out, _ = take(raw, tmp_path)
    assert left_out.rows() == [("events", 1, "wrong number of fields", "u::??")]


def test_catalogue_rows_without_a_key_and_repeated_ones_are_left_out(tmp_path: Path):
    items = pl.LazyFrame({"item_id": ["j", None, "i", "j", ""]})
    raw = raw_log([("u", "i", 5_000_000, 1.0, [], "a")], items=items)
    _, left_out, taken = take(raw, tmp_path)
    assert taken.items["item_id"].to_list() == ["j", "i"]
    assert left_out["reason"].to_list() == ["item_id is missing", "item_id occurs again", "item_id is missing"]
    assert set(left_out["table"]) == {"items"}


def test_a_log_without_a_usable_row_is_refused_with_the_reasons(tmp_path: Path):
    raw = raw_log([("u", "i", None, 1.0, [], "a")])
    with pytest.raises(ValueError, match="no usable event in a test's log: 1 read, left out: .*impossible time': 1"):
        take(raw, tmp_path)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["1", "2", "10", "3"]), st.sampled_from("xyz"), st.integers(1, 5), st.sampled_from([0.0, 1.0])
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=25, deadline=None)
@given(EVENTS, st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_blocks_hold_the_same_as_one_block(
    tmp_path_factory: pytest.TempPathFactory, events: list, rows: int, portion: int, drop: bool
):
    raw = raw_log([(user, item, time * 500_000 + 10**6, label, [], "a") for user, item, time, label in events])
    one, left_out, _ = take(raw, tmp_path_factory.mktemp("one"), drop_duplicates=drop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest_module, "BLOCK_ROWS", rows)
        patch.setattr(ingest_module, "PORTION_ROWS", portion)
        several, left_out_of_several, taken = take(raw, tmp_path_factory.mktemp("several"), drop_duplicates=drop)
    assert several.equals(one)
    assert sorted(left_out["order"]) == sorted(left_out_of_several["order"])
    assert len(one) + len(left_out) == len(events)
    assert one.equals(one.sort("user", "timestamp", maintain_order=True))
    assert taken.users["user_id"].to_list() == sorted({event[0] for event in events}, key=int)
    # an item without a file is known by its first event, in the order of the log
    assert taken.items["item_id"].to_list() == list(dict.fromkeys(event[1] for event in events))
    for path in taken.blocks:
        users = pl.read_parquet(path)["user"]
        assert not any(set(users) & set(pl.read_parquet(other)["user"]) for other in taken.blocks if other != path)


def test_a_log_in_no_order_of_users_comes_out_whole_from_many_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ingest_module, "BLOCK_ROWS", 20_000)
    monkeypatch.setattr(ingest_module, "PORTION_ROWS", 7_000)
    order = pl.int_range(60_000, eager=True)
    raw = raw_log([("u", "i", 5_000_000, 1.0, ["a", "b"], "a")])
    user, time_us = order.hash(1) % 300, (order.hash(2) % 10**6 + 10**6).cast(pl.Int64) * 1_000_000
    rows = raw.events.collect().select(pl.all().repeat_by(len(order)).explode())
    rows = rows.with_columns(order.alias("order"), user.cast(pl.String).alias("user_id"), time_us.alias("time_us"))
    events, left_out, taken = take(replace(raw, events=rows.lazy()), tmp_path, drop_duplicates=False)
    assert len(taken.blocks) == 3 and len(left_out) == 0
    assert taken.users["user_id"].to_list() == [str(user) for user in range(300)]
    by_hand = pl.DataFrame(
        [user.cast(pl.Int32).alias("user"), time_us.alias("timestamp") // 10**6, order.alias("order")]
    )
    assert events.select("user", "timestamp", "order").equals(by_hand.sort("user", "timestamp", "order"))


def test_local_time_and_feedback_are_made_of_time_and_label():
    friday = 1_651_795_200_000_000  # 2022-05-06 00:00 UTC, a Friday
    raw = raw_log([("u", "i", friday, 1.0, [], "a"), ("u", "i", friday + 22 * 3_600_000_000, 0.0, [], "a")])
    frame = with_derived_columns(raw).collect()
    assert frame["hour"].to_list() == ["0", "22"]
    assert frame["weekday"].to_list() == ["5", "5"]
    assert frame["time_of_day"].to_list() == ["night", "evening"]
    assert frame["feedback"].to_list() == ["like", "dislike"]
    china = with_derived_columns(replace(raw, utc_offset_hours=8)).collect()
    assert china["hour"].to_list() == ["8", "6"]
    assert china["weekday"].to_list() == ["5", "6"]
    assert china["time_of_day"].to_list() == ["morning", "morning"]
    own = replace(raw, events=raw.events.with_columns(pl.lit("noon").alias("hour")))
    assert with_derived_columns(own).collect()["hour"].to_list() == ["noon", "noon"]


@pytest.mark.parametrize(
    ("feature", "refused"),
    [
        (FeatureConfig("condition", column="feedback"), True),
        (FeatureConfig("condition", column="feedback", wish=True), False),
        (FeatureConfig("context", column="dwell"), True),
        (FeatureConfig("user", column="dwell"), True),
        (FeatureConfig("item", column="dwell"), True),
        (FeatureConfig("feedback", column="dwell"), False),
        (FeatureConfig("context", column="device"), False),
    ],
)
def test_what_is_known_afterwards_is_a_wish_or_feedback(tmp_path: Path, feature: FeatureConfig, refused: bool):
    raw = raw_log([("u", "i", 5_000_000, 1.0, [], "a")], known_after=("dwell",))
    raw = replace(raw, events=raw.events.with_columns(pl.lit("9").alias("dwell")))
    schema = validate(SchemaConfig(features={"item_id": FeatureConfig("item"), "new": feature}))

    def run() -> None:
        ingest(raw, schema, max_list_length=3, drop_duplicates=True, scratch=tmp_path)

    if refused:
        with pytest.raises(ValueError, match=f"schema.features.new: column '{feature.column}' is known only after"):
            run()
    else:
        run()


def test_lists_and_single_values_are_told_apart(tmp_path: Path):
    raw = raw_log([("u", "i", 5_000_000, 1.0, [], "a")])
    for column, kind in (("words", "id"), ("device", "multi")):
        new = FeatureConfig("context", kind, column=column)
        schema = SchemaConfig(features={"item_id": FeatureConfig("item"), "new": new})
        with pytest.raises(ValueError, match=f"schema.features.new: column '{column}' holds .*kind is {kind}"):
            ingest(raw, validate(schema), max_list_length=3, drop_duplicates=True, scratch=tmp_path)


def test_times_in_every_unit_and_none_that_overflows():
    frame = pl.DataFrame({"t": [978_300_760, 0, -5, 2**62, None]}, schema={"t": pl.Int64})
    seconds = frame.select(microseconds(pl.col("t"), "s"))["t"].to_list()
    assert seconds == [978_300_760_000_000, None, None, None, None]
    for unit, factor in (("ms", 1000), ("us", 1_000_000)):
        assert frame.select(microseconds(pl.col("t") * 1 * factor, unit)).item(0, 0) == 978_300_760_000_000


@pytest.mark.parametrize(
    ("values", "config", "expected"),
    [
        ([1, 0, 2, None], LabelConfig(), [1.0, 0.0, None, None]),
        ([True, False], LabelConfig(), [1.0, 0.0]),
        (["true", "False", " yes", "1", "maybe"], LabelConfig(), [1.0, 0.0, 1.0, 1.0, None]),
        ([3.5, 4.0, float("nan")], LabelConfig(at_least=4), [0.0, 1.0, None]),
        (["5", "x"], LabelConfig(at_least=4), [1.0, None]),
        (["buy", "view", None], LabelConfig(values=["buy", "cart"]), [1.0, 0.0, None]),
        ([4, 5, None], LabelConfig(values=["5", "6.0"]), [0.0, 1.0, None]),
        ([4.0, 4.5, None], LabelConfig(values=["4", "4.5"]), [1.0, 1.0, None]),
    ],
)
def test_labels(values: list, config: LabelConfig, expected: list):
    frame = pl.DataFrame({"x": values})
    got = frame.select(positive(pl.col("x"), frame.schema["x"], config)).to_series()
    assert got.dtype == pl.Float32
    assert got.to_list() == expected


def test_a_wish_may_be_a_fact_of_the_items_and_other_conditions_say_what_to_do(tmp_path):
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,timestamp,label\n" + "".join(f"u,i{n},{1_714_521_600 + n},{n % 2}\n" for n in range(4))
    )
    (tmp_path / "items.csv").write_text("item_id,brand\ni0,010\ni1,NO\ni2,\ni3,010\ni3,again\n")
    files = [f"data.log.{name}={tmp_path / file}.csv" for name, file in (("events", "log"), ("items", "items"))]
    words = ["data.source=log", "data.split={kind: user, fractions: [1, 0, 0]}", *files]
    schema = "schema.features={{item_id: {{role: item}}, brand: {{role: {}}}}}"
    prepare(load(None, [*words, schema.format("condition, wish: true")]), tmp_path / "p")
    data = PreparedData.open(tmp_path / "p")
    raw = {row: value for value, row in data.vocabulary("brand").items()}
    asked = pl.read_parquet(tmp_path / "p" / "events" / "*.parquet").sort("order")["brand"]
    assert [raw.get(row) for row in asked] == ["010", "NO", None, "010"]
    for role in ("condition", "context"):
        with pytest.raises(UserError, match="brand: the events .* no column 'brand'; the items have it: read it there"):
            prepare(load(None, [*words, schema.format(role)]), tmp_path / role)
