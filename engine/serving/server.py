"""Runs the application with uvicorn: bounded connections, a clean stop, a log in JSON."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.errors import InputError
from engine.serving.service import Service

logger = logging.getLogger(__name__)

_HEAD_S = 10.0  # that a request's line and headers may take
_HEAD_BYTES = 64 * 2**10
_WRITE_S = 30.0  # that a client may take to read what was sent
_KEEP_ALIVE_S = 75  # longer than proxies keep an idle connection: the one that reuses it closes it first
_SPARE_S = 5.0  # for an answer after its deadline
_TICK_S = 0.1  # uvicorn's own


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with limits for a client that sends its headers or reads its answer slowly.

    uvicorn bounds only the time between two requests.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head, self._head_bytes = True, 0
        self._messages = 0  # that ended
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(_HEAD_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._in_head and self._head_timer is None:
            self._head_timer = self.loop.call_later(_HEAD_S, self.transport.abort)
        in_head, messages = self._in_head, self._messages
        super().data_received(data)
        # What ended a message in the same piece, a body perhaps, is none of the next one's headers.
        if in_head and self._in_head and messages == self._messages and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES:
                self.send_400_response("Request headers are too long.")

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """See httptools."""
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0
        self._messages += 1

    def pause_writing(self) -> None:
        """See asyncio."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(_WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio."""
        self._stop_write_timer()
        super().resume_writing()

    def on_response_complete(self) -> None:
        """See uvicorn; what is still unsent then must go within the time of a write."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size() and self._write_timer is None:
            self._write_timer = self.loop.call_later(_WRITE_S, self._abort_unsent)

    def _abort_unsent(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class Server(uvicorn.Server):
    """A server that on a signal is first not ready and then stops; it stops too if it cannot warm up."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self._service, self._drain_s = service, drain_s
        self._stop_at = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Each signal goes a step further: not ready for `drain_s`; answer what was taken; stop at once.

        A signal strikes between any two instructions of the loop, with whatever lock is held there, and the
        next strikes in here. So this only notes it; `on_tick` logs it and sets the metrics.
        """
        if self.should_exit:
            self.force_exit = True
            self._captured_signals.append(sig)
        elif self._stop_at == math.inf and self._drain_s:
            self._stop_at = time.monotonic() + self._drain_s
            self._captured_signals.append(sig)
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn, which calls it every 0.1 s."""
        if time.monotonic() >= self._stop_at or self._service.failure is not None:
            self.should_exit = True
        if self.should_exit or self._stop_at < math.inf:
            self._service.drain()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn; a further signal cuts the connections that it waits for."""
        cutting = asyncio.create_task(self._cut_when_forced())
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()

    async def _cut_when_forced(self) -> None:
        while not self.force_exit:
            await asyncio.sleep(_TICK_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def configure(app: FastAPI, connections: int, proxies: str | None = None) -> uvicorn.Config:
    """uvicorn's settings for the application; see `serve`."""
    service: Service = app.state.service
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=proxies is not None,
        forwarded_allow_ips=proxies,
        limit_concurrency=connections,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(service.settings.timeout_s + _SPARE_S),
    )


def serve(
    app: FastAPI,
    host: str,
    port: int,
    *,
    connections: int,
    drain_s: float = 0.0,
    proxies: str | None = None,
    announce: Callable[[str], object] = lambda address: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was taken, and let the signal act as it did before.

    `announce` is called with the address once it is bound. `proxies` are the addresses, with commas between
    them, whose X-Forwarded-For names the client. Raises InputError for an address that cannot be bound, and
    the error of a warm-up that failed.
    """
    service: Service = app.state.service
    config = configure(app, connections, proxies)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=config.backlog)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (while")[0]
        raise InputError(
            f"{host} port {port}: cannot be listened on: {reason}; choose another port, 0 for a free one"
        ) from error
    with listener:
        bound = listener.getsockname()
        shown = f"[{bound[0]}]" if family == socket.AF_INET6 else bound[0]
        announce(f"http://{shown}:{bound[1]}")
        Server(config, service, drain_s).run(sockets=[listener])
    if service.failure is not None:
        raise service.failure


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
