"""Requests that schemathesis makes of the service's own OpenAPI document, to a server that runs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

CONFIG = """
[parameters]
name = "asap"
[checks.positive_data_acceptance]
# The schema allows an image that is none, and a pair of nothing: refused with 422, as documented.
expected-statuses = ["2xx", "401", "422"]
[warnings]
enabled = false
"""
TOKEN = "a-token-of-some-length"


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="needs the extra `test`")
def test_every_answer_is_as_documented(run_server, tmp_path):
    running = run_server(name="asap", token=TOKEN)
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", str(config), "run"]
    options = ["--max-examples", "8", "--phases", "coverage,fuzzing", "--seed", "1", "--no-shrink"]
    options += ["--generation-database", "none"]
    options += ["--header", f"Authorization: Bearer {TOKEN}"]
    command += [f"{running.url}/openapi.json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]
    assert "10 passed" in done.stdout
