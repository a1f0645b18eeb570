"""Jagged attention against its plain twin, and its invariances. Shapes as in lumrec.modules.attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.modules.attention import causal_attention, causal_attention_plain, query_attention
from lumrec.modules.layout import make_layout
from lumrec.modules.relative_bias import TIME_BUCKETS, RelativeBias, TokenTimes, bias_indices

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


def relative_bias(*, time: bool, dtype: torch.dtype = torch.float64) -> RelativeBias:
    bias = RelativeBias(MAX_LENGTH, time=time).to(dtype)
    for i, parameter in enumerate(bias.parameters()):
        parameter.data = draw(len(parameter), seed=70 + i, dtype=dtype)
    return bias


def token_times(num_tokens: int, num_queries: int = 0) -> TokenTimes:
    """Times from seconds to years apart; what is asked about lies up to a day behind what was seen, or is the same."""
    generator = torch.Generator().manual_seed(5)
    seen = (10 ** (8.5 * torch.rand(num_tokens + num_queries, generator=generator))).long()
    asked = seen + torch.randint(0, 86400, seen.shape, generator=generator)
    return TokenTimes(asked[:num_tokens], seen[:num_tokens], asked[num_tokens:], seen[num_tokens:])


KINDS = pytest.mark.parametrize(("silu", "time"), [(False, False), (False, True), (True, False), (True, True)])


@KINDS
@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS)
def test_with_a_relative_bias_too(silu, time, lengths):
    layout, times = make_layout(torch.tensor(lengths)), token_times(sum(lengths))
    fast, plain = qkv(sum(lengths)), qkv(sum(lengths))
    fast_bias, plain_bias = relative_bias(time=time), relative_bias(time=time)
    indices = bias_indices(layout, times if time else None)
    out = causal_attention(*fast, layout, silu=silu, bias=fast_bias, indices=indices)
    expected = causal_attention_plain(*plain, layout, silu=silu, bias=plain_bias, times=times)
    torch.testing.assert_close(out, expected)
    weight = draw(*out.shape, seed=9)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    if sum(lengths):
        pairs = [*zip(fast, plain, strict=True), *zip(fast_bias.parameters(), plain_bias.parameters(), strict=True)]
        for a, b in pairs:
            torch.testing.assert_close(a.grad, b.grad)


@KINDS
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_portions_of_a_bucket_change_nothing(silu, time, rows, monkeypatch):
    """Sequences one by one, and their rows too."""
    lengths = [20, 19, 18, 20]
    layout, times = make_layout(torch.tensor(lengths)), token_times(77)
    indices = bias_indices(layout, times if time else None)

    def results() -> list[torch.Tensor]:
        inputs, bias = qkv(77), relative_bias(time=time)
        out = causal_attention(*inputs, layout, silu=silu, bias=bias, indices=indices)
        (out * draw(*out.shape, seed=9)).sum().backward()
        return [out, *(x.grad for x in (*inputs, *bias.parameters()))]

    whole = results()
    monkeypatch.setattr("lumrec.modules.kernels.biased_attention.CACHED_SCORES", 1)
    monkeypatch.setattr("lumrec.modules.kernels.biased_attention.LEAST_ROWS", rows)
    for part, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
def test_low_precision_with_a_bias_errs_at_most_twice_as_much_as_the_plain_twin(dtype, silu):
    lengths = torch.tensor([0, 1, MAX_LENGTH, 20, 30, 3])
    layout, times = make_layout(lengths), token_times(int(lengths.sum()))
    indices = bias_indices(layout, times)

    def grads(function, of: torch.dtype) -> torch.Tensor:
        """Output and gradients of q, k, v, one behind the other; the bias is float32 at the least, as in training."""
        inputs = qkv(int(lengths.sum()), dtype=of)
        wide = torch.promote_types(of, torch.float32)
        out = function(inputs, relative_bias(time=True, dtype=wide))
        (out * draw(*out.shape, seed=9, dtype=out.dtype)).sum().backward()
        return torch.cat([x.double().flatten() for x in (out.detach(), *(x.grad for x in inputs))])

    def fast(inputs, bias):
        return causal_attention(*inputs, layout, silu=silu, bias=bias, indices=indices)

    def plain(inputs, bias):
        bias = bias.to(inputs[0].dtype)
        return causal_attention_plain(*inputs, layout, silu=silu, bias=bias, times=times)

    exact = grads(plain, torch.float64)
    assert (grads(fast, dtype) - exact).norm() <= 2 * (grads(plain, dtype) - exact).norm()


@KINDS
def test_a_query_with_a_bias_equals_one_more_token_at_the_end(silu, time):
    lengths = torch.tensor([5, 0, 3])
    sequence, prefix = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 5, 2, 0, 3, 3])
    layout = make_layout(lengths, query_sequence_Q=sequence, query_prefix_Q=prefix)
    times, bias = token_times(8, 6), relative_bias(time=time)
    (q, k, v), (qq, kq, vq) = qkv(8), qkv(6, seed=50)
    indices = bias_indices(layout, times if time else None)
    out = query_attention(qq, kq, vq, k, v, layout, silu=silu, bias=bias, indices=indices)
    expected = []
    for i in range(len(sequence)):
        start = int(layout.offsets_B1[sequence[i]])
        rows = slice(start, start + int(prefix[i]))
        joined = [torch.cat([a[rows], b[i : i + 1]]) for a, b in ((q, qq), (k, kq), (v, vq))]
        asked, seen = (
            torch.cat([a[rows], b[i : i + 1]])
            for a, b in ((times.asked_T, times.asked_Q), (times.seen_T, times.seen_Q))
        )
        alone = make_layout(torch.tensor([int(prefix[i]) + 1]))
        none = torch.zeros(0, dtype=torch.int64)
        single = causal_attention_plain(*joined, alone, silu=silu, bias=bias, times=TokenTimes(asked, seen, none, none))
        expected.append(single[-1])
    torch.testing.assert_close(out, torch.stack(expected))
    weight, inputs = draw(*out.shape, seed=9), [k, v, qq, kq, vq, *bias.parameters()]
    gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (out, torch.stack(expected))]
    for got, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(got, plain)


def test_the_last_time_bucket_takes_all_that_is_longer():
    times = TokenTimes(*(torch.tensor([0, 10**12]) for _ in range(2)), *(torch.zeros(0, dtype=torch.int64),) * 2)
    (index, _), *_ = bias_indices(make_layout(torch.tensor([2])), times)
    assert index.time.tolist() == [[[0, 0], [TIME_BUCKETS - 1, 0]]]


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
    [([1, 0], [0, 0], "ascending"), ([0, 2], [0, 0], "ascending"), ([0], [4], "query_prefix_Q must be between 0")],
)
def test_impossible_queries_are_refused(sequence, prefix, message):
    with pytest.raises(ValueError, match=message):
        make_layout(torch.tensor([3, 2]), query_sequence_Q=torch.tensor(sequence), query_prefix_Q=torch.tensor(prefix))
