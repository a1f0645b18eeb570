"""Refresh: only users with another history are asked; what is published equals a build from nothing."""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from shop_log import DAY, SHOP_USERS, START, shop_log

from lumrec.data.prepared import PreparedData
from lumrec.knowledge.digests import history_digests, user_index
from lumrec.knowledge.store import Knowledge, KnowledgeStore
from lumrec.models.lum import load_lum
from lumrec.stages import query as stage
from lumrec.stages.registry import STAGES

CHANGED = {*SHOP_USERS[:10], "12", "13", "new"}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_refreshed_store_equals_a_fresh_one(shop, dtype):
    words = [f"query.dtype={dtype}", "run=kept"]
    first = STAGES["query"].run(shop(*words, "inputs.prepared=monday"))
    assert first["users_asked"] == first["users"] == 41
    runs = Path(shop().runs_dir)
    old = KnowledgeStore.open(runs / "kept")

    shutil.rmtree(runs / "monday")  # the data of yesterday is not needed
    shutil.copytree(runs / "tuesday", runs / "monday")
    (runs / "kept" / "result.json").unlink()
    refreshed = STAGES["query"].run(shop(*words, "inputs.prepared=monday"))
    fresh = STAGES["query"].run(shop(*words, "run=fresh", "inputs.prepared=tuesday"))
    assert (refreshed["users_asked"], refreshed["users_taken_over"], refreshed["users_removed"]) == (13, 28, 1)
    assert (fresh["users_asked"], fresh["users_taken_over"]) == (41, 0)
    same = {name for name in fresh if not name.startswith(("users_", "wall", "answers_per", "bytes", "version"))}
    assert {name: refreshed[name] for name in same} == pytest.approx({name: fresh[name] for name in same}, abs=1e-3)

    data = PreparedData.open(runs / "tuesday")
    keys = [*data.user_keys(), "gone", "nobody"]
    kept, anew = (KnowledgeStore.open(runs / name) for name in ("kept", "fresh"))
    taken = [key for key in data.user_keys() if key not in CHANGED]
    assert torch.equal(kept.get(taken).o_BND, old.get(taken).o_BND)
    assert torch.equal(kept.get(taken).log_z_BN, old.get(taken).log_z_BN)
    assert torch.equal(kept.get(keys).present_BN, anew.get(keys).present_BN)
    assert kept.get(["gone"]).present_BN.sum() == 0 and old.get(["gone"]).present_BN.all()
    # Packs differ, so sums are rounded otherwise: a last digit, or a step of what is stored.
    close = {"atol": {"float32": 2e-5, "int8": 5e-2}[dtype], "rtol": 0}
    torch.testing.assert_close(kept.get(keys).o_BND, anew.get(keys).o_BND, **close)
    torch.testing.assert_close(kept.get(keys).log_z_BN, anew.get(keys).log_z_BN, **close)
    rows, everything = (Knowledge.open(runs / name, data) for name in ("kept", "fresh")), np.arange(data.num_events)
    (mine, theirs) = (knowledge.for_rows(everything) for knowledge in rows)
    assert torch.equal(mine.present_BN, theirs.present_BN)
    torch.testing.assert_close(mine.o_BND, theirs.o_BND, **close)
    torch.testing.assert_close(mine.log_z_BN, theirs.log_z_BN, **close)
    for name in ("items_e.npy", "user_fold.npy", "users.npy", "items.parquet", "rows_present.npy"):
        assert (kept.path / name).read_bytes() == (anew.path / name).read_bytes(), name


def test_a_user_who_was_listed_without_events_is_not_counted_as_removed(shop, tmp_path):
    users = pl.DataFrame({"user_id": [*SHOP_USERS, "gone", "late"]})
    users.write_csv(tmp_path / "users.csv")
    log = shop_log(tuesday=False)
    behind_training = pl.col("timestamp") > START + 6 * DAY
    late = log.filter((pl.col("user_id") == "3") & behind_training).with_columns(user_id=pl.lit("late"))
    for name, events in (("before", log), ("after", pl.concat([log, late]))):
        events.write_csv(tmp_path / f"{name}.csv")
        log_words = [f"data.log.events={tmp_path}/{name}.csv", f"data.log.users={tmp_path}/users.csv"]
        STAGES["prepare"].run(shop(*log_words, f"run={name}"))
    first = STAGES["query"].run(shop("run=k", "inputs.prepared=before"))
    assert (first["users"], first["users_absent"]) == (41, 1)
    second = STAGES["query"].run(shop("run=l", "inputs.prepared=after", "query.refresh_from=k"))
    assert (second["users_asked"], second["users_taken_over"], second["users_removed"]) == (1, 41, 0)


def test_answers_are_taken_over_from_another_run(shop):
    STAGES["query"].run(shop("run=before", "inputs.prepared=monday"))
    result = STAGES["query"].run(shop("run=after", "inputs.prepared=tuesday", "query.refresh_from=before"))
    assert result["users_taken_over"] == 28 and result["users"] == 41
    with pytest.raises(ValueError, match="dtype is 'float16' there, 'float32' here"):
        STAGES["query"].run(
            shop("run=x", "inputs.prepared=tuesday", "query.refresh_from=before", "query.dtype=float32")
        )
    with pytest.raises(FileNotFoundError, match="no knowledge in .*nowhere"):
        STAGES["query"].run(shop("run=y", "inputs.prepared=tuesday", "query.refresh_from=nowhere"))


def test_other_items_make_another_normaliser(shop, monkeypatch):
    words = ["inputs.prepared=monday", "query.dtype=float32"]
    STAGES["query"].run(shop("run=before", *words))
    items = stage.GroupQuery.items
    monkeypatch.setattr(stage.GroupQuery, "items", lambda query: torch.cat([items(query), items(query)[:1]])[:-1] * 0.9)
    STAGES["query"].run(shop("run=after", *words, "query.refresh_from=before"))
    runs = Path(shop().runs_dir)
    data = PreparedData.open(runs / "monday")
    knowledge, store = Knowledge.open(runs / "after", data), KnowledgeStore.open(runs / "after")
    for answers in (knowledge.for_rows(np.arange(data.num_events)), store.get(data.user_keys())):
        similarity = answers.o_BND.double() @ knowledge.items_e[0].double().T
        expected = similarity.logsumexp(-1) * answers.present_BN
        torch.testing.assert_close(answers.log_z_BN.double(), expected, atol=1e-4, rtol=1e-5)


def test_damaged_knowledge_is_not_taken_over(shop, caplog):
    words = ["run=kept", "inputs.prepared=monday"]
    STAGES["query"].run(shop(*words))
    runs = Path(shop().runs_dir)
    file = KnowledgeStore.open(runs / "kept").path / "rows_o.npy"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    (runs / "monday").rename(runs / "old")
    shutil.copytree(runs / "tuesday", runs / "monday")
    with caplog.at_level("INFO"):
        assert STAGES["query"].run(shop(*words))["users_taken_over"] == 0
    assert "no answers are taken over" in caplog.text and "rows_o.npy" in caplog.text
    Knowledge.open(runs / "kept", PreparedData.open(runs / "tuesday"))


def test_a_digest_tells_who_has_another_history(trained_shop):
    features = ["item_id", "feedback"]
    monday, tuesday = (PreparedData.open(trained_shop / name) for name in ("monday", "tuesday"))
    before = dict(zip(monday.user_keys(), user_index(monday, features)["history"].tolist()))
    after = dict(zip(tuesday.user_keys(), user_index(tuesday, features)["history"].tolist()))
    assert {key for key in after if before.get(key) != after[key]} == CHANGED
    # A feature that the LUM does not read does not count.
    without = [dict(zip(d.user_keys(), history_digests(d, ["item_id"]).tolist())) for d in (monday, tuesday)]
    assert {key for key in after if without[0].get(key) != without[1][key]} == CHANGED - {"12"}
    assert len(set(after.values())) == len(after)


def test_a_lum_of_other_vocabularies_is_refused(shop):
    data = PreparedData.open(Path(shop().runs_dir) / "tuesday")
    data.vocabulary_fingerprint = "0123456789abcdef"
    with pytest.raises(ValueError, match="trained on other data.*fixed data.split.times"):
        load_lum(shop().runs / "shop-pretrain", data, device=torch.device("cpu"))
