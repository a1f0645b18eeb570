"""The running moments (mean, variance) of a model trained by several processes, made equal before it is saved."""

import torch
import torch.distributed as dist
from torch import nn

from lumrec.modules.knowledge import MaskedStandardise


@torch.no_grad()
def average_moments(model: nn.Module, group: "dist.ProcessGroup | None" = None) -> None:
    """Replaces the running moments of `model` (KnowledgeFusion's and batch norm's) by their mean over the group.

    Each process has moments of the rows that it has seen, and DistributedModelParallel saves those of one process. So
    call this before each evaluation, `state_dict()` and save, on all processes: it is a collective operation. The mean
    leaves out processes that have not seen a column yet. Without a process group, or in a group of one process, nothing
    happens.

    >>> average_moments(nn.Linear(2, 2))
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    for module in model.modules():
        if isinstance(module, MaskedStandardise):
            is_started_F = (module.is_started_F > 0).to(module.mean_F.dtype)
            sums_3F = torch.stack([module.mean_F * is_started_F, module.var_F * is_started_F, is_started_F])
            dist.all_reduce(sums_3F, group=group)
            mean_F, var_F, count_F = sums_3F
            for buffer, sum_F in ((module.mean_F, mean_F), (module.var_F, var_F)):
                buffer.copy_(torch.where(count_F > 0, sum_F / count_F.clamp(min=1), buffer))
            module.is_started_F.copy_((count_F > 0).to(module.is_started_F.dtype))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            for moments in (module.running_mean, module.running_var):
                if moments is not None:
                    dist.all_reduce(moments, group=group)
                    moments /= dist.get_world_size(group)
