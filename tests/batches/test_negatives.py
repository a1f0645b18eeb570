"""Which items are candidates, and that their weights mean what the settings say."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumrec.batches.negatives import Candidates, NegativeSampler, NegativesConfig

COUNTS = np.array([0, 1, 5, 20, 100, 3])
NONE = torch.zeros(0, dtype=torch.int64)


def draw(config: NegativesConfig, items: list[int], *, seed: int = 0, counts=COUNTS, **arguments) -> Candidates:
    sampler = NegativeSampler(config, counts)
    return sampler.draw(torch.tensor(items, dtype=torch.int64), torch.Generator().manual_seed(seed), **arguments)


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("sampling", ["uniform", "popularity", "mixed"])
@pytest.mark.parametrize("in_batch", [False, True])
def test_logq_makes_the_weights_an_unbiased_estimate_of_the_catalogue(in_batch, sampling, unique):
    """E[w_j] = 1 for every item, where the events' items are drawn by their popularity."""
    config = NegativesConfig(in_batch=in_batch, sampled=24, sampling=sampling, unique=unique)
    sampler, generator = NegativeSampler(config, COUNTS), torch.Generator().manual_seed(0)
    sums, repeats = torch.zeros(len(COUNTS), dtype=torch.float64), 3000
    popularity = torch.from_numpy(COUNTS / COUNTS.sum())
    for _ in range(repeats):
        item_T = torch.multinomial(popularity, 16, replacement=True, generator=generator) if in_batch else NONE
        candidates = sampler.draw(item_T, generator)
        sums[candidates.item_C] += candidates.log_weight_C.double().exp()
    torch.testing.assert_close(sums[1:] / repeats, torch.ones(5, dtype=torch.float64), rtol=0.12, atol=0)
    assert sums[0] == 0  # an item without training events is no negative


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (NegativesConfig(sampling="uniform"), [0, 0.2, 0.2, 0.2, 0.2, 0.2]),
        (
            NegativesConfig(sampled=1, sampling="popularity", popularity_power=0.5),
            np.sqrt(COUNTS) / np.sqrt(COUNTS).sum(),
        ),
        (
            NegativesConfig(sampled=1, sampling="mixed", popularity_power=1.0, popularity_share=0.25),
            0.75 * np.array([0, 0.2, 0.2, 0.2, 0.2, 0.2]) + 0.25 * COUNTS / COUNTS.sum(),
        ),
        (NegativesConfig(sampled=1, sampling="popularity", popularity_power=0.0), [0, 0.2, 0.2, 0.2, 0.2, 0.2]),
    ],
)
def test_draws_follow_the_proposal(config, expected):
    config = dataclasses.replace(config, in_batch=False, sampled=200_000, logq=False)
    sampler = NegativeSampler(config, COUNTS)
    torch.testing.assert_close(sampler.proposal_I, torch.as_tensor(np.asarray(expected)))
    candidates = draw(config, items=[])
    share = torch.zeros(len(COUNTS), dtype=torch.float64)
    share[candidates.item_C] = candidates.log_weight_C.double().exp() / 200_000
    torch.testing.assert_close(share, sampler.proposal_I, rtol=0, atol=0.005)


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(st.integers(1, 5), max_size=12),
    sampled=st.sampled_from([0, 1, 40]),
    in_batch=st.booleans(),
    unique=st.booleans(),
    logq=st.booleans(),
    logq_positive=st.booleans(),
    num_ranks=st.sampled_from([1, 3]),
)
def test_weights_equal_plain_counting(items, sampled, in_batch, unique, logq, logq_positive, num_ranks):
    if not (in_batch or sampled) or (logq_positive and not logq):
        return
    config = NegativesConfig(
        in_batch=in_batch,
        sampled=sampled,
        sampling="mixed" if sampled else "uniform",
        unique=unique,
        logq=logq,
        logq_positive=logq_positive,
    )
    sampler = NegativeSampler(config, COUNTS, num_ranks=num_ranks)
    item_T, num_events = torch.tensor(items, dtype=torch.int64), len(items) + 7
    candidates = sampler.draw(item_T, torch.Generator().manual_seed(1), num_events=num_events)
    random = torch.rand(sampled, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tolist()
    drawn = [next(j for j, c in enumerate(sampler.cumulative_I.tolist()) if c > r) for r in random]
    weights, positive_weights = {}, {}
    for item in sorted(set(items) | set(drawn)):
        q, p = float(sampler.proposal_I[item]), COUNTS[item] / COUNTS.sum()
        count, expected = drawn.count(item), sampled * num_ranks * q
        absent = (1 - q) ** (sampled * num_ranks)
        if in_batch:
            count, expected, absent = (
                count + items.count(item),
                expected + num_events * p,
                absent * (1 - p) ** num_events,
            )
        if unique:
            count, expected = min(count, 1), 1 - absent
        weights[item] = count / expected if logq else count
        positive_weights[item] = 1 / expected if logq else 1
    assert candidates.item_C.tolist() == list(weights)
    assert candidates.item_C[candidates.positive_T].tolist() == items
    assert candidates.log_weight_C.exp().tolist() == pytest.approx(list(weights.values()), rel=1e-5)
    if logq_positive:
        expected = [positive_weights[item] for item in items]
        assert candidates.log_positive_weight_T.exp().tolist() == pytest.approx(expected, rel=1e-5)
    else:
        assert len(candidates.log_positive_weight_T) == 0


def test_in_batch_negatives_count_how_often_an_item_occurs_or_once():
    for unique, weights in ((False, [1.0, 2.0]), (True, [1.0, 1.0])):
        candidates = draw(NegativesConfig(sampled=0, logq=False, unique=unique), [2, 0, 2], counts=np.array([1, 1, 1]))
        assert candidates.item_C.tolist() == [0, 2] and candidates.positive_T.tolist() == [1, 0, 1]
        assert candidates.log_weight_C.exp().tolist() == pytest.approx(weights)


def test_the_full_catalogue():
    candidates = draw(NegativesConfig(full=True), [2, 1], counts=np.array([0, 1, 1]))
    assert candidates.item_C.tolist() == [0, 1, 2] and candidates.positive_T.tolist() == [2, 1]
    assert candidates.log_weight_C.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NegativesConfig(in_batch=False, sampled=0), "no negatives"),
        (NegativesConfig(sampling="zipf"), "expected one of"),
        (NegativesConfig(sampling="mixed", popularity_share=1.5), "at least 0 and at most 1"),
        (NegativesConfig(sampling="popularity"), "set negatives.sampled"),
        (NegativesConfig(full=True, across_ranks=True), "whole catalogue already"),
        (NegativesConfig(logq=False, logq_positive=True), "logq=true"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        NegativeSampler(config, COUNTS)
