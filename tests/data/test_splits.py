from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.data.splits import (
    LATER,
    TEST,
    TRAIN,
    VALID,
    SplitConfig,
    assign,
    check_split,
    cut_times,
    leave_out_later,
    moment_of_share,
    user_fold,
)
from lumrec.run import limits

lengths = st.lists(st.integers(0, 30), max_size=12)


def parts_of_users(config: SplitConfig, counts: list[int]) -> list[np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    split = assign(config, [str(user) for user in range(len(counts))], offsets)
    assert split.dtype == np.int8
    assert len(split) == sum(counts)
    return [split[first:last] for first, last in zip(offsets, offsets[1:])]


@given(lengths, st.sampled_from([[], [0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.7, 0.0, 0.3]]))
def test_temporal_trains_before_it_validates_before_it_tests(counts: list[int], fractions: list[float]):
    for count, part in zip(counts, parts_of_users(SplitConfig("temporal", fractions), counts)):
        assert (np.diff(part) >= 0).all()
        first = fractions[0] if fractions else 0.8
        assert (part == TRAIN).sum() == int(np.ceil(count * first - 1e-9))


def test_temporal_counts_by_hand():
    counts = [1, 2, 4, 5, 9, 10, 20]
    got = [tuple(np.bincount(part, minlength=3)) for part in parts_of_users(SplitConfig("temporal"), counts)]
    assert got == [(1, 0, 0), (2, 0, 0), (4, 0, 0), (4, 1, 0), (8, 1, 0), (8, 1, 1), (16, 2, 2)]


@given(lengths)
def test_leave_one_out_has_one_test_event_and_one_valid_event(counts: list[int]):
    for count, part in zip(counts, parts_of_users(SplitConfig("leave_one_out"), counts)):
        assert part.tolist() == ([TRAIN] * (count - 2) + [VALID, TEST] if count >= 3 else [TRAIN] * count)


@given(lengths, st.integers(0, 2**63))
def test_user_split_keeps_users_whole_and_ignores_the_other_users(counts: list[int], seed: int):
    config = SplitConfig("user", seed=seed)
    parts = parts_of_users(config, counts)
    for part in parts:
        assert len(set(part.tolist())) <= 1
    for fewer, part in zip(parts_of_users(config, counts[:5]), parts):
        assert fewer.tolist() == part.tolist()


def test_user_split_shares_and_seed():
    users = [str(user) for user in range(20_000)]
    offsets = np.arange(len(users) + 1)
    got = assign(SplitConfig("user"), users, offsets)
    assert np.bincount(got) / len(users) == pytest.approx([0.68, 0.04, 0.28], abs=0.01)
    assert (assign(SplitConfig("user", seed=1), users, offsets) != got).mean() > 0.3
    assert set(assign(SplitConfig("user", [0.5, 0.0, 0.5]), users, offsets)) == {TRAIN, TEST}


def test_rotation_validates_and_tests_on_users_who_all_trained():
    users = [str(user) for user in range(20_000)]
    offsets = np.arange(len(users) + 1)
    before = assign(SplitConfig("user"), users, offsets)
    got = assign(SplitConfig("user", rotation=0.36), users, offsets)
    assert np.bincount(got) / len(users) == pytest.approx([0.68, 0.04, 0.28], abs=0.01)
    assert set(before[got != TRAIN]) == {TRAIN}
    assert set(got[before != TRAIN]) == {TRAIN}


@pytest.mark.parametrize("rotation", [-0.1, 1.0])
def test_rotation_is_a_share_of_the_users(rotation: float):
    with pytest.raises(ValueError, match=r"data.split.rotation: .* at least 0 and less than 1"):
        limits.check(SplitConfig("user", rotation=rotation), "data.split")


def test_rotation_belongs_to_the_user_split():
    with pytest.raises(ValueError, match="belongs to kind user"):
        check_split(SplitConfig("temporal", rotation=0.36))


def test_folds_are_stable_balanced_and_independent_of_the_user_split():
    users = [str(user) for user in range(20_000)]
    fold = user_fold(users, 2)
    assert fold.dtype == np.int8
    # written down: a fold that moves would let a LUM answer for users that it was trained on
    assert user_fold(["1", "2", "3", "6040", "ünï", "", "a" * 70], 4).tolist() == [2, 1, 3, 2, 3, 0, 1]
    assert fold.mean() == pytest.approx(0.5, abs=0.02)
    split = assign(SplitConfig("user"), users, np.arange(len(users) + 1))
    for part in (TRAIN, TEST):
        assert fold[split == part].mean() == pytest.approx(0.5, abs=0.02)
    assert user_fold(users[100:200], 5).tolist() == user_fold(users, 5)[100:200].tolist()
    assert len(user_fold([], 2)) == 0
    for count in (0, 128):
        with pytest.raises(ValueError, match="expected 1 … 127"):
            user_fold(users, count)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SplitConfig("random"), "data.split.kind: got 'random', expected one of temporal, leave_one_out, user, time"),
        (SplitConfig("temporal", [0.8, 0.1]), "expected three numbers"),
        (SplitConfig("temporal", [0.8, 0.3, -0.1]), "expected three numbers"),
        (SplitConfig("user", [0.8, 0.1, 0.2]), "sum to 1"),
        (SplitConfig("leave_one_out", [0.8, 0.1, 0.1]), "no meaning for leave_one_out"),
        (SplitConfig("temporal", times=["2022-05-05", "2022-05-06"]), "times belong to kind time"),
        (SplitConfig("time", [0.8, 0.1, 0.1], times=["2022-05-05", "2022-05-06"]), "in place of fractions"),
        (SplitConfig("time", times=["2022-05-05"]), "expected two times"),
        (SplitConfig("time", times=["2022-05-06", "2022-05-05"]), "expected two times"),
        (SplitConfig("time", times=["yesterday", "today"]), "data.split.times: Invalid isoformat.*such as 2022-05-05"),
    ],
)
def test_bad_splits_are_refused(config: SplitConfig, message: str):
    with pytest.raises(ValueError, match=message):
        check_split(config)


def written_blocks(folder: Path, times: list[list[int]]) -> list[Path]:
    paths = []
    for number, block in enumerate(times):
        paths.append(folder / f"{number}.parquet")
        pl.DataFrame({"timestamp": block}, schema={"timestamp": pl.Int64}).write_parquet(paths[-1])
    return paths


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 400_000), max_size=20), min_size=1, max_size=4).filter(lambda b: any(b)),
    st.sampled_from([[0.8, 0.1, 0.1], [0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
)
def test_time_cuts_all_users_at_one_moment(tmp_path_factory: pytest.TempPathFactory, times: list, fractions: list):
    config = SplitConfig("time", fractions)
    cuts = cut_times(config, written_blocks(tmp_path_factory.mktemp("blocks"), times))
    time_E = np.array([time for block in times for time in block])
    split = assign(config, ["u"], np.array([0, len(time_E)]), time_E, cuts)
    for earlier in (TRAIN, VALID):
        later = time_E[split > earlier]
        if (split == earlier).any() and len(later):
            assert time_E[split == earlier].max() < later.min()
    # at least the share asked for, and without the last second of it less
    for cut, share in zip(cuts, np.cumsum(fractions)[:2]):
        before = (time_E < cut).sum()
        assert before >= share * len(time_E) - 1e-6
        assert share == 0 or (time_E < cut - 1).sum() < share * len(time_E)


def test_time_cuts_given_as_times():
    config = SplitConfig("time", times=["1970-01-02", "1970-01-02T08:00:10+08:00"])
    cuts = cut_times(config, [])
    assert cuts.tolist() == [86_400, 86_410]
    time_E = np.array([0, 86_399, 86_400, 86_409, 86_410])
    assert assign(config, ["u"], np.array([0, 5]), time_E, cuts).tolist() == [0, 0, 1, 1, 2]


def test_time_split_needs_one_clock():
    with pytest.raises(ValueError, match="needs one clock for all users"):
        cut_times(SplitConfig("time"), [], absolute_time=False)
    assert cut_times(SplitConfig("temporal"), [], absolute_time=False) is None


def test_the_earliest_share_holds_all_events_of_its_last_second():
    split = np.array([TRAIN, TRAIN, TRAIN, TRAIN, TEST, TRAIN], np.int8)
    timestamp = np.array([50, 10, 20, 20, 5, 40])
    assert moment_of_share(split, timestamp, 0.4) == 20  # the second of five is one of two at 20
    assert leave_out_later(split, timestamp, 0.4).tolist() == [LATER, TRAIN, TRAIN, TRAIN, TEST, LATER]
    assert leave_out_later(split, timestamp, 1.0).tolist() == split.tolist()
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="pretrain.time_share is"):
            moment_of_share(split, timestamp, share)
