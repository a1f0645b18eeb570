"""Processes, devices and sharded tables: every stage trains under TorchRec's DistributedModelParallel (DMP).

On one process the same code runs with a process group of one, so there is no second path to keep right.
"""

import atexit
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan

from lumrec.train.optimizers import TABLE_OPTIMIZERS, OptimizerConfig, check, table_shardings

# What TorchRec 1.8 says at every use under torch 2.13, whatever the caller does.
for _message in (".*broadcast_buffers", "Please use DTensor", "HeuristicalStorageReservation"):
    warnings.filterwarnings("ignore", message=_message, category=FutureWarning)
logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda record: "is_fx_tracing" not in record.getMessage())

SHARDING_TYPES = ("table_wise", "row_wise", "column_wise", "data_parallel")


def rank() -> int:
    """This process's rank; 0 where no process group exists."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together; 1 where no process group exists."""
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device: str | torch.device | None = None, *, threads: int = 0) -> torch.device:
    """The device of this process, its process group initialised and its number of torch threads set.

    Under torchrun the group comes from its environment variables; without them it is a group of one process over a file
    store. A second call changes nothing but the threads. `device` is "cpu", "cuda" (the card `LOCAL_RANK`) or a
    device; None takes CUDA where torch has it. `threads` 0 leaves torch's own number. Raises ValueError where CUDA is
    asked for and absent.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device {str(device)!r} was asked for, but this torch ({torch.__version__}) sees no CUDA device"
            )
        if kind.index is None:
            kind = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(kind)
    if dist.is_initialized():
        return kind
    # gloo stays beside nccl: checkpoints and small Python objects go through the CPU.
    backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    else:
        folder = tempfile.TemporaryDirectory(prefix="lumrec-store-")
        atexit.register(folder.cleanup)
        store = dist.FileStore(str(Path(folder.name) / "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    atexit.register(_destroy)
    return kind


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(
    model: nn.Module,
    *,
    device: str | torch.device,
    optimizer: OptimizerConfig | None = None,
    sharding: str = "",
) -> DistributedModelParallel:
    """`model` under DMP: tables sharded with a fused optimizer, all other parameters replicated (DDP).

    The tables of every EmbeddingBagCollection get `optimizer.table_optimizer` (default OptimizerConfig) fused into
    their backward pass; `optimizers.build_optimizer` gives the rest. Weights that `model` holds already are kept;
    tables on the meta device are drawn shard by shard, so that no process ever holds a whole one. `sharding` names one
    type for all tables ("table_wise", "row_wise", "column_wise", "data_parallel"); "" lets the planner choose between
    table_wise and, on CUDA, row_wise. Notes:

    - row_wise over several gloo processes needs the same number of bags on every process.
    - rowwise_adagrad keeps one sum per row *and shard*, so column_wise trains (slightly) differently from the others.
    - Every step uses the same dense parameters, on all ranks (DDP's static graph): else the next step raises.
    - data_parallel has no fused kernel: `build_optimizer` trains such tables with the plain twin of `table_optimizer`.

    `model` itself is taken over: its EmbeddingBagCollections are replaced. Raises ValueError for unknown names and for
    a table width that is no multiple of 4.
    """
    device = torch.device(device)
    optimizer = optimizer or OptimizerConfig()
    check(optimizer)
    if sharding and sharding not in SHARDING_TYPES:
        raise ValueError(
            f"sharding={sharding!r} is not one of {', '.join(SHARDING_TYPES)}, or '' for the planner's choice"
        )
    if not dist.is_initialized():
        raise RuntimeError("shard() needs a process group: call lumrec.train.parallel.init_distributed() first")
    allowed = [sharding] if sharding else ["table_wise"] + (["row_wise"] if device.type == "cuda" else [])
    constraints = _constraints(model, allowed)
    if sharding != "data_parallel":
        optimizer_class, arguments = TABLE_OPTIMIZERS[optimizer.table_optimizer]
        tables = [p for m in model.modules() if isinstance(m, EmbeddingBagCollection) for p in m.parameters()]
        _apply_optimizer_in_backward(optimizer_class, tables, {"lr": optimizer.table_lr, **arguments})
    sharders: list[ModuleSharder[nn.Module]] = [_Sharder(allowed)]  # type: ignore[list-item]
    plan = _plan(model, sharders, constraints, device)
    given = {name: weight for name, weight in model.state_dict().items() if not weight.is_meta}
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _quiet_torchrec():
        # TorchRec redraws every shard. One seed on all ranks would give equal rows to the shards of one table.
        torch.manual_seed(torch.initial_seed() + 1 + rank())
        sharded = DistributedModelParallel(
            model, env=ShardingEnv.from_process_group(dist.group.WORLD), device=device, plan=plan, sharders=sharders
        )
    _keep_weights(sharded, given)
    return sharded


class _Sharder(EmbeddingBagCollectionSharder):
    """TorchRec leaves row_wise out on CPU, where it works: the types allowed are ours to say."""

    def __init__(self, allowed: list[str]) -> None:
        super().__init__()
        self._allowed = allowed

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return self._allowed


def _constraints(model: nn.Module, allowed: list[str]) -> dict[str, ParameterConstraints]:
    """Per table, what the planner may choose: only fused kernels, or it drops the fused optimizer without a word."""
    constraints = {}
    for module in model.modules():
        if not isinstance(module, EmbeddingBagCollection):
            continue
        for table in module.embedding_bag_configs():
            if table.embedding_dim % 4:
                raise ValueError(
                    f"table {table.name!r} has width {table.embedding_dim}; FBGEMM needs a multiple of 4: set "
                    f"schema.tables.{table.name}.width to {-(-table.embedding_dim // 4) * 4}"
                )
            if table.name in constraints:
                raise ValueError(
                    f"two tables are called {table.name!r}: give each table of the model a name of its own"
                )
            part = max(4, table.embedding_dim // world_size() // 4 * 4)
            constraints[table.name] = ParameterConstraints(
                sharding_types=allowed,
                compute_kernels=["dense" if allowed == ["data_parallel"] else "fused"],
                min_partition=part if "column_wise" in allowed and table.embedding_dim % part == 0 else None,
            )
    return constraints


def _plan(
    model: nn.Module,
    sharders: list[ModuleSharder[nn.Module]],
    constraints: dict[str, ParameterConstraints],
    device: torch.device,
) -> ShardingPlan:
    """The same plan on every rank, each computing it: an error then shows on all of them and leaves none waiting."""
    with _quiet_torchrec():
        topology = Topology(
            world_size=world_size(),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size())),
            compute_device=device.type,
        )
        return EmbeddingShardingPlanner(topology=topology, constraints=constraints).plan(model, sharders)


@contextmanager
def _quiet_torchrec() -> Iterator[None]:
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


def _keep_weights(sharded: DistributedModelParallel, given: dict[str, Tensor]) -> None:
    """Puts back the weights that the tables had before DMP redrew them."""
    with torch.no_grad():
        for name, weight in sharded.state_dict().items():
            if name not in given:
                continue
            if isinstance(weight, ShardedTensor):
                for part in weight.local_shards():
                    rows, columns = (
                        slice(start, start + size)
                        for start, size in zip(part.metadata.shard_offsets, part.metadata.shard_sizes, strict=True)
                    )
                    part.tensor.copy_(given[name][rows, columns])
            elif weight.data_ptr() != given[name].data_ptr():
                weight.copy_(given[name])


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
