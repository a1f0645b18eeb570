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

from lumrec.modules.layout import Extension, JaggedLayout, extension, make_layout, moved, portions
from lumrec.modules.relative_bias import TokenTimes
from lumrec.modules.tokens import Bags, TokenEncoder, kjt_from_lists
from lumrec.modules.user_encoder import KeyValueCache, UserEncoder

SIMILARITIES = ("cosine", "dot")
# Tokens of one event, for each way of tokenisation.
TOKENS_PER_EVENT = {"interleaved": 2, "merged": 1}
# How many numbers (scores, and about 16 widths of activations for each query) queries may hold at once; more queries
# are answered in portions. Small portions are also faster on a CPU: with 4 queries at each of 2,000 events, 2**23 takes
# 0.8 of the time of 2**26.
QUERY_BUDGET = {"cpu": 1 << 23, "cuda": 1 << 26}
# The time of the learned start, used where nothing was seen before the first event.
NEVER = torch.iinfo(torch.int64).min


def check_similarity(similarity: str, temperature: float) -> None:
    """Raises ValueError for an unknown similarity, and for a temperature that is not positive."""
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity is {similarity!r}; expected one of {SIMILARITIES}")
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}; expected a positive number")


def scaled(x: Tensor, similarity: str, temperature: float) -> Tensor:
    """Outputs [..., D], scaled so that the dot product of two of them is their similarity."""
    return x if similarity == "dot" else F.normalize(x, dim=-1) * temperature**-0.5


@dataclass
class Pack:
    """The input of one step: concatenated histories of B users (T events), Q queries and C candidate items.

    tokens: one KJT of all features with T + Q + C bags (see TokenEncoder).
    layout: the tokens of each user, one or two per event, and which of them each query sees.
    query_prefix_Q: int64, how many tokens each query sees: one or two for each event before it.
    previous_T, previous_Q: int64, the event before each event and query in the same history; -1 if there is none.
    time_T, time_Q: int64, seconds, when each event happened and when each query is asked.
    candidate_item_C: int64, the catalogue index of each candidate.
    positive_T: int64, the index of the candidate that is each event's item, or -1 if the event is not predicted. Empty
        if nothing is predicted.
    log_weight_C: float32, log of the weight of each candidate as a negative (see info_nce).
    log_positive_weight_T: float32, log of the weight of each event's item as the positive; empty: 0 for all.
    contrast_event_Q: int64, the event whose item each query is compared with in the counterfactual contrast; or empty.
    event_row_T: int64, the row of each event in the prepared data.
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
        """A pack for `model` from plain lists, on the CPU: to try the model, or to use it with your data pipeline.

        An event, a query and a candidate are dicts: feature -> a row of its table, or a list of rows for a multi-valued
        feature. A feature that is left out is empty.

        users: the events of each user, oldest first, with item, feedback and condition features.
        queries: the conditions to ask of each user after the last event, at the time of that event; () asks none.
        candidates: items, with item features; candidate_item_C is their index in this list.
        positives: the index in `candidates` of each event's item, -1 = not predicted. None: nothing is trained.
        times: seconds of each event; required if the user encoder has a bias of time.

        Raises ValueError for features that the model does not have, negative rows, lists of different lengths, and
        users with more events than the model has positions for.

        Two users with two and one events. The first user gets two queries, the second gets one::

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
        per_token, max_tokens = TOKENS_PER_EVENT[model.tokens], model.user_encoder.max_tokens
        for user, (events, conditions) in enumerate(zip(users, asked, strict=True)):
            if (longest := (max_tokens - bool(conditions)) // per_token) < len(events):
                raise ValueError(
                    f"user {user} has {len(events)} events; this model takes at most {longest}"
                    f"{' with queries' if conditions else ''} (max_tokens {max_tokens}): give the latest"
                )
        positive_T = [index for of_user in positives or () for index in of_user]
        if any(not -1 <= index < len(candidates) for index in positive_T):
            raise ValueError(f"positives name candidates from 0 to {len(candidates) - 1}, or -1; got {positive_T}")
        num_B, queries_B = (torch.tensor([len(x) for x in lists], dtype=torch.int64) for lists in (users, asked))
        moment_Q, end_Q = (x_B.repeat_interleave(queries_B) for x_B in (num_B, num_B.cumsum(0)))
        num_events = int(num_B.sum())
        time_T = torch.tensor([t for of_user in times or () for t in of_user] or [0] * num_events, dtype=torch.int64)
        bags = [bag for part in (*users, *asked, candidates) for bag in part]
        pack = cls.of(
            kjt_from_lists(model.token_encoder.features, bags),
            num_B,
            tokens_per_event=per_token,
            user_Q=torch.repeat_interleave(queries_B),
            moment_Q=moment_Q,
            time_T=time_T,
            time_Q=torch.where(moment_Q == 0, 0, F.pad(time_T, (1, 0))[end_Q]),
            candidate_item_C=torch.arange(len(candidates)),
            event_row_T=torch.arange(num_events),
        )
        return dataclasses.replace(pack, positive_T=torch.tensor(positive_T, dtype=torch.int64))

    @classmethod
    def of(
        cls,
        tokens: KeyedJaggedTensor,
        lengths_B: Tensor,
        *,
        tokens_per_event: int,
        user_Q: Tensor,
        moment_Q: Tensor,
        time_T: Tensor,
        time_Q: Tensor,
        candidate_item_C: Tensor,
        event_row_T: Tensor,
    ) -> "Pack":
        """The pack of these tensors, on the CPU, with nothing to be predicted and candidates of weight 1.

        lengths_B: int64, events of each user. user_Q: int64, ascending, the user of each query. moment_Q: int64, how
        many of the user's events the query sees.
        """
        num_events, first_B = len(time_T), lengths_B.cumsum(0) - lengths_B
        is_first_T = torch.zeros(num_events, dtype=torch.bool)
        is_first_T[first_B[lengths_B > 0]] = True
        prefix_Q, none = tokens_per_event * moment_Q, torch.zeros(0, dtype=torch.int64)
        return cls(
            tokens=tokens,
            layout=make_layout(tokens_per_event * lengths_B, query_sequence_Q=user_Q, query_prefix_Q=prefix_Q),
            num_events=num_events,
            num_queries=len(user_Q),
            num_candidates=len(candidate_item_C),
            query_prefix_Q=prefix_Q,
            previous_T=torch.where(is_first_T, -1, torch.arange(num_events) - 1),
            previous_Q=torch.where(moment_Q == 0, -1, first_B[user_Q] + moment_Q - 1),
            time_T=time_T,
            time_Q=time_Q,
            candidate_item_C=candidate_item_C,
            positive_T=none,
            log_weight_C=torch.zeros(len(candidate_item_C)),
            log_positive_weight_T=torch.zeros(0),
            contrast_event_Q=none,
            event_row_T=event_row_T,
        )

    def to(self, device: torch.device | str) -> "Pack":
        """The same pack on `device`."""
        return moved(self, device)


class LumOutput(NamedTuple):
    """o_TD: outputs at the condition tokens (empty with `queries_only`). o_QD: answers. e_CD: candidate items.

    The dot product of an o and an e is their similarity, for either kind: the model has normalised and scaled them.
    """

    o_TD: Tensor
    o_QD: Tensor
    e_CD: Tensor


@dataclass
class History:
    """The state of B users' histories, from which a LUM answers later queries and reads later events.

    layers: keys and values [T, H, K] of all tokens in each layer. lengths_B: int64, on the CPU, tokens of each user.
    asked_T, seen_T: int64, seconds, the times of each token (see TokenTimes).
    item_BD, time_B: the item and time of each user's last event, which the next merged token contains. For a user
        without events they are the learned start and NEVER.
    """

    layers: KeyValueCache
    lengths_B: Tensor
    asked_T: Tensor
    seen_T: Tensor
    item_BD: Tensor
    time_B: Tensor

    @classmethod
    def joined(cls, parts: Sequence["History"]) -> "History":
        """The histories of all parts, one or more, in this order."""
        layers = [
            (torch.cat([k_THK for k_THK, _ in layer]), torch.cat([v_THK for _, v_THK in layer]))
            for layer in zip(*(part.layers for part in parts), strict=True)
        ]
        names = ("lengths_B", "asked_T", "seen_T", "item_BD", "time_B")
        return cls(layers, *(torch.cat([getattr(part, name) for part in parts]) for name in names))

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer)

    def select(self, index_B: Tensor) -> "History":
        """The histories of the users index_B (int64, on the CPU), in this order."""
        starts_B = self.lengths_B.cumsum(0) - self.lengths_B
        lengths_B = self.lengths_B[index_B]
        place_T = torch.arange(int(lengths_B.sum()))
        place_T += torch.repeat_interleave(starts_B[index_B] - lengths_B.cumsum(0) + lengths_B, lengths_B)
        place_T, index_B = place_T.to(self.asked_T.device), index_B.to(self.asked_T.device)
        layers = [(k_THK[place_T], v_THK[place_T]) for k_THK, v_THK in self.layers]
        ends = self.item_BD[index_B], self.time_B[index_B]
        return History(layers, lengths_B, self.asked_T[place_T], self.seen_T[place_T], *ends)


class LargeUserModel(nn.Module):
    """The Large User Model: how well an item fits a user under a condition, as the dot product of two vectors.

    similarity: "cosine" (the cosine divided by `temperature`) or "dot". The outputs are scaled, so that a store of
    answers and items needs only dot products.

    tokens: how events become tokens; a query is one more condition at the end::

        interleaved   c1 i1 c2 i2 c3 i3 | c      as in the paper; outputs are read at the condition tokens
        merged        c1 i1 i2 | i3              OUR OPTION, with half the tokens: each condition is added to the item
                         c2 c3 | c               before it, the first one to a learned start. Without condition
                                                 features this is next-item prediction, as in SASRec and HSTU.

    Raises ValueError for an unknown similarity or way of tokens, and a temperature that is not positive.
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
        check_similarity(similarity, temperature)
        self.token_encoder = token_encoder
        self.user_encoder = user_encoder
        self.output = nn.Linear(dim, dim)
        self.similarity = similarity
        self.temperature = temperature
        self.tokens = tokens
        self.start_D = nn.Parameter(0.02 * torch.randn(dim)) if tokens == "merged" else None

    def forward(self, pack: Pack, *, queries_only: bool = False) -> LumOutput:
        """Outputs at the condition tokens, answers to the pack's queries, and embeddings of the candidate items.

        A group query is a pack with queries: the history is computed once, and each query attends to the part of it
        that it sees and to itself (LUM figure 4). `queries_only` leaves out what only training reads, and bounds the
        memory: with more queries than QUERY_BUDGET allows, the answers are computed in portions.
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
        """The histories after the pack's events (history None: only these), and the answers to its queries, o_QD.

        The pack has one window for each user of `history`, in the same order, with the user's new events, or none; its
        queries see a number of these. The result equals that of reading the whole history at once, but the time depends
        only on the number of new events. Memory is bounded as in `forward`.
        Raises ValueError for another number of windows, and if a history grows beyond the user encoder's max_tokens:
        its last events then have to be read again, without `history`.
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
                "empty for a user without new events"
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
        # The last item of each user: of the pack's, or the one before them.
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
        """How many numbers one query of a history of num_tokens (int or tensor) holds: scores and activations."""
        return self.user_encoder.num_heads * num_tokens + 16 * self.output.in_features

    def _cost_at_once(self, layout: JaggedLayout) -> int:
        buckets = layout.buckets
        return sum(b.num_sequences * b.max_queries * self._cost(b.max_tokens) for b in buckets)

    def _tokenise(
        self, pack: Pack, item_TD: Tensor, condition_XD: Tensor, history: History | None = None
    ) -> tuple[Tensor, Tensor]:
        """The tokens of the histories, and one token for each query."""
        condition_TD, condition_QD = condition_XD[: pack.num_events], condition_XD[pack.num_events :]
        if self.start_D is None:
            return torch.stack([condition_TD, item_TD], dim=1).flatten(0, 1), condition_QD
        before_T, before_Q = _before(pack)
        known = self._items(pack, item_TD, history)
        return F.embedding(before_T, known) + condition_TD, F.embedding(before_Q, known) + condition_QD

    def _items(self, pack: Pack, item_TD: Tensor, history: History | None) -> Tensor:
        """The pack's items, then for each user the last item before the pack (or the learned start) [T + B, D]."""
        if history is not None:
            return torch.cat([item_TD, history.item_BD])
        start_D = item_TD.new_zeros(item_TD.shape[1]) if self.start_D is None else self.start_D.to(item_TD.dtype)
        return torch.cat([item_TD, start_D.expand(len(pack.layout.offsets_B1) - 1, -1)])

    def _item_times(self, pack: Pack, history: History | None) -> Tensor:
        """The time of each of `_items` (int64 [T + B]); NEVER for the start."""
        if history is not None:
            return torch.cat([pack.time_T, history.time_B])
        return F.pad(pack.time_T, (0, len(pack.layout.offsets_B1) - 1), value=NEVER)

    def _times(self, pack: Pack, history: History | None = None) -> TokenTimes:
        if self.start_D is None:
            time_T = pack.time_T.repeat_interleave(2)
            return TokenTimes(time_T, time_T, pack.time_Q, pack.time_Q)
        # A merged token is asked at the time of its event, and contains the item seen at the event before.
        known = self._item_times(pack, history)
        seen_T, seen_Q = (
            torch.where(known[before] == NEVER, time, known[before])
            for before, time in zip(_before(pack), (pack.time_T, pack.time_Q), strict=True)
        )
        return TokenTimes(pack.time_T, seen_T, pack.time_Q, seen_Q)

    def _scaled(self, x: Tensor) -> Tensor:
        return scaled(x, self.similarity, self.temperature)


def _before(pack: Pack) -> tuple[Tensor, Tensor]:
    """For each event and query of merged tokens, the row of `_items` that it contains."""
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
