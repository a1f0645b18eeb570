"""Jagged attention against its plain twin, and its invariances. Shapes as in lumrec.modules.attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.modules.attention import causal_attention, causal_attention_plain, make_layout, query_attention

MAX_LENGTH = 33
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 20, MAX_LENGTH]), min_size=1, max_size=6)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(num: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [draw(num, 2, 4, seed=seed + i, dtype=dtype).requires_grad_() for i in range(3)]


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS)
def test_forward_and_backward_equal_the_plain_twin(lengths):
    layout = make_layout(torch.tensor(lengths))
    fast, plain = qkv(sum(lengths)), qkv(sum(lengths))
    out, expected = causal_attention(*fast, layout), causal_attention_plain(*plain, layout)
    torch.testing.assert_close(out, expected)
    weight = draw(*out.shape, seed=9)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(fast, plain, strict=True):
        if sum(lengths):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_at_most_twice_as_much_as_the_plain_twin(dtype):
    lengths = torch.tensor([0, 1, 40, 200, 150, 3])
    layout = make_layout(lengths)
    total = int(lengths.sum())
    exact = causal_attention_plain(*qkv(total), layout)
    low = causal_attention(*qkv(total, dtype=dtype), layout).double()
    plain = causal_attention_plain(*qkv(total, dtype=dtype), layout).double()
    assert (low - exact).norm() <= 2 * (plain - exact).norm()


def test_a_query_equals_one_more_token_at_the_end():
    """A query after m tokens answers as a causal sequence of these m tokens and itself would."""
    lengths = torch.tensor([5, 0, 3])
    sequence = torch.tensor([0, 0, 0, 1, 2, 2])
    prefix = torch.tensor([0, 5, 2, 0, 3, 3])
    layout = make_layout(lengths, query_sequence_Q=sequence, query_prefix_Q=prefix)
    q, k, v = qkv(int(lengths.sum()))
    qq, kq, vq = qkv(len(sequence), seed=50)
    out = query_attention(qq, kq, vq, k, v, layout)
    for i in range(len(sequence)):
        start = int(layout.offsets_B1[sequence[i]])
        rows = slice(start, start + int(prefix[i]))
        joined = [torch.cat([a[rows], b[i : i + 1]]) for a, b in ((q, qq), (k, kq), (v, vq))]
        single = causal_attention_plain(*joined, make_layout(torch.tensor([int(prefix[i]) + 1])))
        torch.testing.assert_close(out[i], single[-1])


def test_permuting_queries_permutes_answers():
    lengths = torch.tensor([6, 4])
    sequence, prefix = torch.tensor([0, 0, 0, 1]), torch.tensor([6, 2, 6, 3])
    order = torch.tensor([2, 0, 1, 3])
    q, k, v = qkv(10)
    asked = qkv(4, seed=50)
    layout = make_layout(lengths, query_sequence_Q=sequence, query_prefix_Q=prefix)
    permuted = make_layout(lengths, query_sequence_Q=sequence, query_prefix_Q=prefix[order])
    out = query_attention(*asked, k, v, layout)
    out_permuted = query_attention(*(x[order] for x in asked), k, v, permuted)
    torch.testing.assert_close(out[order], out_permuted)


def test_the_score_budget_changes_nothing(monkeypatch):
    lengths = torch.tensor([9, 8, 8])
    sequence, prefix = torch.tensor([0, 1, 1, 2]), torch.tensor([9, 4, 0, 8])
    layout = make_layout(lengths, query_sequence_Q=sequence, query_prefix_Q=prefix)
    _, k, v = qkv(25)
    asked = qkv(4, seed=50)
    whole = query_attention(*asked, k, v, layout)
    monkeypatch.setattr("lumrec.modules.attention.SCORE_BUDGET", 1)
    torch.testing.assert_close(query_attention(*asked, k, v, layout), whole)


@pytest.mark.parametrize(
    ("sequence", "prefix", "message"),
    [([1, 0], [0, 0], "ascending"), ([0, 2], [0, 0], "ascending"), ([0], [4], "sees between 0 and all")],
)
def test_impossible_queries_are_refused(sequence, prefix, message):
    with pytest.raises(ValueError, match=message):
        make_layout(torch.tensor([3, 2]), query_sequence_Q=torch.tensor(sequence), query_prefix_Q=torch.tensor(prefix))
