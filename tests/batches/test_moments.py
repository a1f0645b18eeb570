"""A row sees only what is strictly earlier than its moment: whatever else changes, nothing that it reads does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from drawn_logs import events_of, prepared, with_another_future
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lumrec.batches.rows import RowBuilder
from lumrec.batches.tower_rows import TowerBuilder
from lumrec.data.moments import first_of_moment, inseparable
from lumrec.data.own_log import check
from lumrec.data.prepare import prepare
from lumrec.data.prepared import PreparedData
from lumrec.data.splits import DEFAULT_FRACTIONS, TRAIN
from lumrec.experiments.config import load
from lumrec.features.statistics import Statistics, raw_statistics
from lumrec.models.lum import ModelConfig, build_lum
from lumrec.models.ranker_config import RANKERS
from lumrec.modules.rankers.base import RankBatch
from lumrec.query.group_query import GroupQuery

READS = sorted({name for ranker in RANKERS.values() for name in ranker.reads} | {"item_U", "category_U"})
FEATURES = {"features": ["item_id", "tags", "clicked"], "row_features": []}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    return lambda events, kind: prepared(events, kind, tmp_path_factory.mktemp("drawn"))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.sampled_from([None, 1, 2])), max_size=14))
def test_a_moment_begins_where_its_request_does(rows: list[tuple]):
    rows.sort(key=lambda row: row[:2])
    before = []
    for user, time, request in rows:
        together = [one for one in rows if one[0] == user and one[2] == request] if request else [(user, time, request)]
        first = min(one[1] for one in together)
        before.append(next(place for place, one in enumerate(rows) if one[:2] == (user, first)))
    user_E, time_E = (np.array([row[place] for row in rows], np.int64) for place in (0, 1))
    got = first_of_moment(user_E, time_E, pl.Series([row[2] for row in rows], dtype=pl.Int64))
    assert got.tolist() == before
    cuts = [cut for cut in range(len(rows)) if all(first >= cut for first in before[cut:])]
    assert inseparable(got).tolist() == [max(cut for cut in cuts if cut <= row) for row in range(len(rows))]


def said(batch: RankBatch) -> list:
    """All that a batch says of its rows but their labels, whatever the numbers of its tokens."""
    bags = {name: batch.tokens[name] for name in batch.tokens.keys()}
    of_token = [[part.tolist() for part in bag.values().split(bag.lengths().tolist())] for bag in bags.values()]
    of_token += [batch.item_U.tolist(), batch.category_U.tolist()]
    history = [[column[place] for column in of_token] for place in batch.history_T.tolist()]
    target = [[column[place] for column in of_token] for place in batch.target_B.tolist()]
    numbers = [batch.offsets_B1, batch.age_T, batch.category_count_T, batch.dense_BF.double().round(decimals=4)]
    return [history, target, *(number.tolist() for number in numbers)]


@pytest.mark.parametrize("kind", sorted(DEFAULT_FRACTIONS))
@settings(max_examples=10, deadline=None)
@given(events=events_of(last_time=6, requests=True), max_history=st.sampled_from([0, 3, 50]), seed=st.integers(0, 99))
@example([(2, 1, 1, None, 0), (2, 1, 2, None, 0), (2, 2, 1, None, 0), (5, 1, 1, None, 0)], 0, 0)  # no user trains
def test_rankers_read_nothing_of_the_same_moment_or_later(make, kind, events, max_history, seed):
    data, random = make(events, kind), np.random.default_rng(seed)
    assume((data.split == TRAIN).any())  # there is nothing to take statistics from, and that is an error

    def read(log: PreparedData, row: int) -> tuple:
        columns = raw_statistics(log)
        statistics = Statistics(np.stack(list(columns.values()), 1).astype(np.float32), list(columns))
        settings = {**FEATURES, "max_history": max_history}
        batch = RowBuilder(log, statistics=statistics, reads=READS, **settings).batch(np.array([row]))
        assert len(batch.history_T) == min(max_history, log.before[row] - log.user_offsets[log.user[row]])
        tower = TowerBuilder(log, **settings).towers(np.array([row]), np.zeros(1, np.int64))
        bag = tower.tokens["item_id"].to_dense()
        return said(batch), [bag[place].tolist() for place in tower.history_T.tolist()]

    for row in random.integers(0, data.num_events, 3).tolist():
        assert read(with_another_future(data, row, random), row) == read(data, row)


@pytest.mark.parametrize("model", [{}, {"encoder": "hstu", "tokens": "merged"}], ids=str)
@settings(max_examples=6, deadline=None)
@given(events=events_of(last_time=6, requests=True), seed=st.integers(0, 99))
def test_the_answers_for_a_row_know_nothing_of_its_moment_or_later(make, model, events, seed):
    data, random = make(events, "user"), np.random.default_rng(seed)

    def answers(log: PreparedData) -> dict[int, torch.Tensor]:
        torch.manual_seed(0)
        lum, builder = build_lum(ModelConfig(dim=8, num_layers=1, num_heads=1, max_events=6, **model), log)
        query = GroupQuery(lum, builder, [{}, {"wish": "top 1"}], max_events=6, stride=2)
        row_E, o_END = query.rows(torch.arange(log.num_users))
        return dict(zip(row_E.tolist(), o_END))

    known = answers(data)
    assert sorted(known) == np.flatnonzero(data.before > data.user_offsets[data.user]).tolist()
    for row, o_ND in known.items():  # rows of one moment were asked once
        mates = np.flatnonzero(data.before == data.before[row]).tolist()
        assert all(torch.equal(known[mate], o_ND) for mate in mates)
    for row in random.permutation(sorted(known))[:2].tolist():
        torch.testing.assert_close(answers(with_another_future(data, row, random))[row], known[row])


@pytest.mark.parametrize("kind", ["temporal", "time", "user"])
@settings(max_examples=10, deadline=None)
@given(events=events_of(last_time=8, requests=True))
def test_no_split_parts_a_moment(make, kind: str, events: list[tuple]):
    data = make(events, kind)
    assert (data.split == data.split[data.before]).all()
    assert all(
        (np.diff(data.split[first:last]) >= 0).all() for first, last in zip(data.user_offsets, data.user_offsets[1:])
    )


# A log of pages of three items; of the last one a row was recorded an hour later, and one row came without a page.
PAGES = """user,item,time,click,page
7,1,100,0,a
7,2,100,1,a
7,3,100,0,a
7,4,7000,0,b
7,5,7000,1,b
7,6,10600,0,b
7,1,9000,1,
8,2,50,0,c
"""
WORDS = ["data.source=log", "data.log.user=user", "data.log.item=item", "data.label.column=click", "name=pages"]


@pytest.fixture
def pages(tmp_path: Path):
    (tmp_path / "log.csv").write_text(PAGES)
    words = [*WORDS, f"data.log.events={tmp_path / 'log.csv'}", f"runs_dir={tmp_path}", "data.log.time_unit=s"]

    def make(*more: str) -> PreparedData:
        prepare(load(None, [*words, "data.log.timestamp=time", *more]), tmp_path / "prepared")
        return PreparedData.open(tmp_path / "prepared")

    make.words = words
    return make


def test_the_history_of_a_row_ends_before_its_page(pages, capsys):
    of_time, of_page = pages(), pages("data.request=page", "overwrite=true")
    assert of_time.before.tolist() == [0, 0, 0, 3, 3, 5, 6, 7]
    assert of_page.before.tolist() == [0, 0, 0, 3, 3, 5, 3, 7]  # the row recorded last was shown with rows 3 and 4
    printed = capsys.readouterr().out
    assert "37.5% of the rows share their time or request with an earlier row of the same user" in printed
    assert "50.0% of the rows share their time or request" in printed
    assert "1 events have no request: each was shown by itself" in printed
    hour = of_page.event_columns["hour"].values
    assert hour[6] == hour[3] != of_time.event_columns["hour"].values[6]  # the hour, too, is that of its page
    builder = RowBuilder(
        of_page,
        features=["item_id"],
        row_features=[],
        max_history=9,
        reads=["age_T", "item_U"],
    )
    batch = builder.batch(np.array([6]))
    assert batch.item_U[batch.history_T].tolist() == of_page.item[:3].tolist()
    assert batch.age_T.tolist() == [6900.0] * 3
    assert raw_statistics(of_page)["log_seconds_since_last"][6] == pytest.approx(np.log1p(6900))


def test_without_times_the_order_of_the_rows_counts(pages, tmp_path: Path, capsys):
    schema = "schema.features={item_id: {role: item}}"
    data = pages("data.log.timestamp=", schema, "data.split.kind=user")
    assert data.before.tolist() == list(range(8)) and set(data.timestamp.tolist()) == {946_684_800}
    assert data.order.tolist() == list(range(8))
    assert "the log has no times: every row sees all rows of its user before it" in capsys.readouterr().out
    check.run(load(None, [*pages.words, "data.log.timestamp="]))
    printed = capsys.readouterr().out
    assert "data.log.timestamp is ''" in printed and "in the order of the log" in printed and "weekday" not in printed
    _, _, config = printed.partition("save from here as my-log.yaml")
    (tmp_path / "my-log.yaml").write_text(config.partition("\n")[2].partition("# ----")[0])
    assert load(tmp_path / "my-log.yaml", []).data.log.timestamp == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.request=pge"], "data.request.*'pge'"),
        (["data.request=click"], "data.request: got 'click', which is the label"),
        (["data.request=user"], "data.request: got 'user', which is data.log.user"),
        (["data.source=simulator", "data.request=page"], "it names a column of source log only"),
        (
            ["data.request=page", "schema.features={item_id: {role: item}, page: {role: context}}"],
            "schema.features.page: column 'page' is data.request",
        ),
        (["data.log.timestamp="], "schema.features.hour: hour is made of the time, and this log has no times"),
        (["data.log.timestamp=", "data.split.kind=time", "schema.features={item_id: {role: item}}"], "one clock"),
    ],
)
def test_what_cannot_be_a_moment_is_told(pages, words: list[str], says: str):
    with pytest.raises(ValueError, match=says):
        pages(*words)


def test_a_log_of_one_time_is_warned_of(tmp_path: Path, capsys):
    rows = [f"{user},{item},100,{item % 2}" for user in range(4) for item in range(5)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time,click", *rows]))
    words = [*WORDS, f"data.log.events={tmp_path / 'log.csv'}", "data.log.timestamp=time", "data.log.time_unit=s"]
    prepare(load(None, [*words, f"runs_dir={tmp_path}", "data.split.kind=user"]), tmp_path / "prepared")
    assert "100% of the rows have no earlier row of their user to read" in capsys.readouterr().out
