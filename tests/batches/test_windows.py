"""Windows over histories: each event once in training, each row asked once in querying."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.batches.windows import answering_windows, deal, token_cost, training_lengths, training_windows, window_cost
from lumrec.data.splits import TEST, TRAIN, VALID


class Log:
    """The few arrays of PreparedData that windows read."""

    def __init__(self, lengths: list[int], train: list[int]) -> None:
        self.user_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.user = np.repeat(np.arange(len(lengths)), lengths)
        self.num_events, self.num_users = int(sum(lengths)), len(lengths)
        place = np.arange(self.num_events) - self.user_offsets[self.user]
        self.split = np.where(place < np.array(train)[self.user], TRAIN, TEST).astype(np.int8)


LENGTHS = st.lists(st.sampled_from([0, 1, 2, 7, 8, 9, 16, 17, 40]), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 5), data=st.data())
def test_training_windows_hold_each_training_event_of_the_chosen_users_once(lengths, seed, data):
    train = [data.draw(st.integers(0, n)) for n in lengths]
    users = np.array([data.draw(st.booleans()) for _ in lengths])
    log = Log(lengths, train)
    windows = training_windows(log, max_events=8, users=users, generator=torch.Generator().manual_seed(seed))
    assert windows.count == 0 or (1 <= int(windows.length_W.min()) and int(windows.length_W.max()) <= 8)
    rows = [
        row for s, n in zip(windows.start_W.tolist(), windows.length_W.tolist(), strict=True) for row in range(s, s + n)
    ]
    expected = np.flatnonzero((log.split == TRAIN) & users[log.user]) if log.num_events else []
    assert sorted(rows) == list(expected)
    assert (log.user[windows.start_W] == windows.user_W.numpy()).all()
    assert windows.count == 0 or (log.user[windows.start_W + windows.length_W - 1] == windows.user_W.numpy()).all()


def test_long_histories_are_cut_at_other_places_in_other_epochs():
    log = Log([40], [40])
    cuts = {
        tuple(
            training_windows(
                log, max_events=8, users=np.array([True]), generator=torch.Generator().manual_seed(seed)
            ).start_W.tolist()
        )
        for seed in range(10)
    }
    assert len(cuts) > 1


def test_training_events_behind_later_parts_are_refused():
    log = Log([3], [1])
    log.split[:] = [TRAIN, VALID, TRAIN]
    with pytest.raises(ValueError, match="training events after"):
        training_lengths(log)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, stride=st.integers(1, 8))
def test_answering_windows_ask_each_event_once_with_enough_history(lengths, stride):
    starts = torch.tensor([0, *np.cumsum(lengths)[:-1].tolist()], dtype=torch.int64)
    answering = answering_windows(
        starts, torch.tensor(lengths), torch.arange(len(lengths)), max_events=8, stride=stride
    )
    windows, window_R = answering.windows, answering.window_R
    assert bool((windows.length_W <= 8).all())
    assert bool((answering.seen_R < windows.length_W[window_R]).all())
    place_R = answering.row_R - starts[windows.user_W[window_R]]
    assert bool(((answering.seen_R == place_R) | (answering.seen_R >= 8 - stride)).all())
    assert answering.row_R.tolist() == list(range(sum(lengths)))
    order = torch.randperm(windows.count)
    parts = [answering.take(torch.tensor([window])) for window in order.tolist()]
    for name in ("answers_W", "seen_R", "row_R"):
        some = torch.cat([getattr(part, name) for part in parts] or [torch.zeros(0, dtype=torch.int64)])
        assert torch.equal(getattr(answering.take(order), name), some)


def deal_plainly(cost_W: list[float], step_W: list[int], num_ranks: int) -> list[int]:
    """The twin of `deal`: one window at a time."""
    rank_W = [0] * len(cost_W)
    for step in set(step_W):
        loads = [0.0] * num_ranks
        members = [w for w in range(len(cost_W)) if step_W[w] == step]
        for window in sorted(members, key=lambda w: -cost_W[w]):
            rank = loads.index(min(loads))
            loads[rank] += cost_W[window]
            rank_W[window] = rank
    return rank_W


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=30),
    num_ranks=st.integers(1, 5),
    budget=st.sampled_from([1, 40, 200]),
)
def test_windows_are_dealt_longest_first_to_the_rank_with_the_least(lengths, num_ranks, budget):
    length_W = torch.tensor(lengths, dtype=torch.int64)
    step_W = (length_W.cumsum(0) - length_W) // budget
    cost_W = window_cost(2 * length_W, 12.0)
    dealt = deal(cost_W, step_W, num_ranks).tolist()
    assert dealt == deal_plainly(cost_W.tolist(), step_W.tolist(), num_ranks)
    for step in set(step_W.tolist()):
        loads = [
            sum(c for c, s, r in zip(cost_W.tolist(), step_W.tolist(), dealt) if s == step and r == rank)
            for rank in range(num_ranks)
        ]
        assert max(loads) - min(loads) <= float(cost_W[step_W == step].max())


def test_a_windows_cost_counts_what_the_blocks_compute():
    # GPT blocks: 8·dim² for q, k, v and output, 16·dim² for the FFN, 2·n·dim for scores and values under the mask.
    dim, layers, tokens = 32, 3, 2 * 50
    expected = layers * tokens * (24 * dim**2 + 2 * tokens * dim)
    cost = window_cost(torch.tensor([100]), token_cost(layers * 12 * dim**2, dim=dim, num_layers=layers))
    assert float(cost) * 2 * dim * layers == expected


def test_an_impossible_stride_is_refused():
    with pytest.raises(ValueError, match="stride"):
        answering_windows(torch.tensor([0]), torch.tensor([3]), torch.tensor([0]), max_events=8, stride=9)
