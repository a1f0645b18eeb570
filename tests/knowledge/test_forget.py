"""A forgotten user is in no byte of the store, and no later build or refresh asks about them again."""

import gzip
import html
import json
import re
import shutil
from pathlib import Path

import markupsafe
import numpy as np
import polars as pl
import pytest
import torch
from shop_log import SHOP_USERS
from small_store import publish

from lumrec.data.prepared import PreparedData
from lumrec.experiments.config import load
from lumrec.knowledge import forget as forgetting
from lumrec.knowledge.forget import FORGOTTEN, Incomplete, forget, read_keys_file
from lumrec.knowledge.records import user_digest
from lumrec.knowledge.store import Knowledge, KnowledgeStore
from lumrec.knowledge.writer import KnowledgeWriter
from lumrec.run.errors import UserError
from lumrec.run.folder import RunFolder
from lumrec.stages.registry import STAGES


def files_with(folder: Path, words: bytes) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file() and words in file.read_bytes()]


def forget_in_stores(runs: Path, keys: list[str]) -> dict[str, int]:
    """What `forget` removes from stores where prepared data hold the users too, which it names."""
    with pytest.raises(Incomplete, match=r"monday: users.parquet \(\d\): prepare it again with overwrite=true") as left:
        forget(runs, keys)
    return left.value.removed


def test_a_forgotten_user_is_gone_for_good(shop):
    words = ["run=kept", "query.dtype=int8"]
    STAGES["query"].run(shop(*words, "inputs.prepared=monday"))
    runs = Path(shop().runs_dir)
    data = PreparedData.open(runs / "monday")
    before, rows_before = KnowledgeStore.open(runs / "kept"), Knowledge.open(runs / "kept", data)
    key, others = SHOP_USERS[5], [key for key in data.user_keys() if key != SHOP_USERS[5]]
    assert files_with(runs / "kept", key.encode()) and before.get([key]).present_BN.all()
    was, was_before = before.get(others), rows_before.for_rows(np.arange(data.num_events))
    del before, rows_before

    assert forget_in_stores(runs, [key]) == {"kept": 1}
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
    assert STAGES["query"].run(shop(*words, "inputs.prepared=monday"))["users_asked"] == 41
    assert KnowledgeStore.open(runs / "kept").path == store.path
    shutil.rmtree(runs / "monday")
    shutil.copytree(runs / "tuesday", runs / "monday")
    refreshed = STAGES["query"].run(shop(*words, "inputs.prepared=monday"))
    assert (refreshed["users_asked"], refreshed["users_taken_over"]) == (12, 28)
    STAGES["query"].run(shop("run=other", "query.dtype=int8", "inputs.prepared=tuesday"))
    STAGES["query"].run(shop(*words, "inputs.prepared=tuesday", "overwrite=true"))
    for name in ("kept", "other"):
        assert not KnowledgeStore.open(runs / name).get([key]).present_BN.any()
        assert files_with(runs / name, key.encode()) == []
    data = PreparedData.open(runs / "tuesday")
    theirs = data.user == data.user_keys().index(key)
    assert not Knowledge.open(runs / "other", data).for_rows(np.flatnonzero(theirs)).present_BN.any()
    assert forget_in_stores(runs, []) == {"kept": 0, "other": 0}
    assert (runs / FORGOTTEN).read_text().split() == [user_digest(key)]


def test_what_was_killed_is_completed_and_leftovers_go(shop, monkeypatch):
    STAGES["query"].run(shop("run=kept", "inputs.prepared=monday"))
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
    assert forget_in_stores(runs, []) == {"kept": 1, "started": 0}
    assert not files_with(runs / "kept", key.encode()) and not files_with(runs / "started", key.encode())


def test_a_store_in_use_is_named_and_the_user_noted_all_the_same(shop):
    STAGES["query"].run(shop("run=kept", "inputs.prepared=monday"))
    runs = Path(shop().runs_dir)
    lock = RunFolder.locked(runs / "kept")
    # As if another process held it.
    (runs / "kept" / ".lock").write_text("1 someone else")
    with pytest.raises(ValueError, match="listed.*will not be asked about again.*being written by process 1"):
        forget(runs, ["20", SHOP_USERS[20]])
    lock.close()
    assert user_digest(SHOP_USERS[20]) in (runs / FORGOTTEN).read_text()
    with pytest.raises(SystemExit):  # prepared data hold the user
        forgetting.main([str(runs)])
    assert not KnowledgeStore.open(runs / "kept").get([SHOP_USERS[20]]).present_BN.any()
    assert json.loads((runs / "kept" / "manifest.json").read_text())["forgotten"] == [user_digest(SHOP_USERS[20])]


def test_an_unknown_folder_is_shop(tmp_path):
    with pytest.raises(FileNotFoundError, match="no runs folder"):
        forget(tmp_path / "nowhere", ["1"])


def test_a_forgotten_user_is_in_no_file_under_the_runs_folder(tmp_path, capsys):
    """Prepared data, their quarantine, LMDB, links and leftovers of kills among them: by their bytes."""
    key, runs, log = "a-user-who-wants-to-be-forgotten", tmp_path / "runs", tmp_path / "log.csv"
    rows = "".join(
        f"{user},{item},{1_700_000_000 + 9 * item},{item % 2}\n" for user in ("7", "8", key) for item in range(20)
    )
    log.write_text(f"user_id,item_id,timestamp,clicked\n{rows}{key},4,0,1\n{key},4\n7,5,0,1\n")
    (tmp_path / "elsewhere").mkdir()
    runs.mkdir()
    (runs / "own").symlink_to(tmp_path / "elsewhere")
    words = ["data.source=log", "data.label={column: clicked, at_least: 1}", f"data.log.events={log}", "run=own"]
    prepared = STAGES["prepare"].run(load(None, [*words, f"runs_dir={runs}"]))
    publish(tmp_path / "store", keys=[key, "7"])
    (runs / "linked").symlink_to(tmp_path / "store")
    for name in (".own.old-17", ".trash-x-17", "nested/.own.preparing"):
        (runs / name).mkdir(parents=True)
        (runs / name / "users.parquet").write_text(key)
    texts = tmp_path / "keys.txt"
    texts.write_bytes(b"\xef\xbb\xbf" + key.encode() + b" \r\n\r\n  nobody\r\n")

    with pytest.raises(SystemExit) as stopped:
        forgetting.main([str(runs), "--keys-file", str(texts)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "1 of the keys are in no store: 'nobody'" in said
    assert re.search(r"own: users.parquet \(1\), quarantine.parquet \(2\): prepare it again", said)
    with pytest.raises(UserError, match="elsewhere holds forgotten users .*overwrite=true"):
        STAGES["prepare"].run(load(None, [*words, f"runs_dir={runs}"]))
    forgetting.main([str(runs), "--prepare"])
    for folder in (runs, tmp_path / "elsewhere", tmp_path / "store"):
        assert not [file for file in folder.rglob("*") if file.is_file() and key in str(read_all(file))]
    again = PreparedData.open(runs / "own")
    assert (runs / "own").is_symlink() and again.user_keys() == ["7", "8"]
    assert again.manifest["counts"]["events"] == prepared["events"] - 20
    assert not KnowledgeStore.open(runs / "linked").get([key]).present_BN.any()
    forgetting.main([str(runs), key])


def test_a_short_key_is_found_in_the_vocabulary_of_a_feature_of_any_role(tmp_path):
    rows = "".join(f"{user},{item},{1_700_000_000 + item},{item % 2}\n" for user in ("7", "42") for item in range(20))
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp,clicked\n{rows}")
    words = ["data.source=log", "data.label.column=clicked", f"data.log.events={tmp_path / 'log.csv'}", "run=own"]
    words += ["schema.features={item_id: {role: item}, who: {role: context, column: user_id}}"]
    STAGES["prepare"].run(load(None, [*words, f"runs_dir={tmp_path / 'runs'}"]))
    with pytest.raises(Incomplete, match=r"own: users.parquet \(1\), vocabulary/who.parquet \(1\): prepare it again"):
        forget(tmp_path / "runs", ["42"])


def test_numbers_of_other_users_that_look_like_the_key_are_no_find(tmp_path):
    """A ranker's run and its data: 3 is the number of a user in them, and the key of another one."""
    words = ["data.source=simulator", "data.simulator.num_users=30", "data.simulator.num_items=50", "name=a"]
    words += ["data.split.kind=user", "data.simulator.events_per_user=20", f"runs_dir={tmp_path}"]
    words += ["rank.model=dlrm", "rank.hidden_dims=[4]", "rank.train.max_steps=1"]
    STAGES["prepare"].run(load(None, words))
    STAGES["rank"].run(load(None, words))
    key = PreparedData.open(tmp_path / "a-prepare").user_keys()[5]
    assert key.isdecimal() and int(key) < 29
    with pytest.raises(Incomplete, match=r"the same command again: \S+: users.parquet \(1\): prepare"):
        forget(tmp_path, [key])
    STAGES["prepare"].run(load(None, [*words, "overwrite=true"]))  # in place of what the ranker kept there, too
    assert not (tmp_path / "a-prepare" / "kept").exists()
    forget(tmp_path, [key])


def read_all(file: Path) -> object:
    """The bytes of a file, and what a Parquet file holds behind its compression."""
    return (file.read_bytes(), pl.read_parquet(file).rows()) if file.suffix == ".parquet" else file.read_bytes()


def test_texts_of_other_files_are_searched(tmp_path):
    runs, key = tmp_path / "runs", "a-user-who-wants-to-be-forgotten"
    (runs / "deep").mkdir(parents=True)
    (runs / "deep" / "config.yaml").write_text(f"show_user: {{user: {key}}}")
    pl.DataFrame({"n": [1, 2], "who": [key, "x"]}).write_parquet(runs / "deep" / "log.parquet")
    (runs / "deep" / "loop").symlink_to(runs)
    with pytest.raises(Incomplete, match=r"deep/config.yaml \(1 of the keys\).*deep/log.parquet \(1 of the keys\)"):
        forget(runs, [key, "42"])


@pytest.mark.parametrize("key", ["Ünal & Söhne <12345>", "4711", "12345678901"])
def test_keys_are_found_however_a_file_spells_them(tmp_path, key):
    """What score writes has the ids of its input; pages and JSON escape; a list, a struct and bytes hide."""
    frames = {
        "lists": {"seen_by_users": [[], [key, "x"]]},
        "structs": {"user": [{"a": ["x"]}, {"a": [key]}]},
        "bytes": {"user_id": [b"\xff", key.encode()]},
        "kinds": {"user_id": pl.Series([key, "x"], dtype=pl.Categorical)},
    }
    if key.isdigit():
        frames |= {"numbers": {"user_id": [int(key), 5]}, "floats": {"user_id": [float(key), None]}}
    for name, frame in frames.items():
        pl.DataFrame(frame).write_parquet(tmp_path / f"{name}.parquet")
    pl.DataFrame({"scene": ["4711"], "price": [4711]}).write_parquet(tmp_path / "no-user.parquet")
    texts = {"a.json": json.dumps({"user": key}), "page.html": html.escape(key), "jinja.html": markupsafe.escape(key)}
    if len(key) >= 8:
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
        (tmp_path / "log.csv.gz").write_bytes(gzip.compress(f"user\n{key}\n".encode()))
    with pytest.raises(Incomplete) as left:
        forget(tmp_path, [key])
    found = set(re.findall(r"(\S+) \(1 of the keys\)", str(left.value)))
    names = {file.name for file in tmp_path.iterdir()} - {"forgotten.txt", ".lock", "no-user.parquet"}
    assert {Path(file).name for file in found} == names


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
def test_one_unreadable_manifest_is_named_and_stops_nothing(tmp_path, content):
    runs = tmp_path / "runs"
    for name in ("a", "broken", "c"):
        publish(runs / name, keys=["1", "2"])
    (runs / "broken" / "manifest.json").write_bytes(content)
    (runs / "stranger").mkdir()
    (runs / "stranger" / "manifest.json").write_bytes(content)
    with pytest.raises(Incomplete, match="broken/manifest.json is") as left:
        forget(runs, ["1"])
    assert left.value.removed == {"a": 1, "c": 1}
    publish(runs / "broken", keys=["1", "2"])
    assert forget(runs, []) == {"a": 0, "broken": 1, "c": 0}


def test_folders_that_only_look_like_ours_stay(tmp_path):
    path = publish(tmp_path / "runs" / "a", keys=["1", "2"])
    for name in ("knowledge-base", ".trash-mine", ".thesis.old-one"):
        (path / name).mkdir()
        (path / name / "text").write_text("years of work")
    publish(path, keys=["1", "2"], seed=1)
    assert forget(tmp_path / "runs", ["1"]) == {"a": 1}
    assert len(list(path.glob("*/text"))) + len(list(path.glob(".*/text"))) >= 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \r\n", "has no key"),
        (b"\xff\xfe1\0", "not UTF-8"),
        (None, "the keys file: there is no "),
        (b"u1\ru2\r", "contains a carriage return or NUL"),
        (b"u1\0u2", "contains a carriage return or NUL"),
    ],
)
def test_a_keys_file_that_cannot_be_used_is_told(tmp_path, content, message):
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_keys_file(tmp_path / "keys")


def test_a_damaged_list_of_the_forgotten_is_never_read_as_empty(tmp_path):
    (tmp_path / FORGOTTEN).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="forgotten.txt is damaged.*restore the file"):
        forget(tmp_path, ["1"])
