"""The HTTP server: answers, refusals, limits, deadlines, the token, new versions, and a store that cannot be read."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from small_server import small_live, write_bundle
from small_store import publish

from lumrec.serving.metrics import Metrics
from lumrec.serving.server import make_app
from lumrec.serving.settings import ServeConfig

LOCAL = "http://127.0.0.1"
TOKEN = "a-long-enough-token"


def client_of(
    folder: Path, *, store: Path | None = None, delay_s: float = 0.0, token: str = "", **settings: Any
) -> TestClient:
    """A client of a new server over folder/bundle.json."""
    metrics = Metrics()
    live = small_live(folder, store=store, delay_s=delay_s, metrics=metrics)
    app = make_app(
        live, ServeConfig(**{"reload_s": 0.02, "timeout_ms": 120_000, **settings}), token=token, metrics=metrics
    )
    app.state.live = live
    return TestClient(app, base_url=LOCAL, raise_server_exceptions=False)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A server with default settings."""
    with client_of(tmp_path) as each:
        yield each


def score(client: TestClient, **body: Any) -> Any:
    """Answer of /v1/score, which has to be 200."""
    answer = client.post("/v1/score", json={"user": "1", "items": ["3"], **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def counted(client: TestClient, line: str) -> float:
    """Value of one line of /metrics; 0 where it is not there."""
    lines = client.get("/metrics").text.splitlines()
    return next((float(each.rpartition(" ")[2]) for each in lines if each.rpartition(" ")[0] == line), 0.0)


def test_scores_are_in_the_order_of_the_request_and_rankings_are_the_best_first(client: TestClient) -> None:
    assert score(client, items=["3", "x", "9", "3"], user="me", request_id="r") == {
        "request_id": "r",
        "bundle": "v1",
        "unknown_user": True,
        "unknown_items": ["x"],
        "unknown_values": 0,
        "cut": False,
        "knowledge": {"present": False, "age_s": None},
        "scores": pytest.approx([0.003, -0.001, 0.009, 0.003]),
    }
    ranking = client.post("/v1/rank", json={"user": "1", "items": ["3", "7", "9", "1"], "k": 2}).json()
    assert [each["item"] for each in ranking["items"]] == ["9", "7"]
    assert len(ranking["request_id"]) == 32


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("", 422, "the body"),
        ("{", 400, "no JSON"),
        ('{"user": "1", "items": ["1"]', 400, "no JSON"),
        ("[]", 422, "the body"),
        ("null", 422, "the body"),
        ("{}", 422, "user is missing"),
        ('{"user": "1"}', 422, "items is missing"),
        ('{"user": 1, "items": ["1"]}', 422, "user: input should be a valid string, got 1"),
        ('{"user": null, "items": ["1"]}', 422, "user"),
        ('{"user": "1", "items": "1"}', 422, "items"),
        ('{"user": "1", "items": []}', 422, "items"),
        ('{"user": "1", "items": ["1", 2]}', 422, "items[1]: input should be a valid string, got 2"),
        ('{"user": "1", "items": ["1"], "itmes": 1}', 422, "itmes is no field of this request (did you mean 'items'?)"),
        ('{"user": "1", "items": ["1"], "time": NaN}', 400, "no JSON"),
        ('{"user": "1", "items": ["1"], "time": Infinity}', 400, "no JSON"),
        ('{"user": "1", "items": ["1"], "time": 1e400}', 422, "time"),
        ('{"user": "1", "items": ["1"], "time": true}', 422, "time"),
        ('{"user": "1", "items": ["1"], "time": ' + "9" * 400 + "}", 422, "time"),
        ('{"user": "1", "items": ["1"], "time": ' + "9" * 5000 + "}", 400, "no JSON"),
        ('{"user": "1", "items": ["1"], "timeout_ms": 0}', 422, "timeout_ms"),
        ('{"user": "1", "items": ["1"], "context": {"a": NaN}}', 400, "no JSON"),
        ('{"user": "1", "items": ["1"], "context": {"a": {"b": 1}}}', 422, "context.a: input should be text, a number"),
        ('{"user": "1", "items": ["1"], "context": ' + '{"a":' * 100 + "1" + "}" * 100 + "}", 422, "context.a"),
        ("[" * 50_000 + "]" * 50_000, 400, "no JSON"),
        ('{"user": "\\ud800", "items": ["1"]}', 400, "no JSON"),
        ('{"user": "\\u202e", "items": ["1"], "\\u001b[2J": 1}', 422, "is no field"),
        ('{"user": "1", "items": ["1"], "context": {"wrong": "x"}}', 422, "context.wrong is no context feature"),
        (
            '{"user": "1", "items": ["1"], "context": {"a": 1e9, "b": [true, null, [1]]}}',
            422,
            "context.b: input",
        ),
        ('{"user": "1", "items": ["1"], "per_item": {"a": ' + "9" * 99 + "}}", 422, "per_item.a"),
        (b"\xff\xfe\x00", 400, "no JSON"),
        (json.dumps({"user": "1", "items": ["1"] * 1001}), 422, "1,001 entries, expected at most 1,000"),
        (json.dumps({"user": "1" * 300_000, "items": ["1"]}), 413, "larger than 256 KiB"),
    ],
)
def test_a_body_that_cannot_be_used_gets_one_sentence(client: TestClient, body: Any, status: int, says: str) -> None:
    for path in ("/v1/score", "/v1/rank"):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, answer.text
        detail = answer.json()["detail"]
        assert says in detail and detail.isprintable() and len(detail) < 400


def test_an_endpoint_without_its_engine_says_what_to_start_it_with(client: TestClient) -> None:
    answer = client.post("/v1/events", json={"events": [{"user": "1", "item": "2", "label": 1}]})
    assert answer.status_code == 404 and "serve.state=" in answer.json()["detail"]
    answer = client.post("/v1/ask", json={"user": "1", "conditions": [{}]})
    assert answer.status_code == 404 and "serve.lums=" in answer.json()["detail"]
    answer = client.post("/v1/retrieve", json={"user": "1"})
    assert answer.status_code == 404 and "serve.store" in answer.json()["detail"]


def test_a_body_of_another_kind_a_wrong_path_and_a_wrong_method_get_one_sentence(client: TestClient) -> None:
    body = '{"user": "1", "items": ["1"]}'
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what a page elsewhere may send without asking
        assert client.post("/v1/score", content=body, headers={"Content-Type": kind}).status_code == 422
    for answer in (client.post("/v1/scores"), client.get("/v1/score"), client.delete("/metrics")):
        assert answer.status_code in (404, 405) and isinstance(answer.json()["detail"], str)


def test_a_body_in_pieces_is_too_large_as_soon_as_it_is(client: TestClient) -> None:
    sent = []

    def pieces() -> Iterator[bytes]:
        for number in range(1000):
            sent.append(number)
            yield b" " * 65_536

    answer = client.post("/v1/score", content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_a_body_with_two_lengths_is_refused(client: TestClient) -> None:
    """A proxy in front may go by the one, and the server by the other: what one holds for a body is a request to it."""
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked", "Content-Length": "4"}
    answer = client.post("/v1/score", content=b"{}", headers=headers)
    assert answer.status_code == 400 and "either" in answer.json()["detail"]
    assert answer.headers["Connection"] == "close"


def test_without_a_token_only_names_of_this_machine_are_answered_to(client: TestClient) -> None:
    for host, status in {"localhost:8000": 200, "127.0.0.1": 200, "[::1]:8000": 200, "evil.example": 400}.items():
        assert client.get("/metrics", headers={"Host": host}).status_code == status


def test_a_token_is_needed_for_all_but_health(tmp_path: Path) -> None:
    with client_of(tmp_path, token=TOKEN) as client:
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        basic = base64.b64encode(f"me:{TOKEN}".encode()).decode()
        for value in ("", "Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Basic é", "Basic ////"):
            answer = client.get("/metrics", headers={"Authorization": value.encode("latin-1")})
            assert answer.status_code == 401 and "Bearer" in answer.json()["detail"], value
        for value in (f"Bearer {TOKEN}", f"bearer  {TOKEN}", f"Basic {basic}"):
            headers = {"Authorization": value, "Host": "scores.example"}
            assert client.get("/metrics", headers=headers).status_code == 200


def test_requests_at_the_same_time_share_a_call_and_get_their_own_answers(tmp_path: Path) -> None:
    with client_of(tmp_path, delay_s=0.05) as client:
        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(lambda number: score(client, items=[str(number)]), range(40)))
        assert [answer["scores"][0] for answer in answers] == pytest.approx([n / 1000 for n in range(40)])
        assert len(client.app.state.live.scorer.calls) < 40
        assert counted(client, "lumrec_candidates_total") == 40


def test_a_full_queue_and_a_missed_deadline_are_refused(tmp_path: Path) -> None:
    with client_of(tmp_path, delay_s=0.3, queue=1, max_batch_candidates=1) as client:
        with ThreadPoolExecutor(8) as threads:
            body = {"user": "1", "items": ["1"]}
            answers = list(threads.map(lambda _: client.post("/v1/score", json=body), range(8)))
        assert {answer.status_code for answer in answers} == {200, 503}
        assert all(int(a.headers["Retry-After"]) >= 1 for a in answers if a.status_code == 503)
        answer = client.post("/v1/score", json={**body, "timeout_ms": 20})
        assert answer.status_code == 504 and "in time" in answer.json()["detail"]
        assert counted(client, 'lumrec_refused_total{why="deadline"}') == 1
        assert counted(client, 'lumrec_requests_total{endpoint="/v1/score",status="504"}') == 1


def test_a_new_bundle_is_served_without_a_failed_request_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    with client_of(tmp_path) as client:
        answers, stop = [], threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answers.append(client.post("/v1/score", json={"user": "1", "items": ["1000"]}))

        asking = threading.Thread(target=ask)
        asking.start()
        for version in range(2, 12):
            write_bundle(tmp_path / "bundle.json", version=f"v{version}", factor=version)
            _until(lambda: answers and answers[-1].json()["bundle"] == f"v{version}")  # noqa: B023
        write_bundle(tmp_path / "bundle.json", version="bad", factor="null")
        _until(lambda: counted(client, 'lumrec_reloads_total{outcome="failed",what="bundle"}') == 1)
        assert counted(client, 'lumrec_readable{what="bundle"}') == 0
        assert "has no factor" in client.get("/readyz").json()["problems"][0]
        stop.set()
        asking.join()
        assert {answer.status_code for answer in answers} == {200}
        for answer in answers:  # never one version's name with another's scores
            assert answer.json()["scores"] == [float(answer.json()["bundle"][1:])] or answer.json()["bundle"] == "v1"
        assert score(client)["bundle"] == "v11"


def test_a_store_that_comes_goes_and_does_not_fit_is_absent_knowledge(tmp_path: Path, caplog: Any) -> None:
    store = tmp_path / "store"
    with client_of(tmp_path, store=store) as client:
        assert score(client)["knowledge"] == {"present": False, "age_s": None}
        answer = client.post("/v1/retrieve", json={"user": "1"})
        assert answer.status_code == 503 and "the store cannot be read: there is no" in answer.json()["detail"]
        assert answer.headers["Retry-After"] == "1"
        assert client.get("/readyz").json()["ready"]
        assert counted(client, 'lumrec_readable{what="store"}') == 0
        assert counted(client, "lumrec_knowledge_absent_total") == 1
        assert "the store cannot be read: there is no knowledge" in caplog.text
        publish(store)
        _until(lambda: score(client)["knowledge"]["present"])
        assert score(client)["scores"] == pytest.approx([0.503])
        assert counted(client, 'lumrec_readable{what="store"}') == 1
        assert client.get("/readyz").json()["problems"] == []
        (store / "manifest.json").write_text("{", encoding="utf-8")
        _until(lambda: not score(client)["knowledge"]["present"])
        assert counted(client, 'lumrec_readable{what="store"}') == 0
        publish(store, seed=1)
        _until(lambda: score(client)["knowledge"]["present"])


def test_a_store_whose_disk_is_gone_is_served_on_and_alarmed(tmp_path: Path, caplog: Any) -> None:
    store = tmp_path / "store"
    publish(store)
    with client_of(tmp_path, store=store) as client:
        assert score(client)["knowledge"]["present"]
        store.rename(tmp_path / "away")
        _until(lambda: counted(client, 'lumrec_readable{what="store"}') == 0)
        for _ in range(5):  # that it can be read is no reason to end the alarm
            assert score(client)["knowledge"]["present"]
            time.sleep(0.02)
        assert counted(client, 'lumrec_readable{what="store"}') == 0
        assert "the store cannot be read: there is nothing at its place any more" in caplog.text
        (tmp_path / "away").rename(store)
        _until(lambda: counted(client, 'lumrec_readable{what="store"}') == 1)
        assert client.get("/readyz").json()["problems"] == []


def test_a_path_with_a_slash_too_many_is_not_found(client: TestClient) -> None:
    """A redirect would go to the host that the request names."""
    for path in ("/v1/score/", "/healthz/", "/v1//score", "/healthz%00", "/%2e%2e/metrics"):
        assert client.get(path, follow_redirects=False).status_code == 404


def test_the_page_of_the_api_names_every_endpoint_and_loads_nothing(client: TestClient) -> None:
    page = client.get("/docs").text
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in page
    assert "curl -s http://127.0.0.1/v1/score" in page
    assert "<script" not in page and "src=" not in page and "http://" not in page.replace(LOCAL, "")
    assert "https://" not in page


def _until(true: Any) -> None:
    """Waits for something to come true, at most two minutes."""
    ends = time.monotonic() + 120
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)
