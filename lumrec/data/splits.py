"""Splits each log into train, valid and test events, and its users into folds.

temporal          user a: t t t t t t t t v s        first 80 %, next 10 %, last 10 % of each user's events; a moment
                                                     is never divided (lumrec/data/moments.py)
leave_one_out     user a: t t t t t t t t v s        the last event, the one before it, the rest
user              user a: t t t t t   user b: s s s  whole users, by a seeded hash of the user's key (DIN's protocol)
time              t t t t t t t t | v v | s s s      the same two times for all users
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import polars as pl

from lumrec.data.moments import inseparable
from lumrec.run import limits
from lumrec.run.errors import UserError
from lumrec.run.limits import setting

TRAIN, VALID, TEST = 0, 1, 2
LATER = 3  # training events that a LUM leaves out, see `leave_out_later`
PARTS = ("train", "valid", "test")
DEFAULT_FRACTIONS = {
    "temporal": [0.8, 0.1, 0.1],
    "leave_one_out": [],
    "user": [0.68, 0.04, 0.28],
    "time": [0.8, 0.1, 0.1],
}
MOST_FOLDS = 127  # what an int8 counts
SplitKind = Literal["temporal", "leave_one_out", "user", "time"]
_FOLD_SALT = 0x6C756D666F6C64  # keeps folds independent of the user split


@dataclass(frozen=True)
class SplitConfig:
    """How events are split into train, validation and test.

    kind: temporal (the last events of each user are tested), leave_one_out (the last one), user (whole users), or time
        (one moment for all users).
    fractions: shares of train, validation and test. [] = .8, .1, .1 of each user's events for temporal and of all
        events for time; .68, .04, .28 of the users for user.
    seed: seed of the user split.
    times: for the time split, instead of fractions: where validation and where test begin, in ISO 8601, UTC unless an
        offset is given (["2022-05-05", "2022-05-07T12:00:00+08:00"]).
    rotation: for the user split: moves all users round by this share (0 ≤ … < 1), those at the end back to the
        beginning. With the default fractions, 0.36 validates and tests on users who all train at rotation 0, to
        confirm settings on users that were not used for tuning.
    """

    kind: SplitKind = "temporal"
    fractions: list[float] = setting(list, least=0, most=1)
    seed: int = limits.seed()
    times: list[str] = field(default_factory=list)
    rotation: float = setting(0.0, least=0, below=1)

    def check(self, at: str) -> None:
        """Raises UserError for settings that do not belong together (`at`: the section, with a dot)."""
        check_split(self)


def check_split(config: SplitConfig) -> list[float]:
    """The fractions in use: three, or none for leave_one_out.

    Raises UserError for an unknown kind, for fractions that are not three numbers >= 0 that sum to 1, and for a
    rotation with another kind than user.
    """
    limits.check_choice("data.split.kind", config.kind, get_args(SplitKind))
    if config.times:
        _check_times(config)
    if config.rotation and config.kind != "user":
        raise UserError(
            f"data.split.rotation: got {config.rotation} with kind {config.kind!r}; it belongs to kind user"
        )
    fractions = [float(share) for share in (config.fractions or DEFAULT_FRACTIONS[config.kind])]
    if config.kind == "leave_one_out":
        if config.fractions:
            raise UserError("data.split.fractions has no meaning for leave_one_out; leave it out")
        return fractions
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise UserError(
            f"data.split.fractions: got {fractions}, expected three numbers ≥ 0 (train, valid, test) that sum to 1"
        )
    return fractions


def _check_times(config: SplitConfig) -> list[int]:
    """The two times of a time split in seconds. Raises UserError for anything else."""
    if config.kind != "time" or config.fractions:
        raise UserError(
            f"data.split.times: got {config.times} with kind {config.kind!r} and fractions {config.fractions}; times "
            "belong to kind time, in place of fractions"
        )
    try:
        moments = [datetime.fromisoformat(text.replace("Z", "+00:00")) for text in config.times]
    except ValueError as error:
        raise UserError(f"data.split.times: {error}; expected ISO 8601, such as 2022-05-05") from None
    seconds = [int((m if m.tzinfo else m.replace(tzinfo=timezone.utc)).timestamp()) for m in moments]
    if len(seconds) != 2 or seconds[0] > seconds[1]:
        raise UserError(
            f"data.split.times: got {config.times}; expected two times, where validation and where test begin"
        )
    return seconds


def cut_times(config: SplitConfig, blocks: Sequence[Path], *, absolute_time: bool = True) -> np.ndarray | None:
    """Seconds at which validation and test begin (int64 [2]) for the time split; None for the others.

    blocks: Parquet files with the column timestamp. A cut by fractions is the earliest second with at least that share
    of all events before it; events of one second are never divided. Raises UserError where times of different users
    cannot be compared.
    """
    if config.kind != "time":
        return None
    if not absolute_time:
        raise UserError(
            "data.split.kind=time needs one clock for all users, and this log only has the time between a user's own "
            "events; use temporal, leave_one_out or user"
        )
    if config.times:
        return np.array(_check_times(config), np.int64)
    time, fractions = pl.scan_parquet(list(blocks)).select("timestamp"), check_split(config)
    days = time.group_by(day=pl.col("timestamp") // 86_400).len().sort("day").collect(engine="streaming")
    before_day = np.concatenate([[0], np.cumsum(days["len"].to_numpy().astype(np.int64))])
    cuts = []
    for share in (fractions[0], fractions[0] + fractions[1]):
        wanted = math.ceil(before_day[-1] * share - 1e-6)
        index = max(0, int(np.searchsorted(before_day, wanted)) - 1)  # of the day with the wanted-th event
        day = int(days["day"][min(index, len(days) - 1)])
        inside = time.filter(pl.col("timestamp") // 86_400 == day).group_by("timestamp").len().sort("timestamp")
        seconds = inside.collect(engine="streaming")
        running = before_day[index] + np.cumsum(seconds["len"].to_numpy().astype(np.int64))
        # one second after the share is reached
        cuts.append(int(seconds["timestamp"][int(np.searchsorted(running, wanted))]) + 1 if wanted > 0 else 0)
    return np.array(cuts, np.int64)


def assign(
    config: SplitConfig,
    user_keys: Sequence[str],
    offsets: np.ndarray,
    timestamp_E: np.ndarray | None = None,
    cuts: np.ndarray | None = None,
    *,
    before_E: np.ndarray | None = None,
) -> np.ndarray:
    """The split of each event (int8: 0 train, 1 valid, 2 test), for events sorted by user and time.

    user_keys: raw key of each of U users. offsets: [U + 1], events of user u are offsets[u]:offsets[u + 1]. timestamp_E
    (seconds) and cuts (see `cut_times`) are read only by the time split; an event at a cut comes after it. before_E:
    where the moment of each event begins (lumrec/data/moments.py; by default each event is one): temporal and time
    place a moment by its first event. leave_one_out follows the published protocol, the order of the log. Labels,
    feedback and items have no influence.

    Few events: temporal rounds in favour of training (of n events the first ceil(0.8 n) are train, those up to
    ceil(0.9 n) valid), so that users with fewer than 5 events only have training events, and those with fewer than 10
    no test event; with leave_one_out, users with fewer than 3 events only have training events.

    >>> assign(SplitConfig("leave_one_out"), ["a", "b"], np.array([0, 4, 6]))
    array([0, 0, 1, 2, 0, 0], dtype=int8)
    """
    fractions = check_split(config)
    counts_U = np.diff(offsets)
    first_E = np.arange(offsets[-1]) if before_E is None else inseparable(before_E)
    if config.kind == "time":
        assert timestamp_E is not None and cuts is not None
        return np.searchsorted(cuts, timestamp_E[first_E], side="right").astype(np.int8)
    if config.kind == "user":
        share_U = _hash(user_keys, config.seed).astype(np.float64) / 2.0**64
        if config.rotation:
            share_U = (share_U + config.rotation) % 1.0
        bounds = np.cumsum(fractions)[:2]
        # side "right": a fraction of 0 leaves its split empty; the last bound is open, however the sum was rounded
        return np.repeat(np.searchsorted(bounds, share_U, side="right").astype(np.int8), counts_U)
    if config.kind == "leave_one_out":
        valid_from_U = np.where(counts_U >= 3, counts_U - 2, counts_U)
        test_from_U = np.where(counts_U >= 3, counts_U - 1, counts_U)
    else:
        # 1e-9: 0.7 * 10 must not become 8 by rounding error
        valid_from_U = np.ceil(counts_U * fractions[0] - 1e-9).astype(np.int64)
        test_from_U = np.ceil(counts_U * (fractions[0] + fractions[1]) - 1e-9).astype(np.int64)
    index_E = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts_U)
    if config.kind == "temporal":
        index_E = index_E[first_E]
    return (index_E >= np.repeat(valid_from_U, counts_U)).astype(np.int8) + (
        index_E >= np.repeat(test_from_U, counts_U)
    ).astype(np.int8)


def assign_block(config: SplitConfig, block: pl.DataFrame, user_ids: pl.Series, cuts: np.ndarray | None) -> np.ndarray:
    """`assign` for a block of `ingest` (user, timestamp, rows_back); user_ids: as text, of all users."""
    user_E, time_E, back_E = (block[name].to_numpy() for name in ("user", "timestamp", "rows_back"))
    first, last = int(user_E[0]), int(user_E[-1]) + 1
    offsets = np.searchsorted(user_E, np.arange(first, last + 1, dtype=user_E.dtype))
    before_E = np.arange(len(block)) - back_E
    return assign(config, user_ids[first:last].to_list(), offsets, time_E, cuts, before_E=before_E)


def moment_of_share(split: np.ndarray, timestamp: np.ndarray, share: float) -> int:
    """Timestamp (seconds) of the last event among the earliest `share` of the training events.

    Raises UserError for a share that is not above 0 and at most 1.
    """
    if not 0.0 < share <= 1.0:
        raise UserError(f"pretrain.time_share is {share}; expected more than 0 and at most 1 (all training events)")
    times = np.sort(timestamp[split == TRAIN])
    return int(times[max(0, math.ceil(share * len(times)) - 1)]) if len(times) else 0


def leave_out_later(split: np.ndarray, timestamp: np.ndarray, share: float) -> np.ndarray:
    """The split for a LUM that only learns from the earliest `share` of the training events: the others are LATER."""
    if share == 1.0:
        return split
    return np.where((split == TRAIN) & (timestamp > moment_of_share(split, timestamp, share)), LATER, split)


def user_fold(user_keys: Sequence[str], num_folds: int) -> np.ndarray:
    """Fold (int8 [U], 0 … num_folds - 1) of each user, a stable hash of the raw key.

    The same key has the same fold in every data set, run and version, so a LUM trained with fold=k/K has never seen the
    users of fold k. Raises UserError unless 1 <= num_folds <= 127.

    >>> user_fold(["1", "2", "3"], 2)
    array([0, 1, 1], dtype=int8)
    """
    if not 1 <= num_folds <= MOST_FOLDS:
        raise UserError(f"number of folds: got {num_folds}, expected 1 … {MOST_FOLDS}")
    return ((_hash(user_keys, _FOLD_SALT) >> np.uint64(11)) % np.uint64(num_folds)).astype(np.int8)


def _hash(keys: Sequence[str], seed: int) -> np.ndarray:
    """uint64 [U]: FNV-1a over each key's UTF-8 bytes from a seeded start, mixed by splitmix64.

    The loop runs over the bytes of the longest key, for all keys at once.
    """
    if len(keys) == 0:
        return np.zeros(0, np.uint64)
    encoded = np.char.encode(np.asarray(keys, dtype=np.str_), "utf-8")
    lengths_U = np.char.str_len(encoded)
    bytes_UW = encoded.view(np.uint8).reshape(len(keys), encoded.dtype.itemsize)
    with np.errstate(over="ignore"):
        start = np.uint64(0xCBF29CE484222325) ^ mix(np.array([seed % 2**64], np.uint64))[0]
        state_U = np.full(len(keys), start, np.uint64)
        for index in range(bytes_UW.shape[1]):
            stepped = (state_U ^ bytes_UW[:, index]) * np.uint64(0x100000001B3)
            state_U = np.where(lengths_U > index, stepped, state_U)
        return mix(state_U)


def mix(state: np.ndarray) -> np.ndarray:
    """splitmix64's output function, elementwise: each bit depends on all others; it relies on overflow."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def parse_fold(fold: str) -> tuple[int, int] | None:
    """(k, K) of "k/K", None of "". Raises UserError for anything else."""
    if not fold:
        return None
    left, _, right = fold.partition("/")
    short = max(len(left), len(right)) <= len(str(MOST_FOLDS))
    if short and left.isdecimal() and right.isdecimal() and int(left) < int(right) and 2 <= int(right) <= MOST_FOLDS:
        return int(left), int(right)
    raise UserError(
        f'fold is {fold!r}; expected "k/K" with 0 ≤ k < K and 2 ≤ K ≤ {MOST_FOLDS}, such as fold=0/2, or "" for all '
        "users"
    )
