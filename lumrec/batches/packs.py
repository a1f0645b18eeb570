"""Packs: windows of many users one after another, up to a budget of events (LUM section 4.1.3, packing).

Shape suffixes: W windows, T events, Q queries, C candidates, I catalogue items.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lumrec.batches.negatives import NegativeSampler, NegativesConfig
from lumrec.batches.windows import Windows, deal, training_windows, window_cost
from lumrec.data.columns import expand_ranges
from lumrec.data.prepared import PreparedData
from lumrec.data.schema import features_by_role
from lumrec.modules.large_user_model import TOKENS_PER_EVENT, Pack
from lumrec.modules.tokens import make_kjt
from lumrec.run.errors import UserError
from lumrec.run.limits import count, setting

ABSENT = -1


class Queries(NamedTuple):
    """Conditions to ask. window_Q: int64 ascending, each query's window; moment_Q: int64, number of its events it sees.

    time_Q: int64, seconds, the time of each query; None = the time of the row after the events that it sees, or at a
    window's end that of the last event.
    conditions: feature -> vocabulary row of each query (int64 [Q]; ABSENT where the feature is not given), or its bags
    (values int64, lengths int64 [Q]) where a query may hold several values.
    """

    window_Q: Tensor
    moment_Q: Tensor
    conditions: Mapping[str, Tensor | tuple[Tensor, Tensor]]
    time_Q: Tensor | None = None


class PackBuilder:
    """Makes packs out of prepared data for a model that reads the given features in the given KJT order."""

    def __init__(
        self,
        data: PreparedData,
        *,
        features: Sequence[str],
        condition_features: Sequence[str],
        tokens: str = "interleaved",
    ) -> None:
        self.data = data
        self.tokens_per_event = TOKENS_PER_EVENT[tokens]
        self.time_E = torch.from_numpy(data.timestamp)
        self.features = list(features)
        self.item_features = features_by_role(data.schema, "item")
        self.feedback_features = features_by_role(data.schema, "feedback")
        self.condition_features = list(condition_features)
        self.item_E = torch.from_numpy(data.item)

    def of_other_events(self, data: PreparedData) -> "PackBuilder":
        """The builder for the events in `data`, which has the same features and vocabularies."""
        other = copy.copy(self)
        other.data, other.time_E, other.item_E = data, torch.from_numpy(data.timestamp), torch.from_numpy(data.item)
        return other

    def pack(
        self,
        windows: Windows,
        *,
        queries: Queries | None = None,
        candidates_C: Tensor | None = None,
        shown_T: Mapping[str, Tensor] | None = None,
    ) -> Pack:
        """One pack of `windows` with `queries` and `candidates_C` (catalogue items, int64); nothing to be predicted.

        shown_T: condition feature -> bool [T], events whose condition is given; all of them by default.
        """
        row_T = expand_ranges(windows.start_W, windows.length_W)
        candidates_C = _none() if candidates_C is None else candidates_C
        queries = queries or Queries(_none(), _none(), {})
        num_events, num_queries, num_candidates = len(row_T), len(queries.window_Q), len(candidates_C)
        stride = num_events + num_queries + num_candidates

        columns: dict[str, tuple[Tensor, Tensor]] = {}
        item_T = self.item_E[row_T]
        for name in self.item_features:
            column = self.data.item_columns[name]
            columns[name] = _bags(
                stride, (0, column.take(item_T)), (stride - num_candidates, column.take(candidates_C))
            )
        for name in self.feedback_features:
            columns[name] = _bags(stride, (0, self.data.event_columns[name].take(row_T)))
        for name in self.condition_features:
            given = self.data.event_columns[name].take(row_T)
            if shown_T is not None and name in shown_T:
                given = _keep(given, shown_T[name])
            asked = queries.conditions.get(name, torch.full((num_queries,), ABSENT))
            if isinstance(asked, Tensor):
                asked = _keep((asked, torch.ones_like(asked)), asked != ABSENT)
            columns[name] = _bags(stride, (0, given), (num_events, asked))

        return Pack.of(
            make_kjt(self.features, columns, stride=stride),
            windows.length_W,
            tokens_per_event=self.tokens_per_event,
            user_Q=queries.window_Q,
            moment_Q=queries.moment_Q,
            time_T=self.time_E[row_T],
            time_Q=self._asked_at(windows, queries) if queries.time_Q is None else queries.time_Q,
            candidate_item_C=candidates_C,
            event_row_T=row_T,
        )

    def _asked_at(self, windows: Windows, queries: Queries) -> Tensor:
        """Time of the row at each query's moment; behind a window's end that of its last event."""
        last_Q = windows.length_W[queries.window_Q] - 1
        row_Q = windows.start_W[queries.window_Q] + torch.minimum(queries.moment_Q, last_Q).clamp(min=0)
        return self.time_E[row_Q.clamp(max=len(self.time_E) - 1)]


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


def _bags(stride: int, *parts: tuple[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Bags of one feature: each part (first bag, (values, lengths)) in ascending places, empty bags elsewhere."""
    lengths_S = torch.zeros(stride, dtype=torch.int64)
    for first, (_, lengths) in parts:
        lengths_S[first : first + len(lengths)] = lengths
    return torch.cat([values for _, (values, _) in parts]), lengths_S


def _keep(bags: tuple[Tensor, Tensor], shown: Tensor) -> tuple[Tensor, Tensor]:
    """The same bags, emptied where not shown."""
    values, lengths = bags
    return values[torch.repeat_interleave(shown, lengths)], torch.where(shown, lengths, 0)


@dataclass(frozen=True)
class PackingConfig:
    """How windows of events are packed into batches.

    events_per_pack: events of one pack on each rank, at most (two tokens each).
    condition_dropout: share of the events whose condition feature is withheld in training, separately for each feature,
        so that a query may leave the feature out.
    """

    events_per_pack: int = count(4096, least=1, most=2**26)
    condition_dropout: float = setting(0.1, least=0, most=1)


class PackLoader:
    """Training packs of an epoch in a seeded order; the state is (epoch, packs done), so any pack can be made again.

    The windows of one step, world_size · events_per_pack events, are divided so that each rank has about the same work
    (see `deal`); ranks with long windows then have fewer events. All ranks compute the same division. They get the same
    number of packs, an empty one if the last step has fewer windows than ranks. token_cost: see there. `done` counts
    budgets of events_per_pack over all ranks, so another number of ranks continues with the next one.
    """

    def __init__(
        self,
        builder: PackBuilder,
        *,
        users: np.ndarray,
        max_events: int,
        packing: PackingConfig,
        negatives: NegativesConfig,
        contrast_feature: str = "",
        token_cost: float = 768.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if packing.events_per_pack < max_events:
            raise UserError(
                f"pretrain.packing.events_per_pack is {packing.events_per_pack}, less than model.max_events "
                f"{max_events}, so a pack cannot hold a full window; raise the first or lower the second"
            )
        if contrast_feature:
            _check_contrast(contrast_feature, builder)
        self.builder, self.users, self.max_events, self.packing = builder, users, max_events, packing
        # Popularity among the users that this LUM is trained on: held-out users must not affect it.
        self.sampler = NegativeSampler(
            negatives,
            builder.data.training_counts(users),
            num_ranks=world_size if negatives.across_ranks else 1,
        )
        self.contrast_feature, self.token_cost = contrast_feature, token_cost
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch, self.done = 0, 0
        windows = self._windows(0)
        if windows.count == 0:
            raise UserError(
                "there are no training events: the split or the fold leaves none; look at the prepared data"
            )
        self._length = self._num_packs(windows)

    def _generator(self, *key: int) -> torch.Generator:
        """One generator for each (epoch, pack), so that packs do not depend on what was drawn before."""
        seed = np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed >> 1))

    def _windows(self, epoch: int) -> Windows:
        generator = self._generator(epoch)
        windows = training_windows(self.builder.data, max_events=self.max_events, users=self.users, generator=generator)
        return windows[torch.randperm(windows.count, generator=generator)]

    def _budget_of_window(self, windows: Windows) -> Tensor:
        before_W = windows.length_W.cumsum(0) - windows.length_W
        return before_W // self.packing.events_per_pack

    def _num_packs(self, windows: Windows) -> int:
        return int(self._budget_of_window(windows)[-1]) // self.world_size + 1

    def __len__(self) -> int:
        """Packs of an epoch on this rank (epochs differ by a pack or two, because windows are cut again)."""
        return self._length

    def __iter__(self) -> Iterator[Pack]:
        windows = self._windows(self.epoch)
        budget_W = self._budget_of_window(windows)
        step_W = torch.div(budget_W - self.done, self.world_size, rounding_mode="floor")
        cost_W = window_cost(self.builder.tokens_per_event * windows.length_W, self.token_cost)
        is_left_W = step_W >= 0
        rank_W = torch.full_like(step_W, -1)
        rank_W[is_left_W] = deal(cost_W[is_left_W], step_W[is_left_W], self.world_size)
        steps = int(step_W[-1]) + 1
        bounds = torch.searchsorted(step_W, torch.arange(steps + 1)).tolist()  # the windows are in the order of steps
        for first, end in zip(bounds, bounds[1:]):
            number = self.done + self.rank
            self.done += self.world_size
            now = windows[first:end]
            num_events = int(now.length_W.sum()) if self.sampler.config.across_ranks else None
            own = now[rank_W[first:end] == self.rank]
            yield self.training_pack(own, self._generator(self.epoch, number), num_events=num_events)
        self.epoch, self.done = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]

    def training_pack(self, windows: Windows, generator: torch.Generator, *, num_events: int | None = None) -> Pack:
        """A pack in which every event is predicted, with negatives and, with a contrast, counterfactual queries.

        num_events: events of all ranks in this step, if their negatives are combined (see NegativeSampler).
        """
        builder, rate = self.builder, self.packing.condition_dropout
        row_T = expand_ranges(windows.start_W, windows.length_W)
        item_T = builder.item_E[row_T]
        shown_T = {name: torch.rand(len(row_T), generator=generator) >= rate for name in builder.condition_features}
        candidates = self.sampler.draw(item_T, generator, num_events=num_events)
        queries, contrast_event_Q = None, _none()
        if self.contrast_feature:
            queries, contrast_event_Q = self._counterfactual(windows, row_T, shown_T, generator)
        pack = builder.pack(windows, queries=queries, candidates_C=candidates.item_C, shown_T=shown_T)
        pack.positive_T, pack.log_weight_C = candidates.positive_T, candidates.log_weight_C
        pack.log_positive_weight_T, pack.contrast_event_Q = candidates.log_positive_weight_T, contrast_event_Q
        return pack

    def _counterfactual(
        self, windows: Windows, row_T: Tensor, shown_T: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[Queries, Tensor]:
        """For each event that shows its condition, one query at its moment with another value of the feature."""
        data, name = self.builder.data, self.contrast_feature
        event_Q = shown_T[name].nonzero().squeeze(1)
        window_T = torch.repeat_interleave(torch.arange(windows.count), windows.length_W)
        moment_T = row_T - windows.start_W[window_T]
        true_Q = data.event_columns[name].values[row_T[event_Q]]
        num_values = data.table_rows[data.schema.features[name].table] - 1
        # Another row among 1 … num_values: skip ahead by 1 … num_values - 1, around the end.
        skip_Q = torch.randint(1, num_values, (len(event_Q),), generator=generator)
        other_Q = (true_Q - 1 + skip_Q) % num_values + 1
        conditions: dict[str, Tensor | tuple[Tensor, Tensor]] = {
            feature: _keep(data.event_columns[feature].take(row_T[event_Q]), shown_T[feature][event_Q])
            for feature in self.builder.condition_features
        }
        conditions[name] = other_Q
        return Queries(window_T[event_Q], moment_T[event_Q], conditions), event_Q


def _check_contrast(name: str, builder: PackBuilder) -> None:
    if name not in builder.condition_features:
        raise UserError(
            f"pretrain.contrast.feature is {name!r}; the conditions that the model reads: {builder.condition_features}"
        )
    if builder.data.event_columns[name].offsets is not None:
        raise UserError(
            f"pretrain.contrast.feature {name!r} is multi-valued: a contrast needs one value for each event"
        )
    num_values = builder.data.table_rows[builder.data.schema.features[name].table] - 1
    if num_values < 2:
        raise UserError(f"pretrain.contrast.feature {name!r} has {num_values} value(s): a contrast needs two or more")
