"""On a Ray cluster of two workers: scoring while workers and drivers are killed, and the service.

One file, so that one cluster is started: that costs more than all that is done with it.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from engine import Prediction, Predictor

psutil = pytest.importorskip("psutil")
ray = pytest.importorskip("ray")

ROOT = Path(__file__).resolve().parents[3]
COPIES, SIZE = 24, 10


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two cores on this machine."""
    # Ray's sockets lie in the folder, and their paths may have 107 characters.
    with (
        tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        settings = {
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            # By default workers step back behind all else, and end when others fill the machine's memory.
            "RAY_worker_niceness": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_raylet_start_wait_time_s": "120",
        }
        for name, value in settings.items():
            patch.setenv(name, value)
        context = ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=folder,
        )
        yield context.address_info["gcs_address"]
        ray.shutdown()


def workers():
    """The processes of the cluster that score."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ShardActor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_for(what, process):
    """Wait until `what()` holds, while the driver runs."""
    while not (found := what()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return found


def test_kills(long_list, tmp_path, cluster):
    """A worker, the driver, a worker again: files are whole, and in the end each pair has one answer."""
    text, out = long_list.path.read_text(), tmp_path / "out"
    pairs = COPIES * len(text.splitlines())
    long_list.path.write_text(text * COPIES)

    def count():
        return len(list(out.glob("pairs-*")))

    command = [sys.executable, "-m", "export.cli", "score", str(long_list.bundle), str(long_list.path)]
    command += ["--out", str(out), "--shard", str(SIZE), "--batch", "4", "-q", "--ray", cluster]

    def start():
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    driver = start()
    wait_for(count, driver)
    first = wait_for(workers, driver)[0]
    first.kill()
    before = count()
    wait_for(lambda: count() > before + 4, driver)
    driver.kill()
    driver.communicate()
    assert driver.returncode == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("pairs-*")}
    assert 5 < len(kept) < pairs // SIZE, "was not in the middle"
    driver = start()
    wait_for(lambda: count() > len(kept) + 4, driver)
    wait_for(workers, driver)[0].kill()
    said, told = driver.communicate(timeout=200)
    assert driver.returncode == 0, told
    assert f"{pairs} pairs, {2 * COPIES} failed" in said

    files = sorted(out.glob("pairs-*"))
    again = [path for path in files if kept.get(path.name) not in (None, path.stat().st_mtime_ns)]
    assert len(again) <= 2, "was answered twice"  # by a worker that outlived its driver
    lines = [json.loads(line)["line"] for path in files for line in path.read_text().splitlines()]
    assert lines == list(range(1, pairs + 1))
    assert json.loads((out / "_SUCCESS").read_text())["pairs"] == pairs
    assert not list(out.glob(".pairs*"))


def test_serve(cluster, long_list):
    """A replica answers over HTTP as `dgm4 serve` does."""
    httpx, serve = pytest.importorskip("httpx"), pytest.importorskip("ray.serve")
    pytest.importorskip("prometheus_client")
    from engine.serving.ray import Deployment, build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"port": port})
    serve.run(build(Deployment(bundle=str(long_list.bundle))))
    picture = (long_list.path.parent / "0.png").read_bytes()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        answers = [
            client.post("/v1/predict", files={"image": image}, data={"caption": "The man"})
            for image in (picture, b"none")
        ]
        assert client.get("/readyz").status_code == 200
    serve.shutdown()
    assert [answer.status_code for answer in answers] == [200, 422]
    with Predictor(long_list.bundle, thumbnail=0, threads=1) as predictor:
        wanted = predictor.predict(picture, "The man")
    assert Prediction.from_dict(answers[0].json()).score == pytest.approx(wanted.score, abs=2e-6)
