"""Requests become the batches that rows of the log are: the same whole numbers, and floats to 1e-6."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_requests import RichLog, builders, live_events, request_of, rich_log, rows_of_events, said
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lumrec.data.drawn_rows import NegativeRowsConfig
from lumrec.data.splits import DEFAULT_FRACTIONS, TRAIN
from lumrec.features.history import Layout, UserHistory, histories_of
from lumrec.models.ranker_config import RANKERS
from lumrec.run.errors import UserError
from lumrec.serving.requests import RequestBuilder

READS = sorted({name for ranker in RANKERS.values() for name in ranker.reads} | {"item_U", "category_U"})
START_US = 1_600_000_000_000_000


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    return lambda *args, **more: rich_log(*args, tmp_path_factory.mktemp("rich"), **more)


def drawn_events(seed: int, num: int, num_users: int = 4, half_seconds: int = 30) -> list[tuple]:
    """Many events of one time, or of one second, and requests whose rows were recorded at several times."""
    random = np.random.default_rng(seed)
    return [
        (
            int(random.integers(1, num_users + 1)),
            int(random.integers(1, 9)),
            START_US + int(random.integers(0, half_seconds)) * 500_000,
            None if random.random() < 0.5 else int(random.integers(1, 4)),
            int(random.random() < 0.5),
        )
        for _ in range(num)
    ]


def same(first: tuple, second: tuple) -> None:
    assert first[0] == second[0]
    for one, other in zip(first[1], second[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def in_portions(log: RichLog, builder: RequestBuilder, keep: int, random: np.random.Generator) -> list[UserHistory]:
    """The state of each user after all events, appended in several portions; what is written is read back."""
    data = log.data
    layout = Layout.of(data.schema, keep=keep, has_clock=log.has_clock)
    known = builder.known(layout)
    started = list(histories_of(data, layout, known))
    states = []
    for user, whole in enumerate(started):
        first, last = data.user_offsets[user : user + 2]
        state = UserHistory.empty(layout)
        state.users, state.dense = whole.users, whole.dense
        cuts = np.sort(random.integers(first, last + 1, random.integers(0, 4)))
        for portion in np.split(np.arange(first, last), cuts - first):
            state.append(builder.encode(live_events(log, portion)), known)
            state = UserHistory.from_bytes(state.to_bytes(), layout)
        states.append(state)
    return states


@pytest.mark.parametrize("split", sorted(DEFAULT_FRACTIONS))
@settings(max_examples=15, deadline=None)
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
