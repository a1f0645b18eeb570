"""Test rows of a ranker with knowledge, scored by lumrec.Scorer and over HTTP from a store and the states of users,
against the scores that the run of the ranker kept.

    python tests/helpers/replay.py RANKER STATE ROWS

RANKER: its run folder; its bundle is beside it. STATE: the folder of `lumrec user_state` with all events (a large
user_state.keep). ROWS: how many of the test rows, drawn at random.

A row's knowledge is what the LUM answered before the row, and a store holds one answer for each user. So rows are
scored in rounds, of each user one moment at a time, after a store with the answers of these moments was published.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI

from lumrec.data.prepared import PreparedData
from lumrec.knowledge.manifest import identity_of
from lumrec.knowledge.records import user_key_bytes
from lumrec.knowledge.store import Knowledge, read_item_keys
from lumrec.knowledge.writer import KnowledgeWriter
from lumrec.metrics.compare import read_scores
from lumrec.metrics.ranking import sigmoid
from lumrec.models.ranker import open_ranker_run, plain_ranker
from lumrec.serving.bundle import folder_of
from lumrec.serving.golden import row_requests
from lumrec.serving.opening import open_app
from lumrec.serving.requests import ScoreRequest
from lumrec.serving.scorer import Scorer
from lumrec.serving.settings import Places, ServeConfig

LOCAL = "127.0.0.1"


class Replayed(NamedTuple):
    """Probabilities of N rows, float64: those that the `rank` stage kept, the Scorer's, and those over HTTP.

    present_N: whether the LUM had an answer. rounds: of them.
    """

    offline_N: np.ndarray
    scorer_N: np.ndarray
    http_N: np.ndarray
    present_N: np.ndarray
    rounds: int


def replay(ranker: Path, state: Path, num_rows: int, *, scratch: Path) -> Replayed:
    """Scores up to `num_rows` test rows in rounds. scratch: an empty folder, for the stores."""
    _, rows = plain_ranker(open_ranker_run(ranker))
    data, knowledge, kept = rows.data, rows.knowledge, read_scores(ranker)
    assert isinstance(knowledge, Knowledge)
    event_N = data.rows(kept.row_N).event
    round_N = rounds_of(data, event_N)
    chosen = np.argsort(round_N, kind="stable")[:num_rows]
    offline_N, event_N, round_N = sigmoid(kept.logit_N[chosen]), event_N[chosen], round_N[chosen]
    scorer_N, http_N, present_N = np.empty(len(chosen)), np.empty(len(chosen)), np.empty(len(chosen), bool)
    requests = row_requests(rows, Scorer.open(folder_of(ranker)).bundle.builder, kept.row_N[chosen])
    for number in np.unique(round_N).tolist():
        place = np.flatnonzero(round_N == number)
        asked = [requests[n] for n in place]
        publish_answers(scratch, knowledge, data, event_N[place])
        scored = Scorer.open(folder_of(ranker), store=scratch, state=state).score_many(asked)
        assert not any(each.cut or each.unknown_user or each.store_error or each.state_error for each in scored)
        scorer_N[place] = [each.scores[0] for each in scored]
        present_N[place] = [each.knowledge_present for each in scored]
        http_N[place] = scores_over_http(Places(folder_of(ranker), str(scratch), str(state), None), asked)
    return Replayed(offline_N, scorer_N, http_N, present_N, int(round_N.max()) + 1)


def rounds_of(data: PreparedData, event_N: np.ndarray) -> np.ndarray:
    """A round for each row: rows of one moment have the same one, a user's moments different ones, in random order."""
    moment_M, of_N = np.unique(data.before[event_N], return_inverse=True)
    user_M = data.user[moment_M]
    order = np.lexsort([np.random.default_rng(0).permutation(len(moment_M)), user_M])
    _, first_U, count_U = np.unique(user_M[order], return_index=True, return_counts=True)
    round_M = np.empty(len(moment_M), np.int64)
    round_M[order] = np.arange(len(moment_M)) - np.repeat(first_U, count_U)
    return round_M[of_N]


def publish_answers(path: Path, knowledge: Knowledge, data: PreparedData, event_N: np.ndarray) -> None:
    """Publishes a store in `path` in which each event's user has the answers that the LUM gave before the event."""
    users, first_U = np.unique(data.user[event_N], return_index=True)
    answers, keys = knowledge.for_rows(event_N[first_U]), data.user_keys()
    identity = identity_of(knowledge.manifest) | {"rows": False, "users": True}
    num_items = knowledge.items_e.shape[1]
    writer = KnowledgeWriter(path, identity, num_events=0, num_users=0, num_items=num_items, max_users=len(users))
    for lum, e_ID in enumerate(knowledge.items_e):
        writer.write_items(lum, e_ID)
    writer.write_item_keys(read_item_keys(knowledge.path))
    has = answers.present_BN[:, 0]
    log_z_BN = None if answers.log_z_BN is None else answers.log_z_BN[has]
    fields = {"asked_at": 1_700_000_000, "last_event_at": 0, "num_events": 0, "num_seen": 0}
    records = writer.user_records(answers.o_BND[has], log_z_BN, **fields, fold=answers.fold_B[has].numpy())
    writer.write_users([user_key_bytes(keys[user]) for user in users[has.numpy()]], records)
    writer.publish({"counts": {"users": int(has.sum())}, "built_at": 1})


def scores_over_http(places: Places, requests: list[ScoreRequest]) -> list[float]:
    """The score of each request's one item by POST /v1/score of a server that serves these places."""
    app = open_app(places, ServeConfig(timeout_ms=60_000, page=False), "")

    def one(request: ScoreRequest) -> float:
        body = {"user": request.user, "items": request.items, "context": request.context, "time": request.time}
        answer = client.post("/v1/score", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["scores"][0]

    with listening(app) as url, httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, requests))


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The address of the application, served by a thread."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    with socket.create_server((LOCAL, 0)) as port:
        thread = threading.Thread(target=server.run, args=([port],))
        thread.start()
        yield f"http://{LOCAL}:{port.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def main() -> None:
    torch.set_num_threads(1)
    ranker, state, num_rows = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as scratch:
        found = replay(ranker, state, num_rows, scratch=Path(scratch))
    scorer, http = (np.abs(each - found.offline_N).max() for each in (found.scorer_N, found.http_N))
    print(
        f"{len(found.offline_N):,} rows in {found.rounds} rounds, {found.present_N.mean():.1%} with LUM answers. "
        f"Largest difference from the offline probability: Scorer {scorer:.2e}, HTTP {http:.2e}"
    )


if __name__ == "__main__":
    main()
