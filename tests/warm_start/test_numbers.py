"""Numbers arrive as they are, or not at all: casts, bytes, names that collide, tied weights; checks of the result."""

import json
import re

import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from takeover import vocabulary
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from lumrec.warm_start import PlanError, warm_start
from lumrec.warm_start.rows import RowMap

EVERYTHING = {"rules": [{"source": "", "match": "prefix"}]}
CAST = {"rules": [{"source": "", "match": "prefix", "dtype": "cast"}]}


def one(value: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.register_buffer("weight", value)
    return model


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (70000.0, torch.float16, r"beyond float16 \(at most 65504\) in 1 rows from row 2 on .such as 70000"),
        (-1e39, torch.float32, r"beyond float32"),
        (1e39j, torch.complex64, r"beyond complex64"),
        (1e-9, torch.float16, r"1 of 12 numbers so small that float16 rounds them to 0"),
        (1e-320, torch.float32, r"1 of 12 numbers so small that float32 rounds them to 0"),
        (torch.nan, torch.float16, "not finite in 1 rows from row 2"),
        (torch.inf, torch.bfloat16, "not finite in 1 rows from row 2"),
        (2**31, torch.int32, "beyond int32 in 1 rows from row 2"),
        (300, torch.uint8, "beyond uint8"),
        (-1, torch.uint8, "beyond uint8"),
        (2, torch.bool, "beyond bool"),
    ],
)
def test_what_a_dtype_cannot_hold_is_not_cast(tmp_path, value, dtype, said):
    whole = not dtype.is_floating_point
    whole = whole and not dtype.is_complex
    kind = torch.complex128 if dtype.is_complex else torch.int64 if whole else torch.float64
    old = torch.ones(4, 3, dtype=kind)
    torch.save({"weight": old}, tmp_path / "good.pt")
    old[2, 1] = value
    torch.save({"weight": old}, tmp_path / "bad.pt")
    model = one(torch.zeros(4, 3, dtype=dtype))
    with pytest.raises(ValueError, match=said):
        warm_start(model, tmp_path / "bad.pt", CAST, block_bytes=24)
    assert not model.weight.any()
    warm_start(model, tmp_path / "good.pt", CAST)
    assert (model.weight == 1).all()


def test_few_numbers_that_become_0_are_counted(tmp_path):
    old = torch.ones(2000, 2)
    old[7] = 1e-9
    torch.save({"weight": old}, tmp_path / "old.pt")
    audit = warm_start(one(torch.zeros(2000, 2, dtype=torch.float16)), tmp_path / "old.pt", CAST)
    assert audit.rows[0].zeroed == 2 and "float32 → float16, 2 rounded to 0" in audit.text()


def test_a_target_without_numbers_is_refused(tmp_path):
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "old.pt")
    for dry_run in (False, True):
        with pytest.raises(ValueError, match=r"'weight' .1 such. is on the meta device and holds no numbers"):
            warm_start(nn.Embedding(2, 2, device="meta"), tmp_path / "old.pt", EVERYTHING, dry_run=dry_run)


def test_names_that_collide(tmp_path):
    torch.save({"model": {"weight": torch.ones(2, 2)}, "weight": torch.zeros(2, 2)}, tmp_path / "prefix.pt")
    with pytest.raises(ValueError, match="'model.weight' and 'weight' of the source are both 'weight' without source_"):
        warm_start(nn.Embedding(2, 2), tmp_path / "prefix.pt", {"source_prefix": "model.", **EVERYTHING})
    for content in ({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}, {0: torch.ones(1), "0": torch.zeros(1)}):
        torch.save(content, tmp_path / "nested.pt")
        with pytest.raises(ValueError, match="two values that are called '(a.b|0)', nested in different ways"):
            warm_start(nn.Linear(1, 1), tmp_path / "nested.pt", EVERYTHING)


def test_tied_weights_have_one_source(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    torch.save({"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2)}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="'a.weight' and 'b.weight' share their memory, and get 'a.weight' and"):
        warm_start(model, tmp_path / "old.pt", EVERYTHING)


def test_what_cannot_be_filled_is_refused(tmp_path):
    """Each of these was filled in part, in another place, or ended in a traceback."""

    class Copies(nn.Module):
        def get_extra_state(self):
            return torch.ones(3)

        def set_extra_state(self, state):
            pass

    def buffers(**values: torch.Tensor) -> nn.Module:
        model = nn.Module()
        for name, value in values.items():
            model.register_buffer(name, value)
        return model

    whole = torch.zeros(4, 2)
    for model, said in [
        (Copies(), "'_extra_state' .1 such. is a copy that the model's state_dict"),
        (buffers(a=torch.zeros(1, 2).expand(4, 2)), "is expanded, so that several of its numbers are one"),
        (buffers(a=whole.to_sparse()), "is a sparse tensor"),
        (buffers(a=whole, b=whole[1:3]), "'a' and 'b' share their memory, and get 'a' and 'b'"),
        (buffers(a=whole, b=whole.view(8)), "'a' and 'b' share their memory"),
        (buffers(a=whole, b=whole.t()), "share their memory"),
    ]:
        state = {name: torch.ones(value.shape) for name, value in model.state_dict().items()}
        torch.save(state, tmp_path / "old.pt")
        with pytest.raises(PlanError, match=said):
            warm_start(model, tmp_path / "old.pt", EVERYTHING)
    torch.save({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "old.pt")
    with pytest.raises(PlanError, match="'weight' .2 such. has no size yet: call the model once"):
        warm_start(nn.LazyLinear(2), tmp_path / "old.pt", EVERYTHING)
    sides = buffers(a=whole[:, :1], b=whole[:, 1:], c=torch.zeros(2))
    torch.save({name: torch.ones(value.shape) for name, value in sides.state_dict().items()}, tmp_path / "old.pt")
    warm_start(sides, tmp_path / "old.pt", EVERYTHING)
    assert (whole == 1).all()


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (torch.uint64, torch.int64, "these are not converted; save them as int64"),
        (torch.int64, torch.uint16, "these are not converted; save them as int64"),
        (torch.float32, torch.float8_e4m3fn, "8-bit floats are not read; save them as bfloat16"),
    ],
)
def test_dtypes_that_torch_cannot_compare_are_not_cast(tmp_path, theirs, ours, said):
    torch.save({"weight": torch.ones(4, 3).to(theirs)}, tmp_path / "old.pt")
    with pytest.raises(PlanError, match=said):
        warm_start(one(torch.zeros(4, 3).to(ours)), tmp_path / "old.pt", CAST)
    same = one(torch.zeros(4, 3).to(theirs))
    warm_start(same, tmp_path / "old.pt", EVERYTHING)
    assert same.weight.float().eq(1).all()


def test_names_with_brackets_are_listed_as_they_are(tmp_path):
    torch.save({"emb[0].weight": torch.ones(2, 2), "weight": torch.ones(2, 2)}, tmp_path / "old.pt")
    audit = warm_start(nn.Embedding(2, 2), tmp_path / "old.pt", EVERYTHING | {"unused": ["emb[0].weight"]})
    assert audit.unused == ["emb[0].weight"]


def test_parameters_that_are_not_contiguous_are_filled(tmp_path):
    model, old = one(torch.zeros(4, 3).t()), torch.randn(3, 4)
    torch.save({"weight": old}, tmp_path / "old.pt")
    warm_start(model, tmp_path / "old.pt", EVERYTHING)
    assert torch.equal(model.weight, old)


def quantised(dim: int, *, beside: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A table, and TorchRec's quantised form of it, as its own code writes it."""
    from torch.ao.quantization import PlaceholderObserver, QConfig
    from torchrec.quant import EmbeddingBagCollection as Quantised
    from torchrec.quant.embedding_modules import quant_prep_enable_quant_state_dict_split_scale_bias

    config = EmbeddingBagConfig(name="t", embedding_dim=dim, num_embeddings=6, feature_names=["f"])
    tables = EmbeddingBagCollection(tables=[config])
    weight = tables.state_dict()["embedding_bags.t.weight"].clone()
    if beside:
        quant_prep_enable_quant_state_dict_split_scale_bias(tables)
    as_int8 = PlaceholderObserver.with_args(dtype=torch.qint8)
    tables.qconfig = QConfig(activation=PlaceholderObserver, weight=as_int8)
    state = Quantised.from_float(tables).state_dict()
    return weight, {name: value.contiguous() for name, value in state.items()}


@pytest.mark.parametrize("dim", [4, 8, 12, 20])
@pytest.mark.parametrize("beside", [False, True])
def test_torchrecs_int8_tables_are_read_as_numbers(tmp_path, dim, beside):
    weight, state = quantised(dim, beside=beside)
    assert len(state) == (3 if beside else 1)
    save_file(state, tmp_path / "int8.safetensors")
    model = nn.Embedding(6, dim)
    rule = {"source": "embedding_bags.t.weight", "target": "weight"}
    with pytest.raises(ValueError, match="uint8: numbers of different kinds .*quantized=int8"):
        warm_start(model, tmp_path / "int8.safetensors", {"rules": [rule | {"columns": "slice"}]})
    audit = warm_start(model, tmp_path / "int8.safetensors", {"rules": [rule | {"quantized": "int8"}]}, block_bytes=50)
    assert (model.weight - weight).abs().max() <= (weight.amax(1) - weight.amin(1)).max() / 255
    assert audit.rows[0].dtype == "float32 (from int8)" and audit.unused == []
    if beside or dim != 8:  # 16 bytes a row are both forms' width there
        with pytest.raises(ValueError, match="bytes a row, which hold its"):
            warm_start(
                nn.Embedding(6, dim), tmp_path / "int8.safetensors", {"rules": [rule | {"quantized": "int8_fused"}]}
            )


@pytest.mark.parametrize("dim", [4, 7, 8])
def test_fbgemms_fused_int8_rows_are_read_as_numbers(tmp_path, dim):
    weight = torch.randn(6, dim)
    torch.save({"weight": torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(weight)}, tmp_path / "fused.pt")
    model = nn.Embedding(6, dim)
    warm_start(model, tmp_path / "fused.pt", {"rules": [{"source": "weight", "quantized": "int8_fused"}]})
    torch.testing.assert_close(model.weight.detach(), weight, atol=float(weight.max() - weight.min()) / 255, rtol=0)
    narrow = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(torch.randn(6, 8), 4)
    torch.save({"weight": torch.cat([narrow, torch.zeros(6, 8, dtype=torch.uint8)], dim=1)}, tmp_path / "int4.pt")
    with pytest.raises(ValueError, match="rows do not span the bytes from 0 to 255"):  # int4, filled up to 16 bytes
        warm_start(nn.Embedding(6, 8), tmp_path / "int4.pt", {"rules": [{"source": "weight", "quantized": "int8"}]})
    torch.save({"weight": weight}, tmp_path / "float.pt")
    with pytest.raises(ValueError, match=r"is float32 \[6, \d\]; expected bytes"):
        warm_start(model, tmp_path / "float.pt", {"rules": [{"source": "weight", "quantized": "int8"}]})


def test_safetensors_in_several_files(tmp_path):
    saved = {"weight": torch.randn(3, 2), "bias": torch.randn(3)}
    for file, name in (("model-1.safetensors", "weight"), ("model-2.safetensors", "bias")):
        save_file({name: saved[name]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    files = {"weight": "model-1.safetensors", "bias": "model-2.safetensors"}

    def write(weight_map: object) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    write(files)
    model = nn.Linear(2, 3)
    audit = warm_start(model, index, EVERYTHING)
    assert audit.kind == "safetensors" and all(torch.equal(model.get_parameter(n), v) for n, v in saved.items())
    for wrong, said in [
        (files | {"bias": "model-1.safetensors"}, "says that model-1.safetensors holds 'bias', which it does not"),
        ({"weight": "model-1.safetensors"} | {"other": "model-2.safetensors"}, "holds 'other', which it does not"),
        (files | {"bias": "../model-2.safetensors"}, "expected names of .safetensors files in its own folder"),
        (files | {"bias": "model-3.safetensors"}, "model-3.safetensors; expected a part of this checkpoint; copy all"),
        (["a"], "is no index of safetensors files"),
    ]:
        write(wrong)
        with pytest.raises(ValueError, match=re.escape(said)):
            warm_start(model, index, EVERYTHING)
    save_file(saved, tmp_path / "model-1.safetensors")
    write(files)
    with pytest.raises(ValueError, match="model-1.safetensors holds 'bias', of which .* knows nothing"):
        warm_start(model, index, EVERYTHING)


def test_rows_that_production_has_are_compared(tmp_path):
    old, folder = torch.arange(12.0).view(6, 2), {"folder": str(tmp_path)}
    torch.save({"weight": old}, tmp_path / "old.pt")
    vocabulary(tmp_path / "theirs.csv", list("abcdef"))
    vocabulary(tmp_path / "ours.csv", list("zfa"))
    by_id = {"source": "weight", "rows": "remap", "new_rows": "zero", "check": "rows.parquet"}
    by_id |= {"source_vocabulary": "theirs.csv", "target_vocabulary": "ours.csv"}

    def check(rows: dict, **rule):
        pl.DataFrame(rows).write_parquet(tmp_path / "rows.parquet")
        model = nn.Embedding(3, 3)
        more = {"columns": "slice_pad_zero", "parts": [[0, 1, 2], [1, 1, 0]]}
        return warm_start(model, tmp_path / "old.pt", {**folder, "rules": [by_id | more | rule]})

    right = {"key": ["a", "f", "c"], "values": [[0.0, 1.0], [10.0, 11.0], [4.0, 5.0]]}
    audit = check(right)
    assert audit.rows[0].checked == 2 and "2 checked" in audit.text()
    wrong = right | {"values": [[0.0, 1.0], [10.0, 11.25], [4.0, 5.0]]}
    with pytest.raises(
        ValueError, match=r"1 of 2 rows of 'weight' differ .* row 1 by 0.25: the model is filled and mus"
    ):
        check(wrong)
    check(wrong, tolerance=0.3)
    for rows, said in [
        ({"key": ["q"], "values": [[0.0, 1.0]]}, "has no row of 'weight'"),
        ({"key": ["a"], "values": [[0.0]]}, "expected lists of the source's 2 columns"),
        ({"row": [0], "values": [[0.0, 1.0]]}, "has no column 'key'; it has row, values"),
    ]:
        with pytest.raises(ValueError, match=said):
            check(rows)
    pl.DataFrame({"row": [1], "values": [[2.0, 3.5]]}).write_parquet(tmp_path / "rows.parquet")
    plain = {"rules": [{"source": "weight", "check": "rows.parquet"}], **folder}
    with pytest.raises(ValueError, match="row 1 by 0.5"):
        warm_start(nn.Embedding(6, 2), tmp_path / "old.pt", plain)
    pl.DataFrame({"row": [1.5], "values": [[2.0, 3.0]]}).write_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="column 'row' holds Float64 such as 1.5; expected row numbers"):
        warm_start(nn.Embedding(6, 2), tmp_path / "old.pt", plain)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="rows.parquet cannot be read as .parquet"):
        warm_start(nn.Embedding(6, 2), tmp_path / "old.pt", plain)


def test_scores_that_production_gave_are_compared(tmp_path):
    production, x = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)), torch.randn(5, 3)
    torch.save(production.state_dict(), tmp_path / "old.pt")
    expected = production.eval()(x).detach()

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))

    ours = model()
    audit = warm_start(ours, tmp_path / "old.pt", EVERYTHING, check=lambda filled: (filled(x), expected))
    assert audit.applied and audit.checked == 5 and "5 scores equal production's" in audit.text() and ours.training
    for scores, said in [
        (expected + 1e-3, "5 of 5 scores differ from production's by more than 1e-05, at most by 0.001"),
        (expected * torch.nan, "5 of 5 scores differ"),
        (expected[:2], r"gave scores of \[5, 1\], production's are \[2, 1\]"),
    ]:
        with pytest.raises(ValueError, match=f"{said}.*must not be used"):
            warm_start(model(), tmp_path / "old.pt", EVERYTHING, check=lambda filled, s=scores: (filled(x), s))
    warm_start(model(), tmp_path / "old.pt", EVERYTHING, check=lambda f: (f(x), expected + 1e-3), tolerance=1e-2)
    for given in (torch.ones(2), None, {"scores": expected}):  # two numbers are no scores and their expectation
        with pytest.raises(ValueError, match="expected the model's scores and production's"):
            warm_start(model(), tmp_path / "old.pt", EVERYTHING, check=lambda filled, given=given: given)
    for tolerance in (torch.nan, torch.inf, -1.0):
        with pytest.raises(ValueError, match="tolerance is .*expected 0 or more"):
            warm_start(model(), tmp_path / "old.pt", EVERYTHING, check=lambda f: (f(x), x), tolerance=tolerance)


def test_an_audit_is_saved_where_it_is_told(tmp_path):
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "old.pt")
    warm_start(nn.Embedding(2, 2), tmp_path / "old.pt", EVERYTHING).save(str(tmp_path / "new" / "folder"))
    assert json.loads((tmp_path / "new" / "folder" / "warm_start.json").read_text())["applied"]
    for place in ("old.pt", "old.pt/below"):
        with pytest.raises(ValueError, match="the audit cannot be saved in .*: that is a file; give a folder"):
            warm_start(nn.Embedding(2, 2), tmp_path / "old.pt", EVERYTHING).save(tmp_path / place)


def test_rows_by_place_take_no_memory_for_each_row():
    for rows in (RowMap(10**12, 10**12), RowMap(10**12, 10**11)):
        assert (rows.num_new, rows.num_unused) == (10**12 - rows.num_source_rows, 0)
        assert rows.sources(10**11 - 1, 10**11).tolist() == [10**11 - 1] and rows.taken(5, 7).all()
    assert RowMap(4, 4).stacked(10**9) == RowMap(4 * 10**9, 4 * 10**9)
    assert RowMap(3, 2).stacked(2).source_row_R.tolist() == [0, 1, -1, 2, 3, -1]
