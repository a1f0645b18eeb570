"""The knowledge store by itself: round trip, absence, damage, and the promise of cross-fitting that it rests on."""

import copy
import json

import lmdb
import numpy as np
import pytest
import torch

from lumrec.batches.negatives import NegativesConfig
from lumrec.batches.packs import PackBuilder, PackingConfig, PackLoader
from lumrec.data.columns import Column
from lumrec.data.splits import TRAIN, user_fold
from lumrec.knowledge.digests import user_index
from lumrec.knowledge.manifest import read_manifest
from lumrec.knowledge.records import bytes_to_records, records_to_bytes, user_dtype, user_key_bytes
from lumrec.knowledge.store import Knowledge, KnowledgeStore
from lumrec.knowledge.writer import KnowledgeWriter
from lumrec.models.lum import ModelConfig, build_lum
from lumrec.run.errors import UserError
from lumrec.run.listed_files import own_hash
from lumrec.stages.pretrain import training_users

N, D = 2, 8
IDENTITY = {
    "conditions": [{"feedback": "like"}, {}],
    "dim": D,
    "lums": [{"run": "a", "fold": "0/2", "fingerprint": "x"}, {"run": "b", "fold": "1/2", "fingerprint": "y"}],
    "hazard": "cross_fit",
    "dtype": "float16",
    "rows": True,
    "users": True,
    "log_normalizer": True,
}


@pytest.fixture
def build(tmp_path, tiny_prepared):
    """Publishes random answers for all rows but the first ten and all users but the last; gives what went in."""

    def make(**changes):
        data, identity = tiny_prepared, {**IDENTITY, "data_fingerprint": tiny_prepared.fingerprint, **changes}
        generator = torch.Generator().manual_seed(len(str(changes)))
        writer = KnowledgeWriter(
            tmp_path / "run",
            identity,
            num_events=data.num_events,
            num_users=data.num_users,
            num_items=data.num_items,
        )
        rows = torch.randperm(data.num_events - 10, generator=generator) + 10
        o_RND = torch.randn(len(rows), N, D, generator=generator)
        log_z_RN = torch.randn(len(rows), N, generator=generator)
        writer.write_rows(rows.numpy(), o_RND, log_z_RN)
        writer.write_user_index(user_fold(data.user_keys(), 2), user_index(data, ["item_id"]))
        writer.write_item_keys(data.item_keys())
        for fold in (0, 1):
            writer.write_items(fold, torch.full((data.num_items, D), float(fold)))
        users = writer.user_records(
            o_RND[:59], log_z_RN[:59], asked_at=7, last_event_at=5, num_events=3, num_seen=2, fold=1
        )
        writer.write_users([user_key_bytes(key) for key in data.user_keys()[:59]], users)
        writer.commit("all")
        writer.publish({"counts": {}})
        return tmp_path / "run", rows, o_RND, log_z_RN

    make.path = tmp_path / "run"
    return make


def test_round_trip(build, tiny_prepared):
    path, rows, o_RND, log_z_RN = build()
    knowledge = Knowledge.open(path, tiny_prepared)
    asked = rows[torch.tensor([5, 3, 3, 0])]  # any order, and twice
    got = knowledge.for_rows(asked)
    assert got.o_BND.dtype == torch.float32
    torch.testing.assert_close(got.o_BND, o_RND[[5, 3, 3, 0]].half().float(), rtol=0, atol=0)
    torch.testing.assert_close(got.log_z_BN, log_z_RN[[5, 3, 3, 0]], rtol=0, atol=0)
    assert got.present_BN.tolist() == [[True] * N] * 4
    users = tiny_prepared.user[asked.numpy()]
    assert got.fold_B.tolist() == user_fold(tiny_prepared.user_keys(), 2)[users].tolist()
    assert knowledge.items_e.shape == (2, tiny_prepared.num_items, D) and bool((knowledge.items_e[1] == 1).all())
    assert (knowledge.num_conditions, knowledge.dim, knowledge.num_folds, knowledge.hazard) == (N, D, 2, "cross_fit")

    served = KnowledgeStore.open(path).get(tiny_prepared.user_keys()[:3])
    torch.testing.assert_close(served.o_BND, o_RND[:3].half().float(), rtol=0, atol=0)
    torch.testing.assert_close(served.log_z_BN, log_z_RN[:3], rtol=0, atol=0)
    assert served.fold_B.tolist() == [1, 1, 1]


def test_what_was_not_asked_is_absent(build, tiny_prepared):
    path, *_ = build()
    got = Knowledge.open(path, tiny_prepared).for_rows(np.arange(12))
    assert got.present_BN[:, 0].tolist() == [False] * 10 + [True] * 2
    assert not got.o_BND[:10].any() and not got.log_z_BN[:10].any()
    served = KnowledgeStore.open(path).get([tiny_prepared.user_keys()[59], "never heard of"])
    assert not served.present_BN.any() and not served.o_BND.any()
    assert KnowledgeStore.open(path).get([]).o_BND.shape == (0, N, D)
    assert Knowledge.open(path, tiny_prepared).for_rows(np.zeros(0, np.int64)).o_BND.shape == (0, N, D)


def files_of(path, tiny_prepared):
    return Knowledge.open(path, tiny_prepared).path


@pytest.mark.parametrize("name", ["rows_o.npy", "rows_log_z.npy", "rows_present.npy", "items_e.npy", "user_fold.npy"])
@pytest.mark.parametrize("damage", ["cut", "flip", "lost"])
def test_damaged_columns_are_noticed(build, tiny_prepared, name, damage):
    path, *_ = build()
    _damage(files_of(path, tiny_prepared) / name, damage)
    error = FileNotFoundError if damage == "lost" else ValueError
    with pytest.raises(error, match=rf"{name}.*overwrite=true"):
        Knowledge.open(path, tiny_prepared)


@pytest.mark.parametrize("damage", ["cut", "flip", "lost"])
def test_a_damaged_user_store_is_noticed(build, tiny_prepared, damage):
    path, *_ = build()
    _damage(files_of(path, tiny_prepared) / "store" / "data.mdb", damage)
    with pytest.raises(FileNotFoundError if damage == "lost" else ValueError, match="data.mdb.*overwrite=true"):
        KnowledgeStore.open(path)


def _damage(file, damage):
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) * 2 // 3] ^= 4
        file.write_bytes(content)
    else:
        file.unlink()


def test_knowledge_of_other_data_or_format_is_refused(build, tiny_prepared):
    path, *_ = build()
    other = copy.copy(tiny_prepared)
    other.fingerprint = "0123456789abcdef"
    with pytest.raises(ValueError, match="made from other data"):
        Knowledge.open(path, other)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        Knowledge.open(path, tiny_prepared)
    for content, message in [
        (b"{", "manifest.json is damaged or cut off: it is not JSON"),
        (b"", "manifest.json is empty"),
        (b"\xff{}", "manifest.json is damaged: byte 0 is not UTF-8"),
        (b"[]", "manifest.json is damaged: it is a list"),
        (b"{}", "manifest.json is no manifest of a knowledge store"),
    ]:
        (path / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match=message):
            KnowledgeStore.open(path)
    (path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="apps/query.py"):
        Knowledge.open(path, tiny_prepared)


def test_a_new_version_takes_the_place_of_the_old_one(build, tiny_prepared):
    path, *_ = build()
    before, store = Knowledge.open(path, tiny_prepared), KnowledgeStore.open(path)
    old = before.for_rows(np.arange(20)).o_BND
    build(hazard="in_sample")
    assert Knowledge.open(path, tiny_prepared).hazard == "in_sample"
    assert torch.equal(before.for_rows(np.arange(20)).o_BND, old) and len(store) == 59
    assert {file.name for file in path.iterdir()} == {"manifest.json", files_of(path, tiny_prepared).name}


def test_a_published_version_is_only_what_the_manifest_lists(build, tiny_prepared):
    path, *_ = build()
    folder = files_of(path, tiny_prepared)
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == sorted(listed)
    KnowledgeStore.open(path).get(tiny_prepared.user_keys())
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == sorted(listed)


def test_one_changed_bit_of_the_manifest_is_noticed(build, tiny_prepared):
    """Every tenth of its bytes, with a bit that keeps letters letters and digits digits; and two conditions swapped."""
    path, *_ = build()
    file = path / "manifest.json"
    whole = file.read_bytes()
    for place in range(0, len(whole), 10):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="manifest.json"):
            KnowledgeStore.open(path)
    manifest = json.loads(whole)
    file.write_text(json.dumps({**manifest, "conditions": manifest["conditions"][::-1]}))
    with pytest.raises(UserError, match="has changed since it was published"):
        Knowledge.open(path, tiny_prepared)


def test_the_folder_of_a_version_is_named_after_what_decides_it(build):
    path, *_ = build()
    manifest = read_manifest(path)
    manifest["folder"] = "knowledge-0123456789abcdef-1"
    manifest["sha256"] = own_hash(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match="names the folder 'knowledge-0123456789abcdef-1', but its other entries lead to knowledge-"
    ):
        KnowledgeStore.open(path)


def test_a_build_that_was_killed_before_it_was_published_is_continued(build, monkeypatch, tiny_prepared):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lumrec.knowledge.writer.sync_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            build()
    path = build.path
    with open(path / "building" / "progress-0", "a") as file:
        file.write("half a li")
    identity = {**IDENTITY, "data_fingerprint": tiny_prepared.fingerprint}
    sizes = {"num_events": tiny_prepared.num_events, "num_users": tiny_prepared.num_users}
    writer = KnowledgeWriter(path, identity, **sizes, num_items=tiny_prepared.num_items)
    assert writer.finished == {"all"}
    writer.publish({"counts": {}})
    assert len(KnowledgeStore.open(path)) == 59


def test_building_what_is_published_once_more_leaves_it_alone(build, tiny_prepared):
    path, *_ = build()
    before = KnowledgeStore.open(path)
    identity = {**IDENTITY, "data_fingerprint": tiny_prepared.fingerprint}
    sizes = {"num_events": tiny_prepared.num_events, "num_users": tiny_prepared.num_users}
    KnowledgeWriter(path, identity, **sizes, num_items=tiny_prepared.num_items)
    assert KnowledgeStore.open(path).path == before.path


def test_user_values_are_checked_for_their_size():
    records = np.zeros(2, user_dtype(N, D, "float16", with_log_z=True))
    records["o"], records["fold"] = 1, [3, 4]
    values = records_to_bytes(records)
    assert np.array_equal(bytes_to_records(values, records.dtype), records)
    with pytest.raises(ValueError, match="expected"):
        bytes_to_records(values, user_dtype(N, D, "float32", with_log_z=True))


def test_any_text_is_a_user_key(tmp_path):
    keys = ["", "1", "ü" * 200, "x" * 5000, "x" * 5001]
    with lmdb.open(str(tmp_path / "db")) as env, env.begin(write=True) as transaction:
        for key in keys:
            transaction.put(user_key_bytes(key), key.encode())
        assert [transaction.get(user_key_bytes(key)).decode() for key in keys] == keys


def test_the_lum_that_is_asked_about_a_user_has_seen_nothing_of_them(tiny_prepared):
    """Whatever user u did, the training packs of the LUM of fold(u) are the same to the last bit."""
    data, num_folds = tiny_prepared, 3
    fold_U = user_fold(data.user_keys(), num_folds)
    user = int(np.bincount(data.user[data.split == TRAIN]).argmax())
    theirs = slice(*data.user_offsets[user : user + 2])
    edited = copy.copy(data)
    edited.item = data.item.copy()
    edited.item[theirs] = (data.item[theirs] * 7 + 3) % data.num_items
    edited.event_columns = {}
    for name, column in data.event_columns.items():
        values = column.values.clone()
        rows = (
            theirs
            if column.offsets is None
            else slice(int(column.offsets[theirs.start]), int(column.offsets[theirs.stop]))
        )
        values[rows] = values[rows].flip(0)
        edited.event_columns[name] = Column(values, column.offsets)
    edited.item_counts = np.bincount(edited.item[data.split == TRAIN], minlength=data.num_items)
    model = ModelConfig(dim=16, max_events=16)
    for fold in range(num_folds):
        packs = [_training_packs(version, model, f"{fold}/{num_folds}") for version in (data, edited)]
        assert (packs[0] == packs[1]) == (fold == fold_U[user])


def _training_packs(data, model: ModelConfig, fold: str) -> list:
    builder: PackBuilder = build_lum(model, data)[1]
    loader = PackLoader(
        builder,
        users=training_users(data, fold),
        max_events=model.max_events,
        packing=PackingConfig(events_per_pack=128),
        negatives=NegativesConfig(sampled=32),
        contrast_feature="feedback",
    )
    tensors = []
    for pack in loader:
        tensors += [pack.tokens.values(), pack.tokens.lengths(), pack.positive_T, pack.log_weight_C, pack.event_row_T]
    return [tensor.tolist() for tensor in tensors]
