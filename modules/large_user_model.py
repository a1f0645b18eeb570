"""The Large User Model: token encoder, causal user encoder, similarity (LUM section 4.1, figure 3a).

Shape suffixes: T events, B users, Q query conditions, C candidate items, D model width.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lumrec.modules.layout import Extension, JaggedLayout, extension, make_layout, portions
from lumrec.modules.relative_bias import TokenTimes
from lumrec.modules.tokens import Bags, TokenEncoder, kjt_from_lists
from lumrec.modules.user_encoder import KeyValueCache, UserEncoder

SIMILARITIES = ("cosine", "dot")
# Tokens that an event becomes, by the way of tokenisation.
TOKENS_PER_EVENT = {"interleaved": 2, "merged": 1}
# What queries may take at once (numbers: scores, and about 16 widths of activations each): more are asked in portions.
# On a CPU small portions are faster too: 2**23 takes 0.8 of the time of 2**26, 4 queries at each of 2,000 events.
QUERY_BUDGET = {"cpu": 1 << 23, "cuda": 1 << 26}
# No time at all: what was seen before the first event.
NEVER = torch.iinfo(torch.int64).min


@dataclass
class Pack:
    """Histories of B users behind each other (T events), with Q queries and C candidate items: one step's input.

    tokens: one KJT of all features with T + Q + C bags (see TokenEncoder).
    layout: where the tokens of each user lie, and which of them each query sees; one or two tokens an event.
    query_prefix_Q: int64, tokens that each query sees: one or two times the number of events before it.
    previous_T, previous_Q: int64, event before each event and query within its own history; -1 where there is none.
    time_T, time_Q: int64, seconds, when each event happened and when each query is asked.
    candidate_item_C: int64, catalogue item that each candidate is.
    positive_T: int64, candidate that each event's item is; -1 where it is not to be predicted. Empty in a pure query.
    log_weight_C: float32, log of the weight with which each candidate counts as a negative (see info_nce).
    log_positive_weight_T: float32, the same for each event's item where it is the right one; empty where it is 0.
    contrast_event_Q: int64, event whose item each query is told apart by (counterfactual contrast); empty otherwise.
    event_row_T: int64, row of each event in the prepared data.
    """

    tokens: KeyedJaggedTensor
    layout: JaggedLayout
    num_events: int
    num_queries: int
    num_candidates: int
    query_prefix_Q: Tensor
    previous_T: Tensor
    previous_Q: Tensor
    time_T: Tensor
    time_Q: Tensor
    candidate_item_C: Tensor
    positive_T: Tensor
    log_weight_C: Tensor
    log_positive_weight_T: Tensor
    contrast_event_Q: Tensor
    event_row_T: Tensor

    @classmethod
    def from_lists(
        cls,
        users: Sequence[Sequence[Bags]],
        model: "LargeUserModel",
        *,
        queries: Sequence[Sequence[Bags]] = (),
        candidates: Sequence[Bags] = (),
        positives: Sequence[Sequence[int]] | None = None,
        times: Sequence[Sequence[int]] | None = None,
    ) -> "Pack":
        """A pack of plain lists for `model`, on the CPU: to try the model, or to feed it from a pipeline of your own.

        An event, a query and a candidate are each a dict: feature -> row of its table, or the rows of a multi-valued
        feature; a feature that is left out is empty.

        users: the events of each user, oldest first, with item, feedback and condition features.
        queries: for each user the conditions to ask behind the last event; () asks nothing.
        candidates: items, with item features; candidate_item_C is their index here.
        positives: for each event the index of its candidate, -1 = not to be predicted; None where nothing is trained.
        times: seconds of each event; needed where the user encoder has a bias of time. A query is asked at the time of
            the last event.

        Raises ValueError for features that the model does not have, negative rows, and lists of different lengths.

        Two users with two and one events; the first is asked twice, the second once::

            events       c1 i1 c2 i2        c3 i3
            queries                  c c          c

        >>> from lumrec.modules.tokens import make_tables
        >>> tables = make_tables({"item": (9, 4), "wish": (3, 4)}, {"item": "item", "wish": "wish"})
        >>> encoder = TokenEncoder(tables, item_features=["item"], condition_features=["wish"], dim=8)
        >>> user_encoder = UserEncoder(encoder="gpt", dim=8, num_layers=1, num_heads=2, max_tokens=6)
        >>> lum = LargeUserModel(encoder, user_encoder, dim=8)
        >>> like, dislike = {"wish": 1}, {"wish": 2}
        >>> users = [[{"item": 3, **like}, {"item": 7, **dislike}], [{"item": 3, **like}]]
        >>> pack = Pack.from_lists(users, lum, queries=[[like, dislike], [like]], candidates=[{"item": 3}, {"item": 7}])
        >>> [tuple(x.shape) for x in lum(pack)]  # outputs at the conditions, answers, candidates
        [(3, 8), (3, 8), (2, 8)]
        """
        asked = list(queries) or [()] * len(users)
        per_event = {
            name: values for name, values in (("positives", positives), ("times", times)) if values is not None
        }
        if len(asked) != len(users) or any(len(values) != len(users) for values in per_event.values()):
            sizes = ", ".join(f"{name} {len(values)}" for name, values in [("queries", asked), *per_event.items()])
            raise ValueError(f"there are {len(users)} users; expected as many lists of each kind, got {sizes}")
        for name, values in per_event.items():
            for user, (events, of_events) in enumerate(zip(users, values, strict=True)):
                if len(of_events) != len(events):
                    raise ValueError(f"user {user} has {len(events)} events and {len(of_events)} {name}")
        if times is None and model.user_encoder.time_bias:
            raise ValueError("the user encoder has a bias of time (time_bias): give `times`, seconds of each event")
        num_B, queries_B = (torch.tensor([len(x) for x in lists], dtype=torch.int64) for lists in (users, asked))
        bags = [bag for part in (*users, *asked, candidates) for bag in part]
        factor, end_B = TOKENS_PER_EVENT[model.tokens], num_B.cumsum(0)
        user_Q, end_Q = torch.repeat_interleave(queries_B), end_B.repeat_interleave(queries_B)
        num_events, length_Q = int(num_B.sum()), num_B.repeat_interleave(queries_B)
        place_T, is_first_T = torch.arange(num_events), torch.zeros(num_events, dtype=torch.bool)
        is_first_T[(end_B - num_B)[num_B > 0]] = True
        time_T = torch.tensor([t for of_user in times or () for t in of_user] or [0] * num_events, dtype=torch.int64)
        positive_T = [index for of_user in positives or () for index in of_user]
        if any(not -1 <= index < len(candidates) for index in positive_T):
            raise ValueError(f"positives name candidates from 0 to {len(candidates) - 1}, or -1; got {positive_T}")
        return cls(
            tokens=kjt_from_lists(model.token_encoder.features, bags),
            layout=make_layout(factor * num_B, query_sequence_Q=user_Q, query_prefix_Q=factor * length_Q),
            num_events=num_events,
            num_queries=len(user_Q),
            num_candidates=len(candidates),
            query_prefix_Q=factor * length_Q,
            previous_T=torch.where(is_first_T, -1, place_T - 1),
            previous_Q=torch.where(length_Q == 0, -1, end_Q - 1),
            time_T=time_T,
            time_Q=torch.where(length_Q == 0, 0, F.pad(time_T, (1, 0))[end_Q]),
            candidate_item_C=torch.arange(len(candidates)),
            positive_T=torch.tensor(positive_T, dtype=torch.int64),
            log_weight_C=torch.zeros(len(candidates)),
            log_positive_weight_T=torch.zeros(0),
            contrast_event_Q=torch.zeros(0, dtype=torch.int64),
            event_row_T=place_T,
        )

    def to(self, device: torch.device | str) -> "Pack":
        """The same pack on `device`."""
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if not isinstance(value := getattr(self, field.name), int)
        }
        return dataclasses.replace(self, **moved)


class LumOutput(NamedTuple):
    """o_TD: outputs at the condition tokens (empty where `queries_only`). o_QD: answers. e_CD: candidate items.

    Similarity is the dot product of an o and an e, whatever its kind: the model has normalised and scaled them.
    """

    o_TD: Tensor
    o_QD: Tensor
    e_CD: Tensor


@dataclass
class History:
    """What a LUM keeps of B users' histories, to be asked later or read on.

    layers: keys and values [T, H, K] of all tokens, layer by layer. lengths_B: int64, on the CPU, tokens of each user.
    asked_T, seen_T: int64, seconds, the times of each token (see TokenTimes).
    item_BD, time_B: the last event's item and time, which a merged token after it tells of; a user without an event has
    the learned start and no time that counts.
    """

    layers: KeyValueCache
    lengths_B: Tensor
    asked_T: Tensor
    seen_T: Tensor
    item_BD: Tensor
    time_B: Tensor

    def select(self, index_B: Tensor) -> "History":
        """The histories of the users `index_B` (int64, on the CPU), in that order."""
        starts_B = self.lengths_B.cumsum(0) - self.lengths_B
        lengths_B = self.lengths_B[index_B]
        place_T = torch.arange(int(lengths_B.sum()))
        place_T += torch.repeat_interleave(starts_B[index_B] - lengths_B.cumsum(0) + lengths_B, lengths_B)
        place_T, index_B = place_T.to(self.asked_T.device), index_B.to(self.asked_T.device)
        layers = [(k_THK[place_T], v_THK[place_T]) for k_THK, v_THK in self.layers]
        ends = self.item_BD[index_B], self.time_B[index_B]
        return History(layers, lengths_B, self.asked_T[place_T], self.seen_T[place_T], *ends)


class LargeUserModel(nn.Module):
    """Token encoder and user encoder; tells how well an item fits a user under a condition.

    similarity: "cosine" (sim = cos / temperature) or "dot". Both sides come out scaled, so that a store of answers and
    items needs a dot product and nothing else.

    tokens: how an event becomes tokens; a query is one more condition at the end::

        interleaved   c1 i1 c2 i2 c3 i3 | c      the paper's: outputs are read at the condition tokens
        merged        c1 i1 i2 | i3              OUR OPTION: the condition is added to the item before it (to a learned
                         c2 c3 | c               start for the first), half the tokens. Without any condition feature
                                                 this is plain next-item prediction, as in SASRec and HSTU.
    """

    def __init__(
        self,
        token_encoder: TokenEncoder,
        user_encoder: UserEncoder,
        *,
        dim: int,
        similarity: str = "cosine",
        temperature: float = 0.05,
        tokens: str = "interleaved",
    ) -> None:
        super().__init__()
        if tokens not in TOKENS_PER_EVENT:
            raise ValueError(f"tokens is {tokens!r}; expected one of {sorted(TOKENS_PER_EVENT)}")
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity is {similarity!r}; expected one of {SIMILARITIES}")
        if not temperature > 0:
            raise ValueError(f"the temperature is {temperature}; expected a positive number")
        self.token_encoder = token_encoder
        self.user_encoder = user_encoder
        self.output = nn.Linear(dim, dim)
        self.similarity = similarity
        self.temperature = temperature
        self.tokens = tokens
        self.start_D = nn.Parameter(0.02 * torch.randn(dim)) if tokens == "merged" else None

    def forward(self, pack: Pack, *, queries_only: bool = False) -> LumOutput:
        """Outputs at condition tokens, answers to the pack's queries, and candidate item embeddings.

        A group query is a pack with queries: the history is computed once, each query attends to the part of it that it
        may see and to itself (LUM figure 4). `queries_only` spares what only training reads, and bounds the memory:
        more queries than QUERY_BUDGET allows are asked of the history's keys and values in portions.
        """
        num_events = pack.num_events
        item_XD, condition_XD = self.token_encoder(pack.tokens, num_events=num_events, num_queries=pack.num_queries)
        x_TD, y_QD = self._tokenise(pack, item_XD[:num_events], condition_XD)
        if queries_only and self._cost_at_once(pack.layout) > QUERY_BUDGET[x_TD.device.type]:
            _, y_QD = self._read_on(pack, x_TD, y_QD, item_XD[:num_events], None)
            x_TD = x_TD[:0]
        else:
            x_TD, y_QD = self.user_encoder(
                x_TD,
                y_QD,
                pack.layout,
                query_prefix_Q=pack.query_prefix_Q,
                times=self._times(pack),
                queries_only=queries_only,
            )
        o_TD = x_TD[:: TOKENS_PER_EVENT[self.tokens]]
        return LumOutput(
            self._scaled(self.output(o_TD)), self._scaled(self.output(y_QD)), self._scaled(item_XD[num_events:])
        )

    def read(self, pack: Pack, history: History | None = None) -> tuple[History, Tensor]:
        """The histories with the pack's events behind them (None: nothing before), and answers to its queries, o_QD.

        The pack has one window for each user of `history`, in its order, with the events that came since, or none; a
        query's moment counts these new events. Equal to reading the whole history at once, in a time that grows with
        the new events alone. Memory is bounded as in `forward`.
        Raises ValueError where a history grows beyond the user encoder's max_tokens: read its last events anew; and for
        another number of windows.
        """
        item_XD, condition_XD = self.token_encoder(
            pack.tokens, num_events=pack.num_events, num_queries=pack.num_queries
        )
        item_TD = item_XD[: pack.num_events]
        x_TD, y_QD = self._tokenise(pack, item_TD, condition_XD, history)
        history, y_QD = self._read_on(pack, x_TD, y_QD, item_TD, history)
        return history, self._scaled(self.output(y_QD))

    def _read_on(
        self, pack: Pack, x_TD: Tensor, y_QD: Tensor, item_TD: Tensor, history: History | None
    ) -> tuple[History, Tensor]:
        """`read` from tokens to what the user encoder gives for the queries."""
        device, new_B = x_TD.device, pack.layout.offsets_B1.diff().cpu()
        if history is not None and len(new_B) != len(history.lengths_B):
            raise ValueError(
                f"the pack has {len(new_B)} windows for {len(history.lengths_B)} histories; expected one for each, "
                "empty where nothing is new"
            )
        times = self._times(pack, history)
        no_Q = times.asked_Q[:0]
        if history is None:
            of_tokens = TokenTimes(times.asked_T, times.seen_T, no_Q, no_Q)
            layers = self.user_encoder.keys_and_values(x_TD, make_layout(new_B).to(device), times=of_tokens)
            lengths_B, asked_T, seen_T = new_B, times.asked_T, times.seen_T
        else:
            grown: Extension = extension(history.lengths_B, new_B).to(device)
            asked_T = torch.cat([history.asked_T, times.asked_T])[grown.order_T]
            seen_T = torch.cat([history.seen_T, times.seen_T])[grown.order_T]
            of_tokens = TokenTimes(asked_T, seen_T, times.asked_T, times.seen_T)
            layers = self.user_encoder.extend(history.layers, x_TD, grown, times=of_tokens)
            lengths_B = history.lengths_B + new_B
        # Of the pack's items and what was before them, the last of each user.
        last_B = (new_B.cumsum(0) // TOKENS_PER_EVENT[self.tokens] - 1).to(device)
        before_B = pack.num_events + torch.arange(len(new_B), device=device)
        place_B = torch.where(new_B.to(device) > 0, last_B, before_B)
        ends = self._items(pack, item_TD, history)[place_B], self._item_times(pack, history)[place_B]
        read = History(layers, lengths_B, asked_T, seen_T, *ends)
        return read, self._ask(read, pack, y_QD, times, seen_before_B=lengths_B - new_B)

    def _ask(self, history: History, pack: Pack, y_QD: Tensor, times: TokenTimes, *, seen_before_B: Tensor) -> Tensor:
        """The user encoder's outputs for the pack's queries, in portions that QUERY_BUDGET allows."""
        lengths_B, queries_B = history.lengths_B, pack.layout.query_offsets_B1.diff().cpu()
        prefix_Q = pack.query_prefix_Q.cpu() + seen_before_B.repeat_interleave(queries_B)
        cost_Q = self._cost(lengths_B).repeat_interleave(queries_B)
        parts = [y_QD[:0]]
        budget = QUERY_BUDGET[y_QD.device.type]
        for queries, tokens, layout in portions(lengths_B, queries_B, prefix_Q, cost_Q=cost_Q, budget=budget):
            parts.append(
                self.user_encoder.ask(
                    [(k_THK[tokens], v_THK[tokens]) for k_THK, v_THK in history.layers],
                    y_QD[queries],
                    layout.to(y_QD.device),
                    query_prefix_Q=prefix_Q[queries].to(y_QD.device),
                    times=TokenTimes(
                        history.asked_T[tokens], history.seen_T[tokens], times.asked_Q[queries], times.seen_Q[queries]
                    ),
                )
            )
        return torch.cat(parts)

    def _cost(self, num_tokens: Any) -> Any:
        """Numbers held for one query of a history of so many tokens (an int or a tensor): scores and activations."""
        return self.user_encoder.num_heads * num_tokens + 16 * self.output.in_features

    def _cost_at_once(self, layout: JaggedLayout) -> int:
        buckets = layout.buckets
        return sum(b.num_sequences * b.max_queries * self._cost(b.max_tokens) for b in buckets)

    def _tokenise(
        self, pack: Pack, item_TD: Tensor, condition_XD: Tensor, history: History | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the histories, and one of each query."""
        condition_TD, condition_QD = condition_XD[: pack.num_events], condition_XD[pack.num_events :]
        if self.start_D is None:
            return torch.stack([condition_TD, item_TD], dim=1).flatten(0, 1), condition_QD
        before_T, before_Q = _before(pack)
        known = self._items(pack, item_TD, history)
        return F.embedding(before_T, known) + condition_TD, F.embedding(before_Q, known) + condition_QD

    def _items(self, pack: Pack, item_TD: Tensor, history: History | None) -> Tensor:
        """The pack's items and, behind them, what was last before each user's events [T + B, D]."""
        if history is not None:
            return torch.cat([item_TD, history.item_BD])
        start_D = item_TD.new_zeros(item_TD.shape[1]) if self.start_D is None else self.start_D.to(item_TD.dtype)
        return torch.cat([item_TD, start_D.expand(len(pack.layout.offsets_B1) - 1, -1)])

    def _item_times(self, pack: Pack, history: History | None) -> Tensor:
        """When each of these items was seen (int64 [T + B]); NEVER for the start."""
        if history is not None:
            return torch.cat([pack.time_T, history.time_B])
        return F.pad(pack.time_T, (0, len(pack.layout.offsets_B1) - 1), value=NEVER)

    def _times(self, pack: Pack, history: History | None = None) -> TokenTimes:
        if self.start_D is None:
            time_T = pack.time_T.repeat_interleave(2)
            return TokenTimes(time_T, time_T, pack.time_Q, pack.time_Q)
        # A merged token is asked at its own moment, and tells of an item seen at the moment before.
        known = self._item_times(pack, history)
        seen_T, seen_Q = (
            torch.where(known[before] == NEVER, time, known[before])
            for before, time in zip(_before(pack), (pack.time_T, pack.time_Q), strict=True)
        )
        return TokenTimes(pack.time_T, seen_T, pack.time_Q, seen_Q)

    def _scaled(self, x: Tensor) -> Tensor:
        if self.similarity == "dot":
            return x
        return F.normalize(x, dim=-1) * self.temperature**-0.5


def _before(pack: Pack) -> tuple[Tensor, Tensor]:
    """For each event and query of merged tokens, the row of `_items` that it begins with."""
    sequence_B = torch.arange(len(pack.layout.offsets_B1) - 1, device=pack.previous_T.device)
    return tuple(  # type: ignore[return-value]
        torch.where(
            previous < 0,
            pack.num_events + sequence_B.repeat_interleave(offsets_B1.diff(), output_size=len(previous)),
            previous,
        )
        for previous, offsets_B1 in (
            (pack.previous_T, pack.layout.offsets_B1),
            (pack.previous_Q, pack.layout.query_offsets_B1),
        )
    )
