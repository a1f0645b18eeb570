"""A published store of random answers, for tests that need no LUM."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lumrec.data.splits import user_fold
from lumrec.knowledge.records import user_key_bytes
from lumrec.knowledge.writer import KnowledgeWriter

KEYS = ["", "1", "ü" * 100, "x" * 5000, "2", "3"]
ITEMS = ["a", "b", "c"]


def publish(
    path: Path,
    *,
    keys: Sequence[str] = KEYS,
    items: Sequence[str] = ITEMS,
    dtype: str = "float16",
    with_log_z: bool = True,
    seed: int = 0,
) -> Path:
    """Publishes random answers for these users, by two LUMs; without rows. Gives `path` back."""
    identity = {
        "data_fingerprint": str(seed),
        "conditions": [{"feedback": "like"}, {}],
        "dim": 8,
        "lums": [{"run": "a"}, {"run": "b"}],
        "hazard": "cross_fit",
        "dtype": dtype,
        "rows": False,
        "users": True,
        "log_normalizer": with_log_z,
    }
    writer = KnowledgeWriter(path, identity, num_events=0, num_users=0, num_items=len(items), max_users=len(keys))
    generator = torch.Generator().manual_seed(seed)
    for lum in (0, 1):
        writer.write_items(lum, torch.randn(len(items), 8, generator=generator))
    writer.write_item_keys(items)
    o_BND, log_z_BN = (torch.randn(len(keys), 2, *rest, generator=generator) for rest in ([8], []))
    fields = {"asked_at": 1_700_000_000, "last_event_at": 5, "num_events": range(len(keys)), "num_seen": 2}
    records = writer.user_records(o_BND, log_z_BN if with_log_z else None, **fields, fold=user_fold(keys, 2))
    writer.write_users([user_key_bytes(key) for key in keys], records)
    writer.publish({"counts": {"users": len(keys)}, "built_at": 1})
    return path
