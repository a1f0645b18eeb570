"""A LUM's knowledge in an existing TorchRec model: DLRM, DLRM_DCN, SimpleDeepFMNN, or one built like them.

Shape suffixes: B rows, I width of the dense input, F knowledge features, O width of the first dense layer; N, D as in
knowledge.py.

A model with two dense features, three rows, and answers of one LUM (of width 4) to two conditions. Before training the
scores equal those of the model without knowledge:

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
    """`model` with a LUM's answers added to its dense features; called as before, with one more argument::

        dense_features ──┐
                         ├── cat ── dense_arch (first layer widened) ──┐
        knowledge ─ fusion                                             ├── the rest of the model ── logits
        sparse_features ───────────────────────────────────────────────┘

    model: takes (dense_features, sparse_features) and passes dense_features unchanged to its submodule `dense_arch`,
        whose first layer is an nn.Linear. DLRM, DLRM_DCN and DLRM_Projection of torchrec.models.dlrm and SimpleDeepFMNN
        of torchrec.models.deepfm do (the latter returns probabilities). `model` is not copied: its first dense layer is
        replaced by one that also reads the new columns.
    fusion: makes the features.
    zero_start: the new columns' weights start at zero, so that before training the scores equal those of `model` to
        the bit; in the first step the fusion then has no gradient. False: initialised like those of nn.Linear.

    Every parameter of `model` keeps its shape and its name, prefixed with "model.". A production checkpoint fits
    `KnowledgeModel(...).model.load_state_dict(..., strict=False)`; the only missing key is the new `added_weight`.
    TorchRec's planner, DistributedModelParallel and train pipelines work as with any nn.Module.

    Raises ValueError if `model` has no such submodule, if that has no nn.Linear, or if it reads knowledge already.
    """

    def __init__(
        self, model: nn.Module, fusion: KnowledgeFusion, *, zero_start: bool = True, dense_arch: str = "dense_arch"
    ) -> None:
        super().__init__()
        modules = dict(model.named_modules())
        if dense_arch not in modules:
            names = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"{type(model).__name__} has no submodule {dense_arch!r}; set dense_arch to the submodule that reads "
                f"the dense features, one of {names}"
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
        """The output of `model` for these rows. dense_features: [B, I]. sparse_features: its KeyedJaggedTensor."""
        # Field by field: TorchRec's pipelines find the tables' inputs with torch.fx, which cannot unpack a batch.
        features_BF = self.fusion(
            knowledge.o_BND, knowledge.e_BD, knowledge.log_z_BN, knowledge.present_BN, knowledge.fold_B
        ).to(dense_features.dtype)
        return self.model(torch.cat([dense_features, features_BF], dim=1), sparse_features)


class WidenedLinear(nn.Linear):
    """`linear` for its I columns plus a matrix for F further columns: one layer over [B, I + F].

    The matrices are separate so that `weight` and `bias` fit existing checkpoints and optimizer states, and so that the
    result equals that of `linear` to the bit while the new weights are zero, which one longer product does not ensure.
    """

    def __init__(self, linear: nn.Linear, num_added: int, *, zero_start: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.added_weight = nn.Parameter(linear.weight.new_zeros(linear.out_features, num_added))
        self.zero_start = zero_start
        self._draw_added()

    def reset_parameters(self) -> None:
        """Initialises all weights; TorchRec calls it for a model that was made on the meta device."""
        super().reset_parameters()
        self._draw_added()

    def _draw_added(self) -> None:
        bound = 0.0 if self.zero_start else (self.in_features + self.added_weight.shape[1]) ** -0.5
        nn.init.uniform_(self.added_weight, -bound, bound)

    def forward(self, x_BI: Tensor) -> Tensor:
        """The layer's output [B, O]. x_BI: the I columns of `linear`, then the F new ones."""
        own_BI, added_BF = x_BI.split([self.in_features, self.added_weight.shape[1]], dim=1)
        return super().forward(own_BI) + F.linear(added_BF, self.added_weight)
