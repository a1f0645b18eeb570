"""InfoNCE against plain twins in float64. Shapes as in lumrec.modules.losses."""

import pytest
import torch
from torch.nn import functional as F

from lumrec.modules import losses
from lumrec.modules.losses import counterfactual_contrast, info_nce, info_nce_plain


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    o_TD = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    e_CD = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    positive_T = torch.randint(-1, 12, (50,), generator=generator)
    log_weight_C = torch.randn(12, generator=generator)
    log_weight_C[3] = float("-inf")
    return o_TD, e_CD, positive_T, log_weight_C


@pytest.mark.parametrize("chunk", [7 * 12, 1 << 18])
@pytest.mark.parametrize("weighted", [True, False])
def test_loss_and_gradients_equal_the_plain_twin(inputs, chunk, weighted, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    o_TD, e_CD, positive_T, log_weight_C = inputs
    results = []
    for function in (info_nce, info_nce_plain):
        o, e = o_TD.clone().requires_grad_(), e_CD.clone().requires_grad_()
        loss = function(o, e, positive_T, log_weight_C if weighted else None)
        (3 * loss).backward()
        results.append((loss.detach(), o.grad, e.grad))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)


def test_in_batch_counts_equal_all_positions_with_collisions_masked():
    """Equ. 2 as it stands: each position against the items of all others, its own item masked among them."""
    generator = torch.Generator().manual_seed(1)
    item_T = torch.randint(0, 6, (40,), generator=generator)
    o_TD = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    table = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    logits = o_TD @ table[item_T].t()
    collision = (item_T[:, None] == item_T) & ~torch.eye(40, dtype=torch.bool)
    expected = F.cross_entropy(logits.masked_fill(collision, float("-inf")), torch.arange(40), reduction="sum")
    counts = torch.bincount(item_T, minlength=6)
    torch.testing.assert_close(
        info_nce(o_TD, table, item_T, counts.double().log().float()), expected, rtol=1e-6, atol=0
    )


def test_bfloat16_autocast_stays_near_float32(inputs):
    o_TD, e_CD, positive_T, log_weight_C = inputs
    exact = info_nce(o_TD, e_CD, positive_T, log_weight_C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = info_nce(o_TD.float(), e_CD.float(), positive_T, log_weight_C)
    assert low.dtype == torch.float32
    assert abs(low - exact) / exact < 0.02


def test_no_supervised_position_gives_zero_and_no_gradient():
    o, e = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = info_nce(o, e, torch.full((3,), -1))
    loss.backward()
    assert loss == 0 and not o.grad.any() and not e.grad.any()


def test_contrast_falls_as_the_item_moves_to_its_own_condition():
    e = torch.tensor([[1.0, 0.0]])
    values = [float(counterfactual_contrast(scale * e, torch.zeros(1, 2), e)) for scale in (-2.0, 0.0, 2.0)]
    assert values[0] > values[1] > values[2]
    assert values[1] == pytest.approx(0.693147, abs=1e-5)
