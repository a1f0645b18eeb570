"""Scores and metrics of a ranker on a split of the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from lumrec.batches.rows import RowBuilder, evaluation_batches
from lumrec.metrics.bootstrap import intervals
from lumrec.metrics.compare import Scores, write_scores
from lumrec.metrics.ranking import ranking_metrics
from lumrec.modules.moments import average_moments
from lumrec.run.distributed import rank, world_size


def score(dmp: DistributedModelParallel, builder: RowBuilder, rows: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Logits of `rows` (float64 [N]), on every rank; each rank computes its share. Collective."""
    was_training = dmp.training
    dmp.eval()
    average_moments(dmp)
    logit_N = torch.zeros(len(rows), dtype=torch.float64)
    times_N = torch.zeros(len(rows), dtype=torch.float64)
    with torch.no_grad():
        batches = evaluation_batches(builder, rows, batch_size=batch_size, rank=rank(), world_size=world_size())
        for index_B, batch in batches:
            logit_N[index_B] = dmp(batch.to(dmp.device)).double().cpu()
            times_N[index_B] = 1.0
    if world_size() > 1:
        dist.all_reduce(logit_N)
        dist.all_reduce(times_N)
    dmp.train(was_training)
    return (logit_N / times_N).numpy()


def evaluate(
    dmp: DistributedModelParallel, builder: RowBuilder, part: int, *, batch_size: int, keep_in: Path | None = None
) -> dict[str, float | str]:
    """`ranking_metrics` of the rows of a part (TRAIN, VALID or TEST), on every rank. Collective.

    keep_in: a run folder to save the scores in, for comparisons with other runs; then the metrics include intervals.
    """
    data = builder.data
    rows = data.with_negatives(np.flatnonzero(data.split == part))
    logit_N = score(dmp, builder, rows, batch_size=batch_size)
    event_N, _, label_N = data.rows(rows)
    user_N = data.user[event_N]
    metrics = ranking_metrics(label_N, logit_N, user_N)
    if keep_in is not None:
        for name, interval in intervals(label_N, logit_N, user_N).items():
            metrics |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        if rank() == 0:
            write_scores(keep_in, Scores(rows, label_N.astype(np.int8), user_N.astype(np.int64), logit_N))
    return metrics
