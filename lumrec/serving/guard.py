"""Checks each request before it reaches an endpoint (token, host, size and time of the body), and counts it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumrec.serving.metrics import Metrics

OPEN = ("/healthz", "/readyz")  # for load balancers, which have no token


class Guard:
    """ASGI middleware. token: "" = none is needed, and only requests to a name of this machine are answered.
    max_body_kib: largest body of a request. body_timeout_s: time in which it has to arrive.

    Without a token, the Host header must name this machine: else a page from elsewhere, open in a browser here, could
    reach the server under a name of its own that leads to 127.0.0.1.
    """

    def __init__(self, app: ASGIApp, *, token: str, max_body_kib: int, body_timeout_s: float, metrics: Metrics) -> None:
        self.app, self.token, self.metrics = app, token, metrics
        self.max_body_kib, self.body_timeout_s = max_body_kib, body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 400, 401 or 413 itself; passes everything else on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, num_bytes = time.perf_counter(), 500, 0
        ends = started + self.body_timeout_s

        async def receive_within_limits() -> Message:
            nonlocal num_bytes
            try:
                message = await asyncio.wait_for(receive(), max(0.0, ends - time.perf_counter()))
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self.body_timeout_s:g} s") from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_kib << 10:
                raise HTTPException(413, self._too_large)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if refusal := self._refusal(scope["path"], Headers(scope=scope)):
                await refusal(scope, receive, noted)
            else:
                await self.app(scope, receive_within_limits, noted)
        finally:
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(endpoint, status).inc()
            self.metrics.request_s.labels(endpoint).observe(time.perf_counter() - started)

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self.max_body_kib:,} KiB (serve.max_body_kib of this server)"

    def _refusal(self, path: str, headers: Mapping[str, str]) -> JSONResponse | None:
        if path in OPEN:
            return None
        if self.token and not _is_same(_given(headers.get("authorization", "")), self.token):
            self.metrics.refused.labels("token").inc()
            says = {"detail": "this server needs a token: send the header Authorization: Bearer <token>"}
            return JSONResponse(says, 401, {"WWW-Authenticate": 'Basic realm="lumrec"'})
        if not (self.token or _is_this_machine(headers.get("host", ""))):
            self.metrics.refused.labels("host").inc()
            says = {"detail": "without a token, this server answers only to localhost and 127.0.0.1"}
            return JSONResponse(says, 400)
        if "content-length" in headers and "transfer-encoding" in headers:
            says = {"detail": "a request has either a Content-Length or a Transfer-Encoding"}
            return JSONResponse(says, 400, {"Connection": "close"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.max_body_kib << 10:
            return JSONResponse({"detail": self._too_large}, 413)
        return None


def _given(authorization: str) -> str:
    """The token of the header: a bearer token, or the password that a browser sends."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _is_same(given: str, token: str) -> bool:
    """Compares in a time that does not depend on how many characters are right."""
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def _is_this_machine(host: str) -> bool:
    name = host[: host.rindex("]") + 1].strip("[]") if host.startswith("[") and "]" in host else host.split(":")[0]
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
