"""A LUM asked from states: equal to asking the log, whether histories are new, read before, too long or late."""

import dataclasses

import numpy as np
import pytest
import torch
from drawn_requests import builders

from lumrec.batches.windows import Windows, behind
from lumrec.features.history import UserHistory, log_events
from lumrec.models.lum import ModelConfig, build_lum
from lumrec.query.group_query import GroupQuery
from lumrec.run.errors import UserError
from lumrec.serving.live_lum import LiveLum

MAX_EVENTS = 16
CONDITIONS = [{"feedback": "like"}, {"category": "top 1"}, {}]


@pytest.fixture(scope="module", params=[("gpt", "interleaved"), ("hstu", "merged")], ids="-".join)
def query(request, tiny_prepared) -> GroupQuery:
    encoder, tokens = request.param
    torch.manual_seed(0)
    config = ModelConfig(encoder=encoder, tokens=tokens, dim=16, max_events=MAX_EVENTS)
    model, builder = build_lum(config, tiny_prepared)
    return GroupQuery(model.double().eval(), builder, CONDITIONS, max_events=MAX_EVENTS)


@pytest.fixture(scope="module")
def states(tiny_prepared):
    """Layout, what events are counted by, and the rows of the log's events."""
    _, builder = builders(tiny_prepared, "none", 5, [])
    layout = builder.spec.layout(keep=16)
    return layout, builder.known(layout), log_events(tiny_prepared, layout, builder.known(layout))


def history_of(states, first: int, number: int) -> UserHistory:
    layout, known, rows = states
    history = UserHistory.empty(layout)
    history.append(rows.take(np.arange(first, first + number)), known)
    return history


def expected(query, users, numbers) -> torch.Tensor:
    """Answers from the log, behind so many events of each user."""
    first_B = torch.from_numpy(query.data.user_offsets[users])
    seen_B = torch.tensor(numbers).clamp(max=MAX_EVENTS - 1)
    windows = Windows(first_B + torch.tensor(numbers) - seen_B, seen_B, torch.tensor(users))
    return query.answer_all(behind(windows), query.asked)


@pytest.mark.parametrize("cache_bytes", [0, 40_000, 2**28])
def test_growing_histories_are_answered_as_from_the_log(query, states, cache_bytes):
    """Users join, grow by a few events, fall silent, and grow beyond what the LUM sees; with and without a cache."""
    data, random = query.data, np.random.default_rng(0)
    length_U = np.diff(data.user_offsets)
    users = np.argsort(-length_U)[:8].tolist()
    assert length_U[users].min() > MAX_EVENTS + 4
    live = LiveLum(query, states[0], cache_bytes=cache_bytes)
    numbers = dict.fromkeys(users, 0)
    for _ in range(12):
        asked = random.permutation(users)[:5].tolist()
        for user in asked:
            numbers[user] = min(numbers[user] + int(random.integers(1, 4)), int(length_U[user]))
        histories = [history_of(states, int(data.user_offsets[user]), numbers[user]) for user in asked]
        o_BND, seen_B = live.answer([str(user) for user in asked], histories)
        want = expected(query, asked, [numbers[user] for user in asked])
        torch.testing.assert_close(o_BND, want, atol=1e-6, rtol=1e-5)
        assert seen_B.tolist() == [min(numbers[user], MAX_EVENTS - 1) for user in asked]
        assert live.cached_bytes <= cache_bytes
    assert max(numbers.values()) > MAX_EVENTS  # folded events too: 16 are kept


def test_only_new_events_are_computed(query, states, monkeypatch):
    """The LUM reads as many events as are new; the whole history again where an event came late."""
    data = query.data
    user = int(np.argmax(np.diff(data.user_offsets)))
    first, read = int(data.user_offsets[user]), []
    live = LiveLum(query, states[0])
    plain = live.lum.read
    monkeypatch.setattr(live.lum, "read", lambda pack, history: (read.append(pack.num_events), plain(pack, history))[1])
    for number in (10, 10, 13):
        live.answer(["a"], [history_of(states, first, number)])
    layout, known, rows = states
    late = UserHistory.empty(layout)
    late.append(rows.take(first + np.delete(np.arange(14), 2)), known)
    o_BND, _ = live.answer(["a"], [late])
    assert read == [10, 0, 3, 13]
    assert not torch.allclose(o_BND, live.answer(["a"], [history_of(states, first, 13)])[0])


def test_a_request_brings_its_own_conditions(query, states):
    data = query.data
    live, user = LiveLum(query, states[0]), 3
    number = min(10, int(np.diff(data.user_offsets)[user]))
    history = history_of(states, int(data.user_offsets[user]), number)
    asked = [{"feedback": "dislike"}]
    for _ in range(2):  # read, and kept
        o_BND, _ = live.answer(["u"], [history], asked)
        windows = Windows(torch.tensor([data.user_offsets[user]]), torch.tensor([number]), torch.tensor([user]))
        torch.testing.assert_close(o_BND, query.ask(windows, asked), atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="did you mean 'like'"):
        live.answer(["u"], [history], [{"feedback": "lik"}])


def test_states_that_hold_too_little_are_refused(query, states):
    layout = states[0]
    with pytest.raises(UserError, match="keeps 14 events of a user, and the LUM reads 15"):
        LiveLum(query, dataclasses.replace(layout, keep=14))
    events = {name: is_list for name, is_list in layout.events.items() if name != "feedback"}
    with pytest.raises(UserError, match="the LUM reads feedback of events"):
        LiveLum(query, dataclasses.replace(layout, events=events))
