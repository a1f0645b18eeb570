"""TorchRec's managed collisions (ZCH) in a warm start: the buffers that say which row a raw id has.

Each rank keeps its own map: `_mch_sorted_raw_ids` is sorted within the rank and leads to the rank's rows. On another
number of ranks, ids would be looked up where they are not. Such buffers are taken only as a whole, together with their
table's rows, and to the same shards.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from lumrec.warm_start.rules import Rule
from lumrec.warm_start.sources import Source

_BUFFER = re.compile(r"(?:.*\.)?(?P<table>[^.]+)\.(?P<buffer>_mch_\w+|_hash_zch_\w+)")
_INSTEAD = (
    "begin on as many ranks as it was saved on, in one plan, with exact rules for the table and all its buffers; or "
    "write its raw ids and rows to a vocabulary and say rows=remap"
)

Pairs = Mapping[str, tuple[str, str, Rule]]


def routing_problems(source: Source, targets: Mapping[str, Any], pairs: Pairs) -> list[str]:
    """What would send raw ids to other rows than in production, in words. pairs: target → (name, whole name, rule)."""
    taken = {full: (target, rule) for target, (_, full, rule) in pairs.items()}
    theirs, ours = _by_table(source.tensors), _by_table(targets)
    problems = []
    for table, names in theirs.items():
        weights = [(full, *taken[full]) for full in _weights_of(table, source.tensors) if full in taken]
        for full, _, rule in weights:
            by_place = rule.rows in ("error", "grow")
            if by_place and (left := [name for name in names if name not in taken]):
                problems.append(
                    f"{full!r} is taken by place, but its raw ids are routed by {left[0]!r}, which is not taken: "
                    f"{_INSTEAD}"
                )
        for name in names:
            if name not in taken:
                continue
            target, rule = taken[name]
            if not weights or any(of_weight.rows != "error" for _, _, of_weight in weights) or rule.rows != "error":
                problems.append(
                    f"{name!r} says which rows of table {table!r} raw ids have, but these rows are not taken as they "
                    f"are: {_INSTEAD}"
                )
            elif any(to not in _weights_of(_table_of(target), targets) for _, to, _ in weights):
                problems.append(
                    f"{name!r} goes to {target!r}, but the rows that it routes raw ids to go to {weights[0][1]!r}, of "
                    f"another table: {_INSTEAD}"
                )
            elif reason := _misrouted(source, name, targets[target]):
                problems.append(f"{name!r} cannot be taken: {reason}; {_INSTEAD}")
    for table, names in ours.items():
        fresh = [name for name in names if name not in pairs]
        filled = [target for target in _weights_of(table, targets) if target in pairs]
        if fresh and filled:
            problems.append(
                f"{filled[0]!r} gets rows of the source, but {fresh[0]!r}, which routes raw ids to them, does not: "
                f"{_INSTEAD}"
            )
    return problems


def _by_table(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if table := _table_of(name):
            found.setdefault(table, []).append(name)
    return found


def _table_of(name: str) -> str:
    """The table whose raw ids a buffer routes; "" for what is no such buffer."""
    match = _BUFFER.fullmatch(name)
    return match["table"] if match else ""


def _weights_of(table: str, names: Iterable[str]) -> list[str]:
    """The names of a table's rows: in a collection of TorchRec, else all that end as such a table's would."""
    found = [name for name in names if f".{name}".endswith(f".{table}.weight")]
    return [name for name in found if name.split(".")[-3:-2] in (["embedding_bags"], ["embeddings"])] or found


def _misrouted(source: Source, name: str, value: Any) -> str:
    """Why a buffer would route ids wrongly in the target's shards; "" where it would not."""
    stored, buffer = source.tensors[name], name.rpartition(".")[2]
    rows = stored.size[0] if stored.size else 1
    if buffer == "_hash_zch_bucket":
        buckets = int(source.read(name, 0, rows).max()), int(_local(value).max())
        return f"the source has {buckets[0]} buckets, the model {buckets[1]}" if buckets[0] != buckets[1] else ""
    if buffer.startswith("_hash_zch"):
        beside = f"{name.rpartition('.')[0]}._hash_zch_bucket"
        return "" if beside in source.tensors else f"{beside!r} is missing, so its number of buckets is not known"
    theirs = sorted((piece.offsets[0], piece.sizes[0]) for piece in stored.pieces)
    ours = [(0, int(value.size()[0]))]
    if isinstance(value, ShardedTensor):
        ours = sorted((shard.shard_offsets[0], shard.shard_sizes[0]) for shard in value.metadata().shards_metadata)
    if ours != theirs:
        return f"its {rows:,} rows were saved in {len(theirs)} shards and are loaded in {len(ours)}, each sorted apart"
    if buffer == "_mch_sorted_raw_ids":
        for first, number in ours:
            if bool((source.read(name, first, first + number).diff() < 0).any()):
                return "its raw ids are not sorted, so it was gathered from several ranks"
    return ""


def _local(value: Any) -> torch.Tensor:
    return value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value
