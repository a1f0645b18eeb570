"""Two ranks that share their candidates train as one process does on the union of their packs.

The one process keeps every candidate of both, item by item, and masks by id; nothing is merged.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from two_ranks_negatives import PRETRAIN, SIZES, draw, draw_parameters, make_model, make_packs

from lumrec.modules.losses import counterfactual_contrast
from lumrec.train.gather_candidates import gather_candidates


@pytest.fixture(scope="module")
def results(tiny_prepared, forks, tmp_path_factory) -> list[dict]:
    folder, script = tmp_path_factory.mktemp("ranks"), Path(__file__).parents[1] / "helpers" / "two_ranks_negatives.py"
    forks.run_script(script, str(tiny_prepared.path), str(folder), world_size=2)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def union_loss(
    o_TD: Tensor,
    own_e_TD: Tensor,
    own_item_T: Tensor,
    e_ND: Tensor,
    item_N: Tensor,
    weight_N: Tensor,
    positive_weight_T: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """InfoNCE of all positions against all candidates of both ranks but those that are the position's own item."""
    score_T = (o_TD * own_e_TD).sum(1)
    weight_TN = torch.where(own_item_T[:, None] == item_N, 0.0, weight_N)
    score_TN = o_TD @ e_ND.t()
    Z_T = positive_weight_T * score_T.exp() + (weight_TN * score_TN.exp()).sum(1)
    loss_T = Z_T.log() - positive_weight_T.log() - score_T
    smooth_T = Z_T.log() - (positive_weight_T * score_T + (weight_TN * score_TN).sum(1)) / (
        positive_weight_T + weight_TN.sum(1)
    )
    return ((1 - label_smoothing) * loss_T + label_smoothing * smooth_T).sum()


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("case", range(len(SIZES)))
def test_loss_and_gradients_are_those_of_the_union(results, case, unique):
    table_ID, matrix_DD = draw_parameters()
    parts = [draw(case, rank) for rank in range(2)]
    item_N, weight_N = torch.cat([p["item_C"] for p in parts]), torch.cat([p["log_weight_C"] for p in parts]).exp()
    if unique:  # of an item on both ranks the larger weight counts, and once
        for n in range(len(item_N)):
            same = (item_N == item_N[n]) & (torch.arange(len(item_N)) != n)
            weight_N[n] = torch.where(same, weight_N, 0).max().maximum(weight_N[n]) if not same[:n].any() else 0.0
    supervised = [p["positive_T"] >= 0 for p in parts]
    x_TD = torch.cat([p["x_TD"][s] for p, s in zip(parts, supervised, strict=True)])
    own_item_T = torch.cat([p["item_C"][p["positive_T"][s]] for p, s in zip(parts, supervised, strict=True)])
    ones_T = torch.ones(len(x_TD), dtype=torch.float64)
    loss = union_loss(x_TD @ matrix_DD, table_ID[own_item_T], own_item_T, table_ID[item_N], item_N, weight_N, ones_T)
    loss.backward()
    for of_rank in results:
        for ours, expected in zip(
            of_rank["cases"][case][unique], (loss.detach(), table_ID.grad, matrix_DD.grad), strict=True
        ):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("place", [0, 1])
def test_a_step_of_the_lum_is_that_of_one_process_over_both_packs(results, tiny_prepared, place):
    """Dense gradients on each rank and the tables' updates, with logQ over both packs, smoothing and contrast."""
    model, builder = make_model(tiny_prepared)
    packs = make_packs(builder, place)
    assert (packs[1].num_candidates == 0) == (place == 1)
    packs = [pack for pack in packs if pack.num_events]  # TorchRec's unsharded tables refuse an empty one
    outputs = [model(pack) for pack in packs]
    item_T = torch.cat([torch.from_numpy(tiny_prepared.item)[pack.event_row_T] for pack in packs])
    # Every event of both packs is a negative of its own, divided by how often its item was to be expected.
    train_I = torch.from_numpy(tiny_prepared.item_counts).double()
    weight_T = 1 / (len(item_T) * train_I / train_I.sum())[item_T].float()
    own_e_TD = torch.cat([output.e_CD[pack.positive_T] for output, pack in zip(outputs, packs, strict=True)])
    loss = union_loss(
        torch.cat([output.o_TD for output in outputs]),
        own_e_TD,
        item_T,
        own_e_TD,
        item_T,
        weight_T,
        weight_T,
        PRETRAIN.label_smoothing,
    )
    for output, pack in zip(outputs, packs, strict=True):
        event_Q = pack.contrast_event_Q
        contrast = counterfactual_contrast(output.o_TD[event_Q], output.o_QD, output.e_CD[pack.positive_T[event_Q]])
        loss = loss + PRETRAIN.contrast.weight * contrast
    (loss / len(item_T)).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = set()
    for of_rank in results:
        for name, gradient in of_rank["steps"][place].items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023
            found.add(name)
    assert found == set(expected)


def test_alone_a_process_keeps_its_candidates():
    given = torch.zeros(3, 2), torch.tensor([4, 5, 9]), torch.tensor([2, -1]), torch.zeros(3)
    assert all(a is b for a, b in zip(gather_candidates(*given, unique=False), (given[0], *given[2:]), strict=True))
