"""The towers: pooling beside a plain loop, items apart from users, one by one as in a batch, absent knowledge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_towers import AGES, HISTORIES, ITEMS, MAX_HISTORY, NUM_TOKENS, draw_knowledge, make_batch, make_towers

from lumrec.modules.retrievers.edb import AnswerProjection


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_shapes_and_scale(similarity):
    o_BV, e_CV = make_towers(similarity=similarity, temperature=0.1)(make_batch(HISTORIES, ITEMS, AGES))
    assert o_BV.shape == (4, 6) and e_CV.shape == (3, 6)
    if similarity == "cosine":
        assert float((o_BV @ e_CV.T).detach().abs().max()) <= 10 + 1e-4
        torch.testing.assert_close(e_CV.norm(dim=1), torch.full((3,), 10**0.5))


@pytest.mark.parametrize("knowledge", [None, (2, 3, 2)])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_batch_is_its_users_and_items_one_by_one(pooling, knowledge):
    towers = make_towers(pooling=pooling, knowledge=knowledge).eval()
    extra = draw_knowledge(4, 3) if knowledge else {}
    o_BV, e_CV = towers(make_batch(HISTORIES, ITEMS, AGES, extra))
    for user in range(4):
        for item in range(3):
            alone = {k: v[item : item + 1] if k == "e_CKW" else v[user : user + 1] for k, v in extra.items()}
            o_1V, e_1V = towers(make_batch([HISTORIES[user]], [ITEMS[item]], [AGES[user]], alone))
            torch.testing.assert_close(o_1V[0], o_BV[user])
            torch.testing.assert_close(e_1V[0], e_CV[item])


def test_the_item_tower_does_not_read_the_user():
    towers = make_towers(knowledge=(2, 3, 2)).eval()
    extra = draw_knowledge(4, 3)
    e_CV = towers(make_batch(HISTORIES, ITEMS, AGES, extra))[1]
    others = {**extra, "o_BNW": extra["o_BNW"] + 1, "fold_B": 1 - extra["fold_B"]}
    same_CV = towers(make_batch([[2], [3], [4, 4], []], ITEMS, [0, 0, 1, 1], others))[1]
    assert torch.equal(e_CV, same_CV)
    e_CV.sum().backward()
    assert all(parameter.grad is None for parameter in towers.user_tower.parameters())


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 3, MAX_HISTORY]), min_size=1, max_size=5), st.sampled_from(["mean", "attention"])
)
def test_pooling_is_that_of_a_plain_loop_with_its_gradients(lengths, pooling):
    towers = make_towers(pooling=pooling).double()
    generator = torch.Generator().manual_seed(sum(lengths))
    histories = [torch.randint(NUM_TOKENS, (n,), generator=generator).tolist() for n in lengths]
    token_UD = torch.randn(NUM_TOKENS, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = [token_UD]
    if pooling == "attention":
        with torch.no_grad():
            towers.distance_bias_L.copy_(torch.randn(MAX_HISTORY, generator=generator))
        inputs += [towers.distance_bias_L, towers.attention.weight]
    pooled_BD = towers._pool(token_UD, make_batch(histories, [0], [0] * len(lengths)))
    plain = []
    for history in histories:
        if not history:
            plain.append(token_UD.new_zeros(4))
        elif pooling == "mean":
            plain.append(token_UD[history].mean(0))
        else:
            bias = torch.stack([towers.distance_bias_L[len(history) - 1 - place] for place in range(len(history))])
            plain.append(torch.softmax(token_UD[history] @ towers.attention.weight[0] + bias, 0) @ token_UD[history])
    plain_BD = torch.stack(plain)
    torch.testing.assert_close(pooled_BD, plain_BD)
    weight_BD = torch.randn(plain_BD.shape, generator=generator, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((x * weight_BD).sum(), inputs, allow_unused=True, materialize_grads=True)
        for x in (pooled_BD, plain_BD + 0 * token_UD.sum())
    )
    torch.testing.assert_close(ours, theirs)


def test_absent_answers_are_zeros_whatever_stands_there():
    projection = AnswerProjection(2, 3, 2, 5)
    extra = draw_knowledge(4, 1)
    present_BN = torch.tensor([[True, True], [False, False], [True, False], [True, True]])
    o_BNW = extra["o_BNW"].masked_fill(~present_BN[:, :, None], float("nan"))
    for training in (True, False):
        features = projection.train(training)(o_BNW, present_BN, extra["fold_B"])
        assert features.shape == (4, 7) and bool(features.isfinite().all())
        assert torch.equal(features[:, :2], present_BN.float()) and not features[1].any()
    zeroed = projection(o_BNW.nan_to_num(7.0), present_BN, extra["fold_B"])
    assert torch.equal(zeroed, features)


def test_each_fold_has_a_projection_of_its_own():
    projection = AnswerProjection(2, 3, 2, 5).eval()
    extra = draw_knowledge(4, 1)
    first, second = (projection(extra["o_BNW"], extra["present_BN"], torch.full((4,), fold)) for fold in (0, 1))
    mixed = projection(extra["o_BNW"], extra["present_BN"], torch.tensor([0, 1, 0, 1]))
    assert torch.equal(mixed, torch.stack([first[0], second[1], first[2], second[3]]))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "max"}, "pooling is 'max'; expected one of"),
        ({"similarity": "l2"}, "similarity is 'l2'; expected one of"),
        ({"temperature": 0.0}, "expected a positive number"),
        ({"knowledge": (2, 3, 2), "knowledge_dropout": 1.0}, "expected 0 or more and less than 1"),
    ],
)
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_towers(**settings)


def test_a_batch_without_the_knowledge_that_is_read_is_refused():
    with pytest.raises(ValueError, match="the batch has none"):
        make_towers(knowledge=(2, 3, 2))(make_batch(HISTORIES, ITEMS, AGES))
