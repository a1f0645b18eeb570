"""FLOPs of a step as its formulas say, without a change to what is computed; a peak that is measured."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lumrec.train.flops import MatrixFlops, gemm_peak, model_flops


def count(function, *inputs: torch.Tensor) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass."""
    with MatrixFlops() as forward:
        loss = function(*inputs).sum()
    with MatrixFlops() as backward:
        loss.backward()
    return forward.total, backward.total


def layers(*sizes: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))


def test_linear_layers_are_six_times_parameters_times_rows():
    model, x = layers(8, 16, 4), torch.randn(10, 8, requires_grad=True)
    expected = 2 * 10 * (8 * 16 + 16 * 4)
    assert count(model, x) == (expected, 2 * expected)
    assert model_flops(*count(model, x)) == 3 * expected


def test_attention_is_a_full_square():
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))

    def attention(*inputs: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*inputs, is_causal=True)

    square = 2 * 2 * 3 * 16 * 16 * 8
    forward, backward = count(attention, q, k, v)
    assert forward == 2 * square
    assert model_flops(forward, backward) == 6 * square  # flash attention's own recomputation is left out


def test_what_is_computed_twice_counts_once():
    model, x = layers(8, 16, 4), torch.randn(10, 8, requires_grad=True)
    plain, again = count(model, x), count(lambda x: checkpoint(model, x, use_reentrant=False), x)
    assert sum(again) > sum(plain)
    assert model_flops(*again) == model_flops(*plain)


def test_results_are_the_same_to_the_bit():
    model, x = layers(8, 16, 4), torch.randn(10, 8)
    before = torch.random.get_rng_state()
    with MatrixFlops():
        gemm_peak(torch.device("cpu"), torch.float32, num_threads=torch.get_num_threads())
        counted = model(x)
    assert torch.equal(counted, model(x)) and torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_measured_once(dtype):
    threads = torch.get_num_threads()
    peak = gemm_peak(torch.device("cpu"), dtype, num_threads=threads)
    measured = gemm_peak.cache_info().misses
    assert gemm_peak(torch.device("cpu"), dtype, num_threads=threads) == peak > 1e8
    assert gemm_peak.cache_info().misses == measured
