"""The buckets of the clients."""

from __future__ import annotations

import pytest

from engine.serving.rate import RateLimiter, client_of


def test_a_bucket_fills_and_empties():
    now = [100.0]
    limiter = RateLimiter(2.0, 4, lambda: now[0])
    for _ in range(4):
        assert limiter.wait("a") == 0
        limiter.take("a", 1)
    assert limiter.wait("a") == 1 and limiter.wait("b") == 0
    now[0] += 0.5
    assert limiter.wait("a") == 0
    limiter.take("a", 32)  # a debt
    assert limiter.wait("a") == 16
    now[0] += 1e6
    for _ in range(4):
        assert limiter.wait("a") == 0
        limiter.take("a", 1)
    assert limiter.wait("a") == 1


def test_it_remembers_so_many_clients():
    limiter = RateLimiter(1e-3, 1, lambda: 0.0)
    for i in range(10_001):
        limiter.take(str(i), 1)
    assert len(limiter._buckets) == 10_000
    assert limiter.wait("0") == 0 and limiter.wait("10000") > 0


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("testclient", "testclient"),
        (None, ""),
    ],
)
def test_clients(host, client):
    assert client_of(host) == client
