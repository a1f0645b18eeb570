"""InfoNCE against plain twins in float64. Shapes as in lumrec.modules.losses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lumrec.modules.kernels import info_nce as kernel
from lumrec.modules.kernels.info_nce import info_nce_plain
from lumrec.modules.losses import counterfactual_contrast, info_nce

SIZES = st.sampled_from([0, 1, 2, 7, 50])


def draw_inputs(num_positions: int, num_candidates: int, *, seed: int = 0) -> dict[str, Tensor]:
    """float64 arguments of info_nce; every fifth candidate is no negative, some positions are left out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_weight_C = normal(num_candidates)
    log_weight_C[::5] = float("-inf")
    return {
        "o_TD": normal(num_positions, 8),
        "e_CD": normal(num_candidates, 8),
        "positive_T": torch.randint(-1, num_candidates, (num_positions,), generator=generator),
        "log_weight_C": log_weight_C,
        "log_positive_weight_T": normal(num_positions),
    }


def loss_and_gradients(function, inputs: dict, **options) -> list[Tensor]:
    o_TD, e_CD = inputs["o_TD"].clone().requires_grad_(), inputs["e_CD"].clone().requires_grad_()
    loss = function(o_TD, e_CD, inputs["positive_T"], **options)
    (3 * loss).backward()
    return [loss.detach(), o_TD.grad, e_CD.grad]


@settings(max_examples=80, deadline=None)
@given(
    num_positions=SIZES,
    num_candidates=SIZES,
    given_options=st.sets(st.sampled_from(["log_weight_C", "log_positive_weight_T"])),
    label_smoothing=st.sampled_from([0.0, 0.2]),
    chunk=st.sampled_from([1, 7 * 12, 1 << 18]),
)
def test_loss_and_gradients_equal_the_plain_twin(num_positions, num_candidates, given_options, label_smoothing, chunk):
    inputs = draw_inputs(num_positions, num_candidates)
    options = {name: inputs[name] for name in given_options} | {"label_smoothing": label_smoothing}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "CHUNK", chunk)
        fast = loss_and_gradients(info_nce, inputs, **options)
    for ours, plain in zip(fast, loss_and_gradients(info_nce_plain, inputs, **options), strict=True):
        torch.testing.assert_close(ours, plain)


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
    torch.testing.assert_close(info_nce(o_TD, table, item_T, counts.double().log()), expected)


def test_the_gradient_is_that_of_the_corrected_logq_correction():
    """arXiv 2507.09331, written as it stands there: the positive stands outside of the softmax, and weighs 1 - p."""
    inputs = draw_inputs(30, 12)
    assert (inputs["positive_T"] < 0).any()

    def corrected(o_TD: Tensor, e_CD: Tensor, positive_T: Tensor, log_weight_C: Tensor) -> Tensor:
        total = o_TD.new_zeros(())
        for o_D, positive in zip(o_TD, positive_T.tolist(), strict=True):
            if positive < 0:
                continue
            score_C = e_CD @ o_D
            others = torch.arange(len(e_CD)) != positive
            log_sum = (score_C + log_weight_C)[others].logsumexp(0)
            probability = torch.softmax(torch.stack([score_C[positive], log_sum]), 0)[0]
            total = total + (1 - probability).detach() * (log_sum - score_C[positive])
        return total

    ours, theirs = (
        loss_and_gradients(function, inputs, log_weight_C=inputs["log_weight_C"]) for function in (info_nce, corrected)
    )
    for gradient, expected in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(gradient, expected)
    assert ours[0] > theirs[0]  # the values differ: only ours is the log loss


def test_a_corrected_positive_gives_the_older_logq():
    """Yi et al.: softmax over the rows of the batch of s_j - log q_j, the own row among them, collisions masked."""
    generator = torch.Generator().manual_seed(2)
    item_T = torch.randint(0, 6, (40,), generator=generator)
    o_TD, table = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (40, 6))
    log_q_C = torch.rand(6, generator=generator, dtype=torch.float64).log()
    logits = o_TD @ table[item_T].t() - log_q_C[item_T]
    collision = (item_T[:, None] == item_T) & ~torch.eye(40, dtype=torch.bool)
    expected = F.cross_entropy(logits.masked_fill(collision, float("-inf")), torch.arange(40), reduction="sum")
    log_expected_C = log_q_C + torch.tensor(40.0, dtype=torch.float64).log()
    loss = info_nce(
        o_TD,
        table,
        item_T,
        torch.bincount(item_T, minlength=6).double().log() - log_expected_C,
        log_positive_weight_T=-log_expected_C[item_T],
    )
    torch.testing.assert_close(loss, expected)


def test_label_smoothing_over_the_catalogue_is_pytorchs():
    inputs = draw_inputs(50, 12)

    def theirs(o_TD: Tensor, e_CD: Tensor, positive_T: Tensor, label_smoothing: float) -> Tensor:
        logits = o_TD @ e_CD.t()
        return F.cross_entropy(logits, positive_T, reduction="sum", ignore_index=-1, label_smoothing=label_smoothing)

    for ours, expected in zip(
        *(loss_and_gradients(f, inputs, label_smoothing=0.1) for f in (info_nce, theirs)), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_bfloat16_autocast_stays_near_float64(label_smoothing):
    """No further from float64 than twice what the plain twin in bfloat16 is, and the loss itself is float32."""
    inputs = draw_inputs(200, 40)
    options = {"log_weight_C": inputs["log_weight_C"].float(), "label_smoothing": label_smoothing}
    exact = loss_and_gradients(info_nce_plain, inputs, **options)
    low = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = (loss_and_gradients(function, low, **options) for function in (info_nce, info_nce_plain))
    assert ours[0].dtype == torch.float32
    for fast, twin, right in zip(ours, plain, exact, strict=True):
        error, allowed = (fast - right).norm() / right.norm(), (twin - right).norm() / right.norm()
        assert error < max(2 * allowed, 1e-3)


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
