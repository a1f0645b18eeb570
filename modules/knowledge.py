"""Features for a ranker from a LUM's answers: direct, interest matching (LUM section 4.3, figure 3c), attention.

Shape suffixes: B rows, N conditions, D width of the LUM, I inputs of a projection, K folds (LUMs), F output features.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

MODES = ("direct", "matching", "both")


class KnowledgeBatch(NamedTuple):
    """A LUM's answers for B rows, as constants: no gradient flows into them.

    o_BND: float, the answer to each condition, from the user's history before the row.
    e_BD: float, the target item as embedded by the same LUM. fold_B: int64, the index of that LUM.
    log_z_BN: float, log of the sum over the catalogue of exp(similarity); None if it was not stored.
    present_BN: bool, whether there is an answer; where it is False, the other values are not read.
    """

    o_BND: Tensor
    e_BD: Tensor
    log_z_BN: Tensor | None
    present_BN: Tensor
    fold_B: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "KnowledgeBatch":
        """The same batch on `device`. non_blocking: as in Tensor.to, for batches in pinned memory."""
        moved = (None if value is None else value.to(device, non_blocking=non_blocking) for value in self)
        return KnowledgeBatch(*moved)  # type: ignore[arg-type]

    def record_stream(self, stream: torch.Stream) -> None:
        """Marks the tensors as used by `stream`; TorchRec's train pipelines require it."""
        for value in self:
            if value is not None:
                value.record_stream(stream)  # type: ignore[arg-type]


try:  # TorchRec's train pipelines accept only registered classes; the rest of this file works without TorchRec
    from torchrec.streamable import Pipelineable

    Pipelineable.register(KnowledgeBatch)
except ImportError:
    pass


class KnowledgeFusion(nn.Module):
    """Features [B, num_features] from a LUM's answers, for the over-arch of any ranker.

    direct: o of every condition and e, projected together. The spaces of K cross-fitted LUMs are unrelated, so each
        LUM has its own projection, chosen by the row's fold.
    matching: for each condition the similarity o·e (a LUM scales o and e so that their dot product is its similarity),
        the log-probability o·e - log z, and the difference of each of the two from its mean over the row's answers. The
        differences separate "an item that this user will like" from "one that this user will dislike".
    both: direct and matching, concatenated. In every mode one further column per answer is 1 if the answer is present.
    attention=True adds to any mode the answers pooled by how well they match the target, Σ_n softmax_n(o_n·e) o_n over
        the present answers, projected by fold: one vector for any number of conditions.

    Columns are standardised with running moments over the present answers, since LUMs differ in scale (a BatchNorm that
    leaves absent answers out). An absent answer is 0 in every column, the mean of the rows that have one. ::

        o_BND ──┬── project by fold ──────────────┐
        e_BD ───┼── o·e ── standardise ───────────┼── [B, num_features]
        log_z ──┘  o·e - log z, contrasts         │
        o, e ───── attention, project by fold ────┤
        present ──────────────────────────────────┘

    dropout: share of rows whose answers are withheld in training. A ranker that has all answers from the first step
    learns little from the history, and in serving some users have no answers.

    Raises ValueError for an unknown mode, and if matching with has_log_z is called without log z, or the reverse.

    Five rows, two conditions; 2 present + 4 direct + 8 matching columns:

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
        self.mode, self.num_conditions, self.knowledge_dim, self.has_log_z = (
            mode,
            num_conditions,
            knowledge_dim,
            has_log_z,
        )
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

        The result is computed in float32, for any dtype of inputs and weights and under autocast, because the moments
        of a batch need that precision.
        """
        if torch.is_autocast_enabled(o_BND.device.type):
            with torch.autocast(o_BND.device.type, enabled=False):
                return self.forward(o_BND, e_BD, log_z_BN, present_BN, fold_B)
        o_BND, e_BD = o_BND.detach().float(), e_BD.detach().float()
        # .shape[0] instead of len() here and below: with len(), torch.export takes the batch size for a constant.
        if self.training and self.dropout:
            present_BN = present_BN & (torch.rand(present_BN.shape[0], 1, device=present_BN.device) >= self.dropout)
        # An absent answer may hold any value, even nan: each part masks it.
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
        # e is known if any answer is: both come from the same LUM.
        has_item_B1 = present_BN.any(dim=1, keepdim=True)
        x_BXD = torch.cat([o_BND, e_BD[:, None]], dim=1)
        x_BXD = self.direct_scale(x_BXD, torch.cat([present_BN, has_item_B1], dim=1)[:, :, None])
        return project_by_fold(x_BXD.flatten(1), self.direct_weight_KIF, self.direct_bias_KF, fold_B) * has_item_B1

    def _matching(self, o_BND: Tensor, e_BD: Tensor, log_z_BN: Tensor | None, present_BN: Tensor) -> Tensor:
        if (log_z_BN is not None) != self.has_log_z:
            raise ValueError(
                f"this KnowledgeFusion was made with has_log_z={self.has_log_z} and is called "
                f"{'with' if log_z_BN is not None else 'without'} log z: set has_log_z as the knowledge is stored"
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
    """The answers weighted by softmax(o·e) over those present, [B, D]; 0 if none is. Absent ones must be finite.

    The softmax needs no temperature: o·e is already the LUM's logit.
    """
    similarity_BN = torch.einsum("bnd,bd->bn", o_BND, e_BD)
    # The lowest number, not -inf, which would make rows without any answer nan, also in the backward pass.
    lowest = torch.finfo(similarity_BN.dtype).min
    weight_BN = similarity_BN.masked_fill(~present_BN, lowest).softmax(dim=1) * present_BN
    return torch.einsum("bn,bnd->bd", weight_BN, o_BND)


def fold_weights(num_folds: int, in_dim: int, out_dim: int) -> nn.Parameter:
    """The weights of one projection for each fold, [K, I, F], initialised like those of nn.Linear."""
    bound = in_dim**-0.5
    return nn.Parameter(torch.empty(num_folds, in_dim, out_dim).uniform_(-bound, bound))


def project_by_fold(x_BI: Tensor, weight_KIF: Tensor, bias_KF: Tensor, fold_B: Tensor) -> Tensor:
    """Each row projected with the weights of its fold, [B, F], in the dtype of x."""
    weight_KIF, bias_KF = weight_KIF.to(x_BI.dtype), bias_KF.to(x_BI.dtype)
    # All folds' projections of all rows, then the right one of each: with a small K, faster than gathering by fold.
    x_KBF = torch.baddbmm(bias_KF[:, None], x_BI.expand(bias_KF.shape[0], -1, -1), weight_KIF)
    return x_KBF[fold_B, torch.arange(fold_B.shape[0], device=fold_B.device)]


class MaskedStandardise(nn.Module):
    """Columns with mean 0 and variance 1 over the present entries; absent entries are 0.

    This is BatchNorm without scale and shift whose moments leave absent entries out. In training it uses the moments of
    the batch and updates the running ones; in evaluation it uses the running ones. A column with fewer than two present
    entries in a batch does not change its running moments. They stay float32 when the model is cast to another dtype.
    With several processes see moments.py.
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
        """x_BX standardised, in its shape and dtype: [B, F], or [B, …] with F columns in all.

        present_BX: bool, of the same shape, or with size 1 where columns share it. Absent entries may be nan.
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
        # The first batch sets the moments; otherwise a short training would be evaluated with the initial ones.
        step_F = torch.where(self.is_started_F > 0, self.momentum, 1.0) * (count_F > 1)
        self.mean_F.lerp_(mean_F, step_F)
        self.var_F.lerp_(var_F, step_F)
        self.is_started_F.copy_(torch.maximum(self.is_started_F, (count_F > 1).float()))


def _sum_of_rows(x_BX: Tensor) -> Tensor:
    """Sum over the first axis, as a matrix product: on a CPU several times faster than sum(dim=0)."""
    return (x_BX.new_ones(1, x_BX.shape[0]) @ x_BX.flatten(1)).view(x_BX.shape[1:])
