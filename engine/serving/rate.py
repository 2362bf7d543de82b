"""How many pairs each client may send: a bucket of tokens for each."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable

_MOST_CLIENTS = 10_000


class RateLimiter:
    """Gives each client `burst` pairs at once and `rate` a second in the long run.

    A client may go into debt by one request, and then waits until it is paid. Of more than 10,000 clients
    those that were silent longest are forgotten, which gives them a full bucket again. Source: the token
    bucket of RFC 2697. Not for several threads.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> int:
        """Seconds until the client may send again, 0 for now."""
        tokens = self._tokens(client)
        return 0 if tokens >= 1 else math.ceil((1 - tokens) / self._rate)

    def take(self, client: str, pairs: int) -> None:
        """Charge the client for pairs."""
        self._buckets[client] = self._tokens(client) - pairs, self._clock()
        self._buckets.move_to_end(client)
        if len(self._buckets) > _MOST_CLIENTS:
            self._buckets.popitem(last=False)

    def _tokens(self, client: str) -> float:
        tokens, then = self._buckets.get(client, (self._burst, self._clock()))
        return min(self._burst, tokens + (self._clock() - then) * self._rate)


def client_of(host: str | None) -> str:
    """What counts as one client: an IPv4 address, or the 64 bits of an IPv6 network."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return host or ""
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))
