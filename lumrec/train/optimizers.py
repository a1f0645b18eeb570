"""Optimizers: what TorchRec fuses into the tables' backward pass, AdamW for everything else, one schedule for both."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ParameterSharding
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from lumrec.run import limits
from lumrec.run.limits import count, setting

TABLE_EPS = 1e-8  # FBGEMM's
# Optimizers that FBGEMM fuses into the backward pass on CPU and on CUDA, with their arguments beside the learning rate.
TABLE_OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, float]]] = {
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": TABLE_EPS}),
    "adagrad": (torch.optim.Adagrad, {"eps": TABLE_EPS}),
    "sgd": (torch.optim.SGD, {}),
}


Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"]
MOST_RATE = 1e6  # any rate above 1 or so diverges


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates and their schedule.

    table_optimizer: optimizer of the tables, fused into their backward pass.
    table_lr: highest learning rate of the tables.
    table_lrs: highest learning rate of single tables by name, instead of table_lr. Use a lower one for tables that came
        from another model; 0 freezes a table, including its new rows.
    dense_lr: highest learning rate of all other parameters (AdamW).
    weight_decay: decay of dense matrices; biases, norms and tables have none.
    clip_grad_norm: highest norm of the dense gradient (without the tables); 0 = no clipping.
    warmup_steps: steps in which both rates rise linearly from 0.
    schedule: after the warm-up: "constant"; "linear" or "cosine", which fall to the lowest rate at the last step;
        "inverse_sqrt", which falls with the root of the step; or "wsd" (warm-up, stable, decay: arXiv 2404.06395),
        which is constant and falls linearly in the last steps.
    decay_share: share of all steps in which "wsd" falls.
    min_lr_factor: lowest rate that a schedule falls to, as a share of the highest.
    """

    table_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    table_lr: float = setting(0.1, least=0, most=MOST_RATE)
    table_lrs: dict[str, float] = setting(dict, least=0, most=MOST_RATE)
    dense_lr: float = setting(1e-3, least=0, most=MOST_RATE)
    weight_decay: float = setting(0.0, least=0, most=MOST_RATE)
    clip_grad_norm: float = setting(1.0, least=0, most=1e12)
    warmup_steps: int = count(0)
    schedule: Schedule = "constant"
    decay_share: float = setting(0.2, least=0, most=1)
    min_lr_factor: float = setting(0.0, least=0, most=1)

    def lr_of(self, table: str) -> float:
        """Highest learning rate of a table."""
        return self.table_lrs.get(table, self.table_lr)


def table_shardings(model: DistributedModelParallel) -> dict[str, ParameterSharding]:
    """How each table is sharded (parameter name → TorchRec's ParameterSharding), in the plan's order."""
    return {
        ".".join(part for part in (module, "embedding_bags", table, "weight") if part): sharding
        for module, tables in model.plan.plan.items()
        for table, sharding in tables.items()  # type: ignore[attr-defined]
    }


class TableAndDenseOptimizer(CombinedOptimizer):
    """TorchRec's CombinedOptimizer over the fused tables, the dense parameters and any data-parallel tables."""

    def __init__(
        self,
        fused: KeyedOptimizer,
        others: Sequence[KeyedOptimizer],
        *,
        dense_parameters: list[Tensor],
        table_names: Sequence[str] = (),
    ) -> None:
        super().__init__([fused, *others])
        self.fused = fused
        self.dense_parameters = dense_parameters
        self.table_names = list(table_names)
        self._highest = [group["lr"] for group in self.param_groups]

    def set_learning_rate(self, factor: float) -> None:
        """Multiplies every highest learning rate by `factor`; takes effect with the next backward pass."""
        for group, highest in zip(self.param_groups, self._highest, strict=True):
            group["lr"] = highest * factor  # type: ignore[index]
        self.fused.step()  # does not train: hands the new rate to the fused kernels

    def state_tensors(self) -> dict[str, dict[str, Any]]:
        """The state's own tensors, parameter → entry → tensor; parameters without any are left out.

        A table's sum of squares has FBGEMM's name ("<table>.momentum1") and shape, however the table is sharded. This
        includes data_parallel tables, whose optimizer is not FBGEMM's (its step count is left out: it has no effect).
        """
        state = {name: dict(entries) for name, entries in self.state_dict()["state"].items() if entries}
        for name in self.table_names:
            if "sum" in state.get(name, {}):
                state[name] = {f"{name.split('.')[-2]}.momentum1": state[name]["sum"].squeeze(1)}
        return state


def build_optimizer(model: DistributedModelParallel, config: OptimizerConfig) -> TableAndDenseOptimizer:
    """One optimizer for all parameters of a model from `parallel.shard`; every parameter is in exactly one part.

    The tables' optimizer is fused into their backward pass already (`shard` was given `table_optimizer` and
    `table_lr`). Tables that are data_parallel get its plain counterpart, all other parameters AdamW. Raises UserError
    for an unknown name.
    """
    limits.check(config)
    replicated = {
        name for name, sharding in table_shardings(model).items() if sharding.sharding_type == "data_parallel"
    }
    tables: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        if parameter.requires_grad:
            (tables if name in replicated else dense)[name] = parameter
    others: list[KeyedOptimizer] = []
    if dense:
        others.append(KeyedOptimizerWrapper(dense, lambda parameters: _adamw(parameters, config)))
    if tables:
        optimizer_class, arguments = TABLE_OPTIMIZERS[config.table_optimizer]
        rates = [config.lr_of(name.split(".")[-2]) for name in tables]

        def twin(parameters: list[Tensor]) -> torch.optim.Optimizer:
            groups = [{"params": [weight], "lr": rate} for weight, rate in zip(parameters, rates, strict=True)]
            return optimizer_class(groups, lr=config.table_lr, **arguments)

        others.append(KeyedOptimizerWrapper(tables, twin))
    return TableAndDenseOptimizer(
        model.fused_optimizer,
        others,
        dense_parameters=list(dense.values()),
        table_names=list(table_shardings(model)),
    )


def _adamw(parameters: list[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = []
    for alike in _replicated_and_sharded(parameters):
        groups.append({"params": [p for p in alike if p.dim() >= 2]})
        groups.append({"params": [p for p in alike if p.dim() < 2], "weight_decay": 0.0})
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.dense_lr, weight_decay=config.weight_decay
    )


def clip_grad_norm(parameters: Sequence[Tensor], max_norm: float) -> float:
    """The joint norm of all gradients, replicated and FSDP-sharded, which are scaled down to `max_norm` if above."""
    kinds = _replicated_and_sharded(parameters)
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return float(norm)


def _replicated_and_sharded(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors and FSDP's DTensors in separate lists: torch's foreach operations do not accept a mixture."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
    return [kind for kind in kinds if kind]


def learning_rate_factor(config: OptimizerConfig, step: float, total_steps: int) -> float:
    """Share of the highest learning rate at `step` (0 is the first) of `total_steps`.

    >>> config = OptimizerConfig(warmup_steps=2, schedule="linear")
    >>> [learning_rate_factor(config, step, 6) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "inverse_sqrt":
        return max(config.min_lr_factor, (max(1, config.warmup_steps) / (step + 1)) ** 0.5)
    # The step at which the rate begins to fall: after the warm-up, or for "wsd" where the last decay_share begins.
    start = float(config.warmup_steps)
    if config.schedule == "wsd":
        start = max(start, total_steps * (1.0 - config.decay_share))
    progress = min(1.0, max(0.0, step - start) / max(1.0, total_steps - start))
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.min_lr_factor + (1.0 - config.min_lr_factor) * left
