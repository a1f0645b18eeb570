"""Scores by raw keys: a bundle, the states of its users and a LUM's knowledge, behind one call.

    scorer = lumrec.Scorer.open("runs/shop-rank-bundle", store="runs/shop-query", state="runs/shop-rank-state")
    scorer.score(user="42", items=["shoes-1", "shoes-9"], context={"page": "home"})    # float32 [2]

Unknown users, items and context values are scored as what was not seen in training. Without a store, or of a user whom
it does not know, the ranker reads absent knowledge, as it did for such rows in training.

Shape suffixes: Q requests, B candidates of all requests, N conditions, D width of the LUM, I items, K LUMs (folds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
import torch

from lumrec.features.history import UserHistory
from lumrec.knowledge.store import KnowledgeStore, UserKnowledge
from lumrec.modules.knowledge import KnowledgeBatch
from lumrec.run.errors import UserError
from lumrec.serving.bundle import Bundle, open_bundle
from lumrec.serving.golden import check_golden
from lumrec.serving.requests import RequestBatch, ScoreRequest
from lumrec.serving.state import UserState

SHORT = 63  # histories up to this length are scored together


@dataclass(frozen=True)
class Scored:
    """What came of one request. scores: float32 [C], the probability of each candidate, in order.

    unknown_user: no state of the user is held. unknown_items: candidates that the bundle does not know. unknown_values:
    number of unknown context values. cut: the request is for a time that the state no longer holds. knowledge_present:
    the LUM had an answer for the user. knowledge_age_s: seconds since it was asked, NaN where absent. state_error,
    store_error: why it could not be read, "" where it could. batch, rows: what the ranker read, and which rows of it.
    """

    scores: np.ndarray
    unknown_user: bool
    unknown_items: list[str]
    unknown_values: int
    cut: bool
    knowledge_present: bool
    knowledge_age_s: float
    state_error: str
    store_error: str
    batch: RequestBatch
    rows: slice


class _State:
    """Reads the states of users; where it cannot, it knows nobody, and `error` says why."""

    def __init__(self, state: UserState | None) -> None:
        self.state, self.error = state, ""

    def get(self, user_keys: Sequence[str]) -> list[UserHistory | None]:
        """As UserState.get."""
        try:
            return self.state.get(user_keys) if self.state else [None] * len(user_keys)
        except (OSError, UserError, lmdb.Error) as error:
            self.state, self.error = None, str(error) or type(error).__name__
            return [None] * len(user_keys)

    def item_counts(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As UserState.item_counts."""
        try:
            assert self.state is not None
            return self.state.item_counts(items)
        except (OSError, UserError, lmdb.Error) as error:
            self.error = str(error) or type(error).__name__
            return np.zeros(len(items)), np.zeros(len(items))


class _Store(NamedTuple):
    """A store, and of each item of the bundle (the unknown one is the last) its index there, -1 for none."""

    store: KnowledgeStore
    row_I: np.ndarray


class Scorer:
    """Scores requests with the bundle that `open` opened.

    version: name of the bundle's version. needs_knowledge: whether the ranker reads a LUM's knowledge. store, state:
    what is read, or None; another one can be assigned between two calls.
    """

    def __init__(self, bundle: Bundle, *, store: KnowledgeStore | None = None, state: UserState | None = None) -> None:
        self.bundle, self.state = bundle, state
        self._store: _Store | None = None
        self.store = store

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        store: KnowledgeStore | str | Path | None = None,
        state: UserState | str | Path | None = None,
        sha256: str = "",
        trust_compiled: bool = False,
        verify: bool = True,
    ) -> Scorer:
        """The bundle published in a folder, with the knowledge store and the user states that it reads.

        store: a store, or the run folder of apps/query.py; None = every answer is absent. state: states, or where they
        are (a folder or a Redis URL); None = every user is unknown. sha256, trust_compiled, verify: see `open_bundle`.
        Raises MissingFileError for what is not there, and UserError where a file is not as it was published, the golden
        rows do not come out, or the store or the state belong to another LUM or other data.
        """
        opened = open_bundle(Path(bundle), sha256=sha256, trust_compiled=trust_compiled, verify=verify)
        check_golden(opened)
        scorer = cls(opened)
        if store is not None:
            read = store if isinstance(store, KnowledgeStore) else KnowledgeStore.open(store, verify=verify)
            if problem := scorer.check_store(read):
                raise UserError(problem)
            scorer.store = read
        if state is not None:
            states = state if isinstance(state, UserState) else UserState.open(state, opened.builder)
            if problem := scorer.check_state(states):
                raise UserError(problem)
            scorer.state = states
        return scorer

    @property
    def version(self) -> str:
        """Name of the bundle's version; another one for each export."""
        return self.bundle.version

    @property
    def needs_knowledge(self) -> bool:
        """Whether the ranker reads a LUM's knowledge."""
        return self.bundle.manifest["needs"] is not None

    @property
    def store(self) -> KnowledgeStore | None:
        """The knowledge store that is read, or None."""
        return self._store.store if self._store else None

    @store.setter
    def store(self, store: KnowledgeStore | None) -> None:
        if store is None or not self.needs_knowledge:
            self._store = None
            return
        keys = store.item_keys()
        row_I = np.full(self.bundle.manifest["num_items"] + 1, -1)
        row_I[self.bundle.builder.keys.items(keys)] = np.arange(len(keys))
        row_I[-1] = -1  # items that the bundle does not know were written here
        self._store = _Store(store, row_I)

    def check_store(self, store: KnowledgeStore) -> str:
        """Why the ranker cannot read this store, as a sentence; "" if it can."""
        needs, has = self.bundle.manifest["needs"], store.manifest
        if needs is None:
            return ""
        for name, wanted in needs.items():
            held = identity_of_lums(has["lums"]) if name == "lums" else has[name]
            if held != wanted:
                return (
                    f"the knowledge in {store.path} is not what the ranker in {self.bundle.folder} was trained with: "
                    f"its {name} are {held!r:.200}, expected {wanted!r:.200}"
                )
        return ""

    def check_state(self, state: UserState) -> str:
        """Why the ranker cannot read these states, as a sentence; "" if it can."""
        spec, identity = self.bundle.builder.spec, state.identity
        try:
            wanted = spec.layout(keep=identity["layout"]["keep"]).to_json()
        except UserError as error:  # fewer events than the ranker reads
            return str(error)
        for name, held, expected in (
            ("vocabulary", identity["vocabulary_fingerprint"], self.bundle.manifest["data"]["vocabulary_fingerprint"]),
            ("layout", identity["layout"], wanted),
        ):
            if held != expected:
                return (
                    f"the user states are not of the data that {self.bundle.folder} was trained on: their {name} is "
                    f"{held!r:.200}, expected {expected!r:.200}; build them with lumrec user_state"
                )
        return ""

    def score(
        self, user: str, items: Sequence[str], context: Mapping[str, Any] | None = None, time: float | None = None
    ) -> np.ndarray:
        """The probability of each item for this user, float32 [C]. Raises UserError for what is no request.

        context: raw values by feature. time: seconds since 1970, UTC; None = now.
        """
        return self.score_many([ScoreRequest(user, items, context or {}, time)])[0].scores

    def score_many(
        self,
        requests: Sequence[ScoreRequest],
        *,
        histories: Sequence[UserHistory | None] | None = None,
        answers: UserKnowledge | None = None,
    ) -> list[Scored]:
        """The result of each request; requests with histories of about the same length are scored in one call.

        A store or state that cannot be read counts as one that knows nobody, and each result gives the reason.
        histories, answers: used in place of those of the state and the store, one for each request. Raises UserError
        for a request that cannot be scored.
        """
        if not all(request.items for request in requests):
            raise UserError("a request has no items: there is nothing to score")
        state, store_error = _State(self.state if histories is None else None), ""
        if histories is None:
            histories = state.get([request.user for request in requests])
        if self.needs_knowledge and answers is None:
            answers, store_error = self._answers(requests)
        scored: list[Scored | None] = [None] * len(requests)
        for group in _by_length(histories, self.bundle.builder.spec.max_history):
            made = self.bundle.builder.batch(
                [requests[q] for q in group],
                [histories[q] for q in group],
                state.item_counts if state.state is not None else None,
            )
            of_group = None
            if answers is not None:
                of_group = UserKnowledge(*(None if x is None else x[torch.tensor(group)] for x in answers))  # type: ignore
                made.rank.knowledge = self._knowledge(of_group, made)
            score_B = self.bundle.graph(made.rank).numpy()
            for place, q in enumerate(group):
                scored[q] = self._scored(requests[q], made, score_B, place, of_group, state.error, store_error)
        return [each for each in scored if each is not None]

    def _scored(
        self,
        request: ScoreRequest,
        made: RequestBatch,
        score_B: np.ndarray,
        q: int,
        answers: UserKnowledge | None,
        state_error: str,
        store_error: str,
    ) -> Scored:
        """The result of request `q` of a batch."""
        rows = slice(int(made.offsets_Q1[q]), int(made.offsets_Q1[q + 1]))
        unknown_items = []
        if made.unknown_items_Q[q]:
            is_unknown = made.item_B[rows] == self.bundle.manifest["num_items"]
            unknown_items = [request.items[c] for c in np.flatnonzero(is_unknown).tolist()]
        return Scored(
            scores=score_B[rows],
            unknown_user=bool(made.unknown_user_Q[q]),
            unknown_items=unknown_items,
            unknown_values=int(made.unknown_values_Q[q]),
            cut=bool(made.cut_Q[q]),
            knowledge_present=answers is not None and bool(answers.present_BN[q].any()),
            knowledge_age_s=np.nan if answers is None else float(answers.age_s_B[q]),
            state_error=state_error,
            store_error=store_error,
            batch=made,
            rows=rows,
        )

    def _answers(self, requests: Sequence[ScoreRequest]) -> tuple[UserKnowledge, str]:
        if self._store is not None:
            return self._store.store.get_or_absent([request.user for request in requests])
        needs, num = self.bundle.manifest["needs"], len(requests)
        num_conditions = len(needs["conditions"])
        nothing = UserKnowledge(
            torch.zeros(num, num_conditions, needs["dim"]),
            torch.zeros(num, num_conditions, dtype=torch.bool),
            torch.full((num,), torch.nan, dtype=torch.float64),
            torch.zeros(num, num_conditions) if needs["log_normalizer"] else None,
            torch.zeros(num, dtype=torch.int64),
        )
        return nothing, ""

    def _knowledge(self, answers: UserKnowledge, made: RequestBatch) -> KnowledgeBatch:
        """The answers of each request, with each of its candidates as embedded by the LUM that answered."""
        request_B = torch.from_numpy(np.repeat(np.arange(len(made.offsets_Q1) - 1), np.diff(made.offsets_Q1)))
        o_BND, present_BN = answers.o_BND[request_B], answers.present_BN[request_B]
        fold_B = answers.fold_B[request_B].clamp(min=0)
        log_z_BN = None if answers.log_z_BN is None else answers.log_z_BN[request_B]
        if self._store is None:
            return KnowledgeBatch(o_BND, torch.zeros_like(o_BND[:, 0]), log_z_BN, torch.zeros_like(present_BN), fold_B)
        row_B = self._store.row_I[made.item_B]
        present_BN = present_BN & torch.from_numpy(row_B >= 0)[:, None]
        e_BD = self._store.store.item_embeddings(row_B, fold_B.numpy())
        return KnowledgeBatch(o_BND, e_BD, log_z_BN, present_BN, fold_B)


def _by_length(histories: Sequence[UserHistory | None], most: int) -> list[list[int]]:
    """Indices of the histories, grouped by similar length, because a batch is padded to its longest history.

    most: most events of a history that are read.
    """
    groups: dict[int, list[int]] = {}
    for q, history in enumerate(histories):
        length = 0 if history is None else min(len(history.events), most)
        groups.setdefault(max(length, SHORT).bit_length(), []).append(q)
    return list(groups.values())


def identity_of_lums(lums: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The identity of LUMs, by which a ranker recognises those it was trained with; without the names of their runs."""
    return [{name: value for name, value in lum.items() if name != "run"} for lum in lums]
