"""Rankers: DIN's fast path equals its twins, rows do not see each other, and planted signals are found in seconds."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_rankers import FEATURES, MODELS, TABLES, Row, make_batch, make_ranker, make_rows, random_knowledge
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.metrics.ranking import auc
from lumrec.modules.kernels import jagged
from lumrec.modules.kernels.jagged import segment_softmax
from lumrec.modules.knowledge import KnowledgeBatch, KnowledgeFusion
from lumrec.modules.rankers.base import Dice, RankBatch, Ranker, RankRow
from lumrec.modules.rankers.din import Din, LocalActivation
from lumrec.modules.rankers.sim import Sim
from lumrec.modules.rankers.twin import Twin
from lumrec.modules.tokens import make_kjt, make_tables

WITHOUT_TIME = [name for name in MODELS if name.split()[0] in ("din", "dlrm")]


# --- DIN's activation unit ---


def unit_inputs(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """token_UD, target_BI, history_T, offsets_B1."""
    random = torch.Generator().manual_seed(seed)
    token_UD = torch.randn(11, 6, generator=random, dtype=dtype)
    target_BI = torch.randn(len(lengths), 4, generator=random, dtype=dtype)
    history_T = torch.randint(11, (sum(lengths),), generator=random)
    return token_UD, target_BI, history_T, torch.tensor([0, *lengths]).cumsum(0)


def make_unit(activation: str = "prelu", softmax: bool = False) -> LocalActivation:
    torch.manual_seed(1)
    unit = LocalActivation(6, 4, hidden_dim=5, activation=activation, softmax=softmax).double()
    with torch.no_grad():
        unit.bias.fill_(0.3)
    return unit


def gradients(unit: LocalActivation, function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Output, and gradients of a weighted sum of it by both inputs and every parameter."""
    token_UD, target_BI = (x.clone().requires_grad_() for x in inputs[:2])
    unit.zero_grad()
    output = function(token_UD, target_BI, *inputs[2:])
    (output * torch.arange(output.numel(), dtype=output.dtype).view_as(output).cos()).sum().backward()
    parameters = [p.grad if p.grad is not None else torch.zeros_like(p) for p in unit.parameters()]
    return [output.detach(), token_UD.grad, target_BI.grad, *(p.clone() for p in parameters)]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.sampled_from([0, 0, 1, 2, 7, 30]), min_size=1, max_size=12),
    chunk_bytes=st.sampled_from([1, 100, 1000, 1 << 20]),
    activation=st.sampled_from(["prelu", "relu"]),
)
def test_chunks_equal_the_plain_twin_forward_and_backward(lengths, chunk_bytes, activation):
    inputs, unit = unit_inputs(lengths), make_unit(activation)
    before, jagged.CHUNK_BYTES = jagged.CHUNK_BYTES, chunk_bytes
    try:
        got = gradients(unit, unit, inputs)
    finally:
        jagged.CHUNK_BYTES = before
    for x, y in zip(got, gradients(unit, unit.plain, inputs), strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)


def test_gradients_are_those_of_finite_differences():
    token_UD, target_BI, history_T, offsets_B1 = unit_inputs([2, 0, 3])
    unit = make_unit()
    names = [name for name, _ in unit.named_parameters()]

    def function(token_UD, target_BI, *parameters):
        arguments = (token_UD, target_BI, history_T, offsets_B1)
        return torch.func.functional_call(unit, dict(zip(names, parameters)), arguments)

    inputs = [token_UD, target_BI, *(p.detach().clone() for p in unit.parameters())]
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("name", MODELS)
def test_columns_of_the_over_archs_input(name):
    knowledge = KnowledgeFusion("direct", 2, 4, 1, 5)
    columns = make_ranker(name, knowledge=knowledge).input_columns()
    assert list(columns) == ["user", "hour", "item", "genres", "interest", "statistics", "knowledge"]
    assert [columns[name] for name in ("user", "hour", "item", "genres")] == [8] * 4
    assert (columns["statistics"], columns["knowledge"]) == (3, 2 + 5) and columns["interest"] > 0
    assert make_ranker(name).input_columns() == {k: v for k, v in columns.items() if k != "knowledge"}


@pytest.mark.parametrize("softmax", [False, True])
def test_jagged_unit_equals_the_papers_padded_one(softmax):
    """DIN as it is written: W [h; t; h*t; h-t] over histories padded to the longest, masked."""
    lengths = [3, 0, 5, 1]
    token_UD, target_BI, history_T, offsets_B1 = unit_inputs(lengths)
    unit = make_unit(softmax=softmax)
    token_dim, item_dim, hidden = 6, 4, 5
    torch.manual_seed(2)
    # Four matrices of the paper; a target's feedback part is zero, as it has none.
    w_history, w_difference = torch.randn(2, token_dim, hidden, dtype=torch.float64)
    w_target, w_product = torch.randn(2, item_dim, hidden, dtype=torch.float64)
    with torch.no_grad():
        unit.token_HD.copy_((w_history + w_difference).T)
        unit.product_HI.copy_(w_product.T)
        unit.target.weight.copy_((w_target - w_difference[:item_dim]).T)
    padded_BLD = torch.zeros(4, 5, token_dim, dtype=torch.float64)
    mask_BL = torch.arange(5) < torch.tensor(lengths)[:, None]
    padded_BLD[mask_BL] = token_UD[history_T]
    target_BLD = F.pad(target_BI, (0, token_dim - item_dim))[:, None].expand_as(padded_BLD)
    hidden_BLH = (
        padded_BLD @ w_history
        + target_BLD[..., :item_dim] @ w_target
        + (padded_BLD * target_BLD)[..., :item_dim] @ w_product
        + (padded_BLD - target_BLD) @ w_difference
        + unit.target.bias
    )
    weight_BL = unit.activation(hidden_BLH) @ unit.output_H + unit.bias
    if softmax:
        weight_BL = weight_BL.masked_fill(~mask_BL, -1e30).softmax(dim=1)
    expected = ((weight_BL * mask_BL)[:, :, None] * padded_BLD).sum(dim=1)
    torch.testing.assert_close(unit(token_UD, target_BI, history_T, offsets_B1), expected, atol=1e-10, rtol=1e-10)


def test_float32_chunks_are_as_exact_as_the_plain_twin():
    lengths = [int(x) for x in torch.randint(0, 60, (300,), generator=torch.Generator().manual_seed(0))]
    inputs = unit_inputs(lengths)
    single = tuple(x.float() if x.is_floating_point() else x for x in inputs)
    unit = make_unit()
    exact = gradients(unit, unit.plain, inputs)
    unit = unit.float()
    for x, plain, fast in zip(exact, gradients(unit, unit.plain, single), gradients(unit, unit, single), strict=True):
        assert (fast - x).norm() <= 2 * (plain - x).norm() + 1e-7 * x.norm()


def test_segment_softmax_by_hand():
    x, segment = torch.tensor([0.0, 1000.0, 0.0, 0.0]), torch.tensor([0, 2, 0, 2])
    torch.testing.assert_close(segment_softmax(x, segment, 4), torch.tensor([0.5, 1.0, 0.5, 0.0]))


def test_dice():
    dice = Dice(2)
    with torch.no_grad():
        dice.alpha.copy_(torch.tensor([0.25, 0.5]))
    x = torch.randn(50, 2) * 3 + 1
    p = torch.sigmoid((x - x.mean(0)) / x.std(0, unbiased=False))
    torch.testing.assert_close(dice(x), p * x + (1 - p) * dice.alpha * x, atol=1e-5, rtol=1e-5)
    assert dice(x[:1]).isfinite().all() and dice(x[:0]).shape == (0, 2)
    dice.eval()
    torch.testing.assert_close(dice(x)[:3], dice(x[:3]))


# --- invariances of whole rankers ---


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [[3, 0, 50, 1, 7], [0, 0], [4]])
def test_rows_do_not_see_each_other(name: str, lengths: list[int]):
    """A batch equals its rows one by one, in any order."""
    ranker = make_ranker(name).eval()
    rows = make_rows(lengths)
    together = ranker(make_batch(rows))
    assert together.shape == (len(rows),) and together.dtype == torch.float32
    torch.testing.assert_close(torch.cat([ranker(make_batch([row])) for row in rows]), together)
    torch.testing.assert_close(ranker(make_batch(rows[::-1])), together.flip(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_history_counts_and_that_of_other_rows_does_not(name: str):
    ranker = make_ranker(name).eval()
    rows = make_rows([6, 6, 6])
    before = ranker(make_batch(rows))
    rows[1].history[2] = (39, 3)
    after = ranker(make_batch(rows))
    assert not torch.equal(after[1], before[1])
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("name", WITHOUT_TIME)
def test_the_order_of_the_history_does_not_matter_but_its_feedback_does(name: str):
    ranker = make_ranker(name).eval()
    row = Row(5, [(1, 1), (2, 2), (3, 3)])
    other_order, other_feedback = Row(5, [(3, 3), (1, 1), (2, 2)]), Row(5, [(1, 2), (2, 2), (3, 3)])
    first, second, third = ranker(make_batch([row, other_order, other_feedback]))
    torch.testing.assert_close(first, second)
    assert not torch.isclose(first, third, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_history_an_unknown_item_and_no_dense_features_work(name: str):
    ranker = make_ranker(name, num_statistics=0)
    batch = make_batch([Row(0, []), Row(0, []), Row(0, [(0, 1)])], num_statistics=0)
    ranker(batch).sum().backward()
    assert all(p.grad.isfinite().all() for p in ranker.parameters() if p.grad is not None)
    assert ranker.eval()(batch).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str):
    fusion = KnowledgeFusion("both", 2, 4, 2, 3)
    ranker = make_ranker(name, knowledge=fusion, dropout=0.1)
    rows = make_rows([5] * 60)
    logits, own_loss = ranker(make_batch(rows, knowledge=random_knowledge(len(rows))), with_loss=True)
    (logits.square().sum() + own_loss).backward()
    assert [name for name, p in ranker.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["din", "dlrm", "dien", "sim", "twin"])
def test_knowledge_is_an_addition_to_the_plain_model(name: str):
    """With the knowledge's columns weighted 0 the ranker is the one without."""
    rows = make_rows([4, 0, 9])
    plain = make_ranker(name).eval()
    with_knowledge = make_ranker(name, knowledge=KnowledgeFusion("both", 2, 4, 2, 3)).eval()
    state = plain.state_dict()
    first = with_knowledge.over_arch[0]
    with torch.no_grad():
        for key, value in with_knowledge.state_dict().items():
            if key in state and value.shape == state[key].shape:
                value.copy_(state[key])
        first.weight.zero_()
        first.weight[:, : plain.over_arch[0].in_features] = plain.over_arch[0].weight
    batch = make_batch(rows, knowledge=random_knowledge(3))
    torch.testing.assert_close(with_knowledge(batch), plain(batch))


def test_wrong_batches_are_refused():
    ranker = make_ranker("din", knowledge=KnowledgeFusion("matching", 2, 4, 1, 3))
    with pytest.raises(ValueError, match="reads a LUM's knowledge and the batch has none"):
        ranker(make_batch(make_rows([2])))
    with pytest.raises(ValueError, match="the batch has 2 statistics; expected 3"):
        ranker(make_batch(make_rows([2]), num_statistics=2))
    batch = make_batch(make_rows([2]))
    batch.tokens = make_kjt(["user"], {}, stride=batch.tokens.stride())
    with pytest.raises(ValueError, match="these tables are called with"):
        ranker(batch)
    with pytest.raises(ValueError, match="activation is 'gelu'; expected one of relu, prelu, dice"):
        make_ranker("dlrm", activation="gelu")


def test_a_batch_moves_with_its_knowledge():
    batch = make_batch(make_rows([2, 3]), knowledge=random_knowledge(2))
    moved = batch.to("cpu")
    assert moved.num_tokens == batch.num_tokens and torch.equal(moved.knowledge.e_BD, batch.knowledge.e_BD)
    assert moved.tokens.keys() == batch.tokens.keys() and len(moved) == 2


# --- losses of their own ---


def test_token_l2_by_hand():
    """Token 5 stands in the batch twice (as a target), (1, 1) three times, (2, 2) once; row 0 of the tables is 0."""
    ranker = make_ranker("din", token_l2=0.5)
    batch = make_batch([Row(5, [(1, 1), (1, 1)]), Row(5, [(1, 1), (2, 2)])])
    token_UD = ranker.look_up(batch).token_UD
    counts = {(1, 1): 3, (2, 2): 1, (5, 0): 2}
    expected = sum(token_UD[u].square().sum() / counts[pair] for u, pair in enumerate(sorted(counts)))
    torch.testing.assert_close(ranker(batch, with_loss=True)[1], 0.25 * expected)


def test_diens_auxiliary_loss_by_hand():
    """Two pairs; with one item in all histories there is no negative."""
    ranker = make_ranker("dien").train()
    batch = make_batch([Row(5, [(1, 1), (1, 2), (1, 1)]), Row(5, [(1, 3)]), Row(5, [])])
    looked, state_TH = ranker.look_up(batch), torch.randn(4, ranker.item_dim)
    item_I = looked.token_UD[batch.history_T[0], : ranker.item_dim]
    expected = F.softplus(-(state_TH[:2] @ item_I)).mean()
    torch.testing.assert_close(ranker.auxiliary_loss(state_TH, looked.token_UD, batch), expected)
    empty = make_batch([Row(5, [])])
    logits, loss = ranker(empty, with_loss=True)
    assert loss == 0 and logits.shape == (1,)
    assert ranker.eval()(batch, with_loss=True)[1] == 0


def test_sims_exact_unit_equals_attention_over_the_keys_of_each_event():
    """By the words of equations 5 and 6, row by row and head by head; key and query here have numbers of their own."""
    rows, batch = make_rows([5, 0, 8]), make_batch(make_rows([5, 0, 8]))
    ranker = make_ranker("sim").eval()
    nn.init.normal_(ranker.key.weight)
    looked = ranker.look_up(batch)
    place_BS = torch.full((3, 8), 13)
    place_BS[0, :5], place_BS[2] = torch.arange(5), torch.arange(5, 13)
    index_BS, age_BS = F.pad(batch.history_T, (0, 1), value=batch.num_tokens), F.pad(batch.age_T, (0, 1), value=-1)
    token_ZD = F.pad(looked.token_UD, (0, 0, 0, 1))
    long_BX = ranker.exact(token_ZD, looked.target_BI, index_BS[place_BS], age_BS[place_BS]).view(3, 4, -1)
    assert not long_BX[1].any()
    for b, row in ((0, rows[0]), (2, rows[2])):
        places = place_BS[b, : len(row.history)]
        gap_SG = ranker.gap_NG[torch.log2(1 + batch.age_T[places]).long()]
        z_SX = torch.cat([looked.token_UD[batch.history_T[places]], gap_SG], dim=1)
        query_X, key_SX = ranker.query(looked.target_BI[b]), ranker.key(z_SX)
        for head in range(4):
            weight_S = (key_SX[:, head::4] @ query_X[head::4] / 16**0.5).softmax(0)
            torch.testing.assert_close(long_BX[b, head], weight_S @ z_SX)


def test_twins_attention_equals_equation_4_event_by_event():
    """Row by row and head by head, over all events of a history that is short enough for all of them to be found."""
    rows, batch = make_rows([5, 0, 8]), make_batch(make_rows([5, 0, 8]))
    ranker = make_ranker("twin").eval()
    looked = ranker.look_up(batch)
    interest_BX = ranker.interest(looked, batch).interest_BX
    torch.testing.assert_close(interest_BX[1], ranker.output.bias)
    for b, first in ((0, 0), (2, 5)):
        places = torch.arange(first, first + len(rows[b].history))
        token_SD = looked.token_UD[batch.history_T[places]]
        age_S = torch.log2(1 + batch.age_T[places]).long()
        count_S = torch.log2(1 + batch.category_count_T[places].float()).long()
        cross_SJ = torch.stack(
            [ranker.age_N[age_S], ranker.count_N[count_S], ranker.compress[0](token_SD[:, ranker.item_dim :])[:, 0]], 1
        )
        query_X, key_SX = ranker.query(looked.target_BI[b]), ranker.key(token_SD[:, : ranker.item_dim])
        value_SV = ranker.value(token_SD) + ranker.age_value_NV[age_S] + ranker.count_value_NV[count_S]
        sum_V = torch.zeros(64)
        for head in range(4):
            logit_S = key_SX[:, head::4] @ query_X[head::4] / 16**0.5 + cross_SJ @ ranker.beta_JH[:, head]
            sum_V[head::4] = logit_S.softmax(0) @ value_SV[:, head::4]
        torch.testing.assert_close(interest_BX[b], ranker.output(sum_V))


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="auxiliary_weight is 0"):
        Sim(None, auxiliary_weight=0)
    with pytest.raises(ValueError, match="0 events searched"):
        Twin(None, num_searched=0)
    batch = make_batch(make_rows([2]))
    batch.age_T = None
    with pytest.raises(ValueError, match="reads age_T and the batch has none"):
        make_ranker("sim")(batch)


# --- planted signals ---


def train(ranker: Ranker, make, *, steps: int) -> float:
    """AUC on fresh rows after `steps` batches of 256 fresh rows each."""
    optimizer = torch.optim.Adam(ranker.parameters(), lr=1e-2)
    for seed in range(steps):
        batch = make(seed)
        logits, own_loss = ranker(batch, with_loss=True)
        loss = F.binary_cross_entropy_with_logits(logits, batch.label_B) + own_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    batch = make(10_000)
    with torch.no_grad():
        return auc(batch.label_B.numpy(), ranker.eval()(batch).numpy())


def liked_before(seed: int) -> RankBatch:
    """Liked: an item that stands in the history with rating 3 (the others stand there with rating 1)."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for target in torch.randint(1, 40, (256,), generator=random).tolist():
        items = {target, *torch.randint(1, 40, (5,), generator=random).tolist()}
        ratings = (1 + 2 * torch.randint(2, (len(items),), generator=random)).tolist()
        history = list(zip(items, ratings))
        rows.append(Row(target, history, label=float((target, 3) in history)))
    return make_batch(rows, num_statistics=0)


def category_liked(seed: int, *, length: int = 6, first: int = 0, last: int = 6) -> RankBatch:
    """Liked: a target of a category (item % 9) of which one event got 3; those of all others got 1, fewer or more.

    The one event stands between the places `first` and `last` of the history, and no other has its category.
    """
    random = torch.Generator().manual_seed(seed)
    items = torch.randint(1, 39, (256, length), generator=random)
    targets = torch.randint(1, 40, (256,), generator=random)
    place_B = torch.randint(first, last, (256,), generator=random)
    ratings = 1 + 2 * torch.randint(2, (256, length), generator=random)
    rows = []
    for b, target in enumerate(targets.tolist()):
        history = [(i + 1 if i % 9 == target % 9 else i, r) for i, r in zip(items[b].tolist(), ratings[b].tolist())]
        rating = history[place_B[b]][1]
        history[place_B[b]] = (target % 9 + 9 if target >= 9 else target, rating)
        rows.append(Row(target, history, label=float(rating == 3)))
    return make_batch(rows, num_statistics=0)


@functools.cache  # three rankers read the same batches
def far_back(seed: int) -> RankBatch:
    """The same, where the one event is among the first 14 of 30, behind what SIM's short-term interest reads."""
    return category_liked(seed, length=30, first=0, last=14)


def mood(seed: int) -> RankBatch:
    """Liked: anything, by a user whose history has more ratings of 3 than of 1."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(256):
        items, ratings = torch.randint(1, 40, (5,), generator=random), torch.randint(2, (5,), generator=random)
        history = [(i, 1 + 2 * r) for i, r in zip(items.tolist(), ratings.tolist())]
        rows.append(Row(1 + len(rows) % 39, history, label=float(ratings.sum() >= 3)))
    return make_batch(rows, num_statistics=0)


def test_din_finds_what_the_same_item_got_in_the_history():
    assert train(make_ranker("din", num_statistics=0), liked_before, steps=100) > 0.95


@pytest.mark.parametrize("name", ["din", "dien", "sim", "sim hard", "twin"])
def test_rankers_find_whether_the_category_of_the_target_was_liked(name: str):
    assert train(make_ranker(name, num_statistics=0), category_liked, steps=100) > 0.95


@pytest.mark.parametrize("name", ["sim", "sim hard", "twin"])
def test_searching_rankers_find_it_far_back(name: str):
    assert train(make_ranker(name, num_statistics=0), far_back, steps=100) > 0.95


def test_dlrm_finds_the_mood_of_the_history():
    assert train(make_ranker("dlrm", num_statistics=0), mood, steps=40) > 0.97


@pytest.mark.parametrize("name", ["din", "dlrm", "dien", "sim", "twin"])
def test_rankers_find_a_signal_that_only_knowledge_has(name: str):
    """Liked: where the answer "liked" fits the item better than the answer "disliked" does; two LUMs, two spaces."""

    def informed(seed: int) -> RankBatch:
        random = torch.Generator().manual_seed(seed)
        knowledge = KnowledgeBatch(
            torch.randn(256, 2, 8, generator=random),
            torch.randn(256, 8, generator=random),
            torch.zeros(256, 2),
            torch.ones(256, 2, dtype=torch.bool),
            torch.arange(256) % 2,
        )
        rows = make_rows([1] * 256, seed=seed)
        batch = make_batch(rows, num_statistics=0, knowledge=knowledge)
        fits = torch.einsum("bnd,bd->bn", knowledge.o_BND, knowledge.e_BD)
        batch.label_B = (fits[:, 0] > fits[:, 1]).float()
        return batch

    fusion = KnowledgeFusion("matching", 2, 8, 2, 4)
    assert train(make_ranker(name, num_statistics=0, knowledge=fusion), informed, steps=40) > 0.97


def test_the_base_needs_a_subclass():
    with pytest.raises(TypeError, match="abstract .*interest.*make_interest"):
        Ranker(
            make_tables(TABLES, FEATURES),
            item_features=["item", "genres"],
            feedback_features=["rating"],
            row_features=["user", "hour"],
            num_statistics=0,
            hidden_dims=[4],
        )
    assert issubclass(Din, nn.Module)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_from_lists_scores_as_one_from_tensors(name):
    """Whether or not equal tokens are one bag; genres of several values, an empty history, statistics."""
    ranker, rows = make_ranker(name).eval(), make_rows([3, 0, 12])
    lists = [
        RankRow(
            target=item_bags(row.target),
            history=[{**item_bags(item), "rating": rating} for item, rating in row.history],
            row={"user": row.user, "hour": row.user % 4},
            statistics=row.dense,
            label=row.label,
            ages=[100.0 * (i + 1) for i in reversed(range(len(row.history)))],
        )
        for row in rows
    ]
    expected, made = make_batch(rows), RankBatch.from_lists(lists, ranker, category="genres")
    assert torch.equal(made.label_B, expected.label_B)
    torch.testing.assert_close(ranker(made), ranker(expected))


def item_bags(item: int) -> dict[str, int | list[int]]:
    return {"item": item, "genres": [item % 9, item // 9][: 1 + item % 2]}


def test_lists_that_make_no_batch():
    with pytest.raises(ValueError, match="row 0 has 1 earlier events and 0 ages"):
        RankBatch.from_lists([RankRow(item_bags(1), [item_bags(2)])], make_ranker("sim"))
    with pytest.raises(ValueError, match="give `category`"):
        RankBatch.from_lists([RankRow(item_bags(1))], make_ranker("sim hard"))
    with pytest.raises(ValueError, match=r"no features \['itme'\]"):
        RankBatch.from_lists([RankRow({"itme": 1})], make_ranker("din"))
