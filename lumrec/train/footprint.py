"""What training takes of a rank, without training: elements of tables and dense parameters, FLOPs and activations.

Shape suffixes: S bags (stride), E width of a table.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchrec import EmbeddingBagCollection
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lumrec.modules.large_user_model import TOKENS_PER_EVENT, LargeUserModel, Pack
from lumrec.modules.tokens import feature_widths, make_kjt
from lumrec.train.flops import MatrixFlops

FLOAT = 4  # bytes: weights, gradients and optimizers' state are float32
TRAINED_BYTES = 4 * FLOAT  # of a dense element: weight, gradient and AdamW's two moments


def encoders(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that hold a list of transformer blocks, by name: what FSDP shards."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "blocks", None), nn.ModuleList)
    }


def dense_elements(model: nn.Module, *, shards: int = 1) -> tuple[int, int]:
    """Elements of the dense parameters on each rank: of the encoders, and of all others.

    shards: ranks that FSDP spreads the encoders over. It cuts the first dimension of each parameter into equal parts,
    of which the last are padded.
    """
    of_tables = {id(p) for m in model.modules() if isinstance(m, EmbeddingBagCollection) for p in m.parameters()}
    of_encoders = {id(p): p for module in encoders(model).values() for p in module.parameters()}
    others = [p for p in model.parameters() if id(p) not in of_tables | of_encoders.keys()]
    sharded = (-(-(p.shape[0] if p.dim() else 1) // shards) * math.prod(p.shape[1:]) for p in of_encoders.values())
    return sum(sharded), sum(p.numel() for p in others)


def table_elements(
    plan: ShardingPlan, sizes: Mapping[str, tuple[int, int]], *, optimizer: str, ranks: int
) -> list[tuple[int, int]]:
    """For each rank, elements of its shards (and the gradients of data_parallel tables), and of the optimizer's state.

    sizes: table → rows and width. optimizer: a name of TABLE_OPTIMIZERS.
    """
    weights, state = [0] * ranks, [0] * ranks
    for shardings in plan.plan.values():
        for name, sharding in shardings.items():  # type: ignore[attr-defined]
            if sharding.sharding_spec is None:  # data_parallel
                shards = [(rank, sizes[name], 2) for rank in range(ranks)]
            else:
                shards = [(each.placement.rank(), each.shard_sizes, 1) for each in sharding.sharding_spec.shards]
            for rank, (rows, width), copies in shards:
                weights[rank] += rows * width * copies
                state[rank] += {"rowwise_adagrad": rows, "adagrad": rows * width, "sgd": 0}[optimizer]
    return list(zip(weights, state, strict=True))


class StepCost(NamedTuple):
    """A forward pass: FLOPs of its matrix products (attention as a full square, as in flops.py), bytes that it keeps
    for the backward pass, and both for one block without checkpointing."""

    flops: float
    kept: float
    block_flops: float
    block_kept: float


def step_cost(
    make: Callable[[int, bool], LargeUserModel],
    *,
    num_layers: int,
    checkpointed: bool,
    histories: float,
    events: int,
    candidates: int,
    queries: bool,
    dtype: torch.dtype,
) -> StepCost:
    """The cost of a LUM's forward pass over `histories` of `events` events each, without tables and loss.

    make: (layers, whether they are checkpointed) → the model. It runs with one and two layers and histories, on fake
    tensors, which have no contents; each further one adds as much. queries: each event is also asked with another
    condition. dtype: of the matrix products.
    """

    def run(layers: int, again: bool = False) -> tuple[float, float]:
        flops, kept = zip(*(_run(partial(make, layers, again), n, events, candidates, queries, dtype) for n in (1, 2)))
        return flops[0] + (histories - 1) * (flops[1] - flops[0]), kept[0] + (histories - 1) * (kept[1] - kept[0])

    (flops_1, kept_1), (flops_2, kept_2) = run(1), run(2)
    block_flops, block_kept = flops_2 - flops_1, kept_2 - kept_1
    kept_more = run(2, True)[1] - run(1, True)[1] if checkpointed else block_kept
    flops, kept = flops_1 + (num_layers - 1) * block_flops, kept_1 - block_kept + num_layers * kept_more
    return StepCost(flops, kept, block_flops, block_kept)


def _run(
    make: Callable[[], LargeUserModel], histories: int, events: int, candidates: int, queries: bool, dtype: torch.dtype
) -> tuple[int, int]:
    """FLOPs of a forward pass, and bytes of what it keeps for the backward pass, beside parameters."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = make()
    encoder, num_queries = model.token_encoder, events * queries
    zeros = torch.zeros(histories * events, dtype=torch.int64)
    stride = histories * (events + num_queries) + candidates
    encoder.tables = _Lookups(feature_widths(encoder.tables), stride)  # type: ignore[assignment]
    pack = Pack.of(
        make_kjt(encoder.features, {}, stride=1),
        torch.full((histories,), events),
        tokens_per_event=TOKENS_PER_EVENT[model.tokens],
        user_Q=torch.arange(histories).repeat_interleave(num_queries),
        moment_Q=zeros[: histories * num_queries],
        time_T=zeros,
        time_Q=zeros[: histories * num_queries],
        candidate_item_C=zeros[:0],
        event_row_T=zeros,
    )
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage()._cdata, x)
        return x

    low = torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with warnings.catch_warnings(), fake, low, MatrixFlops() as flops, hooks:
        warnings.simplefilter("ignore")  # of kernels that do not take two dtypes, as in training
        outputs = model(pack)
    num_bytes = sum(x.untyped_storage().nbytes() for storage, x in kept.items() if storage not in own)
    del outputs  # its graph held what was kept
    return flops.total, num_bytes


class _Lookups(nn.Module):
    """In place of sharded tables: pooled rows [S, E] of each feature."""

    def __init__(self, widths: Mapping[str, int], stride: int) -> None:
        super().__init__()
        self.widths, self.stride = widths, stride

    def forward(self, tokens: KeyedJaggedTensor) -> Any:
        return self

    def to_dict(self) -> dict[str, Tensor]:
        return {name: torch.zeros(self.stride, width, requires_grad=True) for name, width in self.widths.items()}
