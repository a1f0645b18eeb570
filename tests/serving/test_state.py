"""The state of users in LMDB and in a real Redis: each event counts once, whatever is repeated, late or killed."""

import json
import os
import signal
import threading
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from drawn_requests import builders, live_events, rich_log

from lumrec.features.history import Layout, UserHistory, histories_of, log_events
from lumrec.knowledge.forget import forget
from lumrec.knowledge.records import user_digest
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.key_value import RedisKeyValue, Unavailable
from lumrec.serving.requests import Event, RequestBuilder
from lumrec.serving.state import Appended, UserState, build, read_identity

KEEP, DAY = 60, 86_400.0


class Case(NamedTuple):
    place: str | Path
    builder: RequestBuilder
    data: object
    events: list[Event]

    def open(self) -> UserState:
        return UserState.open(self.place, self.builder)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """200 events of 5 users, each at its own time."""
    random = np.random.default_rng(0)
    times = np.sort(random.choice(10**6, 200, replace=False))
    events = [
        (
            int(random.integers(1, 6)),
            int(random.integers(1, 10)),
            (int(at) + 86_400) * 10**6,
            None,
            float(random.integers(0, 2)),
        )
        for at in times
    ]
    return rich_log(events, "time", tmp_path_factory.mktemp("log"))


@pytest.fixture(params=["lmdb", "redis"])
def case(request, log, tmp_path) -> Case:
    """An empty state, and the events of the log with ids."""
    place = tmp_path / "state"
    if request.param == "redis":
        place = request.getfixturevalue("redis_server").place(uuid.uuid4().hex)
    _, builder = builders(log.data, "user", 5, [])
    events = live_events(log, np.arange(log.data.num_events))
    events = [event._replace(event_id=f"e{number}") for number, event in enumerate(events)]
    build(place, {}, builder.spec.layout(keep=KEEP), [])
    return Case(place, builder, log.data, events)


def contents(state: UserState, users) -> list:
    """All that is known of users, and of items."""
    found = state.get(users)
    counts = [x.tolist() for x in state.item_counts(np.arange(9))]
    return [history and history.to_bytes() for history in found] + counts


def test_events_that_are_repeated_late_and_out_of_order_count_once(case):
    state, users = case.open(), case.data.user_keys()
    assert state.append(case.events) == Appended(new=200)
    expected = contents(state, users)
    assert state.append(case.events[::-1]).new == 0
    assert contents(state, users) == expected
    build(case.place, {}, state.layout, [])
    other = case.open()
    order = np.random.default_rng(1).permutation(200)
    events = [case.events[i] for i in np.concatenate([order, order[:50]])]
    counted = Appended()
    for first in range(0, 250, 40):
        counted = counted.plus(other.append(events[first : first + 40]))
    assert counted == Appended(new=200, known=50)
    assert contents(other, users) == expected


def test_what_is_kept_is_bounded_and_older_events_are_late(case):
    state = UserState.open(case.place, case.builder)
    many = [Event("1", "1", DAY + second, 1.0, event_id=f"m{second}") for second in range(100)]
    assert state.append(many) == Appended(new=100)
    [history] = state.get(["1"])
    assert (len(history.events), history.count, history.label) == (KEEP, 40, 40)
    assert state.append(many) == Appended(known=60, late=40)
    assert state.append([Event("1", "1", DAY + 39.0, event_id="never seen")]) == Appended(late=1)
    assert state.append([Event("1", "1", DAY + 39.5, event_id="never seen")]) == Appended(new=1)


def test_events_without_an_id_are_known_by_their_content_also_those_of_the_log(case):
    layout = case.builder.spec.layout(keep=KEEP)
    histories = histories_of(case.data, layout, case.builder.known(layout))
    users = case.data.user_keys()
    assert build(case.place, {"data_fingerprint": "x"}, layout, zip(users, histories, strict=True)) == len(users)
    state = case.open()
    assert state.identity["data_fingerprint"] == "x" and state.identity["layout"] == json.loads(
        json.dumps(layout.to_json())
    )
    before = contents(state, users)
    for events in (case.events, [event._replace(event_id="") for event in case.events]):
        assert state.append(events) == Appended(known=200)
    assert contents(state, users) == before
    new = Event(users[0], case.events[0].item, DAY + 2e6)
    assert state.append([new, new]) == Appended(new=1, known=1) and state.append([new]) == Appended(known=1)


def test_an_unknown_user_and_item_are_taken_in(case):
    state = case.open()
    assert state.get(["who", "1"]) == [None, None]
    assert state.append([Event("who", "what", DAY + 1.0, event_id="a")]).new == 1
    assert state.get(["who"])[0].events.item.tolist() == [9]
    with pytest.raises(UserError, match="there is no feature 'colour'"):
        state.append([Event("who", "1", DAY + 1.0, features={"colour": "red"})])


def test_two_processes_append_to_the_same_users(case):
    """Each half of the events by its own thread and connection, some by both."""
    states = [case.open(), case.open()]

    def append(state, events) -> None:
        for first in range(0, len(events), 7):
            state.append(events[first : first + 7])

    threads = [
        threading.Thread(target=append, args=(state, case.events[part]))
        for state, part in zip(states, (slice(0, 120), slice(80, 200)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    histories = case.open().get(case.data.user_keys())
    assert sum(len(history.events) for history in histories) == 200
    assert sum(case.open().item_counts(np.arange(9))[0]) == 200


def test_kill_9_at_any_time_and_everything_again_is_as_if_nothing_had_happened(case):
    random = np.random.default_rng(2)
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try:  # its own store: neither LMDB nor a socket may be used across a fork
                state = case.open()
                while True:
                    for first in range(0, 200, 3):
                        state.append(case.events[first : first + 3])
            finally:
                os._exit(1)
        time.sleep(random.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    state = case.open()
    state.append(case.events)
    users = case.data.user_keys()
    got = contents(state, users)
    build(case.place, {}, state.layout, [])
    once = case.open()
    once.append(case.events)
    assert contents(once, users) == got


def test_a_forgotten_user_is_gone_and_stays_so(case):
    state = case.open()
    state.append(case.events)
    state.forget(["1"])
    assert state.get(["1", "2"])[0] is None and "1" not in state.unanswered(10).keys
    one = [event for event in case.events if event.user == "1"]
    assert state.append(one) == Appended(forgotten=len(one)) and state.get(["1"]) == [None]
    build(case.place, {}, state.layout, [], forgotten=[user_digest("2")])
    again = case.open()
    assert again.append(case.events[:50]).forgotten == sum(event.user == "2" for event in case.events[:50])


def test_the_forget_command_reaches_states_and_leaves_no_byte(case, tmp_path):
    """Also an event that comes afterwards. The user's key is long enough to be searched for."""
    key = "somebody-who-wants-to-be-forgotten"
    state = case.open()
    state.append([event._replace(user=key) if event.user == "1" else event for event in case.events])
    redis = [] if isinstance(case.place, Path) else [case.place]
    removed = forget(tmp_path, [key], redis=redis)
    assert removed == {str(case.place) if redis else "state": 1}
    assert state.get([key, "2"])[0] is None and state.get(["2"])[0] is not None
    assert state.append([Event(key, "1", DAY + 9e6)]) == Appended(forgotten=1)
    found = [file for file in tmp_path.rglob("*") if file.is_file() and key.encode() in file.read_bytes()]
    assert found == [] and forget(tmp_path, [], redis=redis) == dict.fromkeys(removed, 0)
    assert state.append([Event("2", "1", DAY + 9e6)]).new == 1


def test_users_with_new_events_are_noted_until_they_are_answered(case):
    state, start = case.open(), time.time()
    long = "x" * 400
    state.append([Event("1", "1", DAY + 1.0), Event(long, "1", DAY + 1.0), Event("2", "1", DAY + 1.0)])
    noted = state.unanswered(10)
    assert sorted(noted.keys) == ["1", "2", long] and min(noted.came_at) >= start and len(state.unanswered(1).keys) == 1
    state.append([Event("1", "1", DAY + 1.0)])  # known: nothing to answer
    state.append([Event("2", "1", DAY + 2.0)])
    state.answered(noted)
    assert state.unanswered(10).keys == ["2"]


def test_the_state_in_force_is_read_until_the_next_is_published(case, monkeypatch):
    state = case.open()
    state.append(case.events)
    before = contents(state, case.data.user_keys())

    def killed():
        yield "1", UserHistory.empty(state.layout)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(case.place, {}, state.layout, killed())
    assert read_identity(case.place)["version"] == state.identity["version"]
    assert contents(case.open(), case.data.user_keys()) == before
    build(case.place, {}, state.layout, [])
    assert read_identity(case.place)["version"] != state.identity["version"]
    assert case.open().get(["1"]) == [None] and contents(state, case.data.user_keys()) == before
    if isinstance(case.place, Path):
        assert len(list(case.place.glob("state-*"))) == 1


def test_what_cannot_be_opened_says_why(case, tmp_path, redis_server):
    for place in (tmp_path / "none", redis_server.place("none")):
        with pytest.raises(MissingFileError, match="lumrec user_state"):
            UserState.open(place)
    with pytest.raises(Unavailable, match="does not answer"):
        UserState.open("redis://127.0.0.1:1/0#shop")
    with pytest.raises(UserError, match="without the builder"):
        UserState.open(case.place).append(case.events)
    layout = {**case.open().layout.to_json(), "keep": 7}
    state = case.open()
    state.append(case.events)
    with pytest.raises(UserError, match="other features or settings"):
        UserState(state.store, {"layout": layout}).get(["1"])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "state.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="another version of lumrec"):
        UserState.open(tmp_path / "old")


def test_a_redis_that_was_killed_is_one_error_until_it_is_back(redis_server, log):
    place = redis_server.place("killed")
    _, builder = builders(log.data, "user", 5, [])
    build(place, {}, builder.spec.layout(keep=KEEP), [])
    state = UserState.open(place, builder)
    redis_server.kill()
    for call in (lambda: state.get(["1"]), lambda: state.append([Event("1", "1", DAY + 1.0)])):
        with pytest.raises(Unavailable, match="does not answer"):
            call()
    redis_server.start()
    assert state.append([Event("1", "1", DAY + 1.0)]).new == 1
    assert RedisKeyValue(place).client.ping()


def test_the_histories_of_a_log_are_those_of_its_events_appended_one_after_the_other(log):
    """Folded for all users at once; sums of excesses may round otherwise."""
    _, builder = builders(log.data, "all", 5, [])
    layout = Layout.of(log.data.schema, keep=7, has_clock=True, category="tags")
    known = builder.known(layout)
    rows = log_events(log.data, layout, known)
    for user, history in enumerate(histories_of(log.data, layout, known)):
        grown = UserHistory.empty(layout)
        for row in range(*log.data.user_offsets[user : user + 2]):
            grown.append(rows.take(slice(row, row + 1)), known)
        grown.users, grown.dense = history.users, history.dense  # which no event holds
        assert history.count == grown.count > 0
        for mine, theirs in zip(history.arrays(), grown.arrays(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)
