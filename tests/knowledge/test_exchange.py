"""Knowledge to Parquet and back gives the same answers; files that do not fit are told."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_store import ITEMS, KEYS, publish

from lumrec.data.prepared import PreparedData
from lumrec.knowledge import parquet as exchange
from lumrec.knowledge.forget import Incomplete, forget
from lumrec.knowledge.parquet import export_parquet, import_parquet
from lumrec.knowledge.store import Knowledge, KnowledgeStore
from lumrec.run.errors import UserError


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("with_log_z", [True, False])
def test_there_and_back(tmp_path, dtype, with_log_z, capsys):
    path = publish(tmp_path / "run", dtype=dtype, with_log_z=with_log_z)
    exchange.main(["export", str(path), str(tmp_path / "out")])
    exchange.main(["import", str(tmp_path / "out"), str(tmp_path / "back")])
    assert "6 users, 3 items" in capsys.readouterr().out
    one, two = KnowledgeStore.open(path), KnowledgeStore.open(tmp_path / "back")
    asked = [*KEYS, "nobody"]
    for name, got in two.get(asked)._asdict().items():
        expected = getattr(one.get(asked), name)
        if name == "age_s_B":
            torch.testing.assert_close(got, expected, atol=5, rtol=0, equal_nan=True)
        else:
            assert (got is expected is None) or torch.equal(got, expected), name
    assert two.conditions == one.conditions and two.manifest["dtype"] == dtype
    assert two.items()[0] == ITEMS and torch.equal(two.items()[1], one.items()[1])
    # To the byte, but where pages begin.
    assert (one.path / "items_e.npy").read_bytes() == (two.path / "items_e.npy").read_bytes()
    with pytest.raises(ValueError, match="was imported.*no rows"):
        Knowledge.open(tmp_path / "back", None)
    again = import_parquet(tmp_path / "out", tmp_path / "back")
    assert again["folder"] == two.path.name


def test_what_a_warehouse_sees(tmp_path):
    export_parquet(publish(tmp_path / "run"), tmp_path / "out")
    users, items = (pq.read_table(tmp_path / "out" / name) for name in ("users.parquet", "items.parquet"))
    assert sorted(key for key in users["user_key"].to_pylist() if key is not None) == sorted(set(KEYS) - {"x" * 5000})
    row = users["user_key"].to_pylist().index("2")
    store = KnowledgeStore.open(tmp_path / "run")
    assert users["o_1"][row].as_py() == store.get(["2"]).o_BND[0, 1].tolist()
    assert users["num_events"][row].as_py() == 4 and users["asked_at"][row].as_py() == 1_700_000_000
    assert items["item_key"].to_pylist() == ITEMS
    assert np.array_equal(np.array(items["e_1"].to_pylist(), np.float32), store.items()[1][1].numpy())


def test_an_import_takes_the_place_of_an_older_one_and_leaves_forgotten_users_out(tmp_path):
    export_parquet(publish(tmp_path / "run"), tmp_path / "out")
    import_parquet(tmp_path / "out", tmp_path / "back")
    reader = KnowledgeStore.open(tmp_path / "back")
    with pytest.raises(Incomplete, match=r"out/users.parquet \(1\): export it again, or remove it") as left:
        forget(tmp_path, ["3"])
    assert left.value.removed == {"back": 1, "run": 1}
    assert reader.get(["3"]).present_BN.all()
    assert not KnowledgeStore.open(tmp_path / "back").get(["3"]).present_BN.any()
    users = tmp_path / "out" / "users.parquet"
    pq.write_table(pq.read_table(users).filter(pa.compute.is_valid(pq.read_table(users)["user_key"])), users)
    assert import_parquet(tmp_path / "out", tmp_path / "back")["counts"] == {"users": 4}
    found = KnowledgeStore.open(tmp_path / "back").get(["2", "3", "x" * 5000]).present_BN[:, 0]
    assert found.tolist() == [True, False, False]


def test_nothing_but_exports_and_imports_is_replaced(tmp_path, tiny_prepared):
    prepared, store = shutil.copytree(tiny_prepared.path, tmp_path / "prepared"), publish(tmp_path / "run")
    with pytest.raises(UserError, match='lacks the metadata "lumrec"'):
        export_parquet(store, prepared)
    assert PreparedData.open(prepared).num_users == tiny_prepared.num_users
    export_parquet(store, tmp_path / "out")
    for folder in (prepared, store):
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        with pytest.raises(UserError, match="was not made by an import"):
            import_parquet(tmp_path / "out", folder)
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["items.parquet", "users.parquet"]


def test_users_who_were_forgotten_in_a_folder_further_up_are_left_out(tmp_path):
    export_parquet(publish(tmp_path / "run"), tmp_path / "elsewhere")
    (tmp_path / "runs").mkdir()
    forget(tmp_path / "runs", ["3"])
    assert import_parquet(tmp_path / "elsewhere", tmp_path / "runs" / "a" / "b")["counts"] == {"users": 5}


def test_files_that_do_not_fit_are_told(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    with pytest.raises(FileNotFoundError, match="users.parquet; expected what"):
        import_parquet(out, tmp_path / "back")
    export_parquet(publish(tmp_path / "run"), out)
    export_parquet(publish(tmp_path / "run2", dtype="int8"), other)
    users = pq.read_table(out / "users.parquet")

    shutil.copy(other / "items.parquet", out / "items.parquet")
    with pytest.raises(ValueError, match="different knowledge"):
        import_parquet(out, tmp_path / "back")
    export_parquet(tmp_path / "run", out)
    pq.write_table(users.drop_columns(["o_1"]), out / "users.parquet")
    with pytest.raises(ValueError, match=r"column o_1 is \(absent\); expected fixed_size_list"):
        import_parquet(out, tmp_path / "back")
    pq.write_table(users.replace_schema_metadata(None), out / "users.parquet")
    with pytest.raises(ValueError, match='lacks the metadata "lumrec"'):
        import_parquet(out, tmp_path / "back")
    content = (other / "users.parquet").read_bytes()
    (out / "users.parquet").write_bytes(content[:-9])
    with pytest.raises(ValueError, match="no Parquet file, or was cut off"):
        import_parquet(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()
