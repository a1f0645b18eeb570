"""Approximate nearest neighbours with FAISS: how much of the exact answer an index of item vectors finds, and how fast.

The index holds only the candidates (items with a training event) and searches by inner product, which covers both
similarities. Seen items are removed after the search, so the search asks for as many items more.

Shape suffixes: B users, I catalogue items, K results of a search, V width of vectors, P pairs of user and seen item.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lumrec.data.columns import expand_ranges
from lumrec.data.prepared import PreparedData
from lumrec.evaluation.retrieval import Targets, metric_sums
from lumrec.run import limits
from lumrec.run.limits import count

# Largest size (users × items) of the mask of seen items.
SEEN_BUDGET = 1 << 25


@dataclass(frozen=True)
class AnnConfig:
    """The FAISS index of the item vectors.

    index: flat (exact), hnsw or ivf; "" = none is built.
    k: number of items that are searched when the index's recall and time are measured.
    links: HNSW's M.
    build_beam: HNSW's efConstruction.
    beam: HNSW's efSearch.
    lists: number of IVF's lists; 0 = 4·sqrt(items).
    probes: number of IVF's lists that a search reads.
    """

    index: Literal["hnsw", "flat", "ivf", ""] = "hnsw"
    k: int = count(50, least=1, most=10_000)
    links: int = count(32, least=2, most=1024)  # FAISS divides by log(links), and aborts at 0
    build_beam: int = count(200, least=1, most=2**20)
    beam: int = count(128, least=1, most=2**20)
    lists: int = count(0)
    probes: int = count(16, least=1, most=2**31 - 1)


class ItemIndex:
    """A FAISS index of the catalogue items that `is_candidate_I` (bool [I]) marks, by inner product.

    Raises UserError for settings that FAISS cannot work with.
    """

    def __init__(self, e_IV: Tensor, is_candidate_I: np.ndarray, config: AnnConfig) -> None:
        limits.check(config, "ann")
        import faiss  # not at the top: every app loads this module with its config, and few have an index

        faiss.omp_set_num_threads(torch.get_num_threads())
        self.items = np.flatnonzero(is_candidate_I)
        e = np.ascontiguousarray(e_IV.float().numpy()[self.items])
        self.index: Any = _make_index(e.shape[1], len(e), config)
        if not self.index.is_trained:
            self.index.train(e)
        self.index.add(e)

    def search(self, o_BV: Tensor, k: int) -> Tensor:
        """The k nearest items of each user, nearest first, int64 [B, min(k, candidates)]; -1 where fewer are found."""
        _, index_BK = self.index.search(np.ascontiguousarray(o_BV.float().numpy()), min(k, len(self.items)))
        return torch.from_numpy(np.where(index_BK >= 0, self.items[index_BK], -1))


def _make_index(dim: int, num_items: int, config: AnnConfig) -> Any:
    import faiss

    metric = faiss.METRIC_INNER_PRODUCT
    index: Any
    if config.index == "hnsw":
        index = faiss.IndexHNSWFlat(dim, config.links, metric)
        index.hnsw.efConstruction, index.hnsw.efSearch = config.build_beam, config.beam
        return index
    if config.index == "ivf":
        lists = min(num_items, config.lists or max(1, round(4 * num_items**0.5)))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, metric)
        index.nprobe = config.probes
        return index
    return faiss.IndexFlatIP(dim)


def ann_metrics(
    o_BV: Tensor, e_IV: Tensor, data: PreparedData, targets: Targets, *, config: AnnConfig, ks: Sequence[int]
) -> dict[str, float]:
    """{"ann/hr@10": …, "ann/ndcg@10": …, "ann/recall@50": …, "ann/ms_per_user": …, …} of these users' targets.

    hr, ndcg: as in the exact evaluation, but from the items that the index finds. recall@k: share of the exact k
    nearest items that the index finds, seen items included. ms_per_user, exact_ms_per_user: time of these searches by
    the index, and by a full product and top-k, on torch.get_num_threads() threads. build_s: time to build the index.
    """
    start = time.perf_counter()
    is_candidate_I = data.item_counts > 0
    index = ItemIndex(e_IV, is_candidate_I, config)
    built = time.perf_counter()
    found_BK = index.search(o_BV, config.k)
    searched = time.perf_counter()
    exact_BK = exact_nearest(o_BV, e_IV, is_candidate_I, config.k)
    exact = time.perf_counter()
    num_users, block = len(o_BV), max(1, SEEN_BUDGET // config.k**2)
    common = sum(
        (one_BK[:, :, None] == other_BK[:, None, :]).any(2).sum().item()
        for one_BK, other_BK in zip(exact_BK.split(block), found_BK.split(block), strict=True)
    )
    sums = metric_sums(found_ranks(index, o_BV, data, targets, k=max(ks)), ks)
    return {
        **{f"ann/{name}": value / num_users for name, value in sums.items()},
        f"ann/recall@{config.k}": common / max(1, exact_BK.numel()),
        "ann/ms_per_user": 1e3 * (searched - built) / num_users,
        "ann/exact_ms_per_user": 1e3 * (exact - searched) / num_users,
        "ann/build_s": built - start,
    }


def exact_nearest(o_BV: Tensor, e_IV: Tensor, is_candidate_I: np.ndarray, k: int) -> Tensor:
    """The k candidates with the highest inner product, int64 [B, min(k, candidates)], which an index approximates."""
    items = torch.from_numpy(np.flatnonzero(is_candidate_I))
    e = e_IV[items]
    block = max(1, SEEN_BUDGET // (4 * max(1, len(e))))
    return torch.cat([items[(o @ e.T).topk(min(k, len(e)), dim=1).indices] for o in o_BV.split(block)])


def found_ranks(index: ItemIndex, o_BV: Tensor, data: PreparedData, targets: Targets, *, k: int) -> Tensor:
    """Rank of each target among the found unseen items, from 1 (int64 [B]); num_items + 1 if not among the first k.

    Each search asks for k items plus the highest number of seen items in its block; users with similar numbers of seen
    items are in one block.
    """
    seen_B = targets.end_B - targets.first_B
    order = torch.argsort(seen_B, stable=True)
    item_E = torch.from_numpy(data.item)
    rank_B = torch.full((len(order),), data.num_items + 1)
    for block in order.split(max(1, min(512, SEEN_BUDGET // data.num_items))):
        row_B, first_B, num_seen_B = targets.row_B[block], targets.first_B[block], seen_B[block]
        found_BK = index.search(o_BV[block], k + int(num_seen_B.max()))
        is_seen_BI = torch.zeros(len(block), data.num_items, dtype=torch.bool)
        user_P = torch.repeat_interleave(torch.arange(len(block)), num_seen_B)
        is_seen_BI[user_P, item_E[expand_ranges(first_B, num_seen_B)]] = True
        is_seen_BI.scatter_(1, item_E[row_B][:, None], False)  # a target is never left out
        is_left_BK = (found_BK >= 0) & ~is_seen_BI.gather(1, found_BK.clamp(min=0))
        rank_BK = is_left_BK.cumsum(1)
        is_target_BK = is_left_BK & (found_BK == item_E[row_B][:, None]) & (rank_BK <= k)
        found, at = is_target_BK.any(1), is_target_BK.long().argmax(1)
        rank_B[block[found]] = rank_BK.gather(1, at[:, None]).squeeze(1)[found]
    return rank_B
