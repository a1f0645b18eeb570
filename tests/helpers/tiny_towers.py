"""Small towers, and batches for them."""

import dataclasses

import torch

from lumrec.modules.retrievers.edb import TowerBatch, TwoTower
from lumrec.modules.tokens import make_kjt, make_tables

NUM_TOKENS, MAX_HISTORY = 9, 6


def make_towers(**settings) -> TwoTower:
    torch.manual_seed(0)
    tables = make_tables({"item": (NUM_TOKENS + 1, 4), "age": (5, 2)}, {"item": "item", "age": "age"})
    return TwoTower(
        tables,
        item_features=["item"],
        feedback_features=[],
        row_features=["age"],
        dim=6,
        hidden_dims=[8],
        max_history=MAX_HISTORY,
        **settings,
    )


def make_batch(histories: list[list[int]], items: list[int], ages: list[int], knowledge=None) -> TowerBatch:
    """Users with these histories, and candidates; every token is in the batch, at its own number."""
    stride, num_users = NUM_TOKENS + len(histories), len(histories)
    ones, none = torch.ones(NUM_TOKENS, dtype=torch.int64), torch.zeros(num_users, dtype=torch.int64)
    columns = {
        "item": (torch.arange(1, NUM_TOKENS + 1), torch.cat([ones, none])),
        "age": (torch.tensor(ages, dtype=torch.int64), torch.cat([0 * ones, none + 1])),
    }
    lengths = torch.tensor([0, *map(len, histories)])
    batch = TowerBatch(
        tokens=make_kjt(["item", "age"], columns, stride=stride),
        num_tokens=NUM_TOKENS,
        history_T=torch.tensor([token for history in histories for token in history], dtype=torch.int64),
        offsets_B1=lengths.cumsum(0),
        candidate_C=torch.tensor(items, dtype=torch.int64),
        candidate_item_C=torch.tensor(items, dtype=torch.int64),
        positive_B=torch.zeros(0, dtype=torch.int64),
        log_weight_C=torch.zeros(len(items)),
        log_positive_weight_B=torch.zeros(0),
    )
    return dataclasses.replace(batch, **(knowledge or {}))


def draw_knowledge(num_users: int, num_items: int, *, folds: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "o_BNW": torch.randn(num_users, 2, 3, generator=generator),
        "present_BN": torch.ones(num_users, 2, dtype=torch.bool),
        "fold_B": torch.arange(num_users) % folds,
        "e_CKW": torch.randn(num_items, folds, 3, generator=generator),
    }


HISTORIES, ITEMS, AGES = [[1, 2, 3, 1, 0, 4], [], [5], [8, 7]], [0, 3, 8], [1, 2, 0, 4]
