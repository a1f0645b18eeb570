"""One contract for the readers of a knowledge store: from its folder (LMDB), and from a real Redis."""

import pickle
import signal
import time
import uuid

import pytest
import torch
from small_store import ITEMS, KEYS, publish

from lumrec.knowledge.answers import version_in_force
from lumrec.knowledge.forget import forget
from lumrec.knowledge.records import bytes_to_records, records_to_bytes, user_key_bytes
from lumrec.knowledge.redis_load import load
from lumrec.knowledge.store import KnowledgeStore
from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.key_value import RedisKeyValue, Unavailable


@pytest.fixture(params=["lmdb", "redis"])
def published(request, tmp_path):
    """Publishes a store, or its next version; gives where it is read."""
    place = tmp_path / "run"
    if request.param == "redis":
        place = request.getfixturevalue("redis_server").place(uuid.uuid4().hex)

    def make(**options):
        publish(tmp_path / "run", **options)
        if isinstance(place, str):
            load(tmp_path / "run", place)
        return place

    return make


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_was_published_is_read(published, tmp_path, dtype):
    store, plain = KnowledgeStore.open(published(dtype=dtype)), KnowledgeStore.open(tmp_path / "run")
    asked = [*KEYS[::-1], "nobody"]
    got, expected = store.get(asked), plain.get(asked)
    assert torch.equal(got.o_BND, expected.o_BND) and torch.equal(got.log_z_BN, expected.log_z_BN)
    assert got.present_BN[:, 0].tolist() == [True] * len(KEYS) + [False] and torch.equal(got.fold_B, expected.fold_B)
    assert store.items()[0] == ITEMS and torch.equal(store.items()[1], plain.items()[1])
    assert store.batch(["1", "1"], ["b", "?"]).present_BN[:, 0].tolist() == [True, False]
    assert len(store) == len(KEYS) and store.get([]).o_BND.shape == (0, 2, 8)
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.get(KEYS).o_BND, store.get(KEYS).o_BND) and again.items()[0] == ITEMS


def test_an_open_reader_stays_on_its_version(published):
    before = KnowledgeStore.open(published(seed=0))
    old = before.get(KEYS).o_BND
    after = KnowledgeStore.open(published(seed=1))
    assert not torch.equal(after.get(KEYS).o_BND, old)
    assert torch.equal(before.get(KEYS).o_BND, old)
    with pytest.raises(MissingFileError, match="was replaced"):
        pickle.loads(pickle.dumps(before))


def fresh_record(store, key, value):
    """The record of a user with other numbers, asked ten seconds ago."""
    record = bytes_to_records(store.answers.get([user_key_bytes("1")]), store._record).copy()
    record["o"], record["asked_at"] = value, int(time.time()) - 10
    return user_key_bytes(key), records_to_bytes(record)[0]


def test_fresh_answers_lie_over_the_published_ones_and_go_with_their_version(published, monkeypatch):
    monkeypatch.setattr("lumrec.knowledge.answers.LOOK_AGAIN_S", 0.0)
    place = published(seed=0)
    reader, writer = KnowledgeStore.open(place), KnowledgeStore.open(place)
    old = reader.get(KEYS)
    writer.answers.put_fresh([fresh_record(writer, "2", 2.0), fresh_record(writer, "new", 3.0)])
    got = reader.get([*KEYS, "new"])
    assert got.o_BND[:, 0, 0].tolist() == [*old.o_BND[:4, 0, 0].tolist(), 2.0, old.o_BND[5, 0, 0], 3.0]
    assert bool(got.present_BN.all()) and 10 <= float(got.age_s_B[4]) < 130 and len(reader) == len(KEYS)
    after = KnowledgeStore.open(published(seed=1))
    assert after.get(["new"]).present_BN.any().item() is False and float(after.get(["2"]).o_BND[0, 0, 0]) != 2.0


def test_a_forgotten_user_is_in_no_fresh_answer_either(published, tmp_path, monkeypatch):
    monkeypatch.setattr("lumrec.knowledge.answers.LOOK_AGAIN_S", 0.0)
    place, keys = published(), ["a-user-of-the-store", "a-user-with-only-a-fresh-answer"]
    place = published(keys=[*KEYS, keys[0]])
    store = KnowledgeStore.open(place)
    store.answers.put_fresh([fresh_record(store, key, 2.0) for key in (*keys, "2")])
    redis = [place] if isinstance(place, str) else []
    removed = forget(tmp_path, keys, redis=redis)
    assert removed == {"run": 1, place: 2} if redis else {"run": 2}
    after = KnowledgeStore.open(place)
    assert after.get([*keys, "1"]).present_BN[:, 0].tolist() == [False, False, True]
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(key.encode() in content for key in keys for content in files)


def test_a_redis_that_is_gone_is_absent_knowledge_and_comes_back(redis_server, tmp_path):
    place = redis_server.place("gone")
    load(publish(tmp_path / "run"), place)
    store = KnowledgeStore.open(place)
    assert store.get_or_absent(["1"])[1] == "" and store.get_or_absent(["1"])[0].present_BN.all()
    redis_server.kill()
    with pytest.raises(Unavailable, match="does not answer"):
        store.get(["1"])
    for _ in range(3):
        knowledge, why = store.get_or_absent(["1", "2"])
        assert "does not answer" in why and not knowledge.present_BN.any() and knowledge.o_BND.shape == (2, 2, 8)
    absent = KnowledgeStore.open_or_absent(place, num_conditions=2, dim=8)
    assert "does not answer" in absent.absent_because and not absent.get(["1"]).present_BN.any()
    redis_server.start()
    assert store.get_or_absent(["1"])[1] == ""  # it answers again, and knows nobody
    load(tmp_path / "run", place)
    assert store.get_or_absent(["1"])[0].present_BN.all()


def test_a_redis_that_is_slow_is_not_asked_again_for_a_while(redis_server, tmp_path, monkeypatch):
    monkeypatch.setattr("lumrec.run.key_value.DOWN_S", 3600.0)
    place = redis_server.place("slow")
    load(publish(tmp_path / "run"), place)
    store = KnowledgeStore.open(place, timeout_s=77.0)
    pool = store.answers._store.client.connection_pool
    assert pool.connection_kwargs["socket_timeout"] == 77.0
    pool.reset()  # the connections that there are keep their timeout
    pool.connection_kwargs["socket_timeout"] = 0.05
    redis_server.process.send_signal(signal.SIGSTOP)
    assert "Timeout" in store.get_or_absent(["1"])[1]
    redis_server.process.send_signal(signal.SIGCONT)
    pool.connection_kwargs["socket_timeout"] = 120.0
    assert "Timeout" in store.get_or_absent(["1"])[1]  # it would answer, but is not asked
    store.answers._store._down_until = 0.0
    assert store.get_or_absent(["1"])[0].present_BN.all()


def test_damage_in_a_redis_is_noticed(redis_server, tmp_path):
    place = redis_server.place("damaged")
    load(publish(tmp_path / "run"), place)
    store = KnowledgeStore.open(place)
    raw = RedisKeyValue(place, prefix=f"{store.manifest['folder']}:")
    raw.put([(user_key_bytes("1"), b"short")])
    knowledge, why = store.get_or_absent(["1"])
    assert "has a value of 5 bytes" in why and not knowledge.present_BN.any()
    assert store.get_or_absent(["2"])[0].present_BN.all()  # only who reads the damaged record
    raw.put([(b"/items_e.npy/0", b"\x93NUMPY")])
    with pytest.raises(UserError, match="items_e.npy has 6 bytes, its manifest says"):
        KnowledgeStore.open(place)
    raw.client.hset("damaged:knowledge", "text", '{"folder": "../../etc"}')
    with pytest.raises(UserError, match="is no manifest of a knowledge store"):
        KnowledgeStore.open(place)


def test_a_load_that_was_killed_leaves_the_version_before(redis_server, tmp_path, monkeypatch):
    place = redis_server.place("killed")
    load(publish(tmp_path / "run", seed=0), place)
    store = KnowledgeStore.open(place)
    publish(tmp_path / "run", seed=1)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lumrec.knowledge.redis_load.piece_key", killed)
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path / "run", place)
    assert torch.equal(KnowledgeStore.open(place).get(KEYS).o_BND, store.get(KEYS).o_BND)
    load(tmp_path / "run", place)
    load(publish(tmp_path / "run", seed=2), place)
    client = RedisKeyValue(place).client
    assert {key.split(b":")[1] for key in client.keys("killed:knowledge-*:*")} == client.smembers(
        "killed:knowledge-versions"
    )
    assert len(client.smembers("killed:knowledge-versions")) == 2
    assert version_in_force(place) == version_in_force(tmp_path / "run") != ""
    assert version_in_force(redis_server.place("nothing")) == version_in_force(tmp_path) == ""
    with pytest.raises(MissingFileError, match="redis_load RUN_FOLDER URL"):
        KnowledgeStore.open(redis_server.place("nothing"))
