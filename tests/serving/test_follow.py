"""Fresh knowledge: after new events a store answers as `lumrec query` for the longer log, and readers find it."""

import hashlib
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from drawn_requests import builders
from shop_log import SHOP_USERS, shop_log
from small_experiments import LOG_WORDS

from lumrec.data.prepared import PreparedData
from lumrec.data.splits import user_fold
from lumrec.experiments.config import load
from lumrec.features.history import histories_of
from lumrec.knowledge.redis_load import load as load_into_redis
from lumrec.knowledge.store import Knowledge, KnowledgeStore
from lumrec.models.lum import load_lum
from lumrec.query.group_query import GroupQuery
from lumrec.run.errors import UserError
from lumrec.serving.follow import Follower, spread
from lumrec.serving.live_lum import LiveLum
from lumrec.serving.requests import Event
from lumrec.serving.state import Appended, UserState, build
from lumrec.stages.registry import STAGES

NEW = [*SHOP_USERS[:10], "new", "13"]  # users with events on Tuesday; 13's came late
LUMS = "inputs.lums=[shop-pretrain-0of2, shop-pretrain-1of2]"


@pytest.fixture(scope="module")
def runs(trained_shop, tmp_path_factory) -> Path:
    """Two cross-fitted LUMs of Monday, and their answers on Monday and on Tuesday."""
    runs = tmp_path_factory.mktemp("follow") / "runs"
    shutil.copytree(trained_shop, runs)
    for fold in ("0/2", "1/2"):
        STAGES["pretrain"].run(config(runs, "inputs.prepared=monday", f"fold={fold}"))
    for day in ("monday", "tuesday"):
        STAGES["query"].run(config(runs, f"inputs.prepared={day}", f"run=of-{day}", LUMS, "query.dtype=float32"))
    return runs


def config(runs, *words):
    return load(None, [*LOG_WORDS, f"runs_dir={runs}", *words])


class Served(NamedTuple):
    """Monday's state and knowledge, with a follower; events: of Tuesday's log."""

    state: UserState
    place: str | Path
    follower: Follower
    events: list[Event]

    def reader(self) -> KnowledgeStore:
        return KnowledgeStore.open(self.place)


@pytest.fixture(params=["lmdb", "redis"])
def served(request, runs, tmp_path) -> Served:
    shutil.copytree(runs / "of-monday", tmp_path / "knowledge")
    place, state_place = tmp_path / "knowledge", tmp_path / "state"
    if request.param == "redis":
        place = request.getfixturevalue("redis_server").place(uuid.uuid4().hex)
        load_into_redis(tmp_path / "knowledge", place)
        state_place = place
    data = PreparedData.open(runs / "monday")
    _, builder = builders(data, "user", 5, [])
    layout = builder.spec.layout(keep=50)
    build(state_place, {}, layout, zip(data.user_keys(), histories_of(data, layout, builder.known(layout))))
    manifest = KnowledgeStore.open(place).manifest
    lums = []
    for lum in manifest["lums"]:
        dmp, packs, _ = load_lum(runs / lum["run"], data, device="cpu")
        query = GroupQuery(dmp, packs, manifest["conditions"], **manifest["window"])
        lums.append(LiveLum(query, layout))
    state = UserState.open(state_place, builder)
    log = shop_log(tuesday=True).filter(pl.col("user_id") != "12")  # whose event was corrected, which is no new event
    rows = log.with_columns(pl.col("clicked").cast(pl.Int64)).rows(named=True)
    events = [Event(row["user_id"], row["item_id"], row["timestamp"], row["clicked"]) for row in rows]
    return Served(state, place, Follower(state, place, lums, manifest["lums"], users_at_once=5), events)


def test_after_new_events_the_answers_are_those_of_the_longer_log(served, runs, tmp_path, capsys):
    before, published = served.reader().get([*SHOP_USERS, *NEW]), digest(runs / "of-monday")
    assert served.follower.drain() == (0, [])  # nobody is behind
    assert served.state.append(served.events) == Appended(new=13, known=len(served.events) - 13)
    answered = served.follower.drain()
    assert answered.users == len(NEW) == len(answered.seconds)
    with capsys.disabled():
        print(f"\nseconds from event to answer: {spread(answered.seconds)}")
    got, expected = served.reader().get(NEW), KnowledgeStore.open(runs / "of-tuesday").get(NEW)
    torch.testing.assert_close(got.o_BND, expected.o_BND, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.log_z_BN, expected.log_z_BN, atol=1e-5, rtol=0)
    assert got.fold_B.tolist() == expected.fold_B.tolist() == user_fold(NEW, 2).tolist()
    assert bool(got.present_BN.all()) and bool((got.age_s_B < 60).all())
    assert not torch.equal(got.o_BND, before.o_BND[-len(NEW) :])
    others = SHOP_USERS[14:]
    assert torch.equal(served.reader().get(others).o_BND, before.o_BND[14:40])
    assert served.state.append(served.events).new == 0 and served.follower.drain() == (0, [])
    # What was published, and what rankers train on, is as it was.
    assert digest(tmp_path / "knowledge", beside="fresh-*") == published
    data = PreparedData.open(runs / "monday")
    rows = np.arange(data.num_events)
    old, new = (
        Knowledge.open(path, data).for_rows(rows).o_BND for path in (runs / "of-monday", tmp_path / "knowledge")
    )
    assert torch.equal(old, new)


def digest(path: Path, beside: str = "") -> str:
    """Of every file of a published run, without those that match `beside`."""
    left_out = {file for folder in path.glob(beside) for file in folder.rglob("*")} if beside else set()
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file not in left_out]
    return hashlib.sha256(b"".join(str(f.relative_to(path)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_a_next_version_gets_its_fresh_answers_by_itself(served, runs, tmp_path):
    served.state.append(served.events)
    served.follower.drain()
    fresh = served.reader().get(NEW).o_BND
    words = ["inputs.prepared=monday", "run=again", LUMS, "query.dtype=float32", "query.stride=3", "overwrite=true"]
    shutil.rmtree(runs / "again", ignore_errors=True)
    shutil.move(tmp_path / "knowledge", runs / "again")
    STAGES["query"].run(config(runs, *words))
    assert not list((runs / "again").glob("fresh-*"))
    shutil.move(runs / "again", tmp_path / "knowledge")
    if isinstance(served.place, str):
        load_into_redis(tmp_path / "knowledge", served.place)
    assert not torch.equal(served.reader().get(NEW).o_BND, fresh)
    assert served.follower.drain().users == len(NEW)
    torch.testing.assert_close(served.reader().get(NEW).o_BND, fresh, atol=1e-6, rtol=0)


def test_a_forgotten_user_is_not_answered(served):
    served.state.append(served.events)
    served.state.forget(["3", "new"])
    assert served.follower.drain().users == len(NEW) - 2
    assert not served.reader().get(["new"]).present_BN.any()


def test_a_follower_of_other_lums_is_refused(served):
    follower = served.follower
    other = [{**lum, "fingerprint": "x"} for lum in follower.lum_identity]
    with pytest.raises(UserError, match="made by the LUMs .*or their weights have changed"):
        Follower(served.state, served.place, follower.lums, other)


def test_beside_requests_a_reader_finds_the_new_answer_in_seconds(served, capsys, monkeypatch):
    """A thread follows; the reader asks all the while and is never held up for long."""
    monkeypatch.setattr("lumrec.knowledge.answers.LOOK_AGAIN_S", 0.05)
    stop, reader, waits, seconds = threading.Event(), served.reader(), [], []
    thread = threading.Thread(target=served.follower.run, args=(stop,), kwargs={"idle_s": 0.01})
    thread.start()
    for number in range(5):
        before = reader.get(["20"]).o_BND
        event = Event(SHOP_USERS[20], str(number), 1_700_900_000 + number, number % 2)
        key = [event.user]
        before = reader.get(key).o_BND
        appended = time.perf_counter()
        served.state.append([event])
        while torch.equal(reader.get(key).o_BND, before):
            asked = time.perf_counter()
            reader.get(SHOP_USERS)
            waits.append(time.perf_counter() - asked)
            assert time.perf_counter() - appended < 120
        seconds.append(time.perf_counter() - appended)
    stop.set()
    thread.join()
    with capsys.disabled():
        print(f"\nseconds until a reader sees the answer: {spread(seconds)}; look-ups beside it: {spread(waits)}")


def test_a_redis_that_dies_is_waited_for(runs, served, redis_server, monkeypatch, tmp_path):
    if not isinstance(served.place, str):
        pytest.skip("LMDB has no server that could die")
    monkeypatch.setattr("lumrec.serving.follow.WAIT_S", 0.1)
    stop, done = threading.Event(), []
    thread = threading.Thread(target=lambda: done.append(served.follower.run(stop, idle_s=0.01)))
    thread.start()
    redis_server.kill()
    time.sleep(0.3)
    redis_server.start()  # empty
    load_into_redis(tmp_path / "knowledge", served.place)
    data = PreparedData.open(runs / "monday")
    known = served.state.builder.known(served.state.layout)
    build(served.place, {}, served.state.layout, zip(data.user_keys(), histories_of(data, served.state.layout, known)))
    UserState.open(served.place, served.state.builder).append(served.events)
    deadline = time.monotonic() + 120
    while not served.reader().get(["new"]).present_BN.all():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stop.set()
    thread.join()
    assert done[0].users == len(NEW)
