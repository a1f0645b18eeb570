"""Processes, devices and sharded models: every stage trains under TorchRec's DistributedModelParallel (DMP).

On one process the same code runs with a process group of one, so there is no second code path.

Shape suffixes: K keys of a KJT, S bags (stride).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn import functional as F
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import LazyAwaitable, ShardingEnv
from torchrec.modules.embedding_configs import PoolingType

from lumrec.modules.tokens import guard_key_order
from lumrec.run import limits
from lumrec.run.distributed import rank, world_size
from lumrec.run.errors import UserError
from lumrec.train.footprint import TRAINED_BYTES, dense_elements, encoders
from lumrec.train.optimizers import TABLE_OPTIMIZERS, OptimizerConfig
from lumrec.train.plan import make_plan, quiet_torchrec, read_sharding, topology_here

_SHARDED = "_lumrec_sharded"  # on an EmbeddingBagCollection that DMP has taken over


def shard(
    model: nn.Module,
    *,
    device: str | torch.device,
    optimizer: OptimizerConfig | None = None,
    sharding: str = "",
    fsdp: bool = False,
) -> DistributedModelParallel:
    """`model` under DMP: tables sharded with a fused optimizer, all other parameters replicated (DDP).

    The tables of every EmbeddingBagCollection get `optimizer.table_optimizer` (default OptimizerConfig) fused into
    their backward pass; `optimizers.build_optimizer` makes the optimizer of the rest. Weights that `model` holds
    already are kept; tables on the meta device are initialised shard by shard, so that no process ever holds a whole
    one. `sharding` names one type for all tables ("table_wise", "row_wise", "column_wise", "data_parallel") or a plan
    file (lumrec.train.plan); "" lets the planner choose between table_wise and, on CUDA, row_wise. `fsdp`: transformer
    encoders (modules with a list `blocks`) are sharded block by block (FSDP2), not replicated; all ranks must start
    from the same weights.


    - rowwise_adagrad keeps one sum per row *and shard*, so column_wise trains (slightly) differently from the others.
    - Every step must use the same dense parameters on all ranks (DDP's static graph); otherwise the next step raises.
    - data_parallel has no fused kernel: `build_optimizer` gives such tables `table_optimizer` without fusion.

    `model` is changed in place: its EmbeddingBagCollections are replaced. One that several of its modules share becomes
    one sharded collection that they share. A collection raises ValueError for keys in another order than in its first
    call (`guard_key_order`). Raises UserError for unknown names, a plan that does not fit, a table width that is no
    multiple of 4, managed collisions (ZCH), `fsdp` without any encoder, and tables that another DMP holds already.
    """
    device = torch.device(device)
    optimizer = optimizer or OptimizerConfig()
    limits.check(optimizer)
    if not dist.is_initialized():
        raise RuntimeError("shard() needs a process group: call lumrec.run.distributed.init_distributed() first")
    refuse_managed_collisions(model)
    collections = [module for module in model.modules() if isinstance(module, EmbeddingBagCollection)]
    if any(hasattr(module, _SHARDED) for module in collections):
        raise UserError(
            "tables of this model were sharded before, in another model: two DistributedModelParallel over one "
            "EmbeddingBagCollection silently become two separate tables. Put both models into one nn.Module and shard "
            "that (docs/how-to/warm-start.md), or start the second from the first one's checkpoint"
        )
    chosen = read_sharding(sharding, model, world_size=world_size())
    sharded_encoders = encoders(model) if fsdp else {}
    if fsdp and not sharded_encoders:
        raise UserError("fsdp=true shards transformer blocks, and this model has none: set fsdp=false")
    dense = sum(dense_elements(model, shards=world_size() if fsdp else 1))
    topology = topology_here(device, world_size=world_size(), dense_bytes=TRAINED_BYTES * dense)
    try:
        plan, sharders, _ = make_plan(model, chosen, topology)
    except PlannerError as error:
        raise UserError(
            f"the tables do not fit into {world_size()} process(es) beside the dense parameters "
            f"({str(error).splitlines()[0].strip()}): apps/plan.py shows what a rank takes, and what to change"
        ) from None
    optimizer_class, arguments = TABLE_OPTIMIZERS[optimizer.table_optimizer]
    tables = [
        (config.name, weight)
        for module in collections
        for config, weight in zip(module.embedding_bag_configs(), module.parameters(), strict=True)
    ]
    names = [name for name, _ in tables]
    if unknown := [name for name in optimizer.table_lrs if name not in names]:
        raise UserError(f"table_lrs names {unknown[0]!r}; the model's tables are {', '.join(names)}")
    for module in collections:
        setattr(module, _SHARDED, True)
    for name, weight in tables:
        if name not in chosen or chosen[name].sharding != "data_parallel":
            _apply_optimizer_in_backward(optimizer_class, [weight], {"lr": optimizer.lr_of(name), **arguments})
    given = {name: weight for name, weight in model.state_dict().items() if not weight.is_meta}
    of_encoders = [
        f"{path}.{name}" for path, encoder in sharded_encoders.items() for name, _ in encoder.named_parameters()
    ]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), quiet_torchrec():
        # TorchRec initialises every shard again. With one seed on all ranks, a table's shards would have equal rows.
        torch.manual_seed(torch.initial_seed() + 1 + rank())
        sharded = DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=device,
            plan=plan,
            sharders=sharders,
            init_data_parallel=False,
            data_parallel_wrapper=DefaultDataParallelWrapper(params_to_ignore=of_encoders),
        )
        _keep_weights(sharded, given)
        for encoder in sharded_encoders.values():
            _fully_shard(encoder, device)
        sharded.init_data_parallel()
    _keep_row_wise_right(sharded, device)
    guard_key_order(sharded)
    return sharded


def refuse_managed_collisions(model: nn.Module) -> None:
    """Raises UserError for TorchRec's managed collisions (ZCH): each rank routes raw ids to rows in its own way."""
    if routing := [name for name in model.state_dict() if "._mch_" in name or "._hash_zch_" in name]:
        raise UserError(
            f"{routing[0]!r} belongs to managed collisions (ZCH), which lumrec neither shards nor keeps in its "
            "checkpoints: on other ranks, raw ids would map to other ids' rows. Use an EmbeddingBagCollection and rows "
            "by vocabulary (docs/how-to/warm-start.md)"
        )


def _fully_shard(encoder: nn.Module, device: torch.device) -> None:
    """Shards each block, and the encoder's other parameters, over all ranks (FSDP2)."""
    mesh = init_device_mesh(device.type, (world_size(),))
    for module in (*encoder.blocks, encoder):  # type: ignore[misc]
        # Gradients are averaged over the ranks, as DDP and TorchRec do; the training loop relies on it.
        fully_shard(module, mesh=mesh)
    for method in ("keys_and_values", "extend", "ask"):
        if hasattr(encoder, method):
            register_fsdp_forward_method(encoder, method)


class _EqualStrides:
    """Hooks that pad each rank's KJT with empty bags to the same number, and cut them off the output again.

    Row-wise sharding over gloo fails in the backward pass where ranks have different numbers of bags.
    """

    def __init__(self) -> None:
        self.stride = 0

    def pad(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[KeyedJaggedTensor]:
        (features,) = args
        self.stride = features.stride()
        longest = torch.tensor(self.stride)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        length_KS = features.lengths().view(len(features.keys()), self.stride)
        return (
            KeyedJaggedTensor(
                keys=features.keys(),
                values=features.values(),
                weights=features.weights_or_none(),
                lengths=F.pad(length_KS, (0, int(longest) - self.stride)).flatten(),
                stride=int(longest),
            ),
        )

    def cut(self, module: nn.Module, args: Any, output: LazyAwaitable[KeyedTensor]) -> KeyedTensor:
        padded = output.wait()
        return KeyedTensor(padded.keys(), padded.length_per_key(), padded.values()[: self.stride])


def _keep_row_wise_right(sharded: DistributedModelParallel, device: torch.device) -> None:
    """Works around two bugs of row_wise tables: unequal strides over gloo, and means beside other shardings."""
    for module in sharded.modules():
        if not isinstance(module, ShardedEmbeddingBagCollection):
            continue
        plan = module.module_sharding_plan
        configs = module._embedding_bag_configs
        others = [config for config in configs if plan[config.name].sharding_type != "row_wise"]
        if len(others) == len(configs):
            continue
        # TorchRec 1.8 divides row_wise means by the bags' lengths after the sum over ranks. It then divides the
        # features of all other tables too, although their kernels have done so already. Listed as sums, they are left
        # as they are.
        sums = module._pooling_type_to_rs_features[PoolingType.SUM.value]
        sums.extend(feature for config in others for feature in config.feature_names)
        if device.type == "cpu" and world_size() > 1:
            strides = _EqualStrides()
            module.register_forward_pre_hook(strides.pad)
            module.register_forward_hook(strides.cut)


def _keep_weights(sharded: DistributedModelParallel, given: dict[str, Tensor]) -> None:
    """Restores the weights that the tables had before DMP initialised them again."""
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
