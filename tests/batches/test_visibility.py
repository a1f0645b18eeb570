"""Nothing at or after the predicted event is visible: for every split, in the LUM's training, its queries and a
ranker's history. Logs are drawn: users with few and many events, ties in time, items that come back.
"""

import copy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.batches.rows import RowBuilder
from lumrec.batches.windows import answering_windows, training_windows
from lumrec.data.columns import Column
from lumrec.data.convert import convert
from lumrec.data.manifest import write_manifest
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import FeatureConfig, SchemaConfig, validate
from lumrec.data.sources.raw_log import RawLog
from lumrec.data.splits import DEFAULT_FRACTIONS, TRAIN, VALID, SplitConfig

SCHEMA = validate(
    SchemaConfig(
        features={
            "item_id": FeatureConfig("item"),
            "wish": FeatureConfig("condition", column="feedback", wish=True),
            "clicked": FeatureConfig("feedback", column="feedback"),
        }
    )
)
EVENTS = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(1, 200), st.sampled_from([0.0, 1.0])),
    min_size=4,
    max_size=60,
    unique_by=lambda event: event[:3],
)


def prepared(events: list[tuple], kind: str, folder: Path) -> PreparedData:
    columns = {"user_id": pl.Int64, "item_id": pl.Int64, "time_us": pl.Int64, "label": pl.Float32}
    frame = pl.DataFrame(events, schema=columns, orient="row").with_row_index("order")
    frame = frame.with_columns(pl.col("order").cast(pl.Int64), pl.col("time_us") * 1_000_000)
    content = convert(RawLog(frame.lazy(), None, None, [], "drawn"), SCHEMA, SplitConfig(kind), folder)
    write_manifest(folder, {"schema": asdict(SCHEMA), "split": {}, **content})
    return PreparedData.open(folder)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    return lambda events, kind: prepared(events, kind, tmp_path_factory.mktemp("visible"))


every_split = pytest.mark.parametrize("kind", sorted(DEFAULT_FRACTIONS))


@every_split
@settings(max_examples=12, deadline=None)
@given(events=EVENTS)
def test_parts_follow_one_another(make, kind: str, events: list[tuple]):
    data = make(events, kind)
    later_than_training = data.split > TRAIN
    if kind == "time":
        for part in (TRAIN, VALID):
            if (data.split == part).any() and (data.split > part).any():
                assert data.timestamp[data.split == part].max() < data.timestamp[data.split > part].min()
    elif kind == "user":
        assert not set(data.user[later_than_training]) & set(data.user[data.split == TRAIN])
    for first, last in zip(data.user_offsets, data.user_offsets[1:]):
        assert (np.diff(data.split[first:last]) >= 0).all()
        assert (np.diff(data.timestamp[first:last]) >= 0).all()
    # what training counts, it counts over the training part alone
    known = set(data.vocabulary("item_id"))
    assert known == {data.item_keys()[item] for item in data.item[data.split == TRAIN]}


@every_split
@settings(max_examples=12, deadline=None)
@given(events=EVENTS, max_events=st.integers(1, 7), seed=st.integers(0, 9))
def test_a_lum_trains_on_training_events_in_their_order(make, kind: str, events: list[tuple], max_events, seed):
    data = make(events, kind)
    everyone, generator = np.ones(data.num_users, bool), torch.Generator().manual_seed(seed)
    windows = training_windows(data, max_events=max_events, users=everyone, generator=generator)
    seen = []
    for start, length in zip(windows.start_W.tolist(), windows.length_W.tolist()):
        rows = np.arange(start, start + length)
        assert (data.split[rows] == TRAIN).all()
        assert len(set(data.user[rows])) == 1
        seen += rows.tolist()
    assert sorted(seen) == np.flatnonzero(data.split == TRAIN).tolist()


@every_split
@settings(max_examples=12, deadline=None)
@given(events=EVENTS, max_events=st.integers(1, 7), data=st.data())
def test_a_query_for_a_row_sees_earlier_rows_of_its_user_alone(make, kind: str, events: list[tuple], max_events, data):
    log = make(events, kind)
    stride = data.draw(st.integers(1, max_events))
    start_U, length_U = (torch.from_numpy(x) for x in (log.user_offsets[:-1], np.diff(log.user_offsets)))
    answering = answering_windows(start_U, length_U, torch.arange(log.num_users), max_events=max_events, stride=stride)
    asked = []
    for row, seen in zip(answering.row_R.tolist(), answering.seen_R.tolist()):
        visible = np.arange(row - seen, row)
        asked.append(row)
        assert (log.user[visible] == log.user[row]).all()
        assert (visible < row).all()
        assert (log.timestamp[visible] <= log.timestamp[row]).all()
        assert (log.split[visible] <= log.split[row]).all()
    assert sorted(asked) == list(range(log.num_events))


@every_split
@settings(max_examples=12, deadline=None)
@given(events=EVENTS, max_history=st.integers(0, 6), seed=st.integers(0, 9))
def test_a_ranker_reads_nothing_that_comes_later(make, kind: str, events: list[tuple], max_history: int, seed: int):
    """Every event of the user from the row's moment on gets another item (but the row) and another feedback."""
    data = make(events, kind)
    row = int(np.random.default_rng(seed).integers(data.num_events))
    is_later = (data.timestamp >= data.timestamp[row]) & (data.user == data.user[row])
    other = copy.copy(data)
    other.item = np.where(is_later & (np.arange(data.num_events) != row), (data.item + 1) % data.num_items, data.item)
    given = data.event_columns["clicked"].values
    turned = torch.where(torch.from_numpy(is_later), 3 - given, given)
    other.event_columns = {**data.event_columns, "clicked": Column(turned), "wish": Column(turned)}

    def read(log: PreparedData) -> list:
        builder = RowBuilder(
            log,
            features=["item_id", "clicked"],
            row_features=[],
            max_history=max_history,
        )
        batch = builder.batch(np.array([row]))
        bags = {name: batch.tokens[name] for name in ("item_id", "clicked")}
        token = [[part.tolist() for part in b.values().split(b.lengths().tolist())] for b in bags.values()]
        history = [[column[place] for column in token] for place in batch.history_T.tolist()]
        return [history, [column[int(batch.target_B)] for column in token], batch.offsets_B1.tolist()]

    history, target, offsets = read(data)
    assert read(other) == [history, target, offsets]
    assert offsets[1] == min(max_history, int((~is_later & (data.user == data.user[row])).sum()))
    assert target[1] == []  # the target has no feedback
