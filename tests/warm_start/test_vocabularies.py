"""Rows by raw id: what two vocabularies may have wrong between them, and ids of every form."""

import re

import polars as pl
import pytest
import torch
from takeover import vocabulary
from torch import nn

from lumrec.warm_start import warm_start
from lumrec.warm_start.vocabulary import hash_rows

OLD = torch.arange(12.0).view(6, 2)


@pytest.fixture
def taken(tmp_path):
    """Takes a table of six rows over by raw id: theirs → ours."""
    torch.save({"weight": OLD}, tmp_path / "old.pt")

    def taken(theirs, ours, *, their_rows=None, our_rows=None, suffix="csv", rows=0, **rule):
        vocabulary(tmp_path / f"theirs.{suffix}", theirs, their_rows)
        vocabulary(tmp_path / f"ours.{suffix}", ours, our_rows)
        said = {"source": "weight", "rows": "remap", "new_rows": "zero"} | rule
        said |= {"source_vocabulary": f"theirs.{suffix}", "target_vocabulary": f"ours.{suffix}"}
        model = nn.Embedding(rows or len(ours), 2)
        audit = warm_start(model, tmp_path / "old.pt", {"folder": str(tmp_path), "rules": [said]})
        return model.weight.detach(), audit

    return taken


@pytest.mark.parametrize(
    ("theirs", "ours", "shown"),
    [
        (["7", "8"], ["7.0", "8.0"], "'7.0' and '7'"),
        (["7", "8"], ["8", "007"], "'007' and '7'"),
        (["a", "b"], ["a ", "b"], "'a ' and 'a'"),
        (["a", "b"], ["b", "\ufeffa"], "'\\ufeffa' and 'a'"),
        (["-1", "2"], ["2", "-1."], "'-1.' and '-1'"),
        (["AB1", "b"], ["ab1", "b"], "'ab1' and 'AB1'"),
        (["\xe9", "b"], ["e\u0301", "b"], r"'e\u0301' and '\xe9'"),  # é, as one code and as two
        (["１２", "b"], ["12", "b"], "'12' and '１２'"),
        (['"12"', "b"], ["12", "b"], "'12' and '\"12\"'"),
        (["b'12'", "b"], ["12", "b"], "'12' and \"b'12'\""),
        (["12\u200b", "b"], ["12", "b"], r"'12' and '12\u200b'"),
        (["12\0", "b"], ["12", "b"], r"'12' and '12\x00'"),
        (["1.2345678E7", "b"], ["12345678", "b"], "'12345678' and '1.2345678E7'"),
        (["1e+07", "b"], ["10000000", "b"], "'10000000' and '1e+07'"),
        (["-1", "b"], [str(2**64 - 1), "b"], "'18446744073709551615' and '-1'"),  # 64 bits with and without a sign
        (["-0", "b"], ["0", "b"], "'0' and '-0'"),
    ],
)
def test_ids_that_differ_only_in_form(taken, theirs, ours, shown):
    with pytest.raises(ValueError, match=re.escape(f"differ only in form from ids of theirs.parquet, such as {shown}")):
        taken(theirs, ours, suffix="parquet")
    if ours[0] in theirs or ours[1] in theirs:
        _, audit = taken(theirs, ours, suffix="parquet", lookalikes="new")
        assert audit.rows[0].joined == 0.5


def test_whole_numbers_meet_their_text(taken, tmp_path):
    weight, audit = taken([30, 10, 20], ["10", "20", "x"], suffix="parquet")
    assert torch.equal(weight, torch.stack([OLD[1], OLD[2], 0 * OLD[0]]))
    assert audit.rows[0].joined == pytest.approx(2 / 3) and "2 (66.7% of the raw ids)" in audit.text()
    with pytest.raises(ValueError, match="'key' holds Float64; expected raw ids as text or whole numbers"):
        taken([30.0, 10.0], ["10", "30"], suffix="parquet")


def test_vocabularies_of_different_tables(taken):
    with pytest.raises(
        ValueError, match="not one raw id is in both ours.csv and theirs.csv .the first ids are 'x' and 'a'"
    ):
        taken(["a", "b"], ["x", "y"], keep_rows=[2], rows=3)
    many = [f"n{number}" for number in range(60)]
    with pytest.raises(
        ValueError, match=r"1 of 61 raw ids \(1.6%\) of ours.csv are in theirs.csv, fewer than min_join"
    ):
        taken(["a", "b"], ["a", *many])
    weight, audit = taken(["a", "b"], ["a", *many], min_joined=0.01)
    assert torch.equal(weight[0], OLD[0]) and audit.rows[0].rows_new == 60
    with pytest.raises(ValueError, match=r"2 of 3 raw ids \(66.7%\) .* min_joined=0.9"):
        taken(["a", "b"], ["a", "b", "c"], min_joined=0.9)


def test_categories_of_another_table_are_refused(taken, tmp_path):
    """All new rows would begin with the mean of all, as if no id had a category."""
    ours = ["a", "b", *(f"n{number}" for number in range(30))]
    categories = {"new_rows": "category_mean", "categories": "c.parquet"}
    for keys, said in [
        (["x", "y"], "not one raw id is in both ours.csv and c.parquet .the first ids are 'a' and 'x'"),
        (["a", "y"], r"1 of 32 raw ids .3.1%. of ours.csv are in c.parquet, fewer than min_joined=0.1"),
        (["a", "N1"], "1 raw ids of ours.csv differ only in form from ids of c.parquet, such as 'n1' and 'N1'"),
    ]:
        pl.DataFrame({"key": keys, "category": ["red", "blue"]}).write_parquet(tmp_path / "c.parquet")
        with pytest.raises(ValueError, match=said):
            taken(["a", "b", "n2", "n3"], ours, **categories)
    weight, _ = taken(["a", "b", "n2", "n3"], ours, min_joined=0.03, lookalikes="new", **categories)
    assert torch.equal(weight[2], OLD[:4].mean(0))


def test_a_row_that_is_kept_has_no_raw_id_on_either_side(taken):
    with pytest.raises(ValueError, match="keep_rows has 0, but theirs.csv gives that row to the raw id 'a'"):
        taken(["a", "b"], ["a", "b"], our_rows=[1, 2], rows=3, keep_rows=[0])
    with pytest.raises(ValueError, match="keep_rows has 0, but ours.csv gives that row to the raw id 'a'"):
        taken(["a", "b"], ["a", "b"], their_rows=[1, 2], keep_rows=[0])
    with pytest.raises(ValueError, match="keep_rows has -1; there are 6 and 3 rows"):
        taken(["a", "b"], ["a", "b"], their_rows=[1, 2], our_rows=[1, 2], rows=3, keep_rows=[-1])
    weight, _ = taken(["a", "b"], ["a", "b"], their_rows=[1, 2], our_rows=[2, 1], rows=3, keep_rows=[0])
    assert torch.equal(weight, OLD[[0, 2, 1]])


@pytest.mark.parametrize(
    "rows",
    [
        pl.Series(["0.5", "1.5"]).cast(pl.Decimal(scale=1)),
        pl.Series([1, 2], dtype=pl.Date),
        pl.Series([1, 2], dtype=pl.Duration),
        pl.Series(["0", "1"], dtype=pl.Categorical),
        pl.Series([[0], [1]]),
        pl.Series([b"0", b"1"]),
    ],
    ids=lambda rows: str(rows.dtype),
)
def test_rows_of_other_types_are_not_counted_in_days(taken, rows):
    with pytest.raises(ValueError, match=r"column 'row' holds .*; expected row numbers: 0, 1, 2"):
        taken(["a", "b"], ["a", "b"], suffix="parquet", their_rows=rows)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("rows", [[0.5, 1.5], [0.0, 1.5], [True, False], ["0", "1.5"], [float("nan"), 1.0], [2**63, 0]])
def test_rows_are_whole_numbers(taken, suffix, rows):
    rows = pl.Series(rows, dtype=pl.UInt64) if 2**63 in rows else rows
    for which in ("their_rows", "our_rows"):
        with pytest.raises(ValueError, match="expected row numbers: 0, 1, 2|cannot be read as"):
            taken(["a", "b"], ["a", "b"], suffix=suffix, **{which: rows})


def test_ids_of_64_bits_without_a_sign(taken, tmp_path):
    big = [2**64 - 1, 2**63, 5]
    weight, _ = taken(big, big[::-1], suffix="parquet")
    assert torch.equal(weight, OLD[[2, 1, 0]])
    weight, _ = taken(big, [str(key) for key in big[::-1]], suffix="parquet")
    assert torch.equal(weight, OLD[[2, 1, 0]])
    for keys in (pl.Series(big, dtype=pl.UInt64), pl.Series([str(key) for key in big])):
        assert hash_rows(keys, "modulo", 7).tolist() == [key % 7 for key in big]
        assert hash_rows(keys[:1], "splitmix64", 10**6) == hash_rows(pl.Series([-1]), "splitmix64", 10**6)
    with pytest.raises(ValueError, match="not all ids are such .the first is '-1'.; use hash=fnv1a64"):
        hash_rows(pl.Series(["-1", str(2**63)]), "modulo", 7)


def test_an_id_of_100_kilobytes_is_one_id_among_others(taken):
    long = "x" * 100_000
    weight, _ = taken(["a", long], [long, "b", "a"], min_joined=0.5)
    assert torch.equal(weight, torch.stack([OLD[1], 0 * OLD[0], OLD[0]]))
    with pytest.raises(ValueError, match=r"key 'xxx.*… \(100,002 characters\) occurs 2 times") as error:
        taken([long, long], ["a"])
    assert len(str(error.value)) < 500
    keys = pl.Series([long, *(f"u{number}" for number in range(500)), ""])
    assert hash_rows(keys, "fnv1a64", 1000).tolist()[1:] == hash_rows(keys[1:], "fnv1a64", 1000).tolist()


def test_any_hash_is_a_vocabulary_with_shared_rows(taken):
    """Production's hash gave a and c one row: both begin as it."""
    with pytest.raises(ValueError, match="row 4 occurs 2 times .*or say collisions=share"):
        taken(["a", "b", "c"], ["c", "b", "a"], their_rows=[4, 1, 4])
    weight, audit = taken(["a", "b", "c"], ["c", "b", "a"], their_rows=[4, 1, 4], collisions="share")
    assert torch.equal(weight, OLD[[4, 1, 4]]) and audit.rows[0].rows_unused == 4
    with pytest.raises(ValueError, match="key 'a' occurs 2 times"):
        taken(["a", "a"], ["a"], collisions="share")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"rows": "grow", "keep_rows": [0]}, "keep_rows has no effect with rows=grow"),
        ({"collisions": "share"}, "collisions has no effect with rows=error"),
        ({"hash": "fnv1a64"}, "hash has no effect with rows=error"),
        ({"rows": "hash", "target_vocabulary": "a.csv", "keep_rows": [0]}, "with rows=hash all the source's rows are"),
        ({"min_joined": 0.5}, "min_joined has no effect"),
        ({"rows": "grow", "new_rows": "category_mean", "categories": "a.csv"}, "category_mean needs the raw ids"),
        ({"tolerance": "nan"}, "tolerance is nan; expected 0 or more"),
        ({"source": "(", "match": "regex"}, "source is no regular expression"),
        ({"source": "w.*", "match": "regex", "target": r"\2"}, "target .* cannot be expanded"),
        ({"exclude": ["a"]}, "exclude has no effect without match=prefix or regex"),
        ({"tolerance": 0.5}, "tolerance has no effect without a check"),
        ({"optimizer_kind": "adm"}, "optimizer_kind is 'adm'; expected one of adagrad"),
    ],
)
def test_settings_without_effect_or_meaning(tmp_path, rule, said):
    torch.save({"weight": OLD}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=said):
        warm_start(nn.Embedding(6, 2), tmp_path / "old.pt", {"rules": [{"source": "weight", **rule}]})
