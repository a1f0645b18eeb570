"""The HTTP server of a bundle: scores and rankings as JSON, health, counters, and a page that explains the API.

    POST /v1/score     the probability of each candidate
    POST /v1/rank      the best candidates
    POST /v1/retrieve  the items that the LUM finds best, from the store of its answers
    POST /v1/ask       the same from the LUM itself, under any conditions
    POST /v1/events    what users did, which later requests take into account
    GET  /healthz      this process runs        GET /readyz   it takes requests        GET /metrics   Prometheus
    GET  /             a page that shows a user, and what the LUM changes for them
    GET  /openapi.json the API, for programs    GET /docs     the API, for people; loads nothing from the internet

Requests are computed in batches (batching.py), on the newest version of bundle and store (live.py). Every refusal is
one sentence: {"detail": "..."}. An endpoint that the running server cannot serve answers 404 and says what to start it
with.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from importlib import metadata
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from lumrec.run.errors import UserError
from lumrec.run.key_value import Unavailable
from lumrec.run.page import render
from lumrec.run.printable import printable
from lumrec.serving.api import (
    Alive,
    AskBody,
    Asked,
    EventBody,
    EventsBody,
    EventsTaken,
    FoundItem,
    KnowledgeUsed,
    Problem,
    RankBody,
    RankedItem,
    Ranking,
    Ready,
    RetrieveBody,
    Retrieved,
    ScoreBody,
    Scores,
    example,
    sentence,
)
from lumrec.serving.batching import Batcher, QueueFull
from lumrec.serving.guard import Guard
from lumrec.serving.live import Live
from lumrec.serving.metrics import Metrics
from lumrec.serving.page import Page
from lumrec.serving.requests import Event, ScoreRequest
from lumrec.serving.retrieval import Asker, Retriever, items_of
from lumrec.serving.served_log import ServedLog
from lumrec.serving.settings import ServeConfig

logger = logging.getLogger(__name__)
STUCK_S = 10.0  # this process is not ready while a call of the ranker has taken longer
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
FIELDS = [*dict.fromkeys([*RankBody.model_fields, *AskBody.model_fields, *EventBody.model_fields])]
BAD = {
    400: "The body is no JSON",
    401: "The token is missing or wrong",
    404: "This server was started without what the endpoint needs",
    408: "The body did not arrive in time",
    413: "The body is too large",
    422: "The body has invalid or missing fields",
    503: "Too many requests wait, or what the endpoint reads cannot be read now; Retry-After says when to come back",
    504: "The answer was not ready in time",
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text} for status, text in BAD.items()
}


class Api:
    """The endpoints. live: the scorer in force. log: logs what was scored, or None. asker: LUMs to ask, or None."""

    def __init__(
        self, live: Live, settings: ServeConfig, metrics: Metrics, log: ServedLog | None, asker: Asker | None
    ) -> None:
        self.live, self.settings, self.metrics, self.log, self.asker = live, settings, metrics, log, asker
        self._retriever: Retriever | None = None
        self._page: Page | None = None

    @contextlib.asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """While entered, requests are computed, and new versions looked for."""
        self.batcher = Batcher(
            self._score_many,
            weigh=lambda request: len(request.items),
            max_weight=self.settings.max_batch_candidates,
            max_call_s=self.settings.max_batch_ms / 1000,
            max_waiting=self.settings.queue,
            on_call=self._called,
        )
        # One request at a time, so that each has its own counts and one that fails does not affect another.
        self.appender = Batcher(self._append, max_weight=1, max_waiting=self.settings.queue)
        # Calls that take too long for the event loop.
        self.finder: Batcher[Callable[[], Any], Any] = Batcher(_each, max_weight=1, max_waiting=self.settings.queue)
        self.metrics.starts.inc()
        watching = asyncio.create_task(self._watch())
        yield
        watching.cancel()
        self.batcher.close()
        self.appender.close()
        self.finder.close()
        if self.log is not None:
            await asyncio.to_thread(self.log.close)

    async def score(self, body: ScoreBody) -> Scores:
        """The probability of each item, in the order of the request."""
        scored, answer = await self._scored(body)
        return Scores(**answer, scores=scored.scores.tolist())

    async def rank(self, body: RankBody) -> Ranking:
        """The items with the highest probability, the best first."""
        scored, answer = await self._scored(body)
        best = (-scored.scores).argsort(kind="stable")[: body.k].tolist()
        items = [RankedItem(item=body.items[place], score=float(scored.scores[place])) for place in best]
        return Ranking(**answer, items=items)

    async def events(self, body: EventsBody) -> EventsTaken:
        """Adds events to the state from which later requests are scored. Sending an event again is safe."""
        if self.live.scorer.state is None:
            raise self._missing(
                "state", "reads no user state: start it with serve.state=<what lumrec user_state has built>"
            )
        self._check_number("events", len(body.events))
        events = [
            Event(each.user, each.item, each.time, each.label, each.features, each.event_id, each.request_id)
            for each in body.events
        ]
        if self.log is not None:
            self.log.events(events)
        taken = await self.appender.submit(events, timeout_s=self._timeout_s(body.timeout_ms))
        for outcome, number in taken._asdict().items():
            self.metrics.events.labels(outcome).inc(number)
        return EventsTaken(**taken._asdict())

    async def retrieve(self, body: RetrieveBody) -> Retrieved:
        """The items that the LUM finds best for a user, from the store of its answers; no model runs."""
        timeout_s = self._timeout_s(body.timeout_ms)
        return await self.finder.submit(partial(self._retrieve, body), timeout_s=timeout_s)

    async def ask(self, body: AskBody) -> Asked:
        """The items that the LUM finds best for a user under any conditions, after the user's newest events."""
        if self.asker is None:
            raise HTTPException(404, "this server has no LUM to ask: start it with serve.lums=[<runs of pretrain>]")
        return await self.finder.submit(partial(self._ask, body), timeout_s=self._timeout_s(body.timeout_ms))

    async def page(self, user: Annotated[str, Query(max_length=200)] = "") -> HTMLResponse:
        """What the LUM changes for a user, as a page."""
        scorer = self.live.scorer
        if self._page is None or self._page.scorer is not scorer:
            self._page = Page(scorer)
        view = await self.batcher.beside(partial(self._page.look, user)) if user else None
        return HTMLResponse(render("serve.html.j2", view=view, bundle=scorer.version), headers=PAGE_HEADERS)

    async def healthz(self) -> Alive:
        """200 while this process runs."""
        return Alive()

    async def readyz(self, response: Response) -> Ready:
        """200 while this process takes requests. `problems` lists what cannot be read at the moment."""
        problems = [f"the {what} cannot be read: {why}" for what, why in sorted(self.live.problems.items())]
        if (stuck := self.batcher.busy_s) > STUCK_S:
            problems.append(f"the ranker has been computing for {stuck:.0f} s")
            response.status_code = 503
        return Ready(ready=response.status_code != 503, bundle=self.live.scorer.version, problems=problems)

    async def metrics_text(self) -> Response:
        """Counters and times, for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.settings.reload_s)
            try:
                await asyncio.to_thread(self.live.look)
            except Exception:  # the next look may work
                logger.exception("looking for new versions failed")

    async def _scored(self, body: ScoreBody) -> tuple[Any, dict[str, Any]]:
        """The scorer's result for a request, and the fields that all answers share."""
        self._check_number("items", len(body.items))
        request = ScoreRequest(body.user, body.items, body.context, body.time, body.per_item)
        with self.metrics.queue.track_inprogress():
            scorer, scored = await self.batcher.submit(request, timeout_s=self._timeout_s(body.timeout_ms))
        request_id = body.request_id or uuid.uuid4().hex
        if self.log is not None:
            self.log.scored(scorer, request, request_id, scored)
        age_s = None if math.isnan(scored.knowledge_age_s) else float(scored.knowledge_age_s)
        return scored, {
            "request_id": request_id,
            "bundle": scorer.version,
            "unknown_user": scored.unknown_user,
            "unknown_items": scored.unknown_items,
            "unknown_values": scored.unknown_values,
            "cut": scored.cut,
            "knowledge": KnowledgeUsed(present=scored.knowledge_present, age_s=age_s),
        }

    def _check_number(self, of: str, number: int) -> None:
        if number > self.settings.max_candidates:
            raise HTTPException(
                422,
                f"{of} has {number:,} entries, expected at most {self.settings.max_candidates:,} "
                "(serve.max_candidates of this server)",
            )

    def _timeout_s(self, asked_ms: float | None) -> float:
        return min(asked_ms or math.inf, self.settings.timeout_ms) / 1000

    def _missing(self, what: str, says: str) -> Exception:
        """404 where this server was started without it, 503 where it cannot be read now."""
        if problem := self.live.problems.get(what):
            return Unavailable(f"the {what} cannot be read: {problem}")
        return HTTPException(404, f"this server {says}")

    def _append(self, requests: list[list[Event]]) -> list[Any]:
        state = self.live.scorer.state
        if state is None:
            raise self._missing("state", "reads no user state")
        return [state.append(events) for events in requests]

    def _retrieve(self, body: RetrieveBody) -> Retrieved:
        store = self.live.scorer.store
        if store is None:
            raise self._missing(
                "store",
                "reads no knowledge store: serve a bundle that was trained with knowledge, and give serve.store",
            )
        if self._retriever is None or self._retriever.store is not store:
            self._retriever = Retriever(store)
        condition = self._retriever.condition(body.condition)
        found, problem = self._retriever.find(body.user, condition, body.k)
        self.live.note("store", problem)
        items = [FoundItem(**each) for each in items_of(found)]
        return Retrieved(condition=store.conditions[condition], knowledge=found is not None, items=items)

    def _ask(self, body: AskBody) -> Asked:
        state = self.live.scorer.state
        history = None if state is None else state.get([body.user])[0]
        if history is None or not len(history.events):
            return Asked(unknown_user=True, answers=[])
        assert self.asker is not None
        found = self.asker.find(body.user, history, body.conditions, body.k)
        answers = [
            Retrieved(condition=asked, knowledge=True, items=[FoundItem(**each) for each in items_of(items)])
            for asked, items in zip(body.conditions, found, strict=True)
        ]
        return Asked(unknown_user=False, answers=answers)

    def _score_many(self, requests: list[ScoreRequest]) -> Sequence[tuple[Any, Any]]:
        scorer = self.live.scorer  # a new one may take its place meanwhile
        return [(scorer, scored) for scored in scorer.score_many(requests)]

    def _called(self, answers: Sequence[Any], seconds: float) -> None:
        metrics = self.metrics
        metrics.call_s.observe(seconds)
        metrics.call_requests.observe(len(answers))
        good = [scored for answer in answers if not isinstance(answer, Exception) for scored in answer[1:]]
        metrics.candidates.inc(sum(len(scored.scores) for scored in good))
        metrics.unknown_users.inc(sum(scored.unknown_user for scored in good))
        metrics.unknown_items.inc(sum(len(scored.unknown_items) for scored in good))
        metrics.unknown_values.inc(sum(scored.unknown_values for scored in good))
        metrics.cut.inc(sum(scored.cut for scored in good))
        for scored in good:
            self.live.note("store", scored.store_error)
            self.live.note("state", scored.state_error)
            if not scored.knowledge_present:
                metrics.no_knowledge.inc(self.live.scorer.needs_knowledge)
            elif not math.isnan(scored.knowledge_age_s):
                metrics.knowledge_age_s.observe(scored.knowledge_age_s)


def _each(calls: list[Callable[[], Any]]) -> list[Any]:
    return [call() for call in calls]


class JsonRequest(Request):
    """A request whose body must be strict JSON: no NaN, no lone surrogate, no unlimited nesting."""

    async def json(self) -> Any:
        """The parsed body. Raises HTTPException if it is not valid."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is no JSON: {printable(error)}") from None


class JsonRoute(APIRoute):
    """A route that takes a JsonRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, called with a JsonRequest."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def make_app(
    live: Live,
    settings: ServeConfig,
    *,
    token: str,
    metrics: Metrics,
    log: ServedLog | None = None,
    asker: Asker | None = None,
) -> FastAPI:
    """The ASGI application. token: required of requests; "" = none is needed. log, asker: see Api."""
    api = Api(live, settings, metrics, log, asker)
    app = FastAPI(
        title="lumrec",
        description="Scores candidates for a user, with what a Large User Model knows of them.",
        version=metadata.version("lumrec"),
        lifespan=api.running,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would lead to wherever the Host header says
    )
    app.router.route_class = JsonRoute
    app.post("/v1/score", tags=["ranking"], responses=PROBLEMS)(api.score)
    app.post("/v1/rank", tags=["ranking"], responses=PROBLEMS)(api.rank)
    app.post("/v1/retrieve", tags=["retrieval"], responses=PROBLEMS)(api.retrieve)
    app.post("/v1/ask", tags=["retrieval"], responses=PROBLEMS)(api.ask)
    app.post("/v1/events", tags=["events"], responses=PROBLEMS)(api.events)
    app.get("/healthz", tags=["operation"])(api.healthz)
    app.get("/readyz", tags=["operation"], responses={503: {"model": Ready}})(api.readyz)
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    app.get("/metrics", tags=["operation"], response_class=Response, responses=text)(api.metrics_text)
    app.get("/docs", include_in_schema=False)(docs)
    if settings.page:
        app.get("/", include_in_schema=False)(api.page)
    _say_in_one_sentence(app, metrics)
    body_timeout_s = settings.timeout_ms / 1000
    app.add_middleware(
        Guard, token=token, max_body_kib=settings.max_body_kib, body_timeout_s=body_timeout_s, metrics=metrics
    )
    return app


async def docs(request: Request) -> HTMLResponse:
    """The API as a page."""
    api = request.app.openapi()
    examples = {name: example(schema) for name, schema in api["components"]["schemas"].items()}
    base = str(request.base_url).rstrip("/")
    return HTMLResponse(render("api.html.j2", api=api, examples=examples, base=base), headers=PAGE_HEADERS)


def _say_in_one_sentence(app: FastAPI, metrics: Metrics) -> None:
    """Makes every refusal {"detail": one sentence}."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _refused(422, sentence(error.errors(), FIELDS))

    @app.exception_handler(UserError)
    async def unusable(_: Request, error: UserError) -> JSONResponse:
        return _refused(422, printable(error))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _refused(error.status_code, error.detail, error.headers)

    @app.exception_handler(QueueFull)
    async def full(_: Request, error: QueueFull) -> JSONResponse:
        metrics.refused.labels("queue").inc()
        return _refused(503, str(error), {"Retry-After": str(error.retry_after_s)})

    @app.exception_handler(Unavailable)
    async def unavailable(_: Request, error: Unavailable) -> JSONResponse:
        return _refused(503, printable(error), {"Retry-After": "1"})

    @app.exception_handler(asyncio.TimeoutError)
    async def late(_: Request, error: asyncio.TimeoutError) -> JSONResponse:
        metrics.refused.labels("deadline").inc()
        return _refused(504, "the answer was not there in time (serve.timeout_ms, or timeout_ms of the request)")

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        return _refused(500, f"an error of the server ({type(error).__name__}); its log has the trace")


def _refused(status: int, says: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"detail": says}, status, headers)
