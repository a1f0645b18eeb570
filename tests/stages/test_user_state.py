"""The commands that build the state of users from a ranker's log, and answer their new events."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_requests import builders
from tiny_knowledge import make_knowledge

from lumrec.data.forgotten import FORGOTTEN
from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import load
from lumrec.features.history import SECOND
from lumrec.knowledge.records import user_digest
from lumrec.knowledge.store import KnowledgeStore
from lumrec.run.errors import MissingFileError, UserError
from lumrec.serving.requests import Event
from lumrec.serving.state import UserState
from lumrec.stages.registry import STAGES

RANK = ["rank.batch_size=256", "rank.train.epochs=1", "rank.hidden_dims=[8]", "rank.max_history=10"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A runs folder with prepared data, knowledge, and a ranker that reads it: tiny-rank."""
    words = make_knowledge(tmp_path_factory.mktemp("state"), *RANK, "rank.knowledge=both")
    STAGES["rank"].run(load(None, words))
    return words


def run(words, *more):
    return STAGES["user_state"].run(load(None, [*words, *more]))


def test_the_state_is_that_of_the_log(words):
    result = run(words)
    runs = Path(load(None, words).runs_dir)
    data, state = PreparedData.open(runs / "tiny-prepare"), UserState.open(runs / "tiny-rank-user_state")
    assert result["users"] == len(state) == data.num_users
    assert result["keep"] == state.layout.keep == 50  # of the statistics; the LUM sees 15, the ranker 10
    assert result["last_event_at"] == data.timestamp.max()
    assert state.identity["vocabulary_fingerprint"] == data.vocabulary_fingerprint
    for user, history in enumerate(state.get(data.user_keys())):
        rows = np.arange(*data.user_offsets[user : user + 2])[-50:]
        assert history.events.item.tolist() == data.item[rows].tolist()
        assert (history.events.time // SECOND).tolist() == data.timestamp[rows].tolist()
        assert history.count + len(history.events) == np.diff(data.user_offsets)[user]
    assert run(words) == result  # it is kept, as it may hold newer events
    assert run(words, "overwrite=true")["version"] != result["version"]


def test_a_redis_is_filled_and_forgotten_users_are_left_out(words, redis_server):
    runs, place = Path(load(None, words).runs_dir), redis_server.place("tiny")
    gone = PreparedData.open(runs / "tiny-prepare").user_keys()[3]
    (runs / FORGOTTEN).write_text(user_digest(gone) + "\n")
    result = run(words, f"user_state.place={place}", "user_state.keep=70", "overwrite=true")
    (runs / FORGOTTEN).unlink()
    state = UserState.open(place)
    assert result["users"] == 59 and state.get([gone]) == [None] and state.layout.keep == 70
    assert result["place"] == place


def test_what_cannot_be_built_is_said_first(words, tmp_path):
    with pytest.raises(UserError, match="20 events of a user are to be kept, and this ranker reads 50"):
        run(words, "user_state.keep=20", "overwrite=true")
    with pytest.raises(UserError, match="user_state.place: got 'nowhere', expected a Redis"):
        run(words, "user_state.place=nowhere")
    with pytest.raises(MissingFileError, match="no finished ranker in .*tiny-rank"):
        run(words, f"runs_dir={tmp_path}")


LUMS = "inputs.lums=[tiny-pretrain-0of2, tiny-pretrain-1of2]"


def appended(words, number: int) -> list[str]:
    """Appends an event to the state for each of three users; their keys."""
    runs = Path(load(None, words).runs_dir)
    data = PreparedData.open(runs / "tiny-prepare")
    state = UserState.open(runs / "tiny-rank-user_state", builders(data, "none", 5, [])[1])
    keys, last = data.user_keys()[:3], int(data.timestamp.max())
    events = [Event(key, data.item_keys()[7], last + number, 1.0, {"scenario": "home"}) for key in keys]
    assert state.append(events).new == 3
    return keys


def test_refresh_answers_whoever_has_new_events_and_follow_goes_on_until_it_is_stopped(words):
    run(words, "overwrite=true")
    store, keys = Path(load(None, words).runs_dir) / "tiny-query", appended(words, 1)
    before = KnowledgeStore.open(store).get(keys).o_BND
    result = STAGES["refresh"].run(load(None, [*words, LUMS]))
    assert result["users"] == 3 and 0 < result["p50_s"] <= result["most_s"]
    after = KnowledgeStore.open(store).get(keys).o_BND
    assert not torch.equal(after, before)
    assert STAGES["refresh"].run(load(None, [*words, LUMS]))["users"] == 0

    def new_events_and_then_sigterm() -> None:
        appended(words, 2)
        deadline = time.monotonic() + 120
        while (KnowledgeStore.open(store, verify=False).get(keys).o_BND == after).flatten(1).all(1).any():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    handler, thread = signal.getsignal(signal.SIGTERM), threading.Thread(target=new_events_and_then_sigterm)
    thread.start()
    result = STAGES["refresh"].run(load(None, [*words, LUMS, "refresh.follow=true", "refresh.idle_s=0.05"]))
    thread.join()
    assert result["users"] == 3 and signal.getsignal(signal.SIGTERM) is handler


def test_a_refresh_of_what_does_not_belong_together_is_refused(words, tmp_path):
    with pytest.raises(MissingFileError, match="there is no user state in .*nowhere"):
        STAGES["refresh"].run(load(None, [*words, LUMS, "refresh.state=nowhere"]))
    runs = Path(load(None, words).runs_dir)
    shutil.copytree(runs / "tiny-rank-user_state", tmp_path / "state")
    (tmp_path / "state" / "state.json").write_text(
        (tmp_path / "state" / "state.json").read_text().replace('"data_fingerprint": "', '"data_fingerprint": "0')
    )
    with pytest.raises(UserError, match="was built from other data than"):
        STAGES["refresh"].run(load(None, [*words, LUMS, f"refresh.state={tmp_path / 'state'}"]))
    with pytest.raises(UserError, match="refresh.store: got 'tiny-query', expected a Redis"):
        load(None, [*words, LUMS, "refresh.store=tiny-query"])
        STAGES["refresh"].run(load(None, [*words, LUMS, "refresh.store=tiny-query"]))
