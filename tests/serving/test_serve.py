"""The server over a real bundle, store and state: HTTP equals the scorer, events change scores, a page in a browser."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from redis_servers import RedisServer
from replay import listening, replay
from small_bundle import WORDS

from lumrec.data.prepare import open_or_prepare
from lumrec.data.served import ServedData
from lumrec.experiments.config import load
from lumrec.knowledge.redis_load import load as redis_load
from lumrec.run.errors import MissingFileError, UserError
from lumrec.serving.opening import open_app
from lumrec.serving.scorer import Scorer
from lumrec.serving.settings import Places, ServeConfig
from lumrec.stages.registry import STAGES
from lumrec.stages.serve import places_of

CHROMIUM = Path("/usr/bin/chromium")
SETTINGS = ServeConfig(reload_s=0.05, log_every_s=0.1, timeout_ms=60_000)
LOCAL = "http://127.0.0.1"


@pytest.fixture(scope="module")
def runs(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with a ranker's bundle, its store and the state of its users."""
    runs = tmp_path_factory.mktemp("serve") / "runs"
    shutil.copytree(exported, runs)
    STAGES["user_state"].run(load(None, [*WORDS, f"runs_dir={runs}", "user_state.keep=1000"]))
    return runs


def places(runs: Path, **changes: Any) -> Places:
    """What `lumrec serve` serves of these runs."""
    return places_of(load(None, [*WORDS, f"runs_dir={runs}"]), ServeConfig(log="served"))._replace(**changes)


def client_of(runs: Path, **changes: Any) -> TestClient:
    return TestClient(open_app(places(runs, **changes), SETTINGS, ""), base_url=LOCAL, raise_server_exceptions=False)


def test_answers_equal_the_scorer_s_and_what_was_served_is_trained_on(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    runs = tmp_path / "runs"
    found = places(runs)
    assert found == Places(runs / "tiny-rank-bundle", str(runs / "tiny-query"), str(runs / "tiny-rank-user_state"),
                           runs / "served")  # fmt: skip
    items = ["5", "17", "no such", "0"]
    scorer = Scorer.open(found.bundle, store=found.store, state=found.state)
    with client_of(runs) as client:
        body = {"user": "1", "items": items, "time": 1.8e9, "request_id": "r1"}
        answer = client.post("/v1/score", json=body).json()
        np.testing.assert_array_equal(np.float32(answer["scores"]), scorer.score("1", items, time=1.8e9))
        assert answer["knowledge"]["present"] and answer["unknown_items"] == ["no such"]
        ranked = client.post("/v1/rank", json={**body, "k": 2, "request_id": "r2"}).json()["items"]
        order = np.argsort(-np.float32(answer["scores"]), kind="stable")[:2]
        assert [each["item"] for each in ranked] == [items[place] for place in order]
        stranger = client.post("/v1/score", json={**body, "user": "nobody", "request_id": "r3"}).json()
        assert stranger["unknown_user"] and not stranger["knowledge"]["present"]
        wrong = client.post("/v1/score", json={**body, "context": {"colour": "red"}})
        assert wrong.status_code == 422 and "there is no feature 'colour'" in wrong.json()["detail"]

        events = [{"user": "1", "item": "5", "label": 1, "time": 1.79e9, "event_id": "e", "request_id": "r1"}]
        assert client.post("/v1/events", json={"events": events}).json()["new"] == 1
        assert client.post("/v1/events", json={"events": events}).json()["known"] == 1
        later = client.post("/v1/score", json={**body, "request_id": "r4"}).json()
        assert later["scores"] != answer["scores"]
    words = [*WORDS, f"runs_dir={runs}", "name=next", "data.source=served", "data.served.log=served"]
    words += ["data.served.prepared=tiny-prepare", "data.served.without_event=negative"]
    config = load(None, words)
    STAGES["rank"].run(config)
    data = open_or_prepare(config, served=True)
    assert isinstance(data, ServedData) and data.num_rows == 16 and data.label.sum() == 1
    assert json.loads((runs / "next-rank" / "result.json").read_text())["knowledge_hazard"] == "as_served"
    with pytest.raises(UserError, match="trained on what was served"):
        STAGES["export"].run(config)


def test_test_rows_with_knowledge_score_as_offline_by_the_scorer_and_over_http(runs: Path, tmp_path: Path) -> None:
    """From the store and the states of the users, in rounds: see replay.py."""
    found = replay(runs / "tiny-rank", runs / "tiny-rank-user_state", 60, scratch=tmp_path / "store")
    assert len(found.offline_N) == 60 and found.rounds >= 2 and 0.5 < found.present_N.mean()
    np.testing.assert_allclose(found.scorer_N, found.offline_N, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.http_N, found.offline_N, rtol=0, atol=1e-6)


def test_a_state_that_is_not_there_is_refused_and_a_store_is_not(runs: Path) -> None:
    with pytest.raises(MissingFileError, match="there is no user state"):
        client_of(runs, state=str(runs / "tiny-query"), log=None)
    with client_of(runs, store="nowhere", log=None) as client:
        answer = client.post("/v1/score", json={"user": "1", "items": ["5"]}).json()
        assert not answer["knowledge"]["present"]
        assert "the store cannot be read" in client.get("/readyz").json()["problems"][0]
        assert "answers are absent" in client.get("/?user=1").text


def test_a_redis_that_comes_back_empty_is_an_alarm(runs: Path, redis_server: RedisServer) -> None:
    place, body = redis_server.place("emptied"), {"user": "1", "items": ["5"]}
    redis_load(runs / "tiny-query", place)
    with client_of(runs, store=place, log=None) as client:
        assert client.post("/v1/score", json=body).json()["knowledge"]["present"]
        redis_server.kill()
        redis_server.start()
        assert not client.post("/v1/score", json=body).json()["knowledge"]["present"]
        _until(lambda: 'lumrec_readable{what="store"} 0.0' in client.get("/metrics").text)
        for _ in range(3):  # that it answers requests is no reason to end the alarm
            assert client.post("/v1/score", json=body).status_code == 200
        assert "the store cannot be read: there is no knowledge in" in client.get("/readyz").json()["problems"][0]
        redis_load(runs / "tiny-query", place)
        _until(lambda: client.post("/v1/score", json=body).json()["knowledge"]["present"])
        assert client.get("/readyz").json()["problems"] == []


def _until(true: Callable[[], bool]) -> None:
    """Waits for something to come true, at most two minutes."""
    ends = time.monotonic() + 120
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_items_by_the_store_and_by_the_lum_itself(runs: Path) -> None:
    config = load(None, [*WORDS, f"runs_dir={runs}"])
    app = open_app(places_of(config, ServeConfig(lums=["tiny-pretrain"])), SETTINGS, "")
    with TestClient(app, base_url=LOCAL, raise_server_exceptions=False) as client:
        stored = client.post("/v1/retrieve", json={"user": "1", "k": 5}).json()
        assert stored["condition"] == {"feedback": "like"} and len(stored["items"]) == 5
        similarity = [each["similarity"] for each in stored["items"]]
        assert similarity == sorted(similarity, reverse=True) and 0 < stored["items"][0]["share"] < 1
        conditions = [{"feedback": "dislike"}, {"feedback": "like"}, {}]
        asked = client.post("/v1/ask", json={"user": "1", "k": 5, "conditions": conditions}).json()
        assert [each["condition"] for each in asked["answers"]] == conditions
        now = {each["item"]: each for each in asked["answers"][1]["items"]}
        for each in stored["items"]:  # the same LUM and the same events: equal but for the store's float16
            assert now[each["item"]]["similarity"] == pytest.approx(each["similarity"], abs=0.02)
            assert now[each["item"]]["share"] == pytest.approx(each["share"], rel=0.05)
        other = client.post("/v1/retrieve", json={"user": "1", "k": 5, "condition": conditions[0]}).json()
        assert other["items"] != stored["items"]
        for path, body in (("retrieve", {"condition": {"feedback": "lik"}}), ("ask", {"conditions": [{"mood": "x"}]})):
            answer = client.post(f"/v1/{path}", json={"user": "1", **body})
            assert answer.status_code == 422 and len(answer.json()["detail"]) > 20
        nobody = client.post("/v1/ask", json={"user": "nobody", "conditions": conditions}).json()
        assert nobody == {"unknown_user": True, "answers": []}
        assert not client.post("/v1/retrieve", json={"user": "nobody"}).json()["knowledge"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield chromium
        chromium.close()


def test_the_page_in_a_browser(runs: Path, browser: Any) -> None:
    attack = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
    with listening(open_app(places(runs, log=None), SETTINGS, "")) as url:
        page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")
        asked, said = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(url)
        page.get_by_label("user").fill("1")
        page.get_by_role("button", name="Show").click()
        assert page.locator("h1").inner_text() == "User 1"
        names = page.locator("h2").all_inner_texts()
        assert names == ["Ranking without and with the LUM", "What the LUM expects", "Last events"]
        assert page.locator("h3").all_inner_texts()[:2] == ["Without the LUM", "With the LUM"]
        without, with_lum = (page.locator("ol.ranking").nth(n).locator("li .any").all_inner_texts() for n in (0, 1))
        assert len(without) == len(with_lum) == 15
        for title in set(without) & set(with_lum):  # the arrows count the places between the two lists
            places_moved = without.index(title) - with_lum.index(title)
            moved = page.locator("ol.ranking").nth(1).locator("li").nth(with_lum.index(title)).locator(".move")
            arrow = "▲" if places_moved > 0 else "▼" if places_moved else "="
            assert moved.inner_text().split() == [arrow, str(abs(places_moved))][: 2 if places_moved else 1]
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
        page.get_by_label("user").fill(attack)
        page.get_by_role("button", name="Show").click()
        assert page.locator("h1").inner_text() == f"User {attack}"
        assert "no events" in page.locator(".warning").first.inner_text()
        page.goto(f"{url}/docs")
        assert page.locator("h2").count() > 5
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        assert {address.split("/")[2] for address in asked} == {url.split("/")[2]}
        assert not [text for text in said if "favicon" not in text]
        page.close()


def test_no_page_where_it_is_switched_off(runs: Path) -> None:
    app = open_app(places(runs, log=None), ServeConfig(page=False), "")
    assert TestClient(app, base_url=LOCAL).get("/").status_code == 404


def test_bundles_with_one_name_are_told_apart(runs: Path) -> None:
    """A run in the folder of a pipeline has its bundle, state and store there."""
    config = load(None, [*WORDS, f"runs_dir={runs}", "run=some/rank-din"])
    found = places_of(config, ServeConfig(state="x"))
    assert found.bundle == runs / "some" / "rank-din-bundle"
