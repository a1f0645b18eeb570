"""A LUM's knowledge in a TorchRec model that exists already: DLRM, DLRM_DCN, SimpleDeepFMNN, or one built like them.

Shape suffixes: B rows, I width of the dense input, F knowledge features, O width of the first dense layer, N, D as in
knowledge.py.

A model with two dense features, three rows, and answers of one LUM (width 4) to two conditions. Before training the
scores are those of the model:

>>> class Model(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.dense_arch, self.over_arch = nn.Linear(2, 4), nn.Linear(4, 1)
...     def forward(self, dense_features, sparse_features):
...         return self.over_arch(self.dense_arch(dense_features))
>>> model, dense_BI = Model(), torch.randn(3, 2)
>>> before = model(dense_BI, None)
>>> fusion = KnowledgeFusion("direct", num_conditions=2, knowledge_dim=4, num_folds=1, out_dim=3)
>>> present, fold = torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
>>> answers = KnowledgeBatch(torch.randn(3, 2, 4), torch.randn(3, 4), torch.zeros(3, 2), present, fold)
>>> torch.equal(KnowledgeModel(model, fusion)(dense_BI, None, answers), before)
True
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumrec.modules.knowledge import KnowledgeBatch, KnowledgeFusion


class KnowledgeModel(nn.Module):
    """`model` with a LUM's answers beside its dense features; called as before, with the knowledge behind::

        dense_features ──┐
                         ├── cat ── dense_arch (first layer widened) ──┐
        knowledge ─ fusion                                             ├── the model as it was ── logits
        sparse_features ───────────────────────────────────────────────┘

    model: reads (dense_features, sparse_features) and hands the former, as they are, to its submodule `dense_arch`,
        whose first layer is an nn.Linear: torchrec.models.dlrm's DLRM, DLRM_DCN and DLRM_Projection,
        torchrec.models.deepfm's SimpleDeepFMNN (which ends with a sigmoid and so gives probabilities). It is taken
        over, not copied: that layer is replaced by one that reads the new columns too.
    fusion: makes the features.
    zero_start: the new columns' weights start at zero, so that before training the scores are those of `model`, to the
        bit. The fusion has no gradient in the first step, and then has. False draws them as nn.Linear would.

    Every parameter of `model` keeps its shape and its name, with "model." in front: a production checkpoint fits
    `KnowledgeModel(...).model.load_state_dict(..., strict=False)`, which misses the one new `added_weight` alone.
    TorchRec's planner, DistributedModelParallel and train pipelines see an nn.Module like another.

    Raises ValueError where there is no such submodule, no nn.Linear in it, or knowledge in front of it already.
    """

    def __init__(
        self, model: nn.Module, fusion: KnowledgeFusion, *, zero_start: bool = True, dense_arch: str = "dense_arch"
    ) -> None:
        super().__init__()
        modules = dict(model.named_modules())
        if dense_arch not in modules:
            names = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"{type(model).__name__} has no submodule {dense_arch!r}; say dense_arch=<the one that reads the dense "
                f"features>; it has {names}"
            )
        linears = [(name, m) for name, m in modules[dense_arch].named_modules() if isinstance(m, nn.Linear)]
        if not linears or isinstance(linears[0][1], WidenedLinear):
            fault = "reads knowledge already" if linears else "has no nn.Linear"
            raise ValueError(
                f"{dense_arch!r} of {type(model).__name__} {fault}; expected one whose first layer is an "
                "nn.Linear that reads the dense features"
            )
        name, first = linears[0]
        path = ".".join(part for part in (dense_arch, name) if part)
        parent, _, child = path.rpartition(".")
        setattr(modules[parent], child, WidenedLinear(first, fusion.num_features, zero_start=zero_start))
        self.model, self.fusion = model, fusion

    def forward(self, dense_features: Tensor, sparse_features: Any, knowledge: KnowledgeBatch) -> Any:
        """What `model` gives for these rows. dense_features: [B, I]. sparse_features: its KeyedJaggedTensor."""
        # Field by field: torch.fx, with which TorchRec's pipelines find the tables' inputs, cannot unpack a batch.
        features_BF = self.fusion(
            knowledge.o_BND, knowledge.e_BD, knowledge.log_z_BN, knowledge.present_BN, knowledge.fold_B
        ).to(dense_features.dtype)
        return self.model(torch.cat([dense_features, features_BF], dim=1), sparse_features)


class WidenedLinear(nn.Linear):
    """`linear` over its own columns plus a matrix over F columns behind them: one layer over [B, I + F].

    Not one matrix of I + F columns: `weight` and `bias` stay what checkpoints and optimizers know, and a sum of two
    products is the old product to the bit while the new weights are zero, which a longer product need not be.
    """

    def __init__(self, linear: nn.Linear, num_added: int, *, zero_start: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.added_weight = nn.Parameter(linear.weight.new_zeros(linear.out_features, num_added))
        self.zero_start = zero_start
        self._draw_added()

    def reset_parameters(self) -> None:
        """Draws all weights anew, as TorchRec does it for a model that was made on the meta device."""
        super().reset_parameters()
        self._draw_added()

    def _draw_added(self) -> None:
        bound = 0.0 if self.zero_start else (self.in_features + self.added_weight.shape[1]) ** -0.5
        nn.init.uniform_(self.added_weight, -bound, bound)

    def forward(self, x_BI: Tensor) -> Tensor:
        """[B, O]. x_BI: the I columns of `linear` and the F new ones."""
        own_BI, added_BF = x_BI.split([self.in_features, self.added_weight.shape[1]], dim=1)
        return super().forward(own_BI) + F.linear(added_BF, self.added_weight)
