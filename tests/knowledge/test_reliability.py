"""What goes wrong in production: damage, two writers, a full disk, a killed refresh. With the real store each time."""

import contextlib
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_store import KEYS, publish

from lumrec.data.prepared import PreparedData
from lumrec.knowledge.forget import forget
from lumrec.knowledge.parquet import export_parquet, import_parquet
from lumrec.knowledge.records import decode, encode
from lumrec.knowledge.store import Knowledge, KnowledgeStore
from lumrec.run.errors import UserError
from lumrec.run.files import sha256
from lumrec.stages.registry import STAGES

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"num_conditions": 2, "dim": 8}
LOCK = """
import fcntl, os, sys
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.truncate(0); lock.write(f"{os.getpid()} another"); lock.flush()
print("locked", flush=True)
sys.stdin.read()
"""

# Dies after the answers are taken over, when the first users are written but not yet marked as finished.
DIES = """
import os, signal, sys
from lumrec.experiments.config import load
from lumrec.knowledge import writer
from lumrec.stages.registry import STAGES
commit = writer.KnowledgeWriter.commit
def die_or_commit(self, unit):
    if unit.startswith("users/"):
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self, unit)
writer.KnowledgeWriter.commit = die_or_commit
STAGES["query"].run(load(sys.argv[1], sys.argv[2:]))
"""


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=1) | st.just([0.0]), max_size=9))
@example([[1.401298464324817e-45]])  # so small that a step of it is no number of its own
def test_int8_is_half_a_step_off_and_writing_it_again_changes_nothing(columns):
    x_XD = torch.tensor([[row[0], row[0] / 3, 1e-3 * row[0]] for row in columns]).view(len(columns), 3)
    values, scale = encode(x_XD, "int8")
    x = decode(values, scale)
    assert np.abs(x - x_XD.numpy()).max(initial=0) <= 0.501 * scale.max(initial=0) + 1e-38
    normal = scale > 1e-30
    again, scale_again = encode(torch.from_numpy(x), "int8")
    assert np.array_equal(again[normal], values[normal]) and np.array_equal(scale_again[normal], scale[normal])


@pytest.mark.parametrize("damage", ["flip", "cut", "lost", "no manifest", "half a manifest", "nothing"])
def test_a_server_gets_absent_where_the_store_cannot_be_read(tmp_path, damage, caplog):
    path = publish(tmp_path / "run")
    file = KnowledgeStore.open(path).path / "store" / "data.mdb"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "lost":
        file.unlink()
    elif damage == "no manifest":
        (path / "manifest.json").unlink()
    elif damage == "half a manifest":
        (path / "manifest.json").write_text((path / "manifest.json").read_text()[:50])
    store = KnowledgeStore.open_or_absent(path, **SHAPE)
    got = store.get(KEYS)
    if damage == "nothing":
        assert store.absent_because == "" and got.present_BN.all() and not caplog.text
        return
    assert got.o_BND.shape == (len(KEYS), 2, 8) and got.log_z_BN.shape == got.present_BN.shape == (len(KEYS), 2)
    assert not got.present_BN.any() and not got.o_BND.any() and got.age_s_B.isnan().all() and len(store) == 0
    assert (file.name if damage in ("flip", "cut", "lost") else "manifest.json") in store.absent_because
    assert f"every user is absent: {store.absent_because}" in caplog.text
    with pytest.raises(ValueError, match="has no items"):
        store.items()
    with pytest.raises((ValueError, FileNotFoundError)):
        KnowledgeStore.open(path)


def test_a_store_of_another_shape_is_absent_for_a_server(tmp_path):
    store = KnowledgeStore.open_or_absent(publish(tmp_path / "run"), num_conditions=3, dim=8)
    assert "(2, 8, True), not (3, 8, True)" in store.absent_because and store.get(["1"]).o_BND.shape == (1, 3, 8)


def test_damaged_items_are_noticed(tmp_path):
    path = publish(tmp_path / "run")
    file = KnowledgeStore.open(path).path / "items_e.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="items_e.npy was changed or damaged"):
        KnowledgeStore.open(path)


def test_an_open_store_stays_on_its_version_items_included(tmp_path):
    path = publish(tmp_path / "run")
    one, two = KnowledgeStore.open(path), KnowledgeStore.open(path)
    items, e_KID = one.items()
    publish(path, seed=1)
    three = KnowledgeStore.open(path)
    assert torch.equal(one.get(KEYS).o_BND, two.get(KEYS).o_BND)
    assert not torch.equal(one.get(KEYS).o_BND, three.get(KEYS).o_BND) and not one.path.exists()
    for store in (one, two):
        assert store.items()[0] == items and torch.equal(store.items()[1], e_KID)
    assert not torch.equal(three.items()[1], e_KID)


def test_another_file_by_the_name_of_an_open_one_is_opened(tmp_path):
    """As after the run folder was removed and copied from elsewhere."""
    path, other = publish(tmp_path / "run"), publish(tmp_path / "other", seed=1)
    one = KnowledgeStore.open(path)
    shutil.rmtree(path)
    shutil.copytree(other, path)
    (path / KnowledgeStore.open(path).path.name).rename(one.path)
    again = KnowledgeStore(one.path, one.manifest)
    assert torch.equal(again.get(KEYS).o_BND, KnowledgeStore.open(other).get(KEYS).o_BND)
    assert not torch.equal(one.get(KEYS).o_BND, again.get(KEYS).o_BND)


class Answers(torch.utils.data.Dataset):
    """The first number of each user's answer, by a store that goes with it into the workers."""

    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(KEYS)

    def __getitem__(self, place):
        return self.store.get([KEYS[place]]).o_BND[0, 0, 0]


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_a_store_goes_into_the_workers_of_a_loader(tmp_path, start):
    store = KnowledgeStore.open(publish(tmp_path / "run"))
    loader = torch.utils.data.DataLoader(Answers(store), batch_size=2, num_workers=1, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), store.get(KEYS).o_BND[:, 0, 0])


def test_a_store_sent_to_another_process_is_of_the_same_version_or_told(tmp_path):
    path = publish(tmp_path / "run")
    store = KnowledgeStore.open(path)
    sent = pickle.dumps(store)
    assert torch.equal(pickle.loads(sent).items()[1], store.items()[1])
    absent = KnowledgeStore.open_or_absent(tmp_path / "nowhere", **SHAPE)
    assert pickle.loads(pickle.dumps(absent)).absent_because == absent.absent_because
    publish(path, seed=1)
    with pytest.raises(UserError, match="was replaced by a newer one before another process could open it"):
        pickle.loads(sent)


@pytest.mark.parametrize(
    ("keys", "message"),
    [([1], r"got 1 \(int\): pass '1'"), ("12", r"the single key '12'"), ([None], "None")],
)
def test_keys_that_are_no_text_are_refused(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        KnowledgeStore.open(publish(tmp_path / "run")).get(keys)


@contextlib.contextmanager
def another_process_writes(path: Path) -> Iterator[int]:
    other = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "locked\n"
        yield other.pid
    finally:
        other.communicate()


def test_two_writers_are_refused(shop):
    config = shop("inputs.prepared=monday")
    STAGES["query"].run(config)
    runs = Path(config.runs_dir)
    path = runs / "shop-query"
    export_parquet(path, runs / "out")
    with another_process_writes(path) as pid:
        refused = rf"shop-query is being written by process {pid}"
        with pytest.raises(ValueError, match=refused):
            STAGES["query"].run(shop("inputs.prepared=tuesday"))
        with pytest.raises(ValueError, match=refused):
            forget(runs, ["1"])
        assert KnowledgeStore.open(path).get(["1"]).present_BN.all()
    import_parquet(runs / "out", runs / "imported")
    with another_process_writes(runs / "imported") as pid:
        with pytest.raises(ValueError, match=rf"imported is being written by process {pid}"):
            import_parquet(runs / "out", runs / "imported")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 3 MiB; the test may make it larger by mounting it again."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs the rights of root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("what", ["keys", "items"])
def test_a_full_disk_is_told_and_the_old_version_serves(small_disk, tmp_path, what):
    large = {what: [str(number) for number in range(120_000 if what == "items" else 20_000)]}
    export_parquet(publish(tmp_path / "small"), tmp_path / "small-out")
    export_parquet(publish(tmp_path / "large", seed=1, **large), tmp_path / "large-out")
    path = small_disk / "run"
    import_parquet(tmp_path / "small-out", path)
    served = KnowledgeStore.open(path).get(KEYS).o_BND
    with pytest.raises(ValueError, match=r"no space left for the knowledge in .*MiB free.*Free some space"):
        import_parquet(tmp_path / "large-out", path)
    assert torch.equal(KnowledgeStore.open(path).get(KEYS).o_BND, served)
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    import_parquet(tmp_path / "large-out", path)
    keys, items = large.get("keys", KEYS), large.get("items", ["a", "b", "c"])
    store = KnowledgeStore.open(path)
    assert store.get(keys).present_BN.all() and store.items()[0] == items
    assert torch.equal(store.get(keys).o_BND, KnowledgeStore.open(tmp_path / "large").get(keys).o_BND)


def test_a_killed_refresh_goes_on_and_gives_the_same(shop, forks):
    config = shop("run=kept", "inputs.prepared=monday")
    runs = Path(config.runs_dir)
    STAGES["query"].run(config)
    shutil.copytree(runs / "kept", runs / "killed")
    shutil.rmtree(runs / "monday")
    shutil.copytree(runs / "tuesday", runs / "monday")
    words = f"runs_dir={runs}", "run=killed", "inputs.prepared=monday"
    (script := runs / "dies.py").write_text(DIES)
    killed = forks.start_script(script, str(runs / "kept" / "config.yaml"), *words)
    assert killed.wait() == [-signal.SIGKILL], killed.text()
    assert len(KnowledgeStore.open(runs / "killed")) == 41  # the old version is in force
    finished = (runs / "killed" / "building" / "progress-0").read_text().split()
    assert finished[0] == "items/0" and len(finished) > 1
    assert STAGES["query"].run(shop("run=killed", "inputs.prepared=monday"))["users_asked"] == 13
    STAGES["query"].run(config)
    data = PreparedData.open(runs / "tuesday")
    for name in ("rows_o.npy", "rows_log_z.npy", "rows_present.npy", "items_e.npy", "users.npy"):
        files = [Knowledge.open(runs / run, data).path / name for run in ("kept", "killed")]
        assert sha256(files[0]) == sha256(files[1]), name
    one, two = (KnowledgeStore.open(runs / run).get(data.user_keys()) for run in ("kept", "killed"))
    assert torch.equal(one.o_BND, two.o_BND) and torch.equal(one.log_z_BN, two.log_z_BN)
