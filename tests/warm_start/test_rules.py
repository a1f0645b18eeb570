"""What goes where and what may differ, on small plain models: names, rows by raw id, columns, dtypes."""

import re

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from takeover import vocabulary
from torch import nn

from lumrec.warm_start import PlanError, warm_start
from lumrec.warm_start.rules import read_rules
from lumrec.warm_start.vocabulary import hash_rows, read_columns


class Shop(nn.Module):
    def __init__(self, rows: int = 4, width: int = 4, inputs: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.item = nn.Embedding(rows, width, dtype=dtype)
        self.first = nn.Linear(inputs, 2, dtype=dtype)


@pytest.fixture
def shop(tmp_path):
    """A checkpoint of a Shop, whose numbers are their places."""
    state = {
        "item.weight": torch.arange(16.0).view(4, 4),
        "first.weight": torch.arange(6.0).view(2, 3) + 100,
        "first.bias": torch.tensor([7.0, 8.0]),
    }
    torch.save(state, tmp_path / "shop.pt")
    return tmp_path / "shop.pt", state


def of_item(**rule):
    return {"rules": [{"source": "item.weight", **rule}, {"source": "first.", "match": "prefix"}]}


def test_regular_expressions_and_names(shop):
    path, state = shop
    model = nn.ModuleDict({"a": Shop(), "b": Shop()})
    with pytest.raises(PlanError, match="left over"):
        warm_start(
            model, path, {"rules": [{"source": r"(item|first)\.weight", "match": "regex", "target": r"a.\1.weight"}]}
        )
    rules = {
        "rules": [
            {"source": r"(item|first)\.(\w+)", "match": "regex", "target": r"a.\1.\2"},
            {"source": "item.", "match": "prefix", "target": "b.item."},
        ],
        "fresh": ["b.first.*"],
    }
    audit = warm_start(model, path, rules)
    assert torch.equal(model["a"].item.weight, state["item.weight"]) and torch.equal(
        model["b"].item.weight, state["item.weight"]
    )
    assert audit.fresh == ["b.first.weight", "b.first.bias"]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (
            {"rules": [{"source": "itm.weight"}]},
            "rule 'itm.weight' (exact) matches nothing; the nearest is 'item.weight'",
        ),
        ({"rules": [{"source": "item.weight"}]}, "'first.bias' of the source is left over"),
        ({"rules": [{"source": "item.weight"}]}, "'first.weight' has no source"),
        (
            {"rules": [{"source": "", "match": "prefix"}, {"source": "item.weight"}]},
            "'item.weight' is matched twice: by '' and 'item.weight'",
        ),
        (
            {"rules": [{"source": "", "match": "prefix", "target": "x."}]},
            "is to fill 'x.item.weight', which the model does not have",
        ),
        (
            {"rules": [{"source": "", "match": "prefix"}], "unused": ["itme.*"]},
            "unused lists 'itme.*', which matches nothing",
        ),
        (
            {"rules": [{"source": "", "match": "prefix"}], "fresh": ["item.*"]},
            "is listed as fresh, and rule '' fills it",
        ),
        ({"rules": [{"source": "", "match": "prefix"}], "source_prefix": "modl."}, "begins no name of the source"),
    ],
)
def test_strict_by_default(shop, rules, said):
    model = Shop()
    before = model.item.weight.clone()
    with pytest.raises(PlanError, match=re.escape(said)):
        warm_start(model, shop[0], rules)
    assert torch.equal(model.item.weight, before)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"rule": []}, "unknown key 'rule'; the nearest is 'rules'"),
        ({"rules": [{"source": "a", "colums": "slice"}]}, "unknown key 'colums'; the nearest is 'columns'"),
        ({"rules": [{"source": "a", "columns": "cut"}]}, "columns is 'cut'; expected one of error, slice"),
        ({"rules": [{"source": "a", "rows": "remap"}]}, "has no source_vocabulary, with rows=remap"),
        ({"rules": [{"source": "a", "parts": [[0, 1]], "columns": "pad_zero"}]}, "expected [source column, number of"),
        ({"rules": [{"target": "a"}]}, "has no source"),
        ({"rules": [{"source": "a", "keep_rows": "all"}]}, "keep_rows"),
        ({"rules": [{"source": "a", "keep_rows": [np.int64(0)]}]}, "expected text, numbers, lists and mappings"),
        (None, "holds text; expected keys such as rules"),
        ([], "holds a list; expected keys such as rules"),
    ],
)
def test_rules_that_are_none(rules, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        read_rules(rules)


def test_rows_by_raw_id_through_both_vocabularies(shop, tmp_path):
    path, state = shop
    vocabulary(tmp_path / "theirs.csv", ["007", "7", "c", "d"])
    vocabulary(tmp_path / "ours.parquet", ["d", "new", "007", "newer"], [1, 2, 3, 5])
    model = Shop(rows=6)
    fresh = model.item.weight.detach().clone()
    said = {"rows": "remap", "source_vocabulary": "theirs.csv", "target_vocabulary": "ours.parquet"}
    audit = warm_start(model, path, {"folder": str(tmp_path), **of_item(**said, new_rows="random")}, block_bytes=1)
    weight, old = model.item.weight.detach(), state["item.weight"]
    assert torch.equal(weight[[1, 3]], old[[3, 0]]) and torch.equal(weight[[0, 2, 4, 5]], fresh[[0, 2, 4, 5]])
    row = audit.rows[0]
    assert (row.rows_taken, row.rows_new, row.rows_unused) == (2, 4, 2)


@pytest.mark.parametrize("new_rows", ["mean", "zero", "unknown", "category_mean"])
def test_new_rows(shop, tmp_path, new_rows):
    path, state = shop
    vocabulary(tmp_path / "theirs.csv", ["a", "b", "c"], [1, 2, 3])
    vocabulary(tmp_path / "ours.csv", ["a", "b", "red", "blue", "odd"], [2, 1, 3, 4, 5])
    colours = {"key": ["a", "b", "red", "blue"], "category": ["red", "red", "red", "blue"]}
    pl.DataFrame(colours).write_parquet(tmp_path / "colours.parquet")
    said = {"rows": "remap", "source_vocabulary": "theirs.csv", "target_vocabulary": "ours.csv", "keep_rows": [0]}
    said |= {"categories": "colours.parquet"} if new_rows == "category_mean" else {}
    model = Shop(rows=6)
    rules = {"folder": str(tmp_path), **of_item(**said, new_rows=new_rows)}
    warm_start(model, path, rules, block_bytes=20)
    weight, old = model.item.weight.detach(), state["item.weight"]
    assert torch.equal(weight[:3], old[[0, 2, 1]])
    mean = old[[0, 1, 2]].mean(0)  # of the rows that are taken
    red = old[[1, 2]].mean(0)
    expected = {"mean": [mean] * 3, "zero": [0 * mean] * 3, "unknown": [old[0]] * 3, "category_mean": [red, mean, mean]}
    torch.testing.assert_close(weight[3:], torch.stack(expected[new_rows]))


def test_rows_by_hash(shop, tmp_path):
    path, state = shop
    vocabulary(tmp_path / "ours.csv", ["5", "10", "3"])
    said = {"rows": "hash", "target_vocabulary": "ours.csv"}
    model = Shop(rows=3)
    warm_start(model, path, {"folder": str(tmp_path), **of_item(**said)})
    assert torch.equal(model.item.weight.detach(), state["item.weight"][[1, 2, 3]])
    vocabulary(tmp_path / "ours.csv", ["5", "9", "3"])
    with pytest.raises(
        ValueError, match=r"2 of 3 raw ids share a row .* such as '5' and '9' \(row 1\): say collisions=share"
    ):
        warm_start(model, path, {"folder": str(tmp_path), **of_item(**said)})
    warm_start(model, path, {"folder": str(tmp_path), **of_item(**said, collisions="share")})
    assert torch.equal(model.item.weight.detach(), state["item.weight"][[1, 1, 3]])


def test_hashes_are_the_published_ones():
    texts = pl.Series(["", "a", "foobar", "ä"])
    # The authors' test vectors of 64-bit FNV-1a.
    known = [0xCBF29CE484222325, 0xAF63DC4C8601EC8C, 0x85944171F73967E8]
    assert hash_rows(texts[:3], "fnv1a64", 2**61 - 1).tolist() == [value % (2**61 - 1) for value in known]
    mixed = 0x9E3779B97F4A7C15  # SplitMix64's first increment: the first output of seed 0 is e220a8397b1dcdaf
    signed = pl.Series([str(mixed - 2**64)])
    assert hash_rows(signed, "splitmix64", 2**61 - 1).tolist() == [0xE220A8397B1DCDAF % (2**61 - 1)]
    assert hash_rows(pl.Series(["-1", "12"]), "modulo", 10).tolist() == [9, 2]
    with pytest.raises(ValueError, match="use hash=fnv1a64"):
        hash_rows(texts, "modulo", 10)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    rows=st.sampled_from([1, 2, 7]),
    new=st.sampled_from([0, 1, 5]),
    block=st.sampled_from([1, 50, 10**6]),
)
def test_remapping_equals_a_plain_loop(tmp_path, data, rows, new, block):
    theirs = data.draw(st.permutations([f"i{number}" for number in range(rows)]))
    ours = data.draw(st.permutations([*theirs[: data.draw(st.integers(1, rows))], *(f"n{n}" for n in range(new))]))
    vocabulary(tmp_path / "theirs.parquet", theirs)
    vocabulary(tmp_path / "ours.parquet", ours)
    old = torch.randn(rows, 3)
    torch.save({"weight": old}, tmp_path / "old.pt")
    model = nn.Embedding(len(ours), 3)
    rule = {"source": "weight", "rows": "remap", "new_rows": "zero"}
    rule |= {"source_vocabulary": "theirs.parquet", "target_vocabulary": "ours.parquet"}
    warm_start(model, tmp_path / "old.pt", {"rules": [rule], "folder": str(tmp_path)}, block_bytes=block)
    for row, key in enumerate(ours):
        expected = old[theirs.index(key)] if key in theirs else torch.zeros(3)
        assert torch.equal(model.weight[row].detach(), expected)


def test_columns(shop):
    path, state = shop
    first = state["first.weight"]
    others = [{"source": "item.weight"}, {"source": "first.bias"}]

    def filled(inputs, **rule):
        model = Shop(inputs=inputs)
        nn.init.ones_(model.first.weight)
        warm_start(model, path, {"rules": [*others, {"source": "first.weight", **rule}]}, block_bytes=1)
        return model.first.weight.detach()

    assert torch.equal(filled(2, columns="slice"), first[:, :2])
    assert torch.equal(filled(4, columns="pad_zero"), torch.cat([first, torch.zeros(2, 1)], dim=1))
    assert torch.equal(filled(4, columns="pad_fresh"), torch.cat([first, torch.ones(2, 1)], dim=1))
    # Knowledge between the old inputs: [0] new new [1 2] new.
    moved = filled(6, columns="pad_zero", parts=[[0, 1, 0], [1, 2, 3]])
    zero = torch.zeros(2, 2)
    assert torch.equal(moved, torch.cat([first[:, :1], zero, first[:, 1:], zero[:, :1]], dim=1))
    both = filled(4, columns="slice_pad_zero", parts=[[0, 1, 1], [2, 1, 3]])
    assert torch.equal(both, torch.stack([zero[:, 0], first[:, 0], zero[:, 0], first[:, 2]], dim=1))
    for inputs, rule, said in [
        (4, {}, "4 columns, 'first.weight' 3: say what becomes of the others by columns=pad_zero or pad_fresh"),
        (2, {}, "by columns=slice"),
        (2, {"columns": "pad_zero"}, "1 of the source's would be left out"),
        (4, {"columns": "slice"}, "slice leaves 1 without a source"),
        (4, {"columns": "pad_zero", "parts": [[0, 4, 0]]}, "overlap or go beyond the source's"),
        (4, {"columns": "pad_zero", "parts": [[0, 2, 0], [2, 1, 1]]}, "overlap or go beyond the target's"),
    ]:
        with pytest.raises(ValueError, match=re.escape(said)):
            filled(inputs, **rule)


def test_rows_that_differ_need_a_word(shop):
    for rows, rule, said in [
        (6, {}, "say what row is which by rows=grow or remap"),
        (3, {"rows": "grow"}, "say what row is which by rows=remap, by raw id"),
        (6, {"rows": "grow"}, "2 of 6 rows have no source: say new_rows=mean"),
    ]:
        with pytest.raises(ValueError, match=re.escape(said)):
            warm_start(Shop(rows=rows), shop[0], of_item(**rule))
    model = Shop(rows=6)
    warm_start(model, shop[0], of_item(rows="grow", new_rows="unknown"))
    assert torch.equal(model.item.weight.detach(), shop[1]["item.weight"][[0, 1, 2, 3, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_numbers_widen_and_wide_ones_narrow_only_by_leave(shop, tmp_path, dtype):
    path, state = shop
    torch.save({name: value.to(dtype) for name, value in state.items()}, tmp_path / "narrow.pt")
    model = Shop()
    everything = {"rules": [{"source": "", "match": "prefix"}]}
    audit = warm_start(model, tmp_path / "narrow.pt", everything)
    assert torch.equal(model.item.weight.detach(), state["item.weight"].to(dtype).float())
    assert audit.rows[0].dtype == f"{str(dtype)[6:]} → float32"
    with pytest.raises(ValueError, match="precision is lost; say dtype=cast"):
        warm_start(Shop(dtype=dtype), path, everything)
    narrow = Shop(dtype=dtype)
    warm_start(narrow, path, {"rules": [{"source": "", "match": "prefix", "dtype": "cast"}]})
    assert torch.equal(narrow.item.weight.detach(), state["item.weight"].to(dtype))


def test_categories_of_a_csv_are_text(tmp_path):
    (tmp_path / "c.csv").write_text("key,category\n007,010\n7,10\n8,NO\n")
    frame = read_columns(tmp_path / "c.csv", ["key", "category"])
    assert (frame["key"].to_list(), frame["category"].to_list()) == (["007", "7", "8"], ["010", "10", "NO"])
