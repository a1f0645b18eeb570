"""A LUM that answers from the states of users: after their newest events, and any conditions that a request brings.

A user whose events the LUM has read before costs only the new ones (LUM section 4.2, the prefix cache):

    answer   c1 i1 c2 i2 c3 i3           | a b      read, keys and values kept
    answer   ...................  c4 i4  | a b      only c4 i4 and the queries are computed

Shape suffixes: B users, N conditions, D width, K the users whose histories fit into a window.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lumrec.batches.windows import Windows, behind
from lumrec.data.columns import Column
from lumrec.data.prepared import PreparedData
from lumrec.features.history import SECOND, EventRows, Layout, UserHistory
from lumrec.features.items import Catalogue
from lumrec.modules.large_user_model import History
from lumrec.query.conditions import Conditions
from lumrec.query.group_query import GroupQuery, serving_windows
from lumrec.query.prefix_cache import plain_lum, read_on
from lumrec.run.errors import UserError


class _Read(NamedTuple):
    """What the LUM has read of a user: the keys and values, and the events that they belong to."""

    history: History
    time_E: np.ndarray
    item_E: np.ndarray
    id_E: np.ndarray


class LiveLum:
    """Asks a LUM about users whose events are in a state.

    query: the LUM and its conditions. layout: of the states. cache_bytes: most bytes of keys and values that are kept,
    of the users asked about last. cached_bytes: bytes kept now. To be used by one thread at a time.

    Raises UserError if the states keep fewer events than the LUM sees, or lack features that it reads.
    """

    def __init__(self, query: GroupQuery, layout: Layout, *, cache_bytes: int = 2**28) -> None:
        missing = {*query.builder.feedback_features, *query.builder.condition_features} - layout.events.keys()
        if missing:
            raise UserError(
                f"the LUM reads {', '.join(sorted(missing))} of events, which the user state does not hold: build it "
                "for a ranker that does not leave them out (rank.leave_out)"
            )
        if layout.keep < query.max_events - 1:
            raise UserError(
                f"the user state keeps {layout.keep} events of a user, and the LUM reads {query.max_events - 1}: build "
                f"it with user_state.keep={query.max_events - 1} or more"
            )
        self.query, self.lum, self.layout = query, plain_lum(query), layout
        self._columns = Catalogue.of(query.data).columns
        self._read: OrderedDict[str, _Read] = OrderedDict()
        self._cache_bytes, self.cached_bytes = cache_bytes, 0
        query.model.eval()

    def answer(
        self,
        user_keys: Sequence[str],
        histories: Sequence[UserHistory],
        asked: Sequence[Mapping[str, str]] | None = None,
    ) -> tuple[Tensor, np.ndarray]:
        """Answers after each user's last event, o_BND (float32), and how many events the LUM saw (int64 [B]).

        histories: each with one event or more. asked: conditions; None = the query's. The answers equal those of the
        whole histories, up to rounding. Raises UserError for an unknown condition.
        """
        view = log_of(histories, self.query.data, self._columns)
        query = self.query.of_other_events(view)
        conditions = query.asked if asked is None else query.of_request(len(histories), asked)
        whole = serving_windows(view, torch.arange(len(histories)), max_events=query.max_events).windows
        total_B = np.array([history.count + len(history.events) for history in histories])
        known_B = [self._known(key, history) for key, history in zip(user_keys, histories, strict=True)]
        fits_B = total_B <= query.max_events - 1
        o_BND = torch.empty(len(histories), conditions.count, self.lum.output.out_features)
        for is_known in (True, False):
            index = [b for b in np.flatnonzero(fits_B).tolist() if (known_B[b] is not None) == is_known]
            if index:
                parts = [known for b in index if (known := known_B[b]) is not None]
                grown, o_BND[index] = self._read_on(query, whole[torch.tensor(index)], parts, conditions)
                self._keep([user_keys[b] for b in index], [histories[b].events for b in index], grown)
        if long := np.flatnonzero(~fits_B).tolist():
            o_BND[long] = query.answer_all(behind(whole[torch.tensor(long)]), conditions)
        return o_BND, whole.length_W.numpy()

    def _known(self, key: str, history: UserHistory) -> _Read | None:
        """What was read of the user; None if an event has since been added before the last one that was read."""
        read, events = self._read.get(key), history.events
        if read is None:
            return None
        pairs = ((read.time_E, events.time), (read.item_E, events.item), (read.id_E, events.id))
        return read if all(np.array_equal(old, new[: len(old)]) for old, new in pairs) else None

    def _read_on(
        self, query: GroupQuery, whole: Windows, parts: Sequence[_Read], asked: Conditions
    ) -> tuple[History, Tensor]:
        """The histories and answers of these windows. parts: what was read of each before; empty if nothing was."""
        history, read_K = None, torch.zeros(whole.count, dtype=torch.int64)
        if parts:
            history = History.joined([part.history for part in parts])
            read_K = torch.tensor([len(part.time_E) for part in parts])
        return read_on(query, self.lum, history, whole, read_K, asked)

    def _keep(self, user_keys: Sequence[str], events: Sequence[EventRows], grown: History) -> None:
        """Keeps the histories of these users; drops those of users who were not asked about for the longest time."""
        for place, (key, rows) in enumerate(zip(user_keys, events, strict=True)):
            if (before := self._read.pop(key, None)) is not None:
                self.cached_bytes -= before.history.num_bytes
            read = _Read(grown.select(torch.tensor([place])), rows.time, rows.item, rows.id)
            self._read[key], self.cached_bytes = read, self.cached_bytes + read.history.num_bytes
        while self.cached_bytes > self._cache_bytes:
            self.cached_bytes -= self._read.popitem(last=False)[1].history.num_bytes


def log_of(histories: Sequence[UserHistory], data: PreparedData, item_columns: Mapping[str, Column]) -> PreparedData:
    """The kept events of these users as a log with the features of `data`; users are numbered in order.

    item_columns: of a Catalogue, which has a row for unknown items too.
    """
    view = copy.copy(data)
    rows = histories[0].events
    for history in histories[1:]:
        rows = rows.followed_by(history.events)
    lengths = np.array([len(history.events) for history in histories])
    view.user_offsets = np.concatenate([[0], np.cumsum(lengths)])
    view.user, view.item, view.label = np.repeat(np.arange(len(lengths)), lengths), rows.item, rows.label
    view.timestamp = rows.time // SECOND if histories[0].layout.has_clock else rows.time
    view.num_events, view.num_users = len(rows), len(histories)
    view.event_columns, view.item_columns = dict(rows.features), dict(item_columns)
    return view
