"""Sharding plans: which ranks hold which table, by TorchRec's planner, one type for all tables, or a plan file.

A plan file is YAML or JSON: table → sharding type, or table → type and ranks. The planner places all other tables:

    item: row_wise                                # over all ranks
    user: {sharding: column_wise, ranks: [0, 1]}  # equal parts of its columns
    genre: {sharding: table_wise, ranks: [1]}

A run saves the plan that it uses as plan.json, which is such a file.
"""

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.sharding_plan import column_wise, table_wise
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from lumrec.run.errors import UserError, did_you_mean
from lumrec.run.typed_yaml import overlaid, read
from lumrec.train.optimizers import table_shardings

TABLE_SHARE = 0.85  # of a GPU's memory, less what the dense parameters take: what tables may take, as in TorchRec
SHARDING_TYPES = ("table_wise", "row_wise", "column_wise", "data_parallel")


@dataclass(frozen=True)
class TableSharding:
    """sharding: one of SHARDING_TYPES. ranks: those that hold the table's shards; () leaves them to the planner."""

    sharding: str
    ranks: tuple[int, ...] = ()


def read_sharding(sharding: str, model: nn.Module, *, world_size: int) -> dict[str, TableSharding]:
    """The sharding that was asked for, table name → TableSharding; the planner places tables that are not in it.

    `sharding`: "" asks for nothing; a sharding type applies to all tables (with row_wise, tables without rows for every
    rank become table_wise, see `_lacks_rows`); anything else is the path of a plan file.
    Raises UserError for what is neither, and for a plan that does not fit the model or the number of processes.
    """
    tables = _tables(model)
    if sharding in SHARDING_TYPES:
        small = {name for name, table in tables.items() if sharding == "row_wise" and _lacks_rows(table, world_size)}
        return {name: TableSharding("table_wise" if name in small else sharding) for name in tables}
    widths = {name: table.embedding_dim for name, table in tables.items()}
    chosen = read_plan(sharding, widths, world_size=world_size, whose="this model")
    for name, table in chosen.items():
        if table.sharding == "row_wise" and _lacks_rows(tables[name], world_size):
            raise UserError(
                f"{sharding}, table {name!r}: row_wise over {world_size} ranks would leave one without any of its "
                f"{tables[name].num_embeddings} rows: make it table_wise"
            )
    return chosen


def read_plan(
    sharding: str, widths: Mapping[str, int] | None = None, *, world_size: int, whose: str = ""
) -> dict[str, TableSharding]:
    """The contents of a plan file, table name → TableSharding; {} for "" and for a sharding type.

    widths: width of each table of the model (which messages call `whose`); None where they are not known yet. Raises
    UserError for what is neither a type nor a file, and for a plan that does not fit the tables' names and widths or
    the number of processes.
    """
    if not sharding or sharding in SHARDING_TYPES:
        return {}
    path = Path(sharding)
    if not os.path.lexists(path):
        raise UserError(
            f"sharding={sharding!r} is not one of {', '.join(SHARDING_TYPES)}{_nearest(sharding, SHARDING_TYPES)}, nor "
            f"a plan file in {Path.cwd()}; '' lets the planner choose"
        )
    content = read(path, "sharding")
    if not isinstance(content, dict):
        what = "a list" if isinstance(content, list) else "nothing" if content is None else "text"
        raise UserError(f"{path} holds {what}; expected table → sharding type, such as item: row_wise")
    chosen = {}
    for name, entry in content.items():
        if widths is not None and name not in widths:
            raise UserError(f"{path}: {whose} has no table {name!r}{_nearest(str(name), widths)}")
        chosen[name] = _table_sharding(f"{path}, table {name!r}", entry)
        _check_ranks(f"{path}, table {name!r}", chosen[name], widths[name] if widths else 0, world_size)
    return chosen


def _lacks_rows(table: EmbeddingBagConfig, world_size: int) -> bool:
    """Whether row_wise would leave a rank without a row: FBGEMM's CPU backward then reads beyond its list of tables."""
    block = -(-table.num_embeddings // world_size)
    return (world_size - 1) * block >= table.num_embeddings


def _table_sharding(where: str, entry: Any) -> TableSharding:
    if isinstance(entry, str):
        entry = {"sharding": entry}
    if not isinstance(entry, dict) or "sharding" not in entry or not entry.keys() <= {"sharding", "ranks"}:
        raise UserError(f"{where}: got {entry!r}; expected a sharding type, or {{sharding: <type>, ranks: [0, 1, …]}}")
    kind, given = entry["sharding"], entry.get("ranks", [])
    if kind not in SHARDING_TYPES:
        nearest = _nearest(str(kind), SHARDING_TYPES)
        raise UserError(f"{where}: sharding {kind!r} is not one of {', '.join(SHARDING_TYPES)}{nearest}")
    try:
        ranks = overlaid(list[int], None, given)
    except UserError:
        raise UserError(f"{where}: ranks is {given!r}; expected a list of ranks, such as [0, 1]") from None
    return TableSharding(str(kind), tuple(ranks))


def _check_ranks(where: str, table: TableSharding, width: int, world_size: int) -> None:
    """Raises UserError for ranks that do not exist, or that the sharding type cannot use. width: 0 = not known."""
    ranks = table.ranks
    if not ranks:
        return
    beyond = [rank for rank in ranks if not 0 <= rank < world_size]
    if beyond:
        raise UserError(
            f"{where}: rank {beyond[0]} does not exist, this run has {world_size} process(es), 0…{world_size - 1}: "
            "start as many as the plan is for, or leave ranks out"
        )
    if table.sharding == "table_wise" and len(ranks) != 1:
        raise UserError(f"{where}: table_wise puts the whole table on one rank; got ranks {list(ranks)}")
    if table.sharding in ("row_wise", "data_parallel") and sorted(ranks) != list(range(world_size)):
        raise UserError(
            f"{where}: {table.sharding} uses all ranks, 0…{world_size - 1}; got ranks {list(ranks)}: leave them out"
        )
    if table.sharding == "column_wise" and width % (4 * len(ranks)):
        raise UserError(
            f"{where}: its width {width} does not divide into {len(ranks)} parts that are multiples of 4 (FBGEMM): "
            "name fewer ranks"
        )


def _nearest(name: str, names: Collection[str]) -> str:
    return did_you_mean(name, names, cutoff=0.5) or f" (there are {', '.join(names)})"


class Planned(NamedTuple):
    """A sharding plan, the sharders that carry it out, and TorchRec's estimate of what the tables' lookups, exchange
    and updates take of each rank in a step, in seconds [rank]."""

    plan: ShardingPlan
    sharders: list[ModuleSharder[nn.Module]]
    rank_s: list[float]


def topology_here(device: torch.device, *, world_size: int, dense_bytes: int) -> Topology:
    """The topology of this job. dense_bytes: of each rank, those that its dense parameters take in training."""
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    memory = 0
    if device.type == "cuda":
        memory = int(TABLE_SHARE * torch.cuda.get_device_properties(device).total_memory) - dense_bytes
    with quiet_torchrec():
        return Topology(
            world_size=world_size, local_world_size=local_world_size, compute_device=device.type, hbm_cap=memory
        )


def make_plan(
    model: nn.Module,
    chosen: Mapping[str, TableSharding],
    topology: Topology,
    *,
    bags: int | None = None,
    values_per_bag: Mapping[str, float] | None = None,
) -> Planned:
    """TorchRec's plan that follows `chosen` (from `read_sharding`).

    The planner places all other tables, by table_wise and, on CUDA, row_wise. bags: of each feature, in a rank's step;
    values_per_bag: by feature, 1 where it is not given. Every rank computes the same plan, so an error occurs on all of
    them and none is left waiting. Raises UserError for a table width that is no multiple of 4, PlannerError where the
    tables do not fit into the topology.
    """
    world_size, local_world_size, device_type = (
        topology.world_size,
        topology.local_world_size,
        topology.compute_device,
    )
    allowed = {}
    for name, table in _tables(model).items():
        splits = device_type == "cuda" and not _lacks_rows(table, world_size)
        allowed[name] = [chosen[name].sharding] if name in chosen else ["table_wise", *(["row_wise"] if splits else [])]
    sharder = _Sharder([kind for kind in SHARDING_TYPES if any(kind in types for types in allowed.values())])
    options: list[ShardingOption] = []

    def take(best: list[ShardingOption]) -> list[ShardingOption]:
        options.extend(best)
        return best

    with quiet_torchrec():
        planner = EmbeddingShardingPlanner(
            topology=topology,
            batch_size=bags,
            # The topology's memory is what tables may take. TorchRec would count dense parameters six times, unsharded.
            storage_reservation=FixedPercentageStorageReservation(0.0),
            constraints=_constraints(model, allowed, world_size, values_per_bag or {}),
            callbacks=[take],
        )
        plan = planner.plan(model, [sharder])  # type: ignore[list-item]
    rank_s = [0.0] * world_size
    for option in options:
        for shard in option.shards:
            rank_s[shard.rank or 0] += shard.perf.total / 1000 if shard.perf else 0.0
    modules = dict(model.named_modules())
    # The plan lists a collection that two modules share under both paths; DMP shards it under the first.
    plan.plan = {path: shardings for path, shardings in plan.plan.items() if path in modules}
    for path, shardings in plan.plan.items():
        parameters = sharder.shardable_parameters(modules[path])
        for name in shardings:  # type: ignore[attr-defined]
            table = chosen.get(name)
            if table is None or not table.ranks or table.sharding in ("row_wise", "data_parallel"):
                continue
            if table.sharding == "table_wise":
                place = table_wise(rank=table.ranks[0], compute_kernel="fused")
            else:
                place = column_wise(ranks=list(table.ranks), compute_kernel="fused")
            placed = place(parameters[name], local_world_size, world_size, device_type, sharder)
            shardings[name] = placed  # type: ignore[index]
    return Planned(plan, [sharder], rank_s)  # type: ignore[list-item]


class _Sharder(EmbeddingBagCollectionSharder):
    """Allows the given sharding types on every device: TorchRec excludes row_wise on CPU, although it works there."""

    def __init__(self, allowed: list[str]) -> None:
        super().__init__()
        self._allowed = allowed

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return self._allowed


def _tables(model: nn.Module) -> dict[str, EmbeddingBagConfig]:
    tables: dict[str, EmbeddingBagConfig] = {}
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for table in module.embedding_bag_configs():
                if table.name in tables:
                    raise UserError(f"two tables are called {table.name!r}: give each table of the model its own name")
                tables[table.name] = table
    return tables


def _constraints(
    model: nn.Module, allowed: Mapping[str, list[str]], world_size: int, values_per_bag: Mapping[str, float]
) -> dict[str, ParameterConstraints]:
    """What the planner may choose for each table: only fused kernels, or it silently drops the fused optimizer."""
    constraints = {}
    for name, table in _tables(model).items():
        width, types = table.embedding_dim, allowed[name]
        if width % 4:
            raise UserError(
                f"table {name!r} has width {width}; FBGEMM needs a multiple of 4: set "
                f"schema.tables.{name}.width to {-(-width // 4) * 4}"
            )
        part = max(4, width // world_size // 4 * 4)
        constraints[name] = ParameterConstraints(
            sharding_types=types,
            compute_kernels=["dense" if types == ["data_parallel"] else "fused"],
            min_partition=part if "column_wise" in types and width % part == 0 else None,
            pooling_factors=[values_per_bag.get(feature, 1.0) for feature in table.feature_names],
        )
    return constraints


@contextmanager
def quiet_torchrec() -> Iterator[None]:
    """Hides the log warnings that TorchRec gives for every plan, whatever the caller does; errors still show."""
    loggers = [logging.getLogger(name) for name in ("torchrec", None)]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def plan_table(model: DistributedModelParallel) -> str:
    """The sharding plan as text: one line per table with its rows × width, sharding type, kernel and ranks."""
    weights = model.state_dict()
    lines = [f"{'table':48} {'rows':>12} {'width':>6}  {'sharding':14} {'kernel':8} ranks"]
    for name, sharding in table_shardings(model).items():
        rows, width = weights[name].size()
        ranks = ",".join(map(str, sharding.ranks or []))
        lines.append(
            f"{name:48} {rows:>12} {width:>6}  {sharding.sharding_type:14} {sharding.compute_kernel:8} {ranks}"
        )
    return "\n".join(lines) + "\n"


def plan_json(plan: ShardingPlan) -> str:
    """The sharding plan as a plan file that `read_sharding` reads back."""
    content = {
        table: {"sharding": sharding.sharding_type, "ranks": list(sharding.ranks or [])}
        for tables in plan.plan.values()
        for table, sharding in tables.items()  # type: ignore[attr-defined]
    }
    return json.dumps(content, indent=2) + "\n"
