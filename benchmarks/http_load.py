"""A lean HTTP client for benchmarks: one thread, prebuilt requests, one pair at a time a connection."""

from __future__ import annotations

import random
import select
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_BOUNDARY = b"dgm4-boundary"
_PART = b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n"


def form_request(path: str, image: bytes, caption: str, headers: str = "") -> bytes:
    """The bytes of a POST of one pair as a form."""
    parts = (b'name="image"; filename="a.jpg"', image), (b'name="caption"', caption.encode())
    body = b"".join(_PART % (_BOUNDARY, head, data) for head, data in parts) + b"--%s--\r\n" % _BOUNDARY
    lines = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}"
    return lines.encode() + b"Content-Type: multipart/form-data; boundary=%s\r\n\r\n" % _BOUNDARY + body


@dataclass
class Outcome:
    """What became of the requests: seconds of each answer, counts of statuses, and what was lost.

    lost: requests without any answer. cut: connections that this client cut on purpose, halfway.
    client_s: seconds of CPU that the client itself took; wall_s: seconds from first to last.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    lost: int = 0
    cut: int = 0
    client_s: float = 0.0
    wall_s: float = 0.0

    @property
    def rate(self) -> float:
        """Answers with 200 a second."""
        return self.statuses.get(200, 0) / self.wall_s


class _Connection:
    """A connection that is kept, and its request's state."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self.socket = self._connect()
        self.started = 0.0
        self.received = b""

    def _connect(self) -> socket.socket:
        made = socket.create_connection(self._address, timeout=60)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def send(self, request: bytes, started: float) -> None:
        """Send a request, which counts from `started` on; over a new connection where this one was closed."""
        self.started, self.received = started, b""
        if self._closed():
            self.renew()
        self.socket.sendall(request)

    def _closed(self) -> bool:
        """Whether the server closed it while nothing was asked: it can be read, and ends."""
        return bool(select.select([self.socket], [], [], 0)[0])

    def read(self) -> int | None:
        """Read what there is; the status once the response is whole, 0 where the connection ended."""
        part = self.socket.recv(1 << 20)
        if not part:
            return 0
        self.received += part
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return None
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        return int(head[9:12]) if len(body) >= length else None

    def cut(self, request: bytes) -> None:
        """Send half a request, close, and connect anew."""
        self.socket.sendall(request[: len(request) // 2])
        self.renew()

    def renew(self) -> None:
        """Close and connect anew."""
        self.socket.close()
        self.socket = self._connect()


def run(
    address: tuple[str, int],
    requests: Sequence[bytes],
    due: Iterator[float],
    connections: int,
    cut_every: int = 0,
    tick: Callable[[int], Any] = lambda sent: None,
) -> Outcome:
    """Send requests in turn when they are `due`, seconds from the start, over so many connections.

    A request whose time comes while no connection is free waits, and its seconds count from its time. Of
    every `cut_every` requests one more is sent by half and cut. `tick` is called after each answer.
    """
    outcome, selector = Outcome(), selectors.DefaultSelector()
    free = [_Connection(address) for _ in range(connections)]
    busy: dict[int, _Connection] = {}
    start, cpu = time.perf_counter(), time.process_time()
    coming, sent = next(due, None), 0
    while coming is not None or busy:
        now = time.perf_counter() - start
        while coming is not None and coming <= now and free:
            connection = free.pop()
            if cut_every and sent % cut_every == cut_every - 1:
                connection.cut(requests[sent % len(requests)])
                outcome.cut += 1
            connection.send(requests[sent % len(requests)], start + max(coming, 0))
            busy[connection.socket.fileno()] = connection
            selector.register(connection.socket, selectors.EVENT_READ)
            sent += 1
            coming = next(due, None)
        wait = max(coming - now, 0) if coming is not None and free else 1.0
        for key, _ in selector.select(wait):
            connection = busy[key.fd]
            status = connection.read()
            if status is None:
                continue
            selector.unregister(connection.socket)
            del busy[key.fd]
            _count(outcome, status, time.perf_counter() - connection.started)
            if status == 0:
                connection.renew()
            free.append(connection)
            tick(len(outcome.seconds))
    outcome.wall_s, outcome.client_s = time.perf_counter() - start, time.process_time() - cpu
    for connection in free:
        connection.socket.close()
    return outcome


def _count(outcome: Outcome, status: int, seconds: float) -> None:
    outcome.seconds.append(seconds)
    if status == 0:
        outcome.lost += 1
    else:
        outcome.statuses[status] = outcome.statuses.get(status, 0) + 1


def at_once(count: int) -> Iterator[float]:
    """Requests that are all due at the start: as many at a time as there are connections."""
    return iter([0.0] * count)


def poisson(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Times of independent clients: `rate` a second in the mean, for so many seconds."""
    draws, now = random.Random(seed), 0.0
    while (now := now + draws.expovariate(rate)) < seconds:
        yield now
