"""What a ranker makes of a LUM's answers: direct features, interest matching (LUM section 4.3, figure 3c), attention.

Shape suffixes: B rows, N conditions asked, D width of the LUM, K folds (LUMs), F features given to the ranker.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

MODES = ("direct", "matching", "both")


class KnowledgeBatch(NamedTuple):
    """What LUMs say about B rows; fixed numbers, no gradient flows into them.

    o_BND: float, answers of the row's user to each condition, asked with the history before the row.
    e_BD: float, the target item by the token encoder of the same LUM. fold_B: int64, which LUM that was.
    log_z_BN: float, log of the sum over the catalogue of exp(similarity); None where it was not stored.
    present_BN: bool, False where there is no answer; what stands there is not read.
    """

    o_BND: Tensor
    e_BD: Tensor
    log_z_BN: Tensor | None
    present_BN: Tensor
    fold_B: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "KnowledgeBatch":
        """The same batch on `device`; non_blocking: as in Tensor.to, for batches in pinned memory."""
        moved = (None if value is None else value.to(device, non_blocking=non_blocking) for value in self)
        return KnowledgeBatch(*moved)  # type: ignore[arg-type]

    def record_stream(self, stream: torch.Stream) -> None:
        """Says that `stream` uses the batch, as TorchRec's train pipelines ask of what they move."""
        for value in self:
            if value is not None:
                value.record_stream(stream)  # type: ignore[arg-type]


try:  # TorchRec's train pipelines take what is registered; without TorchRec the rest of this file works all the same
    from torchrec.streamable import Pipelineable

    Pipelineable.register(KnowledgeBatch)
except ImportError:
    pass


class KnowledgeFusion(nn.Module):
    """Features for a ranker's over-arch out of a LUM's answers; usable in front of any.

    direct: o of every condition and e, projected together. The spaces of K cross-fitted LUMs have nothing to do with
        each other, so each has a projection of its own, chosen by the row's fold.
    matching: for each condition the similarity o·e (a LUM scales o and e so that their dot product is its similarity),
        its log-probability o·e - log z, and how far each of the two is from its mean over the row's answers: what tells
        "an item that this user will like" from "one that this user will not".
    both: the two behind each other. In every mode a column says of each answer whether it is there.
    attention=True adds, to any mode, the answers pooled by how well each matches the target, Σ_n softmax_n(o_n·e) o_n
        over the answers that are there, projected by fold: one vector however many conditions are asked.

    Columns are standardised by running moments over the answers that are there (BatchNorm that knows absence), since a
    LUM's scale is its own. An absent answer is 0 in every column: the mean of the rows that have one. ::

        o_BND ──┬── project by fold ──────────────┐
        e_BD ───┼── o·e ── standardise ───────────┼── [B, num_features]
        log_z ──┘  o·e - log z, contrasts         │
        o, e ───── attention, project by fold ────┤
        present ──────────────────────────────────┘

    dropout: share of rows whose answers are withheld while training. A ranker that can lean on the answers from its
    first step learns little from the history; and serving has users without answers.

    Raises ValueError for an unknown mode, and where matching was set up with log z and is called without, or reverse.

    >>> fusion = KnowledgeFusion("both", num_conditions=2, knowledge_dim=8, num_folds=3, out_dim=4)
    >>> o_BND, e_BD, log_z_BN = torch.randn(5, 2, 8), torch.randn(5, 8), torch.randn(5, 2)
    >>> fusion(o_BND, e_BD, log_z_BN, torch.ones(5, 2, dtype=torch.bool), torch.tensor([0, 2, 1, 0, 0])).shape
    torch.Size([5, 14])
    """

    def __init__(
        self,
        mode: str,
        num_conditions: int,
        knowledge_dim: int,
        num_folds: int,
        out_dim: int,
        *,
        has_log_z: bool = True,
        attention: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"the knowledge dropout is {dropout}; expected 0 or more and less than 1")
        self.dropout = dropout
        if mode not in MODES:
            raise ValueError(f"the knowledge mode is {mode!r}; expected one of {', '.join(MODES)}")
        self.mode, self.num_conditions, self.has_log_z = mode, num_conditions, has_log_z
        self.num_features = num_conditions
        if mode != "matching":
            in_dim = (num_conditions + 1) * knowledge_dim
            self.direct_scale = MaskedStandardise(in_dim)
            self.direct_weight_KIF = fold_weights(num_folds, in_dim, out_dim)
            self.direct_bias_KF = nn.Parameter(torch.zeros(num_folds, out_dim))
            self.num_features += out_dim
        if mode != "direct":
            kinds = (2 if has_log_z else 1) * (2 if num_conditions > 1 else 1)
            self.matching_scale = MaskedStandardise(kinds * num_conditions)
            self.num_features += kinds * num_conditions
        self.attention = attention
        if attention:
            self.pooled_scale = MaskedStandardise(knowledge_dim)
            self.pooled_weight_KIF = fold_weights(num_folds, knowledge_dim, out_dim)
            self.pooled_bias_KF = nn.Parameter(torch.zeros(num_folds, out_dim))
            self.num_features += out_dim

    def forward(
        self, o_BND: Tensor, e_BD: Tensor, log_z_BN: Tensor | None, present_BN: Tensor, fold_B: Tensor
    ) -> Tensor:
        """Features [B, num_features] (shapes and meaning of the inputs: KnowledgeBatch).

        Float32, and computed in it, whatever the inputs, the weights and autocast are: moments of a batch need it.
        """
        if torch.is_autocast_enabled(o_BND.device.type):
            with torch.autocast(o_BND.device.type, enabled=False):
                return self.forward(o_BND, e_BD, log_z_BN, present_BN, fold_B)
        o_BND, e_BD = o_BND.detach().float(), e_BD.detach().float()
        # Sizes by .shape[0] here and below: len() makes torch.export take the batch's size for a constant.
        if self.training and self.dropout:
            present_BN = present_BN & (torch.rand(present_BN.shape[0], 1, device=present_BN.device) >= self.dropout)
        # What stands in the place of an absent answer may be anything, nan included: each part leaves it out.
        features = [present_BN.float()]
        if self.mode != "matching":
            features.append(self._direct(o_BND, e_BD, present_BN, fold_B))
        if self.mode != "direct":
            features.append(self._matching(o_BND, e_BD, log_z_BN, present_BN))
        if self.attention:
            has_item_B1 = present_BN.any(dim=1, keepdim=True)
            o_BND = torch.where(present_BN[:, :, None], o_BND, 0.0)
            x_BD = self.pooled_scale(pool_answers(o_BND, e_BD, present_BN), has_item_B1)
            features.append(project_by_fold(x_BD, self.pooled_weight_KIF, self.pooled_bias_KF, fold_B) * has_item_B1)
        return torch.cat(features, dim=1)

    def _direct(self, o_BND: Tensor, e_BD: Tensor, present_BN: Tensor, fold_B: Tensor) -> Tensor:
        # e is known wherever any answer is: both are read from one LUM.
        has_item_B1 = present_BN.any(dim=1, keepdim=True)
        x_BXD = torch.cat([o_BND, e_BD[:, None]], dim=1)
        x_BXD = self.direct_scale(x_BXD, torch.cat([present_BN, has_item_B1], dim=1)[:, :, None])
        return project_by_fold(x_BXD.flatten(1), self.direct_weight_KIF, self.direct_bias_KF, fold_B) * has_item_B1

    def _matching(self, o_BND: Tensor, e_BD: Tensor, log_z_BN: Tensor | None, present_BN: Tensor) -> Tensor:
        if (log_z_BN is not None) != self.has_log_z:
            raise ValueError(
                f"this KnowledgeFusion was made with has_log_z={self.has_log_z} and is called "
                f"{'with' if log_z_BN is not None else 'without'} log z: make it the way the knowledge is stored"
            )
        kinds = [torch.einsum("bnd,bd->bn", o_BND, e_BD)]
        if log_z_BN is not None:
            kinds.append(kinds[0] - log_z_BN.detach().float())
        if self.num_conditions > 1:
            count_B1 = present_BN.sum(dim=1, keepdim=True).clamp(min=1)
            for x_BN in tuple(kinds):
                mean_B1 = torch.where(present_BN, x_BN, 0.0).sum(dim=1, keepdim=True) / count_B1
                kinds.append(x_BN - mean_B1)
        return self.matching_scale(torch.stack(kinds, dim=1), present_BN[:, None]).flatten(1)


def pool_answers(o_BND: Tensor, e_BD: Tensor, present_BN: Tensor) -> Tensor:
    """Answers weighted by softmax(o·e) over those present, [B, D]; 0 where none is. Absent ones must be finite.

    The softmax has no temperature of its own: o·e is the LUM's logit already.
    """
    similarity_BN = torch.einsum("bnd,bd->bn", o_BND, e_BD)
    # The lowest number, not -inf: a row without any answer would be nan, in the backward pass too.
    lowest = torch.finfo(similarity_BN.dtype).min
    weight_BN = similarity_BN.masked_fill(~present_BN, lowest).softmax(dim=1) * present_BN
    return torch.einsum("bn,bnd->bd", weight_BN, o_BND)


def fold_weights(num_folds: int, in_dim: int, out_dim: int) -> nn.Parameter:
    """Weights of one projection for each fold, [K, I, F], drawn as nn.Linear draws its own."""
    bound = in_dim**-0.5
    return nn.Parameter(torch.empty(num_folds, in_dim, out_dim).uniform_(-bound, bound))


def project_by_fold(x_BI: Tensor, weight_KIF: Tensor, bias_KF: Tensor, fold_B: Tensor) -> Tensor:
    """Each row by the projection of its own fold, [B, F], in the dtype of x."""
    weight_KIF, bias_KF = weight_KIF.to(x_BI.dtype), bias_KF.to(x_BI.dtype)
    # All folds' projections of all rows, then each row's own: K is small, and one batched product beats K gathers.
    x_KBF = torch.baddbmm(bias_KF[:, None], x_BI.expand(bias_KF.shape[0], -1, -1), weight_KIF)
    return x_KBF[fold_B, torch.arange(fold_B.shape[0], device=fold_B.device)]


class MaskedStandardise(nn.Module):
    """Columns brought to mean 0 and variance 1 over the entries that are present; 0 where absent.

    BatchNorm without scale and shift, whose moments leave absent entries out: a batch's own while training (running
    ones are kept beside), the running ones in evaluation. A column without a present entry in a batch leaves no trace.
    The running moments stay float32 when the model is cast to another dtype. Several processes: see moments.py.
    """

    mean_F: Tensor
    var_F: Tensor
    is_started_F: Tensor

    def __init__(self, num_features: int, *, momentum: float = 0.05, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean_F", torch.zeros(num_features))
        self.register_buffer("var_F", torch.ones(num_features))
        self.register_buffer("is_started_F", torch.zeros(num_features))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MaskedStandardise":
        def in_own_dtype(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(in_own_dtype, recurse)

    def forward(self, x_BX: Tensor, present_BX: Tensor) -> Tensor:
        """x_BX standardised, float32, in its shape: [B, F] or [B, …] with F columns in all. present_BX: bool, of that
        shape or with 1 where columns share it; absent entries may be anything, nan included.
        """
        columns = x_BX.shape[1:]
        weight_BX = present_BX.to(x_BX.dtype)
        x_BX = torch.where(present_BX, x_BX, 0.0)
        if not self.training:
            scale_X = (self.var_F + self.eps).rsqrt().view(columns)
            return torch.addcmul(x_BX, weight_BX, self.mean_F.view(columns), value=-1) * scale_X
        count_X = weight_BX.sum(dim=0)
        safe_X = count_X.clamp(min=1)
        mean_X = _sum_of_rows(x_BX) / safe_X
        deviation_BX = torch.addcmul(x_BX, weight_BX, mean_X, value=-1)  # 0 where absent
        var_X = _sum_of_rows(deviation_BX.square()) / safe_X
        self._observe(mean_X.flatten().detach(), var_X.flatten().detach(), count_X.expand(columns).flatten())
        return deviation_BX * (var_X + self.eps).rsqrt()

    def _observe(self, mean_F: Tensor, var_F: Tensor, count_F: Tensor) -> None:
        # The first batch sets the moments, so that a short training does not evaluate with those of the start.
        step_F = torch.where(self.is_started_F > 0, self.momentum, 1.0) * (count_F > 1)
        self.mean_F.lerp_(mean_F, step_F)
        self.var_F.lerp_(var_F, step_F)
        self.is_started_F.copy_(torch.maximum(self.is_started_F, (count_F > 1).float()))


def _sum_of_rows(x_BX: Tensor) -> Tensor:
    """Sum over the first axis, as a matrix product: several times as fast on a CPU as a sum over rows."""
    return (x_BX.new_ones(1, x_BX.shape[0]) @ x_BX.flatten(1)).view(x_BX.shape[1:])
