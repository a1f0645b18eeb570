"""Optimizer state is taken where its meaning is known, whatever it is called; the audit names all that is not."""

import re

import pytest
import torch
from takeover import vocabulary
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from lumrec.warm_start import warm_start
from lumrec.warm_start.states import Dropped, Entry, matched, read_state

ROWS, WIDTH = 6, 4
TABLE = "embedding_bags.item.weight"


class Fused:
    """State as FBGEMM's fused optimizers show it: named by table, the first one always momentum1."""

    def __init__(self, **entries: torch.Tensor) -> None:
        self.entries = {f"item.{name}": value for name, value in entries.items()}

    def state_dict(self) -> dict:
        return {"state": {TABLE: self.entries}}


def table() -> nn.Module:
    model = nn.Module()
    model.embedding_bags = nn.ModuleDict({"item": nn.Embedding(ROWS, WIDTH)})
    return model


def saved(path, **entries: torch.Tensor):
    state = {TABLE: {f"item.{name}": value for name, value in entries.items()}}
    torch.save({"model": {TABLE: torch.randn(ROWS, WIDTH)}, "optim": {"state": state}}, path)
    return path


def rules(**more) -> dict:
    given = {"source_prefix": "model.", "optimizer_prefix": "optim.state."}
    return given | {"rules": [{"source": "", "match": "prefix", **more}]}


def moments() -> dict[str, torch.Tensor]:
    return {"momentum1": torch.randn(ROWS, WIDTH), "exp_avg_sq": torch.rand(ROWS, WIDTH)}


ADAGRAD, ROW_WISE = {"momentum1": torch.rand(ROWS, WIDTH)}, {"momentum1": torch.rand(ROWS)}
ADAM = moments()
PARTIAL = ADAM | {"exp_avg_sq": torch.rand(ROWS)}


@pytest.mark.parametrize("theirs", [ADAM, PARTIAL])
@pytest.mark.parametrize("ours", [ADAGRAD, ROW_WISE])
def test_adams_first_moment_is_no_sum_of_squares(tmp_path, theirs, ours):
    """Both are called momentum1; as sums of squares they would be nan after a step."""
    path, sums = saved(tmp_path / "adam.pt", **theirs), torch.full_like(ours["momentum1"], 7.0)
    audit = warm_start(table(), path, rules(), optimizer=Fused(momentum1=sums))
    assert (sums == 7).all()
    assert re.match("dropped: the source's is (partial_rowwise_)?adam .exp_avg, exp_avg_sq.", audit.rows[0].optimizer)
    assert audit.states_left == [f"optim.state.{TABLE}.item.{name}" for name in ("momentum1", "exp_avg_sq")]
    assert f"optimizer state not taken: {', '.join(audit.states_left)}" in audit.text()
    with pytest.raises(ValueError, match="is to be kept, but would be dropped: the source's is"):
        warm_start(table(), path, rules(optimizer="keep"), optimizer=Fused(momentum1=sums))
    model = table()
    for entry in ours:  # and Adagrad's sums are no first moments
        kept = {name: torch.zeros_like(value) for name, value in theirs.items()}
        audit = warm_start(model, saved(tmp_path / "adagrad.pt", **ours), rules(), optimizer=Fused(**kept))
        assert "adagrad (sum), the model's" in audit.rows[0].optimizer and not kept[entry].any()


@pytest.mark.parametrize(("theirs", "ours"), [(ADAM, ADAM), (ADAM, PARTIAL), (PARTIAL, ADAM), (PARTIAL, PARTIAL)])
def test_moments_go_on_as_moments(tmp_path, theirs, ours):
    kept = {name: torch.zeros_like(value) for name, value in ours.items()}
    audit = warm_start(table(), saved(tmp_path / "adam.pt", **theirs), rules(), optimizer=Fused(**kept))
    assert audit.rows[0].optimizer.startswith("kept") and audit.states_left == []
    assert torch.equal(kept["momentum1"], theirs["momentum1"])
    expected = theirs["exp_avg_sq"]
    if expected.dim() > kept["exp_avg_sq"].dim():
        expected = expected.mean(1)
    elif expected.dim() < kept["exp_avg_sq"].dim():
        expected = expected[:, None].expand(ROWS, WIDTH)
    torch.testing.assert_close(kept["exp_avg_sq"], expected)


def test_entries_that_do_not_say_what_they_are(tmp_path):
    """FBGEMM's own names of Adam's moments are momentum1 and momentum2; a rule may say what wrote them."""
    theirs = {"momentum1": ADAM["momentum1"], "momentum2": ADAM["exp_avg_sq"]}
    path, kept = saved(tmp_path / "raw.pt", **theirs), {name: torch.zeros(ROWS, WIDTH) for name in ADAM}
    audit = warm_start(table(), path, rules(), optimizer=Fused(**kept))
    assert "momentum1 beside momentum2 has no known meaning; say optimizer_kind" in audit.rows[0].optimizer
    warm_start(table(), path, rules(optimizer_kind="lamb"), optimizer=Fused(**kept))
    assert all(torch.equal(kept[name], value) for name, value in ADAM.items())
    for kind in ("adagrad", "rowwise_adagrad", "partial_rowwise_adam", "sgd"):
        with pytest.raises(ValueError, match=f"optimizer_kind={kind}, which keeps .* the source has momentum1"):
            warm_start(table(), path, rules(optimizer_kind=kind), optimizer=Fused(**kept))


def test_sums_of_squares_are_never_negative(tmp_path):
    """What LARS keeps looks like Adagrad's sums but for its signs."""
    path, sums = saved(tmp_path / "lars.pt", momentum1=torch.randn(ROWS, WIDTH)), torch.zeros(ROWS, WIDTH)
    with pytest.raises(
        ValueError, match=r"momentum1' has numbers that are below 0, so they are neither sums of squares nor"
    ):
        warm_start(table(), path, rules(), optimizer=Fused(momentum1=sums))
    audit = warm_start(table(), path, rules(optimizer_kind="sgd"), optimizer=Fused(momentum1=sums))
    assert "the source's is sgd (momentum_buffer), the model's adagrad" in audit.rows[0].optimizer and not sums.any()


def test_counters_of_row_wise_adagrad_do_not_change_its_sums(tmp_path):
    theirs = ROW_WISE | {"prev_iter": torch.ones(ROWS), "row_counter": torch.ones(ROWS)}
    sums = torch.zeros(ROWS)
    audit = warm_start(table(), saved(tmp_path / "counter.pt", **theirs), rules(), optimizer=Fused(momentum1=sums))
    assert audit.rows[0].optimizer == "kept" and torch.equal(sums, ROW_WISE["momentum1"])
    assert [name.split(".")[-1] for name in audit.states_left] == ["prev_iter", "row_counter"]


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)


def trained(make=torch.optim.Adam, **settings) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = Dense()
    optimizer = make(model.parameters(), **settings)
    for _ in range(2):
        optimizer.zero_grad()
        model.second(model.first(torch.randn(5, 3))).square().sum().backward()
        optimizer.step()
    return model, optimizer


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer, form: str) -> dict:
    state = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    return {form.format(name): entries for name, entries in state.items()}


def fresh(make=torch.optim.Adam) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Dense()
    optimizer = make(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the entries
    return model, optimizer


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({"momentum1": torch.ones(ROWS, dtype=torch.uint8)}, ROW_WISE, "momentum1 is torch.uint8, expected floating"),
        (
            {"momentum1": torch.ones(ROWS).to(torch.float8_e4m3fn)},
            ROW_WISE,
            "is torch.float8_e4m3fn, expected floating",
        ),
        ({"momentum1": torch.ones(ROWS, dtype=torch.int64)}, ROW_WISE, "momentum1 is torch.int64, expected floating"),
        (
            {"momentum1": torch.ones(ROWS * 2)},
            {"momentum1": torch.ones(ROWS * 2)},
            "is of column shards, but its table",
        ),
        (
            ADAM | {"step": torch.ones(ROWS)},
            ADAM | {"step": torch.ones(())},
            "step .6. has one number per something unk",
        ),
        (ADAM | {"max_exp_avg_sq": torch.rand(ROWS, WIDTH)}, ADAM, "momentum1 beside .* has no known meaning"),
        (ROW_WISE | {"sparse_ema": torch.rand(ROWS, WIDTH)}, ROW_WISE, "momentum1 beside sparse_ema has no known"),
        ({"exp_avg": torch.rand(ROWS, WIDTH)}, ADAM, "the source's is another optimizer .exp_avg."),  # Lion
    ],
)
def test_state_that_is_not_what_it_looks_like_is_dropped(tmp_path, theirs, ours, said):
    kept = {name: torch.full_like(value, 7.0) for name, value in ours.items()}
    audit = warm_start(table(), saved(tmp_path / "a.pt", **theirs), rules(), optimizer=Fused(**kept))
    assert re.search(f"dropped: .*{said}", audit.rows[0].optimizer), audit.rows[0].optimizer
    assert all((value == 7).all() for value in kept.values()) and len(audit.states_left) == len(theirs)


def test_the_audit_names_what_a_state_is_saved_under(tmp_path):
    """A CombinedOptimizer's key, or a parameter that is not in the file."""
    state = {f"old.{TABLE}": {"old.momentum1": ROW_WISE["momentum1"]}}
    torch.save({"model": {TABLE: torch.randn(ROWS, WIDTH)}, "optim": {"state": state}}, tmp_path / "a.pt")
    audit = warm_start(table(), tmp_path / "a.pt", rules(), optimizer=Fused(momentum1=torch.zeros(ROWS)))
    assert audit.rows[0].optimizer == f"kept, saved under 'old.{TABLE}'"


def test_settings_of_the_optimizer_that_have_no_effect(tmp_path):
    path, fused = saved(tmp_path / "a.pt", **ROW_WISE), Fused(momentum1=torch.zeros(ROWS))
    for given, said in [
        (rules() | {"optimizer_prefix": "optim.stat."}, "optimizer_prefix 'optim.stat.' begins no name of .*a.pt"),
        (rules(optimizer_kind="adam", optimizer="drop"), "optimizer_kind has no effect without another value of opt"),
        (rules(optimizer_kind="adam") | {"optimizer_prefix": ""}, "optimizer_kind of rule '' is given without optim"),
        (rules() | {"optimizer_parameters": [TABLE]}, "the source keeps its state by name: leave it out"),
    ]:
        with pytest.raises(ValueError, match=said):
            warm_start(table(), path, given, optimizer=fused)


@pytest.mark.parametrize("form", ["{}", "module.{}", "_dmp_wrapped_module.module.{}", "dense.{}"])
def test_names_of_wrappers_and_of_combined_optimizers(tmp_path, form):
    theirs, adam = trained()
    state = named_state(theirs, adam, form)
    torch.save({"model": theirs.state_dict(), "optim": {"state": state}}, tmp_path / "a.pt")
    model, optimizer = fresh()
    audit = warm_start(model, tmp_path / "a.pt", rules(optimizer="keep"), optimizer=optimizer)
    assert audit.states_left == []
    for name, parameter in model.named_parameters():
        for entry, value in state[form.format(name)].items():
            assert torch.equal(optimizer.state[parameter][entry], value)


def test_keyed_and_combined_optimizers_of_the_model(tmp_path):
    theirs, adam = trained()
    torch.save({"model": theirs.state_dict(), "optim": {"state": named_state(theirs, adam, "{}")}}, tmp_path / "a.pt")
    model = Dense()
    keyed = KeyedOptimizerWrapper(dict(model.named_parameters()), lambda parameters: torch.optim.Adam(parameters))
    keyed.init_state()
    warm_start(model, tmp_path / "a.pt", rules(optimizer="keep"), optimizer=CombinedOptimizer([("dense", keyed)]))
    ours, expected = (optimizer.state[module.first.weight] for optimizer, module in ((keyed, model), (adam, theirs)))
    assert torch.equal(ours["exp_avg_sq"], expected["exp_avg_sq"]) and ours["step"] == 2


def test_state_by_index_needs_names(tmp_path):
    theirs, adam = trained()
    torch.save({"model": theirs.state_dict(), "optim": adam.state_dict()}, tmp_path / "a.pt")
    model, optimizer = fresh()
    audit = warm_start(model, tmp_path / "a.pt", rules(), optimizer=optimizer)
    assert all("keeps its state by index" in row.optimizer for row in audit.rows) and len(audit.states_left) == 12
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="optimizer_parameters has 1 names, but the source has state of a parameter 3"):
        warm_start(model, tmp_path / "a.pt", rules() | {"optimizer_parameters": names[:1]}, optimizer=optimizer)
    for wrong, said in [
        (["first.bias", *names[1:]], "has 'first.bias' twice: give each parameter once"),
        (
            ["first.wieght", *names[1:]],
            "has 'first.wieght', which the source does not have; the nearest is 'first.weight'",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            warm_start(model, tmp_path / "a.pt", rules() | {"optimizer_parameters": wrong}, optimizer=optimizer)
    warm_start(model, tmp_path / "a.pt", rules(optimizer="keep") | {"optimizer_parameters": names}, optimizer=optimizer)
    for ours, expected in zip(model.parameters(), theirs.parameters()):
        assert torch.equal(optimizer.state[ours]["exp_avg"], adam.state[expected]["exp_avg"])


def test_state_by_index_of_an_optimizer_that_knew_its_names(tmp_path):
    theirs, _ = trained()
    adam = torch.optim.Adam(theirs.named_parameters())
    theirs.first(torch.randn(5, 3)).sum().backward()
    adam.step()
    torch.save({"model": theirs.state_dict(), "optim": adam.state_dict()}, tmp_path / "a.pt")
    model, optimizer = fresh()
    warm_start(model, tmp_path / "a.pt", rules(optimizer="keep"), optimizer=optimizer)
    assert torch.equal(optimizer.state[model.first.bias]["exp_avg"], adam.state[theirs.first.bias]["exp_avg"])


def test_the_state_in_a_file_of_its_own(tmp_path):
    theirs, adam = trained()
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    torch.save({"state": named_state(theirs, adam, "{}")}, tmp_path / "optim.pt")
    model, optimizer = fresh()
    given = {"rules": [{"source": "", "match": "prefix", "optimizer": "keep"}], "optimizer_source": "optim.pt"}
    given |= {"optimizer_prefix": "state.", "folder": str(tmp_path)}
    audit = warm_start(model, tmp_path / "model.pt", given, optimizer=optimizer)
    assert torch.equal(optimizer.state[model.second.weight]["exp_avg"], adam.state[theirs.second.weight]["exp_avg"])
    assert audit.states_left == [] and torch.equal(model.second.weight, theirs.second.weight)
    with pytest.raises(ValueError, match="optimizer_prefix 'stat.' begins no name of .*optim.pt"):
        warm_start(model, tmp_path / "model.pt", given | {"optimizer_prefix": "stat."}, optimizer=optimizer)
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere.pt"):
        warm_start(model, tmp_path / "model.pt", given | {"optimizer_source": "nowhere.pt"}, optimizer=optimizer)


OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
}


@pytest.mark.parametrize("theirs", OPTIMIZERS)
def test_of_torchs_optimizers_only_the_same_goes_on(tmp_path, theirs):
    old, old_optimizer = trained(OPTIMIZERS[theirs])
    state = named_state(old, old_optimizer, "{}")
    torch.save({"model": old.state_dict(), "optim": {"state": state}}, tmp_path / "old.pt")
    for ours, make in OPTIMIZERS.items():
        model, optimizer = fresh(make)
        audit = warm_start(model, tmp_path / "old.pt", rules(), optimizer=optimizer)
        assert audit.rows[0].optimizer.startswith("kept" if ours == theirs else "dropped: the source's is"), ours
        assert bool(audit.states_left) == (ours != theirs)


def test_new_rows_have_no_state_yet_and_old_ones_keep_theirs(tmp_path):
    path = saved(tmp_path / "old.pt", **ROW_WISE)
    vocabulary(tmp_path / "theirs.csv", list("abcdef"))
    vocabulary(tmp_path / "ours.csv", list("zfaxyb"))
    by_id = {"rows": "remap", "source_vocabulary": "theirs.csv", "target_vocabulary": "ours.csv", "new_rows": "mean"}
    given = rules() | {"folder": str(tmp_path), "rules": [{"source": TABLE, **by_id}]}
    sums = torch.ones(ROWS)
    warm_start(table(), path, given, optimizer=Fused(momentum1=sums))
    theirs = ROW_WISE["momentum1"]
    assert torch.equal(
        sums, torch.stack([theirs[5] * 0, theirs[5], theirs[0], theirs[0] * 0, theirs[0] * 0, theirs[1]])
    )


def test_state_of_column_shards_is_known_by_its_size():
    """[7544] of a table of 3,772 rows: one sum for each row and each of two shards."""
    entry = [Entry("t.momentum1", (7544,), torch.float32)]
    state = read_state(entry, (3772, 16))
    assert (state.optimizer, state.forms) == ("rowwise_adagrad", {"sum": "shard"})
    with pytest.raises(Dropped, match="the source's is rowwise_adagrad .sum., the model's adam"):
        matched(
            read_state(
                [Entry("t.momentum1", (8, 2), torch.float32), Entry("t.exp_avg_sq", (8, 2), torch.float32)], (8, 2)
            ),
            state,
        )
