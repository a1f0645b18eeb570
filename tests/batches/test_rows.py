"""Rows of a ranker: each batch equal to a slow reading of the log, in a loader that can be resumed and shared out."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lumrec.batches.rows import RowBuilder, RowLoader, evaluation_batches, training_rows
from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData
from lumrec.features.statistics import dense_inputs
from lumrec.modules.rankers.base import RankBatch

ITEM = ["item_id", "categories", "price_bucket"]
FEEDBACK = ["clicked"]
ROW = ["segment", "hour", "weekday", "scenario", "query"]


def make_builder(data: PreparedData, **changes) -> RowBuilder:
    arguments = {
        "features": [*ROW, *FEEDBACK, *ITEM],
        "row_features": ROW,
        "max_history": 7,
    }
    return RowBuilder(data, **(arguments | changes))


def bags(batch: RankBatch, feature: str) -> list[list[int]]:
    jagged = batch.tokens[feature]
    return [part.tolist() for part in jagged.values().split(jagged.lengths().tolist())]


def read(batch: RankBatch) -> list[dict]:
    """What the batch says of each row, in words."""
    bag = {feature: bags(batch, feature) for feature in batch.tokens.keys()}

    def token(place: int) -> tuple:
        assert not any(bag[feature][place] for feature in ROW)
        return tuple(tuple(bag[feature][place]) for feature in [*ITEM, *FEEDBACK])

    offsets = batch.offsets_B1.tolist()
    rows = []
    for b, row in enumerate(batch.row_B.tolist()):
        place = batch.num_tokens + b
        assert not any(bag[feature][place] for feature in [*ITEM, *FEEDBACK])
        rows.append(
            {
                "row": row,
                "target": token(int(batch.target_B[b])),
                "history": [token(t) for t in batch.history_T[offsets[b] : offsets[b + 1]].tolist()],
                "features": [tuple(bag[feature][place]) for feature in ROW],
                "label": float(batch.label_B[b]),
            }
        )
    return rows


def expected(data: PreparedData, row: int, max_history: int) -> dict:
    """The same, by one slow look at the prepared data after the other."""

    def value(column: Column, index: int) -> tuple:
        return tuple(column.take(torch.tensor([index]))[0].tolist())

    def token(event: int, is_target: bool) -> tuple:
        item = [value(data.item_columns[feature], data.item[event]) for feature in ITEM]
        return (*item, *(() if is_target else value(data.event_columns[feature], event) for feature in FEEDBACK))

    user = data.user[row]
    first = max(data.user_offsets[user], row - max_history)
    return {
        "row": row,
        "target": token(row, True),
        "history": [token(event, False) for event in range(first, row)],
        "features": [
            value(data.user_columns[name], user) if name in data.user_columns else value(data.event_columns[name], row)
            for name in ROW
        ],
        "label": float(data.label[row]),
    }


@pytest.mark.parametrize("max_history", [0, 1, 7, 1000])
def test_a_batch_says_what_the_log_says(tiny_prepared: PreparedData, max_history: int):
    data = tiny_prepared
    firsts = data.user_offsets[:-1][np.diff(data.user_offsets) > 0][:5]  # empty histories
    rows = np.concatenate([firsts, np.random.default_rng(0).choice(data.num_events, 40), firsts[:1]])
    batch = make_builder(data, max_history=max_history).batch(rows)
    assert read(batch) == [expected(data, row, max_history) for row in rows.tolist()]
    assert len(batch) == len(rows) and batch.tokens.stride() == batch.num_tokens + len(rows)
    assert batch.history_T.dtype == batch.target_B.dtype == batch.offsets_B1.dtype == torch.int64


def test_every_token_is_looked_up_once(tiny_prepared: PreparedData):
    batch = make_builder(tiny_prepared).batch(np.arange(tiny_prepared.num_events))
    bag = [bags(batch, feature)[: batch.num_tokens] for feature in [*ITEM, *FEEDBACK]]
    is_target = ~torch.isin(torch.arange(batch.num_tokens), batch.history_T)
    # Items that no training event has are all "unknown": equal values, different tokens. The known ones stand once.
    known = [token for token, _ in zip(zip(*map(map, [tuple] * 4, bag)), is_target) if token[0] != (0,)]
    assert len(set(known)) == len(known)
    used = torch.cat([batch.history_T, batch.target_B]).unique()
    assert used.tolist() == list(range(batch.num_tokens))


def test_statistics_stand_beside_their_rows(tiny_prepared: PreparedData):
    statistics = dense_inputs(tiny_prepared)
    rows = np.array([5, 3, 3, 100])
    batch = make_builder(tiny_prepared, statistics=statistics).batch(rows)
    assert torch.equal(batch.dense_BF, torch.from_numpy(statistics.values_RF[rows]))
    assert make_builder(tiny_prepared).batch(rows).dense_BF.shape == (4, 0)


@pytest.mark.parametrize("category", ["", "price_bucket"])
def test_what_some_rankers_read_beside_the_tables(tiny_prepared: PreparedData, category: str):
    data = tiny_prepared
    reads = ["item_U", "category_U", "age_T", "category_count_T"]
    rows = np.concatenate([data.user_offsets[:3], np.random.default_rng(0).choice(data.num_events, 30)])
    batch = make_builder(data, reads=reads, category=category).batch(rows)
    column = data.item_columns[category or "categories"]

    def category_of(event: int) -> int:
        return ([*column.take(torch.tensor([data.item[event]]))[0].tolist(), 0])[0]

    ages, categories, counts, items = [], [], [], []
    for row in rows.tolist():
        begin = data.user_offsets[data.user[row]]
        for event in range(max(begin, row - 7), row):
            ages.append(data.timestamp[row] - data.timestamp[event])
            categories.append(category_of(event))
            items.append(data.item[event])
            counts.append(sum(category_of(earlier) == categories[-1] for earlier in range(begin, event)))
    assert batch.age_T.tolist() == pytest.approx(ages) and batch.category_count_T.tolist() == counts
    assert batch.category_U[batch.history_T].tolist() == categories
    assert batch.category_U[batch.target_B].tolist() == [category_of(row) for row in rows.tolist()]
    assert batch.item_U[batch.history_T].tolist() == items
    assert batch.item_U[batch.target_B].tolist() == data.item[rows].tolist()
    assert make_builder(data).batch(rows).age_T is None
    with pytest.raises(ValueError, match="the category is 'clicked' .*; expected an item feature"):
        make_builder(data, reads=reads, category="clicked")


def test_feedback_of_the_row_and_of_later_events_is_not_in_its_batch(tiny_prepared: PreparedData):
    data = tiny_prepared
    row = int(data.user_offsets[3]) + 4
    before = make_builder(data).batch(np.array([row]))
    other = copy.copy(data)
    clicked = data.event_columns["clicked"].values.clone()
    clicked[row:] = 3 - clicked[row:]
    other.event_columns = {**data.event_columns, "clicked": Column(clicked)}
    other.label = np.concatenate([data.label[:row], 1 - data.label[row:]])
    after = make_builder(other).batch(np.array([row]))
    assert [{**r, "label": None} for r in read(before)] == [{**r, "label": None} for r in read(after)]


def test_feedback_may_have_several_values(tiny_prepared: PreparedData):
    data = copy.copy(tiny_prepared)
    lengths = torch.arange(data.num_events) % 3
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.arange(int(offsets[-1])) % 2 + 1
    data.event_columns = {**data.event_columns, "clicked": Column(values, offsets)}
    rows = np.arange(0, data.num_events, 37)
    assert read(make_builder(data).batch(rows)) == [expected(data, row, 7) for row in rows.tolist()]


def test_two_threads_may_use_one_builder(tiny_prepared: PreparedData):
    builder = make_builder(tiny_prepared)
    parts = [np.random.default_rng(i).choice(tiny_prepared.num_events, 80) for i in range(12)]
    alone = [read(builder.batch(rows)) for rows in parts]
    with ThreadPoolExecutor(4) as pool:
        assert [read(batch) for batch in pool.map(builder.batch, parts)] == alone


def rows_of(loader: RowLoader) -> list[list[int]]:
    return [batch.row_B.tolist() for batch in loader]


def test_an_epoch_holds_each_row_once_in_even_batches_and_a_new_order(tiny_prepared: PreparedData):
    rows = np.flatnonzero(tiny_prepared.split == 0)
    loader = RowLoader(make_builder(tiny_prepared), rows, batch_size=100, seed=3)
    first, second = rows_of(loader), rows_of(loader)
    assert len(first) == len(loader) == -(-len(rows) // 100)
    assert loader.state_dict() == {"epoch": 2, "first": 0, "done": 0, "world_size": 1}
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == rows.tolist() and first != second
    sizes = [len(batch) for batch in first]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= 100
    again = RowLoader(make_builder(tiny_prepared), rows, batch_size=100, seed=3)
    other = RowLoader(make_builder(tiny_prepared), rows, batch_size=100, seed=4)
    assert rows_of(again) == first and rows_of(other) != first


def test_the_loader_resumes_in_mid_epoch(tiny_prepared: PreparedData):
    rows = np.flatnonzero(tiny_prepared.split == 0)
    whole = RowLoader(make_builder(tiny_prepared), rows, batch_size=200)
    expected_rows = rows_of(whole) + rows_of(whole)
    first = RowLoader(make_builder(tiny_prepared), rows, batch_size=200)
    head = [next(batches).row_B.tolist() for batches in [iter(first)] for _ in range(3)]
    resumed = RowLoader(make_builder(tiny_prepared), rows, batch_size=200)
    resumed.load_state_dict(first.state_dict())
    assert head + rows_of(resumed) + rows_of(resumed) == expected_rows


@pytest.mark.parametrize("num_rows", [3, 4, 10, 100])
def test_ranks_share_an_epoch_in_equally_many_batches_none_empty(tiny_prepared: PreparedData, num_rows: int):
    rows, builder = np.arange(num_rows), make_builder(tiny_prepared)
    ranks = [RowLoader(builder, rows, batch_size=4, rank=rank, world_size=3) for rank in range(3)]
    batches = [rows_of(loader) for loader in ranks]
    assert len({len(part) for part in batches}) == 1 and min(len(b) for part in batches for b in part) >= 1
    assert sorted(sum(sum(batches, []), [])) == rows.tolist()


def test_other_numbers_of_ranks_deal_out_what_is_left_of_the_epoch(tiny_prepared: PreparedData):
    rows, builder = np.arange(101), make_builder(tiny_prepared)
    state, seen = {"epoch": 1, "first": 0, "done": 0, "world_size": 1}, []
    for world_size, steps in ((1, 3), (2, 2), (3, 1), (1, 0), (1, 99)):
        ranks = [RowLoader(builder, rows, batch_size=5, rank=rank, world_size=world_size) for rank in range(world_size)]
        for loader in ranks:
            loader.load_state_dict(state)
            seen += [row for _, batch in zip(range(steps), loader) for row in batch.row_B.tolist()]
        states = [loader.state_dict() for loader in ranks]
        assert states == states[:1] * world_size
        state = states[0]
    assert sorted(seen) == rows.tolist() and state["epoch"] == 2
    last = {"epoch": 0, "first": 0, "done": 100, "world_size": 1}  # of batches of one row: one row is left
    ranks = [RowLoader(builder, rows, batch_size=1, rank=rank, world_size=3) for rank in range(3)]
    batches = []
    for loader in ranks:
        loader.load_state_dict(last)
        batches.append(rows_of(loader))
    order = np.random.default_rng([0, 0]).permutation(rows).tolist()
    assert batches == [[[row]] for row in order[-3:]]


@pytest.mark.parametrize(("num_rows", "world_size"), [(0, 1), (1, 1), (1, 3), (10, 3), (50, 2)])
def test_evaluation_reads_each_row_on_some_rank_in_equally_many_batches(tiny_prepared, num_rows, world_size):
    rows = np.random.default_rng(0).permutation(tiny_prepared.num_events)[:num_rows]
    builder = make_builder(tiny_prepared)
    seen, counts = [], []
    for rank in range(world_size):
        batches = list(evaluation_batches(builder, rows, batch_size=4, rank=rank, world_size=world_size))
        counts.append(len(batches))
        for place_B, batch in batches:
            assert batch.row_B.tolist() == rows[place_B].tolist() and len(batch) >= 1
            seen += place_B.tolist()
    assert len(set(counts)) == 1 and set(seen) == set(range(num_rows))


def test_a_window_of_the_training_part(tiny_prepared: PreparedData):
    everything = training_rows(tiny_prepared, None)
    early, late = (training_rows(tiny_prepared, None, window) for window in ([0, 0.25], [0.25, 1]))
    assert sorted([*early, *late]) == everything.tolist() and len(early) == pytest.approx(len(everything) / 4, rel=0.02)
    assert tiny_prepared.timestamp[early].max() < tiny_prepared.timestamp[late].min()
    for window in ([0.5], [0.5, 0.5], [-0.1, 1], [0, 1.1]):
        with pytest.raises(ValueError, match="expected two shares, such as"):
            training_rows(tiny_prepared, None, window)


def test_features_that_are_left_out(tiny_prepared: PreparedData):
    reduced = tiny_prepared.without(["price", "segment_category"])
    assert {*tiny_prepared.schema.features} - {*reduced.schema.features} == {"price", "segment_category"}
    assert {*tiny_prepared.dense} - {*reduced.dense} == {"price"}
    assert reduced.fingerprint == tiny_prepared.fingerprint and reduced.item is tiny_prepared.item
    with pytest.raises(ValueError, match="there is no feature 'prize' to leave out"):
        tiny_prepared.without(["prize"])


def test_errors(tiny_prepared: PreparedData):
    with pytest.raises(ValueError, match="max_history is -1"):
        make_builder(tiny_prepared, max_history=-1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        RowLoader(make_builder(tiny_prepared), np.arange(5), batch_size=0)
    with pytest.raises(ValueError, match="1 rows for 2 process"):
        RowLoader(make_builder(tiny_prepared), np.arange(1), batch_size=5, world_size=2)
