"""`dgm4 serve` as a process: its log, its token, its end."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest

from engine.serving import create_app
from engine.serving.server import Server, configure
from export.cli.serve import TOKEN

CAPTION, NAME = "Mayor Quimby unveils a monorail", "holiday-snap.jpg"
SECRET = "a-token-of-some-length"
BODY = (
    b'--b\r\nContent-Disposition: form-data; name="image"; filename="%s"\r\n\r\n%s\r\n'
    b'--b\r\nContent-Disposition: form-data; name="caption"\r\n\r\n%s\r\n--b--\r\n'
)


class Process:
    """A `dgm4 serve` on a free port; `lines` is its log so far."""

    def __init__(self, *arguments, **environment):
        command = [sys.executable, "-m", "export.cli", "serve", *map(str, arguments), "--port", "0"]
        self.popen = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment}
        )
        self.lines = []
        self.address = urlsplit(self.await_line("listening")["address"])

    def await_line(self, message):
        """Read the log up to a message."""
        for line in self.popen.stderr:
            self.lines.append(json.loads(line))
            if self.lines[-1].get("message") == message:
                return self.lines[-1]
        raise AssertionError(f"no {message} in {self.lines}")

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(self.address.hostname, self.address.port, timeout=20)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = response.status, response.read()
        connection.close()
        return answer

    def end(self):
        """Wait for the end; the exit code and the whole log."""
        self.lines += map(json.loads, self.popen.stderr)
        return self.popen.wait(20), self.lines


@pytest.fixture
def start():
    """Starts a process that ends with the test."""
    processes = []

    def start(*arguments, **environment):
        processes.append(Process(*arguments, **environment))
        return processes[-1]

    yield start
    for process in processes:
        process.popen.kill()
        process.popen.wait()
        process.popen.stderr.close()
        process.popen.stdout.close()


def test_from_start_to_sigterm(start, photo, encode):
    process = start("demo:asap", "--drain", "0.3", **{TOKEN: SECRET})
    process.await_line("ready")
    body = BODY % (NAME.encode(), encode(photo, "JPEG"), CAPTION.encode())
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert process.request("POST", "/v1/predict", body, **headers)[0] == 401
    headers["Authorization"] = f"Bearer {SECRET}"
    status, answer = process.request("POST", "/v1/predict?card=true", body, **headers)
    assert status == 200
    assert json.loads(answer)["warnings"][0].startswith("demo_weights: ")
    for broken in (b"{" + CAPTION.encode(), b'{"image": "%s"}' % NAME.encode()):
        headers["Content-Type"] = "application/json"
        assert process.request("POST", "/v1/predict", broken, **headers)[0] in (400, 422)
    assert process.request("GET", f"/{NAME}?caption=Quimby", **headers)[0] == 404
    with socket.create_connection((process.address.hostname, process.address.port)) as garbage:
        garbage.sendall(CAPTION.encode() + b"\r\n\r\n")
        garbage.recv(1_000)
    process.popen.send_signal(signal.SIGTERM)
    assert process.request("GET", "/healthz")[0] == 200  # it drains
    code, log = process.end()
    assert code == 143
    text = json.dumps(log)
    assert "Quimby" not in text and "holiday" not in text and SECRET not in text
    assert "127.0.0.1" not in text.replace(process.address.netloc, "")
    requests = [line for line in log if line.get("message") == "request"]
    assert [line["status"] for line in requests][:5] == [401, 200, 400, 422, 404]
    assert requests[1].keys() >= {"time", "level", "request_id", "method", "route", "pairs", "bytes"}
    assert log[-1]["message"].startswith("Finished")


def test_two_signals_and_an_address_that_is_taken(start, bundle_dir, tmp_path):
    token = tmp_path / "token"
    token.write_text(f"{SECRET}\n")
    process = start(bundle_dir, "--token-file", token, "--host", "0.0.0.0", "--drain", "600")
    assert not [line for line in process.lines if line["level"] == "warning"]
    taken = [sys.executable, "-m", "export.cli", "serve", bundle_dir, "--port", str(process.address.port)]
    second = subprocess.run([*taken, "--host", "0.0.0.0"], capture_output=True, text=True, check=False)
    assert second.returncode == 1 and "dgm4: error: " in second.stderr.splitlines()[-1]
    assert any("no token is set" in line for line in second.stderr.splitlines())
    process.await_line("ready")
    process.popen.send_signal(signal.SIGTERM)
    process.await_line("draining")
    process.popen.send_signal(signal.SIGTERM)
    assert process.end()[0] == 143


def test_a_second_signal_does_not_wait_for_what_was_taken(start, bundle_dir):
    process = start(bundle_dir)
    process.await_line("ready")
    with socket.create_connection((process.address.hostname, process.address.port)) as stalled:
        stalled.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        time.sleep(0.3)
        process.popen.send_signal(signal.SIGTERM)
        process.await_line("draining")
        with pytest.raises(subprocess.TimeoutExpired):
            process.popen.wait(1)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(5) == 143


def test_a_second_signal_amid_the_first_is_kept(predictor, monkeypatch):
    """The handler takes no lock and writes no log, where a second signal would find it half done."""
    app = create_app(predictor)
    service = app.state.service
    config = configure(app, connections=8)
    config.load()
    server = Server(config, service, drain_s=600)
    drained = []
    monkeypatch.setattr(
        service, "drain", lambda: (drained.append(1), server.handle_exit(signal.SIGTERM, None))
    )
    server.handle_exit(signal.SIGTERM, None)
    assert not drained and not server.should_exit
    asyncio.run(server.on_tick(0))
    assert drained and server.should_exit


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--token-file", "nowhere"], "--token-file: nowhere: expected a file of text"),
        (["--max-pending", "1"], "--max-pending: expected at least --max-pairs, which is 32, got 1"),
        (
            ["--max-buffered", "1"],
            "--max-buffered: expected at least --max-body, which is 50331648 bytes, got 1048576 bytes",
        ),
        (["--name", "a/b"], "--name: expected letters"),
        (["--port", "70000"], "expected a port from 0 to 65535"),
    ],
)
def test_wrong_arguments(arguments, words, bundle_dir, capsys):
    from export.cli.app import run

    with pytest.raises(SystemExit) as end:
        run(["serve", str(bundle_dir), *arguments])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_short_token_is_refused(bundle_dir, capsys, monkeypatch):
    from export.cli.app import run

    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(SystemExit):
        run(["serve", str(bundle_dir)])
    message = capsys.readouterr().err
    assert "16 or more" in message and "short" not in message
