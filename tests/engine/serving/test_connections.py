"""Clients that are slow, gone, or too many, against a server on a socket."""

from __future__ import annotations

import gc
import http.client
import json
import threading
import time
from pathlib import Path

import pytest

from engine.serving import server

BODY = b'{"caption": "Obama speaks"}'
HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def whole(body=BODY, more=b""):
    return HEAD + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


def receive(connection):
    """Everything until the server closes the connection; a reset closes it too."""
    parts = []
    try:
        while part := connection.recv(65_536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def eventually(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def impatient(monkeypatch):
    """Short times for slow clients."""
    for name in ("_HEAD_S", "_WRITE_S"):
        monkeypatch.setattr(server, name, 0.3)


def test_slow_headers_end_the_connection(run_server, impatient):
    running = run_server()
    started = time.monotonic()
    for sent in (b"", b"POST /v1", HEAD):
        with running.connect() as connection:
            connection.sendall(sent)
            assert receive(connection) == b""
    with running.connect() as connection:  # on a connection that was used before
        connection.sendall(whole())
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /hea")
        assert receive(connection) == b""
    assert time.monotonic() - started < 10
    eventually(lambda: running.open == 0)


def test_a_byte_now_and_then_gives_no_more_time(run_server, impatient):
    running = run_server()
    with running.connect() as connection:
        end = time.monotonic() + 10
        with pytest.raises(OSError):
            for byte in HEAD * 50:
                assert time.monotonic() < end
                connection.sendall(bytes([byte]))
                time.sleep(0.05)


def test_endless_headers_are_refused(run_server):
    running = run_server()
    with running.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        try:
            for i in range(20_000):
                connection.sendall(b"X-%d: %s\r\n" % (i, b"a" * 100))
        except OSError:
            pass
        assert b" 200 " not in receive(connection)
    eventually(lambda: running.open == 0)


@pytest.mark.parametrize("size", [60_000, 66_000, 100_000, 300_000, 1_000_000])
def test_a_body_in_one_piece_is_no_header(run_server, size):
    running = run_server()
    body = json.dumps({"caption": "a " * (size // 2)}).encode()
    with running.connect() as connection:
        for more in (b"", b"Connection: close\r\n"):  # a second request on the connection too
            connection.sendall(whole(body, more))
        assert receive(connection).count(b"HTTP/1.1 200 ") == 2


def test_a_slow_body_is_refused(run_server):
    running = run_server(read_timeout_s=0.3)
    with running.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 9000\r\n\r\n" + b"{")
        answer = receive(connection)
    assert b" 408 " in answer and b'"request_timeout"' in answer and b"connection: close" in answer.lower()


def test_a_client_that_still_sends_gets_its_refusal(run_server):
    """A body that is too large is read on for a while: else the connection is reset under the answer."""
    running = run_server(max_body=2**20, max_buffered=2**20)
    connection = http.client.HTTPConnection(*running.address, timeout=10)
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/predict", iter([b"x" * 65_536] * 200), kind, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413 and json.loads(response.read())["code"] == "too_large"
    connection.close()


def test_a_client_that_does_not_read_is_cut_off(run_server, impatient, monkeypatch):
    running = run_server()
    monkeypatch.setattr(running.app.state.service.metrics, "text", lambda: b"x" * 30_000_000)
    with running.connect() as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(lambda: running.open == 1)
        eventually(lambda: running.open == 0)


def test_connections_are_limited(run_server):
    running = run_server(connections=4)
    idle = [running.connect() for _ in range(8)]
    eventually(lambda: running.open == 8)
    idle[0].sendall(whole())
    assert b" 503 " in idle[0].recv(65_536)
    for connection in idle:
        connection.close()
    eventually(lambda: running.open == 0)
    with running.connect() as connection:
        connection.sendall(whole(more=b"Connection: close\r\n"))
        assert b" 200 " in receive(connection)


def gate_the_network(predictor, monkeypatch):
    """The predictor's network waits for the event that this returns."""
    opened, submit = threading.Event(), predictor._runner.submit

    def waits(items):
        opened.wait(20)
        return submit(items)

    monkeypatch.setattr(predictor._runner, "submit", waits)
    return opened


def test_a_client_that_goes_away_leaves_nothing_behind(run_server, predictor, monkeypatch):
    running = run_server(max_batch=1)
    service = running.app.state.service
    with running.connect() as connection:  # which starts the threads of the Batcher
        connection.sendall(whole())
        assert connection.recv(65_536)
    opened = gate_the_network(predictor, monkeypatch)
    gone = [running.connect() for _ in range(12)]
    for connection in gone:
        connection.sendall(whole())
    halfway = [running.connect() for _ in range(6)]
    for connection in halfway:
        connection.sendall(HEAD + b"Content-Length: 900000\r\n\r\n" + b"{" * 1_000)
    eventually(lambda: service._batcher.statistics().pending == 12 and running.open == 18)
    files, threads = open_files(), threading.active_count()
    for connection in gone + halfway:
        connection.close()
    eventually(lambda: running.open == 0)
    eventually(lambda: service._batcher.statistics().pending <= 2)  # those that the network has already
    opened.set()
    eventually(lambda: service._batcher.statistics().pending == 0)
    gc.collect()
    assert open_files() <= files - 36  # both ends of 18 connections
    assert threading.active_count() <= threads
    metrics = service.metrics.text().decode()
    assert "dgm4_buffered_bytes 0.0" in metrics
    assert 'dgm4_errors_total{code="client_gone"} 18.0' in metrics


def test_a_full_queue_is_told(run_server, predictor, monkeypatch):
    running = run_server(max_pending=4, max_pairs=4, max_batch=1, timeout_s=20.0)
    opened = gate_the_network(predictor, monkeypatch)
    waiting = [running.connect() for _ in range(4)]
    for connection in waiting:
        connection.sendall(whole(more=b"Connection: close\r\n"))
    eventually(lambda: running.app.state.service._batcher.statistics().pending == 4)
    with running.connect() as connection:
        connection.sendall(whole(more=b"Connection: close\r\n"))
        answer = receive(connection)
    assert b" 503 " in answer and b'"overloaded"' in answer and b"retry-after: 1" in answer.lower()
    opened.set()
    for connection in waiting:
        assert b" 200 " in receive(connection)
        connection.close()


def test_a_late_answer_is_a_504(run_server, predictor, monkeypatch):
    running = run_server(timeout_s=0.3)
    opened = gate_the_network(predictor, monkeypatch)
    with running.connect() as connection:
        connection.sendall(whole(more=b"Connection: close\r\n"))
        answer = receive(connection)
    opened.set()
    assert b" 504 " in answer and b'"deadline_exceeded"' in answer
    eventually(lambda: running.app.state.service._batcher.statistics().pending == 0)


def test_a_stop_finishes_what_was_taken(run_server, predictor, monkeypatch):
    running = run_server()
    opened = gate_the_network(predictor, monkeypatch)
    with running.connect() as connection:
        connection.sendall(whole())
        eventually(lambda: running.app.state.service._batcher.statistics().pending == 1)
        running.server.handle_exit(15, None)
        eventually(lambda: not running.app.state.service.ready)
        opened.set()
        assert b" 200 " in receive(connection)
    running.thread.join(10)
    assert not running.thread.is_alive()
    running.server._captured_signals.clear()


def test_answers_are_equal_under_load(run_server, predictor, jpeg):
    """Threads of clients; a short form of benchmarks/serving.py."""
    running = run_server()
    captions = [f"Obama speaks {i}" for i in range(8)]
    expected = {caption: predictor.predict(None, caption).to_dict(heatmap=False) for caption in captions}
    failures = []

    def ask(number):
        connection = http.client.HTTPConnection(*running.address, timeout=20)
        for i in range(25):
            caption = captions[(number + i) % len(captions)]
            body = json.dumps({"caption": caption}).encode()
            connection.request("POST", "/v1/predict", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = json.loads(response.read())
            if response.status != 200 or data["words"] != expected[caption]["words"]:
                failures.append((response.status, data))
        connection.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    text = running.app.state.service.metrics.text().decode()
    assert 'dgm4_requests_total{method="POST",route="/v1/predict",status="200"} 200.0' in text
