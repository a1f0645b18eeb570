"""A forgotten user is in no byte of the store, and no later build or refresh asks about them again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from shop_log import SHOP_USERS

from lumrec.data.prepared import PreparedData
from lumrec.query import forget as forgetting
from lumrec.query import stage
from lumrec.query.forget import FORGOTTEN, forget
from lumrec.query.records import user_digest
from lumrec.query.store import Knowledge, KnowledgeStore
from lumrec.query.writer import KnowledgeWriter
from lumrec.train.run import RunFolder


def files_with(folder: Path, words: bytes) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file() and words in file.read_bytes()]


def test_a_forgotten_user_is_gone_for_good(shop):
    words = ["run=kept", "query.dtype=int8"]
    stage.run(shop(*words, "inputs.prepared=monday"))
    runs = Path(shop().runs_dir)
    data = PreparedData.open(runs / "monday")
    before, rows_before = KnowledgeStore.open(runs / "kept"), Knowledge.open(runs / "kept", data)
    key, others = SHOP_USERS[5], [key for key in data.user_keys() if key != SHOP_USERS[5]]
    assert files_with(runs / "kept", key.encode()) and before.get([key]).present_BN.all()
    was, was_before = before.get(others), rows_before.for_rows(np.arange(data.num_events))
    del before, rows_before

    assert forget(runs, [key]) == {"kept": 1}
    assert files_with(runs / "kept", key.encode()) == []
    assert files_with(runs / "kept", SHOP_USERS[20].encode())
    store, rows = KnowledgeStore.open(runs / "kept"), Knowledge.open(runs / "kept", data)
    assert not store.get([key]).present_BN.any() and len(store) == len(others)
    for name in ("o_BND", "log_z_BN", "present_BN"):
        assert torch.equal(getattr(store.get(others), name), getattr(was, name)), name
    user = data.user_keys().index(key)
    theirs = torch.from_numpy(data.user == user)
    now = rows.for_rows(np.arange(data.num_events))
    assert not now.present_BN[theirs].any() and not now.o_BND[theirs].any() and not now.log_z_BN[theirs].any()
    assert not np.asarray(rows.o)[theirs.numpy()].any()
    for name in ("o_BND", "log_z_BN", "present_BN"):
        assert torch.equal(getattr(now, name)[~theirs], getattr(was_before, name)[~theirs]), name
    assert rows.manifest["counts"]["users"] == len(others) and rows.manifest["counts"]["users_absent"] == 1
    assert rows.manifest["counts"]["rows"] == int(now.present_BN[:, 0].sum())

    # The same stage again: what is published is what is wanted. A refresh, another run, one made anew: not asked.
    assert stage.run(shop(*words, "inputs.prepared=monday"))["users_asked"] == 41
    assert KnowledgeStore.open(runs / "kept").path == store.path
    shutil.rmtree(runs / "monday")
    shutil.copytree(runs / "tuesday", runs / "monday")
    refreshed = stage.run(shop(*words, "inputs.prepared=monday"))
    assert (refreshed["users_asked"], refreshed["users_taken_over"]) == (12, 28)
    stage.run(shop("run=other", "query.dtype=int8", "inputs.prepared=tuesday"))
    stage.run(shop(*words, "inputs.prepared=tuesday", "overwrite=true"))
    for name in ("kept", "other"):
        assert not KnowledgeStore.open(runs / name).get([key]).present_BN.any()
        assert files_with(runs / name, key.encode()) == []
    data = PreparedData.open(runs / "tuesday")
    theirs = data.user == data.user_keys().index(key)
    assert not Knowledge.open(runs / "other", data).for_rows(np.flatnonzero(theirs)).present_BN.any()
    assert forget(runs, []) == {"kept": 0, "other": 0}
    assert (runs / FORGOTTEN).read_text().split() == [user_digest(key)]


def test_what_was_killed_is_completed_and_leftovers_go(shop, monkeypatch):
    stage.run(shop("run=kept", "inputs.prepared=monday"))
    runs, key = Path(shop().runs_dir), SHOP_USERS[20]
    trash = runs / "kept" / ".trash-knowledge-0123-9"
    trash.mkdir()
    (trash / "data.mdb").write_text(key)
    (runs / "started" / "building").mkdir(parents=True)
    (runs / "started" / "building" / "identity.json").write_text("{}")
    (runs / "started" / "building" / "data.mdb").write_text(key)
    with monkeypatch.context() as patch:
        patch.setattr(KnowledgeWriter, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            forget(runs, [key])
    assert KnowledgeStore.open(runs / "kept").get([key]).present_BN.all()  # still in force, and noted
    assert forget(runs, []) == {"kept": 1, "started": 0}
    assert not files_with(runs / "kept", key.encode()) and not files_with(runs / "started", key.encode())


def test_a_store_in_use_is_named_and_the_user_noted_all_the_same(shop):
    stage.run(shop("run=kept", "inputs.prepared=monday"))
    runs = Path(shop().runs_dir)
    lock = RunFolder.locked(runs / "kept")
    # As if another process held it.
    (runs / "kept" / ".lock").write_text("1 someone else")
    with pytest.raises(ValueError, match="noted and will not be asked again.*being written by process 1"):
        forget(runs, ["20", SHOP_USERS[20]])
    lock.close()
    assert user_digest(SHOP_USERS[20]) in (runs / FORGOTTEN).read_text()
    forgetting.main([str(runs)])
    assert not KnowledgeStore.open(runs / "kept").get([SHOP_USERS[20]]).present_BN.any()
    assert json.loads((runs / "kept" / "manifest.json").read_text())["forgotten"] == [user_digest(SHOP_USERS[20])]


def test_an_unknown_folder_is_shop(tmp_path):
    with pytest.raises(FileNotFoundError, match="no runs folder"):
        forget(tmp_path / "nowhere", ["1"])
