"""The past of requests for statistics, computed from the states of their users.

Shape suffixes: Q requests, T events of all requests, B rows (candidates), P values of events, V values of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lumrec.data.columns import Column
from lumrec.features.history import UserHistory
from lumrec.features.items import at, entries, sum_of_rows
from lumrec.features.statistics import Past


class RequestPast(Past):
    """The past of the candidates of requests. Each request sees the first `seen` events of its user's history.

    seconds_Q: time from the last event that is seen to the request. item_B, request_B: of each candidate, int64,
    ascending by request. columns: of the item features. slots: scratch memory, int32 zeros, as many as the largest
    table has rows; they are zeros again afterwards.
    """

    def __init__(
        self,
        histories: Sequence[UserHistory],
        seen: Sequence[int],
        seconds_Q: np.ndarray,
        item_B: np.ndarray,
        request_B: np.ndarray,
        columns: Mapping[str, Column],
        slots: np.ndarray,
    ) -> None:
        self.histories, self.item_B, self.request_B = histories, item_B, request_B
        self.columns, self.slots = columns, slots
        events = [history.events for history in histories]
        self.item_T, label_T, excess_T = (
            np.concatenate([getattr(of, name)[:num] for of, num in zip(events, seen, strict=True)])
            for name in ("item", "label", "excess")
        )
        offsets = np.concatenate([[0], np.cumsum(seen)])
        self.request_T = np.repeat(np.arange(len(seen)), seen)
        super().__init__(
            {"label": label_T, "excess": excess_T}, offsets[request_B], offsets[request_B + 1], seconds_Q[request_B]
        )
        self.count_N = self.count_N + np.array([of.count for of in histories])[request_B]

    def total(self, name: str) -> np.ndarray:
        """Sum of the numbers `name` over all events, folded ones included, float64 [B]."""
        return super().total(name) + np.array([getattr(of, name) for of in self.histories])[self.request_B]

    def shared(self, feature: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        column, slots = self.columns[feature], self.slots
        row_V, value_V = entries(column, self.item_B)
        event_P, value_P = entries(column, self.item_T)
        # Each value of a candidate gets a slot (the last one given counts), and slot 0 takes all other values.
        slots[value_V] = np.arange(1, len(value_V) + 1, dtype=np.int32)
        num_slots = len(value_V) + 1
        request_V = at(self.request_B, row_V)
        slot_P = at(self.request_T, event_P) * num_slots + slots[value_P]
        slot_V = request_V * num_slots + slots[value_V]
        slots[value_V] = 0
        num = len(self.histories) * num_slots
        weights = [None, *(at(values_T, event_P) for values_T in self.values.values())]
        # Without events, bincount gives integers whatever the weights.
        of_V = [np.bincount(slot_P, weight_P, num)[slot_V].astype(np.float64) for weight_P in weights]
        for q, history in enumerate(self.histories):
            if history.count:
                first, last = np.searchsorted(request_V, [q, q + 1])
                folded = history.counts[feature].of(value_V[first:last])
                for values_V, folded_V in zip(of_V, folded, strict=True):
                    values_V[first:last] += folded_V
        count_B, *sums = (sum_of_rows(values_V, row_V, len(self.item_B)) for values_V in of_V)
        return count_B, dict(zip(self.values, sums, strict=True))
