"""Small rankers of every kind, and batches for them written as rows."""

import torch

from lumrec.modules.knowledge import KnowledgeBatch, KnowledgeFusion
from lumrec.modules.rankers.base import RankBatch, Ranker
from lumrec.modules.rankers.dien import Dien
from lumrec.modules.rankers.din import Din
from lumrec.modules.rankers.dlrm import Dlrm
from lumrec.modules.rankers.sim import Sim
from lumrec.modules.rankers.twin import Twin
from lumrec.modules.tokens import feature_order, make_kjt, make_tables

TABLES = {"item": (40, 8), "genre": (9, 8), "rating": (4, 8), "user": (30, 8)}
FEATURES = {"item": "item", "genres": "genre", "rating": "rating", "user": "user", "hour": "rating"}
MODELS = {
    "din": Din,
    "din softmax": lambda *args, **keywords: Din(*args, softmax=True, **keywords),
    "din dice": lambda *args, **keywords: Din(*args, activation="dice", **keywords),
    "dlrm": Dlrm,
    "dlrm cross": lambda *args, **keywords: Dlrm(*args, cross_dim=6, **keywords),
    "dien": Dien,
    "sim": lambda *args, **keywords: Sim(*args, num_searched=8, **keywords),
    "sim hard": lambda *args, **keywords: Sim(*args, search="hard", **keywords),
    "twin": lambda *args, **keywords: Twin(*args, num_searched=8, **keywords),
}


def make_ranker(name: str, *, num_statistics: int = 3, knowledge: KnowledgeFusion | None = None, **keywords) -> Ranker:
    torch.manual_seed(0)
    return MODELS[name](
        make_tables(TABLES, FEATURES),
        item_features=["item", "genres"],
        feedback_features=["rating"],
        row_features=["user", "hour"],
        num_statistics=num_statistics,
        hidden_dims=[16, 8],
        knowledge=knowledge,
        **keywords,
    )


class Row:
    """One row in words: the target item, (item, rating) of the history, user, label; genres follow from the item."""

    def __init__(self, target: int, history: list[tuple[int, int]], user: int = 1, label: float = 0.0) -> None:
        self.target, self.history, self.user, self.label = target, history, user, label
        self.dense = [float(user) / 10, len(history) / 10, 0.5]


def make_batch(rows: list[Row], *, num_statistics: int = 3, knowledge: KnowledgeBatch | None = None) -> RankBatch:
    tokens = sorted({(row.target, 0) for row in rows} | {pair for row in rows for pair in row.history})
    place = {token: i for i, token in enumerate(tokens)}
    bags: dict[str, list[list[int]]] = {
        "item": [[item] for item, _ in tokens] + [[] for _ in rows],
        "genres": [[item % 9, item // 9][: 1 + item % 2] for item, _ in tokens] + [[] for _ in rows],
        "rating": [[rating] if rating else [] for _, rating in tokens] + [[] for _ in rows],
        "user": [[] for _ in tokens] + [[row.user] for row in rows],
        "hour": [[] for _ in tokens] + [[row.user % 4] for row in rows],
    }
    columns = {
        name: (torch.tensor(sum(bag, []), dtype=torch.int64), torch.tensor([len(x) for x in bag]))
        for name, bag in bags.items()
    }
    lengths = torch.tensor([0] + [len(row.history) for row in rows])
    return RankBatch(
        tokens=make_kjt(feature_order(make_tables(TABLES, FEATURES)), columns, stride=len(tokens) + len(rows)),
        num_tokens=len(tokens),
        target_B=torch.tensor([place[row.target, 0] for row in rows]),
        history_T=torch.tensor([place[pair] for row in rows for pair in row.history], dtype=torch.int64),
        offsets_B1=lengths.cumsum(0),
        dense_BF=torch.tensor([row.dense[:num_statistics] for row in rows]).reshape(len(rows), num_statistics),
        label_B=torch.tensor([row.label for row in rows]),
        row_B=torch.arange(len(rows)),
        knowledge=knowledge,
        item_U=torch.tensor([item for item, _ in tokens]),
        category_U=torch.tensor([item % 9 for item, _ in tokens]),
        age_T=torch.tensor([100.0 * (i + 1) for row in rows for i in reversed(range(len(row.history)))]),
        category_count_T=torch.tensor(
            [
                sum(x % 9 == item % 9 for x, _ in row.history[:i])
                for row in rows
                for i, (item, _) in enumerate(row.history)
            ],
            dtype=torch.int64,
        ),
    )


def make_rows(lengths: list[int], seed: int = 0) -> list[Row]:
    random = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=random))

    return [
        Row(draw(40), [(draw(40), 1 + draw(3)) for _ in range(length)], user=draw(30), label=float(draw(2)))
        for length in lengths
    ]


def random_knowledge(rows: int) -> KnowledgeBatch:
    return KnowledgeBatch(
        torch.randn(rows, 2, 4),
        torch.randn(rows, 4),
        torch.randn(rows, 2),
        torch.ones(rows, 2, dtype=torch.bool),
        torch.arange(rows) % 2,
    )
