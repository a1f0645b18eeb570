"""How well a LUM's answers rank the labels without a ranker.

Shape suffixes: B rows, N conditions, D width, R rows of a part.
"""

import numpy as np
import torch
from torch import Tensor

from lumrec.data.prepared import PreparedData
from lumrec.data.splits import PARTS
from lumrec.knowledge.store import Knowledge
from lumrec.metrics.ranking import auc, grouped_auc

ROWS_AT_ONCE = 1 << 16


def wish_score(o_BND: Tensor, e_BD: Tensor) -> Tensor:
    """Similarity of the item to the first condition's answer, minus its mean similarity to the other answers, [B].

    With a wish and its opposite (feedback = like, dislike), a higher score means that the first fits better. With a
    single condition it is the similarity.

    >>> o_BND, e_BD = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[3.0, 1.0]])
    >>> wish_score(o_BND, e_BD)
    tensor([2.])
    """
    similarity_BN = torch.einsum("bnd,bd->bn", o_BND, e_BD)
    others_BN = similarity_BN[:, 1:]
    return similarity_BN[:, 0] - (others_BN.mean(1) if others_BN.shape[1] else 0.0)


def rank_by_answers(knowledge: Knowledge, data: PreparedData) -> dict[str, float]:
    """{"valid/lum_auc", "valid/lum_gauc", "test/lum_auc", "test/lum_gauc"}: the labels ranked only by `wish_score`.

    If the first condition is {} (no condition), the others are not its opposite, and only its similarity is used. Rows
    without an answer are left out. A part without rows, or with only one class, has nan.
    """
    num_read = len(knowledge.conditions) if knowledge.conditions[0] else 1
    result: dict[str, float] = {}
    for part in ("valid", "test"):
        answered = (data.split == PARTS.index(part)) & np.asarray(knowledge.present)
        row_R = data.with_negatives(np.flatnonzero(answered))
        scores = []
        for first in range(0, len(row_R), ROWS_AT_ONCE):
            rows = data.rows(row_R[first : first + ROWS_AT_ONCE])
            answers = knowledge.for_rows(rows.event)
            e_BD = knowledge.items_e[answers.fold_B, torch.from_numpy(rows.item)].float()
            scores.append(wish_score(answers.o_BND[:, :num_read], e_BD))
        score_R = torch.cat(scores).double().numpy() if scores else np.zeros(0)
        event_R, _, label_R = data.rows(row_R)
        result[f"{part}/lum_auc"] = auc(label_R, score_R)
        result[f"{part}/lum_gauc"] = grouped_auc(label_R, score_R, data.user[event_R]).value
    return result
