"""The command that builds the state of users from a ranker's log."""

from pathlib import Path

import numpy as np
import pytest
from tiny_knowledge import make_knowledge

from lumrec.data.forgotten import FORGOTTEN
from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import load
from lumrec.features.history import SECOND
from lumrec.knowledge.records import user_digest
from lumrec.run.errors import MissingFileError, UserError
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
