"""Requests become the batches that rows of the log are: the same whole numbers, and floats to 1e-6."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import polars as pl
import pytest
import torch
from drawn_requests import RichLog, builders, live_events, request_of, rich_log, rows_of_events, said
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lumrec.data.drawn_rows import NegativeRowsConfig
from lumrec.data.forms import as_text
from lumrec.data.log_columns import of_time
from lumrec.data.prepared import PreparedData
from lumrec.data.scaling import Moments, scaled
from lumrec.data.splits import DEFAULT_FRACTIONS, TRAIN
from lumrec.features.history import Known, Layout, UserHistory, histories_of, log_events
from lumrec.features.statistics import Scale
from lumrec.models.ranker_config import RANKERS
from lumrec.modules.rankers.base import RankBatch
from lumrec.run.errors import UserError
from lumrec.serving.raw_values import TIME_TEXTS, scaled_number, text
from lumrec.serving.requests import Event, RequestBuilder, ScoreRequest

READS = sorted({name for ranker in RANKERS.values() for name in ranker.reads} | {"item_U", "category_U"})
START_US = 1_600_000_000_000_000


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    return lambda *args, **more: rich_log(*args, tmp_path_factory.mktemp("rich"), **more)


def drawn_events(
    seed: int, num: int, *, users: int = 4, span: int = 30, pages: bool = False, step_us: int = 500_000
) -> list[tuple]:
    """Many events of one time, or of one second, and requests whose rows were recorded at several times.

    span: steps of time in which all of them lie. pages: a request lasts four of them at most.
    """
    random, events = np.random.default_rng(seed), []
    for _ in range(num):
        user, item, at = (int(random.integers(1, most)) for most in (users + 1, 9, span))
        request = at // 4 if pages else int(random.integers(1, 4))
        shown_with = None if random.random() < 0.5 else request
        events.append((user, item, START_US + at * step_us, shown_with, int(random.random() < 0.5)))
    return events


def same(first: tuple, second: tuple) -> None:
    assert first[0] == second[0]
    for one, other in zip(first[1], second[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def in_portions(log: RichLog, builder: RequestBuilder, keep: int, random: np.random.Generator) -> list[UserHistory]:
    """The state of each user after all events, appended in several portions; what is written is read back."""
    data = log.data
    layout = Layout.of(data.schema, keep=keep, has_clock=log.has_clock)
    known = builder.known(layout)
    states = without_events(data, layout)
    for user, state in enumerate(states):
        first, last = data.user_offsets[user : user + 2]
        cuts = np.sort(random.integers(first, last + 1, random.integers(0, 4)))
        for portion in np.split(np.arange(first, last), cuts - first):
            state.append(builder.encode(live_events(log, portion)), known)
            state = states[user] = UserHistory.from_bytes(state.to_bytes(), layout)
    return states


def without_events(data: PreparedData, layout: Layout) -> list[UserHistory]:
    """The state of each user before the first event."""
    states = [UserHistory.empty(layout) for _ in range(data.num_users)]
    for state, whole in zip(states, histories_of(data, layout, Known({}, None, None)), strict=True):
        state.users, state.dense = whole.users, whole.dense
    return states


@pytest.mark.parametrize("split", sorted(DEFAULT_FRACTIONS))
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 999),
    num=st.integers(4, 60),
    kind=st.sampled_from(["all", "user", "none"]),
    max_history=st.sampled_from([0, 3, 50]),
    reads=st.sampled_from([READS, *(ranker.reads for ranker in RANKERS.values())]),
    has_requests=st.booleans(),
    has_negatives=st.booleans(),
)
def test_a_request_is_the_row_of_its_moment(
    make, split, seed, num, kind, max_history, reads, has_requests, has_negatives
):
    negatives = NegativeRowsConfig(per_positive=2, sampling="uniform") if has_negatives else None
    random = np.random.default_rng(seed)
    try:
        log = make(drawn_events(seed, num), split, seed=seed, has_requests=has_requests, negatives=negatives)
    except UserError:  # a user has had every item there is
        assume(False)
    assume((log.data.split == TRAIN).any())
    rows, builder = builders(log.data, kind, max_history, reads)
    states = in_portions(log, builder, 60, random)
    check_rows(log, rows, builder, states)


def check_rows(log: RichLog, rows, builder: RequestBuilder, states: list[UserHistory]) -> None:
    """Every row of the log equals a candidate of a request to the states after all events."""
    of_events = rows_of_events(log.data)
    requests = [request_of(log, event, of) for event, of in of_events.items()]
    made = builder.batch(requests, [states[user] for user in log.data.user])
    same(said(rows.batch(np.concatenate(list(of_events.values())))), said(made.rank))
    assert not made.unknown_user_Q.any() and not made.unknown_items_Q.any() and not made.cut_Q.any()


@pytest.mark.parametrize("split", ["temporal", "user"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), num=st.integers(4, 60), kind=st.sampled_from(["user", "none"]))
def test_of_a_log_without_times(make, split, seed, num, kind):
    log = make(drawn_events(seed, num), split, seed=seed, has_clock=False)
    assume((log.data.split == TRAIN).any())
    rows, builder = builders(log.data, kind, 50, READS)
    check_rows(log, rows, builder, in_portions(log, builder, 60, np.random.default_rng(seed)))


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 999), kind=st.sampled_from(["all", "user", "none"]), has_requests=st.booleans())
def test_a_state_that_keeps_less_than_the_history(make, seed, kind, has_requests):
    """Every row is asked when it happened, and its event appended then; of a user's 80, 50 or 20 are kept."""
    events = drawn_events(seed, 80, users=1, span=160, pages=True)
    log = make(events, "temporal", seed=seed, has_requests=has_requests)
    data = log.data
    keep = 20 if kind == "none" else 50
    rows, builder = builders(data, kind, 12, READS)
    layout = Layout.of(data.schema, keep=keep, has_clock=True)
    known = builder.known(layout)
    states, sent = without_events(data, layout), 0
    time_E = log.frame["time_us"].to_numpy()[data.order]
    by_time = np.argsort(time_E, kind="stable")
    for moment in np.unique(time_E[data.before]):
        while sent < len(by_time) and time_E[by_time[sent]] < moment:
            event = by_time[sent : sent + 1]
            states[data.user[event[0]]].append(builder.encode(live_events(log, event)), known)
            sent += 1
        asked = np.flatnonzero(time_E[data.before] == moment)
        made = builder.batch(
            [request_of(log, row, np.array([row])) for row in asked], [states[u] for u in data.user[asked]]
        )
        assert not made.cut_Q.any()
        same(said(rows.batch(asked)), said(made.rank))
    assert len(states[0].events) == keep and states[0].count == sent - keep > 0
    early = builder.batch([request_of(log, 0, np.array([0]))], [states[0]])
    assert early.cut_Q.all()


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 999), keep=st.sampled_from([5, 60]), has_clock=st.booleans())
def test_a_state_built_from_the_log_is_what_appending_makes(make, seed, keep, has_clock):
    log = make(drawn_events(seed, 60, step_us=1_000_000), "temporal", seed=seed, has_clock=has_clock)
    rows, builder = builders(log.data, "all" if has_clock else "user", 50, READS)
    layout = Layout.of(log.data.schema, keep=keep, has_clock=has_clock)
    built = list(histories_of(log.data, layout, builder.known(layout)))
    appended = in_portions(log, builder, keep, np.random.default_rng(seed))
    for one, other in zip(built, appended, strict=True):
        for first, second in zip(one.arrays(), other.arrays(), strict=True):
            assert first.dtype == second.dtype
            np.testing.assert_allclose(first, second, rtol=1e-12 if first.dtype == np.float64 else 0, atol=1e-12)
    if keep == 60:
        check_rows(log, rows, builder, built)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 999), has_requests=st.booleans())
def test_moments_of_prepared_data_are_told_apart_within_a_second(make, seed, has_requests):
    log = make(drawn_events(seed, 50, users=2, span=12), "temporal", seed=seed, has_requests=has_requests)
    rows, builder = builders(log.data, "all", 50, READS)
    known = builder.known(builder.layout)
    moment_E = log_events(log.data, builder.layout, known).moment
    requests = [request_of(log, row, np.array([row]))._replace(time=at / 1e6) for row, at in enumerate(moment_E)]
    states = list(histories_of(log.data, builder.layout, known))
    made = builder.batch(requests, [states[user] for user in log.data.user])
    same(said(rows.batch(np.arange(log.data.num_events))), said(made.rank))


def test_a_count_of_twin_stays_when_its_moment_is_folded(log: RichLog, builder: RequestBuilder):
    layout = dataclasses.replace(builder.layout, keep=2)
    state, event = UserHistory.empty(layout), Event("1", "1", START_US / 1e6)
    for second in (0, 5, 5, 5, 5):
        state.append(builder.encode([event._replace(time=event.time + second)]), builder.known(layout))
    assert state.earlier.tolist()[0] == 1  # of its moment two others are folded now


@pytest.fixture(scope="module")
def log(make) -> RichLog:
    return make(drawn_events(7, 60), "temporal", seed=7)


@pytest.fixture(scope="module")
def builder(log: RichLog) -> RequestBuilder:
    return builders(log.data, "all", 50, READS)[1]


def bags(rank: RankBatch, name: str) -> list[list[int]]:
    """Of the rows."""
    jagged = rank.tokens[name]
    return [part.tolist() for part in jagged.values().split(jagged.lengths().tolist())][rank.num_tokens :]


def test_what_is_unknown_is_served_and_counted(builder: RequestBuilder):
    unknown, time = {"device": "toaster", "words": ["t0", "x"], "mood": None}, START_US / 1e6
    asked = ScoreRequest("nobody", ["1", "no such item", "2"], unknown, time)
    known = ScoreRequest("nobody", ["1"], {"device": "phone", "words": [], "mood": 1, "depth": 0.5}, time)
    made = builder.batch([asked, known], [None, None])
    assert made.unknown_user_Q.tolist() == [True, True]
    assert made.unknown_items_Q.tolist() == [1, 0]
    assert made.unknown_values_Q.tolist() == [4, 0]  # of device, words, mood and depth
    assert made.item_B.tolist() == [0, builder.catalogue.num_items, 1, 0]
    assert bags(made.rank, "device")[:3] == [[0]] * 3
    assert bags(made.rank, "user_id") == [[0]] * 4 and bags(made.rank, "hobbies") == [[]] * 4
    assert made.rank.offsets_B1.tolist() == [0] * 3 and made.rank.history_of_B.tolist() == [0, 0, 0, 1]
    assert torch.isfinite(made.rank.dense_BF).all()


def test_features_of_a_user_may_come_with_the_request(log: RichLog, builder: RequestBuilder):
    state = in_portions(log, builder, 60, np.random.default_rng(0))[0]
    rank = builder.batch(
        [ScoreRequest("1", ["1", "2"], given) for given in ({"hobbies": ["h0"], "wealth": 1e6}, {})], [state, state]
    ).rank
    wealth_B = rank.dense_BF[:, builder.spec.statistics.names.index("wealth")].tolist()
    assert wealth_B[0] == wealth_B[1] > 100 and wealth_B[2] == wealth_B[3] == np.float32(state.dense["wealth"])
    own = bags(rank, "hobbies")
    assert own[0] == own[1] == builder.keys.rows("hobbies", ["h0"]).tolist()
    assert own[2] == own[3] == state.users["hobbies"].values.tolist()


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (
            ScoreRequest("1", ["1"], {"devise": "tv"}),
            "no feature 'devise'; the features of a request are: depth, device",
        ),
        (ScoreRequest("1", ["1"], {"clicked": "like"}), "no feature 'clicked'"),  # it is known only afterwards
        (ScoreRequest("1", ["1"], {"words": "t0"}), "column 'words' is of kind multi: got 't0', expected a list"),
        (ScoreRequest("1", ["1"], {"mood": {}}), "a value of a feature is {}"),
        (ScoreRequest("1", ["1", "2"], per_item={"mood": [1]}), "'mood' has 1 values per item; expected 2"),
        (ScoreRequest("1", ["1"], time="noon"), "a time is 'noon'; expected seconds"),
        (ScoreRequest("1", ["1"], time=float("nan")), "a time is nan"),
        (ScoreRequest("1", ["1"], time=START_US / 1e3), "expected seconds since 1970, UTC, before the year 2100"),
        (ScoreRequest("1", ["1"], time=1e300), "a time is 1e+300"),
    ],
)
def test_a_request_that_cannot_be_read(builder: RequestBuilder, request_: ScoreRequest, says: str):
    with pytest.raises(UserError, match=re.escape(says)):
        builder.batch([request_], [None])


def test_an_event_that_cannot_be_read(builder: RequestBuilder):
    with pytest.raises(UserError, match="the label of an event is 3; expected 0 or 1"):
        builder.encode([Event("1", "1", label=3)])
    with pytest.raises(UserError, match="no feature 'age'; the features of events are: "):
        builder.encode([Event("1", "1", features={"age": 3})])


def test_likes_after_the_log_count_where_they_are_given(builder: RequestBuilder):
    asked, names = [ScoreRequest("1", ["1", "2"])], builder.spec.statistics.names
    rate, count = names.index("item_like_rate"), names.index("item_log_count")
    before = builder.batch(asked, [None]).rank.dense_BF
    after = builder.batch(asked, [None], lambda item_N: (np.array([4.0, 0.0]), np.array([4.0, 0.0]))).rank.dense_BF
    assert (after[0, [rate, count]] > before[0, [rate, count]]).all()
    assert torch.equal(after[1], before[1])


def test_late_events_are_sorted_in(log: RichLog, builder: RequestBuilder):
    layout = Layout.of(log.data.schema, keep=60, has_clock=True)
    known, rows = builder.known(layout), np.arange(log.data.user_offsets[1])
    in_order, late = UserHistory.empty(layout), UserHistory.empty(layout)
    in_order.append(builder.encode(live_events(log, rows)), known)
    for portion in (rows[::2], rows[1::2]):
        late.append(builder.encode(live_events(log, portion)), known)
    time = in_order.events.time
    assert (np.diff(late.events.time) >= 0).all() and sorted(late.events.time) == sorted(time)
    np.testing.assert_array_equal(np.sort(late.earlier), np.sort(in_order.earlier))


def test_a_damaged_state_is_told(log: RichLog, builder: RequestBuilder):
    state = in_portions(log, builder, 10, np.random.default_rng(0))[0]
    raw = state.to_bytes()
    for damaged in (b"", raw[:7], raw[:-8], raw + bytes(8), b"x" + raw[1:], raw[:30] + b"\xff" + raw[31:]):
        with pytest.raises(UserError, match="the state of a user is damaged"):
            UserHistory.from_bytes(damaged, state.layout)
    with pytest.raises(UserError, match="was made with other features or settings"):
        UserHistory.from_bytes(raw, dataclasses.replace(state.layout, keep=11))


@given(time_us=st.lists(st.integers(0, 4 * 10**15), min_size=1, max_size=20), offset=st.sampled_from([0.0, 5.5, -8.0]))
def test_columns_made_of_the_time_are_those_of_a_log(time_us: list[int], offset: float):
    frame = pl.DataFrame({"time_us": time_us}).select(**of_time(pl.col("time_us"), offset))
    local = np.array(time_us) + int(offset * 3_600_000_000)
    assert {name: made(local) for name, made in TIME_TEXTS.items()} == frame.to_dict(as_series=False)


@given(value=st.one_of(st.none(), st.integers(-(2**53), 2**53), st.floats(), st.booleans()))
def test_a_text_is_that_of_a_vocabulary(value):
    kind = {int: pl.Int64, float: pl.Float64, bool: pl.Boolean}.get(type(value), pl.String)
    assert text(value) == (as_text(pl.Series([value], dtype=kind))[0] or "")


@given(
    value=st.one_of(st.none(), st.floats(), st.floats(-10, 10).map(str), st.sampled_from(["", " 2 ", "x", "1e400"])),
    kind=st.sampled_from(["log", "standard", "none"]),
)
def test_a_dense_value_is_scaled_as_in_a_log(value, kind: str):
    moments = Moments(weight=4.0, mean=0.5, squares=9.0)
    column = pl.Series("x", [value], dtype=pl.Float64 if isinstance(value, float) else pl.String)
    got = scaled_number(value, Scale(moments.mean, moments.deviation, kind))
    try:
        expected, missing = scaled(column, kind, moments)
    except UserError:  # too far for a model to read, which is served as missing
        assert got is None
        return
    assert got is None if missing else np.float32(got) == expected[0]
