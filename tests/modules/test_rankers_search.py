"""Recurrence and searches over jagged histories equal their plain twins, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lumrec.modules.kernels import jagged
from lumrec.modules.kernels.jagged import indexed_dot, latest, lookup, row_chunks
from lumrec.modules.kernels.recurrence import plain_recurrence, recurrence
from lumrec.modules.rankers.search import (
    hard_search,
    head_logits,
    masked_softmax,
    plain_hard_search,
    plain_top_search,
    top_search,
)

LENGTHS = st.lists(st.sampled_from([0, 0, 1, 2, 5, 12]), min_size=1, max_size=8)
CHUNK_BYTES = st.sampled_from([1, 1000, 1 << 20])


@pytest.fixture(autouse=True)
def restore(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jagged, "CHUNK_BYTES", jagged.CHUNK_BYTES)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, chunk_bytes=CHUNK_BYTES, with_attention=st.booleans())
def test_recurrence_equals_its_plain_twin_forward_and_backward(lengths, chunk_bytes, with_attention):
    jagged.CHUNK_BYTES = chunk_bytes
    random = torch.Generator().manual_seed(0)
    num_events = sum(lengths)
    gate_XG, weight_GH = (torch.randn(n, k, generator=random, dtype=torch.float64) for n, k in ((7, 12), (12, 4)))
    attention_T = torch.rand(num_events, generator=random, dtype=torch.float64) if with_attention else None
    index_T = torch.randint(7, (num_events,), generator=random)
    results = []
    for function in (recurrence, plain_recurrence):
        inputs = [gate_XG.clone().requires_grad_(), weight_GH.clone().requires_grad_()]
        if attention_T is not None:
            inputs.append(attention_T.clone().requires_grad_())
        state_TH = function(inputs[0], index_T, inputs[1], offsets_of(lengths), *inputs[2:])
        (state_TH * torch.arange(num_events * 4, dtype=torch.float64).view(-1, 4).cos()).sum().backward()
        results.append([state_TH, *(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_without_attention_the_recurrence_is_pytorchs_gru():
    """Whose update gate keeps the state, where DIEN's lets the candidate in: the sign of its weights is turned."""
    torch.manual_seed(0)
    gru = torch.nn.GRU(3, 4, batch_first=True).double()
    x_BLD = torch.randn(2, 5, 3, dtype=torch.float64)
    order = torch.tensor([*range(4, 8), *range(4), *range(8, 12)])  # reset, update → update, reset
    sign = torch.tensor([-1.0] * 4 + [1.0] * 8, dtype=torch.float64)[:, None]
    with torch.no_grad():
        gru.bias_hh_l0[8:] = 0
        weight_ih, weight_hh = gru.weight_ih_l0[order] * sign, gru.weight_hh_l0[order] * sign
        bias = (gru.bias_ih_l0 + gru.bias_hh_l0)[order] * sign[:, 0]
        gate_XG = x_BLD.flatten(0, 1) @ weight_ih.t() + bias
        states = recurrence(gate_XG, torch.arange(10), weight_hh, torch.tensor([0, 5, 10]))
        torch.testing.assert_close(states.view(2, 5, 4), gru(x_BLD)[0])


@settings(deadline=None, max_examples=40)
@given(num_events=st.sampled_from([0, 1, 9]), chunk_bytes=CHUNK_BYTES)
def test_indexed_dot_equals_the_gathered_product_forward_and_backward(num_events, chunk_bytes):
    jagged.CHUNK_BYTES = chunk_bytes
    random = torch.Generator().manual_seed(0)
    a_TH, b_UH = (torch.randn(n, 4, generator=random, dtype=torch.float64) for n in (num_events, 3))
    index_T = torch.randint(3, (num_events,), generator=random)
    results = []
    for function in (indexed_dot, lambda a, b, index: (a * b[index]).sum(dim=1)):
        inputs = [a_TH.clone().requires_grad_(), b_UH.clone().requires_grad_()]
        dot_T = function(*inputs, index_T)
        dot_T.square().sum().backward()
        results.append([dot_T, *(x.grad for x in inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_lookup_equals_indexing_forward_and_backward():
    random, index_BS = torch.Generator().manual_seed(0), torch.tensor([[0, 2], [2, 2]])
    table_UX, weight_BSX = (torch.randn(*shape, generator=random) for shape in ((3, 4), (2, 2, 4)))
    results = []
    for function in (lookup, lambda table, index: table[index]):
        table = table_UX.clone().requires_grad_()
        rows_BSX = function(table, index_BS)
        (rows_BSX * weight_BSX).sum().backward()
        results.append([rows_BSX, table.grad])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def in_words(place_BS: Tensor, num_events: int) -> list[list[int]]:
    return [[t for t in row if t < num_events] for row in place_BS.tolist()]


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, num=st.sampled_from([1, 3, 100]), chunk_bytes=CHUNK_BYTES, seed=st.integers(0, 99))
def test_searches_find_what_their_plain_twins_find(lengths, num, chunk_bytes, seed):
    jagged.CHUNK_BYTES = chunk_bytes
    random, offsets_B1, num_events = torch.Generator().manual_seed(seed), offsets_of(lengths), sum(lengths)
    history_T = torch.randint(9, (num_events,), generator=random)
    target_B = torch.randint(9, (len(lengths),), generator=random)
    category_U = torch.randint(3, (9,), generator=random)
    found_BS = hard_search(category_U, target_B, history_T, offsets_B1, num)
    arguments = (category_U, target_B, history_T, offsets_B1, num)
    assert in_words(found_BS, num_events) == plain_hard_search(*arguments)

    score_T = torch.randint(4, (num_events + 1,), generator=random).double()  # many ties
    found_BS = top_search(
        lambda rows, place_RL: score_T[place_RL], offsets_B1, num_events=num_events, event_bytes=8, num=num
    )
    assert in_words(found_BS, num_events) == plain_top_search(score_T, offsets_B1, num)
    assert found_BS.shape == (len(lengths), min(num, max(lengths)))


@settings(deadline=None, max_examples=20)
@given(lengths=LENGTHS, chunk_bytes=CHUNK_BYTES)
def test_chunks_hold_each_event_once(lengths, chunk_bytes):
    jagged.CHUNK_BYTES = chunk_bytes
    offsets_B1, num_events = offsets_of(lengths), sum(lengths)
    seen = []
    for rows, place_RL in row_chunks(offsets_B1, num_events=num_events, event_bytes=8):
        for row, places in zip(rows.tolist(), in_words(place_RL, num_events), strict=True):
            assert places == list(range(int(offsets_B1[row]), int(offsets_B1[row + 1])))
            seen += places
    assert sorted(seen) == list(range(num_events))
    for num in (0, 1, 3):
        events_N, kept_B1 = latest(torch.arange(num_events), offsets_B1, num)
        rows = [list(range(num_events))[start:end] for start, end in zip(offsets_B1.tolist(), offsets_B1[1:].tolist())]
        expected = [row[max(0, len(row) - num) :] for row in rows]
        assert events_N.tolist() == sum(expected, []) and kept_B1.diff().tolist() == [len(x) for x in expected]


def test_attention_of_heads_equals_head_by_head():
    torch.manual_seed(0)
    query_BX, key_BSX = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    is_event_BS = torch.arange(5) < torch.tensor([5, 0, 2])[:, None]
    weight_BSH = masked_softmax(head_logits(query_BX, key_BSX, 2), is_event_BS)
    for b, length in enumerate([5, 0, 2]):
        for head in range(2):
            query, keys = query_BX[b, head::2], key_BSX[b, :length, head::2]
            torch.testing.assert_close(weight_BSH[b, :length, head], (keys @ query / 2).softmax(0))
        assert not weight_BSH[b, length:].any()
