"""A genuine Triton Inference Server on this machine, for tests and measurements.

It comes out of the wheel `nvidia-pytriton`, which has the server and its Python backend, but no other. The
server's backend is of a time before NumPy 2, so it has a NumPy of its own:

    pip install --no-deps --target FOLDER nvidia-pytriton==0.7.0 numpy==1.26.4
    export DGM4_TRITON_SERVER=FOLDER
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType

from engine.errors import BackendError

VARIABLE = "DGM4_TRITON_SERVER"
INSTALL = "pip install --no-deps --target FOLDER nvidia-pytriton==0.7.0 numpy==1.26.4"
_START_S, _EXIT_S, _TRIES = 60, 10, 5
_STUB = "triton_python_backend_stub"


def server_folder() -> Path | None:
    """The folder that `VARIABLE` names, None where it is not set; raises BackendError unless it has a server.

    The server's backend must have been built for this version of Python.
    """
    if not (value := os.environ.get(VARIABLE)):
        return None
    stub = Path(value, "pytriton", "tritonserver", "python_backend_stubs", _python(), _STUB)
    if not stub.is_file():
        raise BackendError(f"{VARIABLE}={value}: expected the folder of {INSTALL}, whose {stub} is not there")
    return Path(value).absolute()


class TritonServer:
    """A context manager that runs a server over model repositories, on free ports of the loopback.

    Attributes:
        http, grpc, metrics: addresses as "127.0.0.1:8000".
        process: the running server.
        log: what it has written.
    """

    def __init__(self, folder: Path, work: Path, *arguments: str) -> None:
        """`folder` is that of `server_folder`; `work` an empty folder for the log and the backends."""
        self._folder, self._work, self._arguments = folder, work, arguments
        self._log = work / "server.log"

    @property
    def log(self) -> str:
        """What the server has written so far."""
        return self._log.read_text(errors="replace")

    def __enter__(self) -> TritonServer:
        self._copy_backends()
        for _ in range(_TRIES):
            self._start()
            if self._is_live():
                return self
            if "already in use" not in self.log:  # another process took the port in between
                break
        self.stop()
        raise BackendError(f"the server did not start:\n{self.log[-4000:]}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """Ask the server to end, as a container's host does, and wait; return its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(_EXIT_S + 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def scrape(self) -> dict[str, float]:
        """The server's metrics: each line's name with its labels, and its value."""
        text = self._get(self.metrics, "/metrics")[1]
        lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def _copy_backends(self) -> None:
        """The Python backend with the process that this version of Python needs, as pytriton makes it."""
        source = self._folder / "pytriton" / "tritonserver"
        self._backends = self._work / "backends"
        shutil.copytree(source / "backends", self._backends)
        shutil.copy2(source / "python_backend_stubs" / _python() / _STUB, self._backends / "python")

    def _start(self) -> None:
        ports = free_ports(3)
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{port}" for port in ports)
        command = [str(self._folder / "pytriton" / "tritonserver" / "bin" / "tritonserver")]
        command += [f"--backend-directory={self._backends}", f"--exit-timeout-secs={_EXIT_S}"]
        command.append("--allow-gpu-metrics=false")
        for protocol, port in zip(("http", "grpc", "metrics"), ports, strict=True):
            command += [f"--{protocol}-address=127.0.0.1", f"--{protocol}-port={port}"]
        # Servers of one machine share /dev/shm.
        command.append(f"--backend-config=python,shm-region-prefix-name=dgm4-{os.getpid()}-{ports[0]}-")
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join([str(self._folder / "nvidia_pytriton.libs"), _library()]),
            # What this process imports, but with the server's own NumPy.
            "PYTHONPATH": os.pathsep.join([str(self._folder), *(path for path in sys.path if path)]),
            "ORT_DISABLE_TELEMETRY": "1",
        }
        with self._log.open("wb") as log:
            command += self._arguments
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def _is_live(self) -> bool:
        end = time.monotonic() + _START_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self._get(self.http, "/v2/health/ready")[0] == 200:
                    return True
            except OSError:
                pass
            time.sleep(0.05)
        return False

    @staticmethod
    def _get(address: str, path: str) -> tuple[int, str]:
        with closing(http.client.HTTPConnection(address, timeout=10)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _library() -> str:
    return str(sysconfig.get_config_var("LIBDIR"))
