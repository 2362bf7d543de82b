"""What every request passes first: its number, its limits and its token; and what is written down of it."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.serving.metrics import Metrics
from engine.serving.problems import RETRY_S, Problem, Refused, problem_of
from engine.serving.rate import RateLimiter, client_of
from engine.serving.settings import Settings

logger = logging.getLogger(__name__)

EXCHANGE = "dgm4.exchange"  # the scope's key of the Exchange
# Paths that need no token: they tell nothing of the images, and probes and browsers send none.
_OPEN = re.compile(r"/|/docs|/openapi\.json|/healthz|/readyz|/v2/health/(live|ready)|/static/[\w.]+")
_GIVEN_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_LINGER_S = 2.0
_CLIENT_GONE = 499  # as nginx logs it; nobody reads it
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


class Exchange:
    """One request and its answer: what the limits need to know of it, and the log.

    read_by, deadline: the times of `loop.time()` by which its body must be here, and its answer.
    unread: whether more of the body may come.
    """

    def __init__(self, headers: Headers, settings: Settings, root_path: str) -> None:
        self.root_path = root_path
        given = headers.get("x-request-id", "")
        self.request_id = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        self.client = ""
        self.started = time.perf_counter()  # uvloop's clock has whole milliseconds
        now = asyncio.get_running_loop().time()
        self.read_by, self.deadline = now + settings.read_timeout_s, now + settings.timeout_s
        self.unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        self.received = self.pairs = 0
        self.status: int | None = None
        self.code: str | None = None


class Gate:
    """Middleware around the routes: refuses early, bounds what is read, stamps and records what is sent."""

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, routes: Sequence[Route | Mount]
    ) -> None:
        self._app, self._settings, self._metrics, self._routes = app, settings, metrics, routes
        self._rate = None if settings.rate is None else RateLimiter(settings.rate, settings.burst)
        self._buffered = 0
        metrics.buffered.set_function(lambda: self._buffered)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(headers := Headers(scope=scope), self._settings, scope.get("root_path", ""))
        scope[EXCHANGE] = exchange

        async def limited() -> Message:
            return await self._receive(receive, exchange)

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                if exchange.unread and message["status"] not in (200, 408):
                    await self._linger(receive, exchange, headers)
                _stamp(message, exchange, scope)
            await send(message)

        try:
            self._admit(scope, headers, exchange)
            await self._app(scope, limited, stamped)
        except ClientDisconnect:
            exchange.status, exchange.code = _CLIENT_GONE, "client_gone"
        except Exception as error:
            if exchange.status is not None:
                raise  # the answer has begun: the server cuts the connection
            await answer(problem_of(error), scope, error)(scope, receive, stamped)
        finally:
            self._buffered -= exchange.received
            if self._rate is not None and exchange.pairs:
                self._rate.take(exchange.client, exchange.pairs)
            self._record(scope, exchange)

    def _admit(self, scope: Scope, headers: Headers, exchange: Exchange) -> None:
        """Refuse what can be refused before the body is read."""
        token = self._settings.token
        if token is not None and not needs_no_token(scope["path"]):
            kind, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), token.encode())
            if kind.lower() != "bearer" or not same:
                message = "expected the header Authorization: Bearer TOKEN with this service's token"
                raise Refused(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})
        if scope["method"] != "POST":
            return
        if _is_foreign(headers):
            raise Refused(403, "cross_site", "pages of other sites may not send requests here")
        if headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "unsupported_media_type", "expected a body that is not compressed")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._settings.max_body:
            raise self._too_large(length)
        if self._rate is not None:
            exchange.client = client_of(scope["client"][0] if scope.get("client") else None)
            if wait := self._rate.wait(exchange.client):
                message = f"this client has sent its share; expected the next request in {wait} s"
                raise Refused(429, "rate_limited", message, {"Retry-After": str(wait)})

    async def _receive(self, receive: Receive, exchange: Exchange) -> Message:
        """The next part of a body, within the limits of bytes and of time."""
        if not exchange.unread:
            return await receive()
        try:
            async with asyncio.timeout_at(exchange.read_by):
                message = await receive()
        except TimeoutError:
            text = f"expected the whole body within {self._settings.read_timeout_s:g} s"
            raise Refused(408, "request_timeout", text) from None
        size = len(message.get("body", b""))
        exchange.received += size
        self._buffered += size
        exchange.unread = message.get("more_body", False)
        if exchange.received > self._settings.max_body:
            raise self._too_large("more")
        if self._buffered > self._settings.max_buffered:
            text = "the service holds as many bytes of requests as it may; try again"
            raise Refused(503, "overloaded", text, {"Retry-After": str(RETRY_S)})
        return message

    def _too_large(self, size: str) -> Refused:
        return Refused(
            413, "too_large", f"expected a body of at most {self._settings.max_body} bytes, got {size}"
        )

    async def _linger(self, receive: Receive, exchange: Exchange, headers: Headers) -> None:
        """Read the rest of a refused body, for a while: a client that still sends would miss the answer.

        Nothing of it is kept, so the time alone bounds it.
        """
        if "expect" in headers:  # it waits to be asked for the body
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while exchange.unread:
                    exchange.unread = (await receive()).get("more_body", False)

    def _record(self, scope: Scope, exchange: Exchange) -> None:
        """Count the request, and log it without anything that the client chose."""
        route = _route_of(scope, self._routes)
        seconds = time.perf_counter() - exchange.started
        status = exchange.status or _CLIENT_GONE
        self._metrics.record(scope["method"], route, status, exchange.code, seconds)
        fields: dict[str, Any] = {
            "request_id": exchange.request_id,
            "method": scope["method"] if scope["method"] in ("GET", "POST") else "other",
            "route": route,
            "status": status,
            "code": exchange.code,
            "pairs": exchange.pairs,
            "bytes": exchange.received,
            "milliseconds": round(1e3 * seconds, 1),
        }
        level = logging.ERROR if status == 500 else logging.INFO
        logger.log(level, "request", extra={"fields": fields})


def _route_of(scope: Scope, routes: Sequence[Route | Mount]) -> str:
    """The path of the route that a request is for, if refused before it too; "unmatched" without one."""
    if (found := getattr(scope.get("route"), "path", None)) is not None:
        return str(found)
    scope = {**scope, "root_path": scope[EXCHANGE].root_path}  # a mount changes it
    matching = {route.path: route.matches(scope)[0].value for route in routes}
    best = max(matching, key=matching.__getitem__, default="unmatched")
    return best if matching.get(best) else "unmatched"


def needs_no_token(path: str) -> bool:
    """Whether the path is open to everyone, where a token is set."""
    return _OPEN.fullmatch(path) is not None


def _is_foreign(headers: Headers) -> bool:
    """Whether a page of another site sent the request: by the browser's word, or by the page's origin."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None or origin is None:
        return site == "cross-site"
    return origin.partition("://")[2] != headers.get("host")


def _stamp(message: Message, exchange: Exchange, scope: Scope) -> None:
    """Add what every response carries; a connection whose request is not read to its end is closed."""
    exchange.status = message["status"]
    headers = MutableHeaders(raw=message.setdefault("headers", []))
    headers["X-Request-ID"] = exchange.request_id
    for name, value in _HEADERS.items():
        headers.setdefault(name, value)
    if exchange.unread and scope.get("http_version", "1.1") < "2":
        headers["Connection"] = "close"


def answer(problem: Problem, scope: Scope, error: BaseException | None = None) -> Response:
    """The response for a problem; a fault of the service goes to the log too, without its message."""
    exchange: Exchange = scope[EXCHANGE]
    exchange.code = problem.code
    if problem.status == 500 and error is not None:
        fields = {"request_id": exchange.request_id}
        logger.error("a request failed", exc_info=error, extra={"fields": fields})
    return problem.response(exchange.request_id, scope["path"].startswith("/v2"))
