"""Windows over histories: each event once in training, each row asked once in querying."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.data.sequences import answering_windows, training_lengths, training_windows
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
    with pytest.raises(ValueError, match="training events behind"):
        training_lengths(log)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, stride=st.integers(1, 8))
def test_answering_windows_ask_each_event_once_with_enough_history(lengths, stride):
    starts = torch.tensor([0, *np.cumsum(lengths)[:-1].tolist()], dtype=torch.int64)
    answering = answering_windows(
        starts, torch.tensor(lengths), torch.arange(len(lengths)), max_events=8, stride=stride
    )
    asked = []
    windows = answering.windows
    columns = (windows.start_W, windows.length_W, windows.user_W, answering.first_W, answering.last_W)
    for start, length, user, first, last in zip(*(column.tolist() for column in columns), strict=True):
        assert length <= 8 and last <= length
        for moment in range(first, last):
            place = start + moment - int(starts[user])
            assert moment == place or moment >= 8 - stride
            asked.append(start + moment)
    assert asked == list(range(sum(lengths)))


def test_an_impossible_stride_is_refused():
    with pytest.raises(ValueError, match="stride"):
        answering_windows(torch.tensor([0]), torch.tensor([3]), torch.tensor([0]), max_events=8, stride=9)
