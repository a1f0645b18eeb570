"""FAISS beside the exact answer: a flat index equals it, with seen items left out; approximate ones come near."""

import copy

import numpy as np
import pytest
import torch

from lumrec.evaluation.ann import AnnConfig, ItemIndex, ann_metrics, exact_nearest, found_ranks
from lumrec.evaluation.retrieval import last_events, metric_sums, rank_targets

DIM = 8


@pytest.fixture(scope="module")
def vectors(tiny_prepared):
    generator = torch.Generator().manual_seed(0)
    targets = last_events(tiny_prepared, "test")
    shapes = (len(targets.row_B), DIM), (tiny_prepared.num_items, DIM)
    return (*(torch.randn(shape, generator=generator) for shape in shapes), targets)


def test_a_flat_index_is_exact(tiny_prepared, vectors):
    o_BV, e_IV, targets = vectors
    data = copy.copy(tiny_prepared)
    data.item_counts = data.item_counts.copy()
    data.item_counts[::5] = 0  # no candidates
    index = ItemIndex(e_IV, data.item_counts > 0, AnnConfig("flat"))
    assert torch.equal(index.search(o_BV, 50), exact_nearest(o_BV, e_IV, data.item_counts > 0, 50))
    exact_B = rank_targets(o_BV, e_IV, data, targets)
    for k in (1, 10, data.num_items):
        found_B = found_ranks(index, o_BV, data, targets, k=k)
        assert torch.equal(found_B, torch.where(exact_B <= k, exact_B, data.num_items + 1))
    metrics = ann_metrics(o_BV, e_IV, data, targets, config=AnnConfig("flat"), ks=[5, 10])
    sums = metric_sums(exact_B, [5, 10])
    assert {f"ann/{name}": pytest.approx(value / len(o_BV)) for name, value in sums.items()}.items() <= metrics.items()
    assert metrics["ann/recall@50"] == 1.0 and metrics["ann/ms_per_user"] > 0


@pytest.mark.parametrize(
    "config", [AnnConfig("hnsw"), AnnConfig("ivf", lists=20, probes=12)], ids=lambda config: config.index
)
def test_an_approximate_index_finds_most(config):
    generator = torch.Generator().manual_seed(0)
    o_BV, e_IV = torch.randn(50, DIM, generator=generator), torch.randn(2000, DIM, generator=generator)
    candidates = np.arange(2000) % 3 > 0
    found_BK = ItemIndex(e_IV, candidates, config).search(o_BV, 50)
    exact_BK = exact_nearest(o_BV, e_IV, candidates, 50)
    assert candidates[found_BK[found_BK >= 0].numpy()].all()
    recall = (exact_BK[:, :, None] == found_BK[:, None, :]).any(2).float().mean()
    assert 0.85 < recall <= 1


def test_an_unknown_index_is_refused():
    with pytest.raises(ValueError, match="ann.index: got 'tree', expected one of hnsw, flat, ivf"):
        ItemIndex(torch.zeros(3, DIM), np.ones(3, bool), AnnConfig("tree"))
