"""Batches of a two-tower retriever: rows of the log with the history before each, and the items to choose from.

Shape suffixes: B rows, C candidate items, I catalogue items, K LUMs (folds), W width of the LUM.
"""

from collections.abc import Iterator

import numpy as np
import torch

from lumrec.batches.negatives import NegativeSampler, NegativesConfig
from lumrec.batches.rows import RowBuilder, RowLoader
from lumrec.modules.retrievers.edb import TowerBatch

ITEM_BLOCK = 32768


class TowerBuilder(RowBuilder):
    """Makes batches for a TwoTower out of event rows and catalogue items; settings as of a RowBuilder."""

    def towers(self, rows: np.ndarray, items_C: np.ndarray) -> TowerBatch:
        """Users of the event rows `rows` (int64 [B]), each with the history before its row, and items (int64 [C]).

        Either may be empty. A row's item is not read: positives and weights are left empty.
        """
        tokens, item_C = self.tokens(rows, items_C), torch.from_numpy(items_C)
        batch = TowerBatch(
            tokens=tokens.kjt,
            num_tokens=tokens.num_tokens,
            history_T=tokens.history_T,
            offsets_B1=tokens.offsets_B1,
            candidate_C=tokens.item_C,
            candidate_item_C=item_C,
            positive_B=torch.zeros(0, dtype=torch.int64),
            log_weight_C=torch.zeros(len(items_C)),
            log_positive_weight_B=torch.zeros(0),
        )
        if self.knowledge is not None:
            answers = self.knowledge.for_rows(rows)
            batch.o_BNW, batch.present_BN, batch.fold_B = answers.o_BND, answers.present_BN, answers.fold_B
            batch.e_CKW = self.knowledge.items_e[:, item_C].transpose(0, 1)
        return batch

    def catalogue(self) -> Iterator[TowerBatch]:
        """Every catalogue item, in order, in batches without users."""
        for start in range(0, self.data.num_items, ITEM_BLOCK):
            items = np.arange(start, min(start + ITEM_BLOCK, self.data.num_items))
            yield self.towers(np.zeros(0, np.int64), items)


class TowerLoader(RowLoader):
    """Training batches of a two-tower retriever: the rows as a RowLoader deals them, and negatives as in step 1.

    Expected occurrences of items (logQ) are counted in `rows`. A training item that is in none of them counts once, so
    that it is drawn too: the evaluation has it as a candidate.
    """

    builder: TowerBuilder

    def __init__(
        self,
        builder: TowerBuilder,
        rows: np.ndarray,
        *,
        negatives: NegativesConfig,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(builder, rows, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        data = builder.data
        counts_I = np.bincount(data.item[rows], minlength=data.num_items)
        self.across_ranks = negatives.across_ranks
        self.sampler = NegativeSampler(
            negatives,
            np.maximum(counts_I, data.item_counts > 0),
            num_ranks=world_size if negatives.across_ranks else 1,
        )

    def make_batch(self, rows: np.ndarray, *, number: int, num_rows: int) -> TowerBatch:
        seed = np.random.SeedSequence([self.seed, self.epoch, self.first, number]).generate_state(1, np.uint64)[0]
        candidates = self.sampler.draw(
            torch.from_numpy(self.builder.data.item[rows]),
            torch.Generator().manual_seed(int(seed >> np.uint64(1))),
            num_events=num_rows if self.across_ranks else None,
        )
        batch = self.builder.towers(rows, candidates.item_C.numpy())
        batch.positive_B, batch.log_weight_C = candidates.positive_T, candidates.log_weight_C
        batch.log_positive_weight_B = candidates.log_positive_weight_T
        return batch
