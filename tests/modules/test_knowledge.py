"""Knowledge fusion: matching by hand, a projection per fold, absence, standardising, and no gradient into knowledge."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec.models.dlrm import OverArch

from lumrec.modules.knowledge import KnowledgeBatch, KnowledgeFusion, MaskedStandardise, pool_answers

B, N, D, K = 12, 3, 4, 2


def make_batch(seed: int = 0, rows: int = B, conditions: int = N) -> KnowledgeBatch:
    generator = torch.Generator().manual_seed(seed)
    return KnowledgeBatch(
        o_BND=torch.randn(rows, conditions, D, generator=generator),
        e_BD=torch.randn(rows, D, generator=generator),
        log_z_BN=torch.randn(rows, conditions, generator=generator),
        present_BN=torch.rand(rows, conditions, generator=generator) < 0.8,
        fold_B=torch.randint(K, (rows,), generator=generator),
    )


def make_fusion(mode: str, conditions: int = N, **keywords) -> KnowledgeFusion:
    torch.manual_seed(0)
    return KnowledgeFusion(mode, conditions, D, K, 5, **keywords)


def masked_moments(x: Tensor, present: Tensor) -> Tensor:
    """Each column standardised over its present entries, in NumPy."""
    columns = []
    for column, mask in zip(x.T.double().numpy(), present.T.numpy()):
        kept = column[mask]
        columns.append(np.where(mask, (column - kept.mean()) / np.sqrt(kept.var() + 1e-5), 0.0))
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def test_matching_by_hand():
    batch = make_batch()
    got = make_fusion("matching")(*batch)
    similarity = torch.stack([(batch.o_BND[:, n] * batch.e_BD).sum(1) for n in range(N)], dim=1)
    log_probability = similarity - batch.log_z_BN
    expected = [batch.present_BN.float()]
    kinds = [similarity, log_probability]
    for x in (similarity, log_probability):
        rows = []
        for b in range(B):
            mask = batch.present_BN[b]
            rows.append(x[b] - x[b][mask].mean() if mask.any() else x[b])
        kinds.append(torch.stack(rows))
    expected += [masked_moments(x, batch.present_BN) for x in kinds]
    torch.testing.assert_close(got, torch.cat(expected, dim=1), atol=2e-5, rtol=2e-5)


def test_direct_features_have_a_projection_of_their_own_for_each_fold():
    fusion = make_fusion("direct")
    batch = make_batch()._replace(present_BN=torch.ones(B, N, dtype=torch.bool))
    with torch.no_grad():
        fusion.direct_bias_KF.normal_()
    got = fusion(*batch)
    x = torch.cat([batch.o_BND.flatten(1), batch.e_BD], dim=1)
    x = masked_moments(x, torch.ones_like(x, dtype=torch.bool))
    for b in range(B):
        fold = batch.fold_B[b]
        expected = x[b] @ fusion.direct_weight_KIF[fold] + fusion.direct_bias_KF[fold]
        torch.testing.assert_close(got[b, N:], expected, atol=2e-5, rtol=2e-5)
    fusion(*batch)[batch.fold_B == 0].sum().backward()
    assert fusion.direct_weight_KIF.grad[1].abs().sum() == 0 < fusion.direct_weight_KIF.grad[0].abs().sum()


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("mode", ["direct", "matching", "both"])
def test_what_stands_where_no_answer_is_has_no_effect(mode, attention):
    fusion = make_fusion(mode, attention=attention)
    batch = make_batch()
    absent_BN = ~batch.present_BN
    assert absent_BN.any() and not absent_BN.all(dim=1).any()
    o_BND, log_z_BN = batch.o_BND.clone(), batch.log_z_BN.clone()
    o_BND[absent_BN], log_z_BN[absent_BN] = torch.nan, torch.inf
    for train in (True, False):
        fusion.train(train)
        assert torch.equal(fusion(*batch), fusion(*batch._replace(o_BND=o_BND, log_z_BN=log_z_BN)))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("mode", ["direct", "matching", "both"])
def test_a_row_without_any_answer_is_all_zeros_and_leaves_the_others_as_they_are(mode, attention):
    fusion = make_fusion(mode, attention=attention)
    with torch.no_grad():
        fusion(*make_batch(seed=5))
        if mode != "matching":
            fusion.direct_bias_KF.normal_()
        if attention:
            fusion.pooled_bias_KF.normal_()
    batch = make_batch()
    present_BN = batch.present_BN.clone()
    present_BN[4] = False
    got = fusion(*batch._replace(present_BN=present_BN))
    assert got[4].abs().max() == 0
    without = [x[torch.arange(B) != 4] for x in batch]
    torch.testing.assert_close(make_like(fusion)(*without), got[torch.arange(B) != 4], atol=2e-5, rtol=2e-5)


def make_like(fusion: KnowledgeFusion) -> KnowledgeFusion:
    twin = make_fusion(fusion.mode, attention=fusion.attention)
    twin.load_state_dict(fusion.state_dict())
    return twin


def test_no_gradient_flows_into_knowledge_and_modes_add_up():
    batch = make_batch()
    fixed = [x.requires_grad_() if x.is_floating_point() else x for x in batch]
    fusion = make_fusion("both")
    got = fusion(*fixed)
    got.sum().backward()
    assert all(x.grad is None for x in fixed if x.is_floating_point())
    direct, matching = make_fusion("direct"), make_fusion("matching")
    assert fusion.num_features == got.shape[1] == direct.num_features + matching.num_features - N
    torch.testing.assert_close(got[:, : N + 5], direct(*batch))
    torch.testing.assert_close(got[:, N + 5 :], matching(*batch)[:, N:])


def pool_by_loops(o_BND: Tensor, e_BD: Tensor, present_BN: Tensor) -> Tensor:
    """The plain twin: row by row, over the answers that are there and no other."""
    rows = []
    for o_ND, e_D, present_N in zip(o_BND, e_BD, present_BN):
        kept_ND = o_ND[present_N]
        rows.append((kept_ND @ e_D).softmax(dim=0) @ kept_ND if len(kept_ND) else (o_ND.sum(dim=0) + e_D) * 0)
    return torch.stack(rows)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(0, 99))
def test_pooled_answers_and_their_gradients_are_those_of_the_plain_twin(counts, seed):
    batch = make_batch(seed, rows=len(counts), conditions=5)
    present_BN = torch.stack([torch.randperm(5) < count for count in counts])  # 0, 1 and all five among them
    results = []
    for pool in (pool_answers, pool_by_loops):
        o_BND, e_BD = batch.o_BND.double().requires_grad_(), (batch.e_BD * 4).double().requires_grad_()
        pooled_BD = pool(o_BND, e_BD, present_BN)
        (pooled_BD * torch.arange(1.0, D + 1)).sum().backward()
        results.append((pooled_BD, o_BND.grad, e_BD.grad))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)
    assert (results[0][0][present_BN.sum(dim=1) == 0] == 0).all()


@pytest.mark.parametrize("mode", ["direct", "matching", "both"])
def test_attention_joins_the_features_of_every_mode(mode):
    batch, fusion = make_batch(), make_fusion(mode, attention=True)
    with torch.no_grad():
        fusion.pooled_bias_KF.normal_()
    plain = make_fusion(mode)
    assert fusion.num_features == plain.num_features + 5
    plain.load_state_dict({name: x for name, x in fusion.state_dict().items() if not name.startswith("pooled")})
    got, has_item_B1 = fusion(*batch), batch.present_BN.any(dim=1, keepdim=True)
    torch.testing.assert_close(got[:, :-5], plain(*batch))
    pooled_BD = masked_moments(pool_by_loops(*batch[:2], batch.present_BN), has_item_B1.expand(-1, D))
    weight_BDF, bias_BF = fusion.pooled_weight_KIF[batch.fold_B], fusion.pooled_bias_KF[batch.fold_B]
    expected = (torch.einsum("bd,bdf->bf", pooled_BD, weight_BDF) + bias_BF) * has_item_B1
    torch.testing.assert_close(got[:, -5:], expected, atol=2e-5, rtol=2e-5)


def test_without_log_z_and_with_one_condition():
    batch = make_batch(conditions=1)
    assert make_fusion("matching", 1)(*batch).shape == (B, 3) == (B, make_fusion("matching", 1).num_features)
    fusion = make_fusion("matching", 1, has_log_z=False)
    assert fusion(*batch._replace(log_z_BN=None)).shape == (B, 2) == (B, fusion.num_features)
    with pytest.raises(ValueError, match="has_log_z=False and is called with log z"):
        fusion(*batch)
    with pytest.raises(ValueError, match="is 'all'; expected one of direct, matching, both"):
        make_fusion("all")


def test_dropout_withholds_all_answers_of_some_rows_while_training():
    batch = make_batch(rows=2000)._replace(present_BN=torch.ones(2000, N, dtype=torch.bool))
    fusion = make_fusion("both", dropout=0.25)
    withheld = fusion(*batch).abs().amax(dim=1) == 0
    assert 0.2 < withheld.float().mean() < 0.3
    fusion.eval()
    assert (fusion(*batch)[:, :N] == 1).all()
    with pytest.raises(ValueError, match=r"knowledge dropout is 1\.0"):
        make_fusion("both", dropout=1.0)


def test_order_of_rows_does_not_matter_in_evaluation():
    fusion, batch = make_fusion("both"), make_batch()
    fusion(*batch)
    fusion.eval()
    order = torch.randperm(B)
    torch.testing.assert_close(fusion(*(x[order] for x in batch)), fusion(*batch)[order])
    torch.testing.assert_close(torch.cat([fusion(*(x[b : b + 1] for x in batch)) for b in range(B)]), fusion(*batch))


def test_running_moments_start_with_the_first_batch_and_follow():
    scale = MaskedStandardise(2, momentum=0.5)
    present = torch.tensor([[True, False]] * 4)
    scale(torch.tensor([[1.0, 9], [2, 9], [3, 9], [4, 9]]), present)
    assert scale.mean_F.tolist() == [2.5, 0.0] and scale.var_F.tolist() == [1.25, 1.0]
    scale(torch.tensor([[5.0, 9], [5, 9], [5, 9], [5, 9]]), present)
    assert scale.mean_F.tolist() == [3.75, 0.0] and scale.var_F.tolist() == [0.625, 1.0]
    scale.eval()
    assert scale(torch.tensor([[3.75, 5.0]]), torch.tensor([[True, True]])).tolist() == [
        [0.0, pytest.approx(5.0, abs=1e-4)]
    ]


def test_stands_in_front_of_torchrecs_over_arch():
    fusion, batch = make_fusion("both"), make_batch()
    interaction_BF = torch.randn(B, 7)  # what DLRM's InteractionArch gives
    over = OverArch(7 + fusion.num_features, [8, 1])
    logits = over(torch.cat([interaction_BF, fusion(*batch)], dim=1))
    logits.sum().backward()
    assert logits.shape == (B, 1) and fusion.direct_weight_KIF.grad.abs().sum() > 0


def test_to_moves_what_is_there():
    moved = make_batch()._replace(log_z_BN=None).to("cpu")
    assert moved.log_z_BN is None and moved.o_BND.shape == (B, N, D)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["direct", "matching", "both"])
def test_low_precision_weights_and_autocast_compute_in_float32(mode, dtype):
    plain, batch = make_fusion(mode, attention=True), make_batch(rows=3000)
    low = make_fusion(mode, attention=True).to(dtype)
    plain.load_state_dict(low.state_dict())  # weights rounded alike
    assert low.state_dict().keys() == plain.state_dict().keys()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(plain(*batch), low(*batch), rtol=0, atol=0)
    for module in (plain, low):
        module.eval()
    assert plain(*batch).dtype == torch.float32
    torch.testing.assert_close(low(*batch), plain(*batch), rtol=0, atol=0)
    buffers = dict(low.named_buffers())
    assert buffers and all(x.dtype == torch.float32 for x in buffers.values())
    trained = make_fusion(mode, attention=True)
    trained(*batch)
    moments = {name: x.clone() for name, x in trained.named_buffers()}
    assert all(torch.equal(x, moments[name]) for name, x in trained.to(dtype).named_buffers())  # not rounded
    low.train()(*batch).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in low.parameters())


def test_to_takes_what_torchrecs_pipelines_give():
    from torchrec.streamable import Pipelineable

    batch = make_batch()
    assert isinstance(batch, Pipelineable)
    moved = batch.to(torch.device("cpu"), non_blocking=True)
    assert all(torch.equal(x, y) for x, y in zip(batch, moved)) and batch.to("meta").o_BND.is_meta


def test_moments_made_on_the_meta_device_can_be_placed():
    with torch.device("meta"):
        scale = MaskedStandardise(3)
    placed = scale.to_empty(device="cpu")
    assert {x.device.type for x in placed.buffers()} == {"cpu"}
