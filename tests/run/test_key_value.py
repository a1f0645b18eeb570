"""One contract for the key-value stores: LMDB and a real Redis, changed by many processes and killed between writes."""

import os
import signal
import threading
import uuid
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.run.errors import MissingFileError, UserError
from lumrec.run.key_value import Changes, KeyValue, LmdbKeyValue, Moved, RedisKeyValue, Unavailable, redis_place

KEYS = [b"a", b"b*[?", b"\x00\xff", b"x" * 500]


@pytest.fixture(params=["lmdb", "redis"])
def store(request, tmp_path) -> KeyValue:
    if request.param == "lmdb":
        return LmdbKeyValue(tmp_path / "store")
    return RedisKeyValue(request.getfixturevalue("redis_server").place(uuid.uuid4().hex), prefix="v1:")


def test_values_counters_and_marks(store):
    assert store.get(KEYS) == [None] * 4 and store.get([]) == [] and len(store) == 0
    store.put([(key, key * 2) for key in KEYS])
    changes = Changes(put={b"new": b""}, delete=[b"a"], add={b"i": (2, 1.5), b"j": (1, 0.0)}, mark={b"a": b"1"})
    seen = []
    store.update([b"a", b"none"], lambda values: seen.append(values) or changes)
    assert seen == [[b"aa", None]]
    assert store.get([b"a", b"new", *KEYS[1:]]) == [None, b"", *(key * 2 for key in KEYS[1:])]
    store.update([], lambda values: Changes(add={b"i": (1, -0.25)}))
    numbers, sums = store.counters([b"i", b"nothing", b"j"])
    assert numbers.tolist() == [3, 0, 1] and sums.tolist() == [1.25, 0.0, 0.0]
    assert len(store) == 4
    assert dict(pair for block in store.scan() for pair in block) == {b"new": b""} | {key: key * 2 for key in KEYS[1:]}


def test_a_mark_that_was_set_again_stays(store):
    store.update([], lambda values: Changes(mark={b"a": b"1", b"b": b"1", b"c": b"1"}))
    assert len(store.marked(2)) == 2
    seen = store.marked(10)
    store.update([], lambda values: Changes(mark={b"b": b"2"}))
    store.unmark(seen)
    assert store.marked(10) == {b"b": b"2"}
    store.update([], lambda values: Changes(delete=[b"b"]))
    assert store.marked(10) == {}


@given(st.lists(st.binary(min_size=1, max_size=4), max_size=30, unique=True))
@settings(max_examples=10)
def test_a_scan_gives_each_key_once(tmp_path_factory, keys):
    store = LmdbKeyValue(tmp_path_factory.mktemp("scan"))
    store.put([(key, b"v") for key in keys])
    assert sorted(key for block in store.scan() for key, _ in block) == sorted(keys)


def test_a_store_that_was_moved_has_no_byte_of_what_was_left_out(tmp_path):
    store = LmdbKeyValue(tmp_path / "old")
    pairs = [
        (b"secret-%d" % n if n % 3 else b"kept-%d" % n, b"secret" * (n % 200) if n % 3 else b"v") for n in range(999)
    ]
    store.put(pairs)
    store.update([], lambda values: Changes(mark={b"secret-1": b"1", b"kept-0": b"1"}, add={b"i": (2, 1.0)}))
    published = []
    reader = LmdbKeyValue(tmp_path / "old")
    other = store.move_to(
        tmp_path / "new",
        lambda keys: np.array([key.startswith(b"secret") for key in keys]),
        lambda: published.append(True),
    )
    assert published and b"secret" not in (tmp_path / "new" / "data.mdb").read_bytes()
    assert dict(pair for block in other.scan() for pair in block) == {key: v for key, v in pairs if v == b"v"}
    assert other.counters([b"i"])[0].tolist() == [2] and other.marked(9) == {b"kept-0": b"1"}
    assert reader.get([b"secret-1", b"kept-0"]) == [None, b"v"]
    with pytest.raises(Moved, match="written again in another folder"):
        reader.update([], lambda values: Changes(put={b"a": b""}))


def test_two_writers_of_one_key_lose_nothing(store):
    """Each adds to a number that it has read: an update that is not one transaction would lose some."""

    def add() -> None:
        for _ in range(50):
            store.update([b"n"], lambda values: Changes(put={b"n": b"%d" % (int(values[0] or 0) + 1)}))

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get([b"n"]) == [b"150"]


def test_a_kill_within_an_update_leaves_all_or_nothing(store, tmp_path):
    """The children die before they write, between two writes, and after the last one, in turn."""
    place = store.path if isinstance(store, LmdbKeyValue) else store.place
    for dies in ("before", "between", "after") * 2:
        if os.fork() == 0:
            try:  # its own connection: neither LMDB nor a socket may be used across a fork
                child = RedisKeyValue(place, prefix="v1:") if isinstance(place, str) else LmdbKeyValue(tmp_path / "of")
                child.update([b"n"], partial(_one_more, dies))
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        _, status = os.wait()
        assert os.WTERMSIG(status) == signal.SIGKILL
    after = store if isinstance(store, RedisKeyValue) else LmdbKeyValue(tmp_path / "of")
    assert after.get([b"n", b"m"]) == [b"2", b"2"] and after.counters([b"c"])[0].tolist() == [2]


class _Deadly(dict):
    def items(self):
        yield from list(super().items())[:1]
        os.kill(os.getpid(), signal.SIGKILL)


def _one_more(dies: str, values: list[bytes | None]) -> Changes:
    if dies == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    value = b"%d" % (int(values[0] or 0) + 1)
    put = {b"n": value, b"m": value}
    return Changes(put=_Deadly(put) if dies == "between" else put, add={b"c": (1, 1.0)})


def test_a_store_that_is_not_there_is_one_error(tmp_path, redis_server):
    with pytest.raises(MissingFileError, match="data.mdb"):
        LmdbKeyValue(tmp_path / "none", create=False)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "data.mdb").write_bytes(b"no LMDB" * 1000)
    with pytest.raises(Unavailable, match="bad cannot be read"):
        LmdbKeyValue(tmp_path / "bad")
    gone = RedisKeyValue("redis://:secret@127.0.0.1:1/0#shop")
    with pytest.raises(Unavailable, match=r"redis://:\*\*\*@127.0.0.1:1/0#shop does not answer"):
        gone.get([b"a"])


@pytest.mark.parametrize("place", ["redis://localhost:6379/0", "redis://localhost/0#a b", "redis://localhost:x/0#a"])
def test_a_place_in_redis_that_cannot_be(place):
    pytest.importorskip("redis")
    with pytest.raises(UserError, match="names no store|is no URL"):
        redis_place(place, timeout_s=1.0)
