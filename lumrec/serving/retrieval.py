"""Items that fit a user best: by the answers of the knowledge store, or by asking the LUM while a request waits.

Both multiply answers with the embeddings of all items, by an exact FAISS index of each LUM's items.

Shape suffixes: B users, N conditions, I items, D width, K LUMs (folds), k items found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np

from lumrec.data.splits import user_fold
from lumrec.features.history import UserHistory
from lumrec.knowledge.log_normalizer import log_normalizer
from lumrec.knowledge.store import KnowledgeStore
from lumrec.query.conditions import spoken
from lumrec.run.errors import UserError
from lumrec.serving.live_lum import LiveLum


class Found(NamedTuple):
    """An item. similarity: o · e. share: its probability among all items under the condition; None = not known."""

    item: str
    similarity: float
    share: float | None


class ItemIndex:
    """Finds the items whose embeddings (float32 [I, D]) fit an answer best."""

    def __init__(self, keys: Sequence[str], e_ID: np.ndarray) -> None:
        self.keys = keys
        self.index = faiss.IndexFlatIP(e_ID.shape[1])
        self.index.add(np.ascontiguousarray(e_ID, dtype=np.float32))

    def find(self, o_ND: np.ndarray, log_z_N: np.ndarray | None, k: int) -> list[list[Found]]:
        """The k best items for each answer, the best first."""
        similarity_Nk, place_Nk = self.index.search(np.ascontiguousarray(o_ND, dtype=np.float32), k)
        share_Nk = None if log_z_N is None else np.exp(similarity_Nk - log_z_N[:, None])
        return [
            [
                Found(self.keys[place], float(similarity_Nk[n, i]), None if share_Nk is None else float(share_Nk[n, i]))
                for i, place in enumerate(places)
                if place >= 0
            ]
            for n, places in enumerate(place_Nk.tolist())
        ]


class Retriever:
    """Items for users, by what a store holds of them. A store's conditions are asked offline."""

    def __init__(self, store: KnowledgeStore) -> None:
        self.store = store
        keys, e_KID = store.items()
        self._indices = [ItemIndex(keys, e_ID.numpy()) for e_ID in e_KID]

    def condition(self, asked: Mapping[str, str] | None) -> int:
        """Which of the store's conditions this is; None is the first. Raises UserError for another one."""
        if asked is None:
            return 0
        if dict(asked) not in self.store.conditions:
            known = "; ".join(map(spoken, self.store.conditions))
            raise UserError(f"the store holds no answers under {spoken(dict(asked))}; it has: {known}")
        return self.store.conditions.index(dict(asked))

    def find(self, user: str, condition: int, k: int) -> tuple[list[Found] | None, str]:
        """The best items (None for a user whom the store does not know), and why the store cannot be read, or ""."""
        answers, problem = self.store.get_or_absent([user])
        if problem or not bool(answers.present_BN[0, condition]):
            return None, problem
        log_z_N = None if answers.log_z_BN is None else answers.log_z_BN[0, condition : condition + 1].numpy()
        index = self._indices[int(answers.fold_B[0])]
        return index.find(answers.o_BND[0, condition : condition + 1].numpy(), log_z_N, k)[0], ""


class Asker:
    """Items for users under any conditions, by LUMs that read the users' newest events. For one thread at a time."""

    def __init__(self, lums: Sequence[LiveLum]) -> None:
        self.lums = lums
        keys = lums[0].query.data.item_keys()
        self._items = [lum.query.items() for lum in lums]
        self._indices = [ItemIndex(keys, e_ID.numpy()) for e_ID in self._items]

    def find(self, user: str, history: UserHistory, asked: Sequence[Mapping[str, str]], k: int) -> list[list[Found]]:
        """The best items under each condition, by the LUM that was not trained on the user where there are several.

        Raises UserError for an unknown condition.
        """
        fold = int(user_fold([user], len(self.lums))[0])
        o_ND = self.lums[fold].answer([user], [history], asked)[0][0]
        if len(o_ND) != len(asked):
            raise UserError(f"a condition names several at once ({len(o_ND)} in all): name each of them")
        return self._indices[fold].find(o_ND.numpy(), log_normalizer(o_ND, self._items[fold]).numpy(), k)


def items_of(found: Sequence[Found] | None) -> list[dict[str, Any]]:
    """As the API answers."""
    return [each._asdict() for each in found or []]
