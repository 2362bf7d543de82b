"""The application over the network whose outputs can be computed by hand, and servers of it."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import socket
import threading
import time

import onnx
import pytest
from onnx import TensorProto, helper

from engine import Predictor
from engine.registry import NETWORKS

GIVEN = "box_given"
NEEDED = ("fastapi", "httptools", "prometheus_client", "python_multipart", "uvicorn")  # the extra `serve`
if all(map(importlib.util.find_spec, NEEDED)):
    from starlette.testclient import TestClient

    from engine.serving import Settings, create_app, server
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def jpeg(photo, encode):
    """The bytes of a small photograph."""
    return encode(photo, "JPEG")


@pytest.fixture(scope="session")
def judging(tmp_path_factory, network, bundle_dir, manifest_template, write_manifest):
    """The network whose outputs can be computed by hand, with the box that is given as its box."""
    graph = copy.deepcopy(network)
    kept = [node for node in graph.graph.node if "attention_map" not in node.output]
    for node in kept:
        if "box" in node.output:
            node.CopyFrom(helper.make_node("Identity", [GIVEN], ["box"]))
    del graph.graph.node[:], graph.graph.output[-1]
    graph.graph.node.extend(kept)
    graph.graph.input.append(helper.make_tensor_value_info(GIVEN, TensorProto.FLOAT, ["batch", 4]))
    directory, manifest = tmp_path_factory.mktemp("judging"), manifest_template()
    onnx.save(graph, directory / "model.onnx")
    for name in ("tokenizer.json", "README.md"):
        (directory / name).write_bytes((bundle_dir / name).read_bytes())
    config = NETWORKS["pmmd_refine"].sizes["tiny"]
    manifest["model"] = {"name": config.name, "size": config.size, "config": config.to_dict()}
    manifest["inputs"].append({"name": GIVEN, "dtype": "float32", "shape": ["batch", 4]})
    del manifest["outputs"][-1]
    write_manifest(directory, manifest)
    with Predictor(directory, threads=1) as made:
        yield made


def await_ready(service):
    for _ in range(200):
        if service.ready:
            return
        time.sleep(0.02)
    raise AssertionError("the service did not become ready")


@pytest.fixture
def open_client(predictor):
    """Makes a client of an application with these settings that has warmed up."""
    with contextlib.ExitStack() as stack:

        def open_client(**settings):
            app = create_app(predictor, Settings(**settings))
            client = stack.enter_context(TestClient(app, raise_server_exceptions=False))
            await_ready(app.state.service)
            return client

        yield open_client


@pytest.fixture
def client(open_client):
    return open_client()


class Running:
    """A server in a thread: its address, application and connections."""

    def __init__(self, app, connections):
        self.app = app
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.url = "http://{}:{}".format(*self.address)
        config = server.configure(app, connections)
        self.server = server.Server(config, app.state.service, drain_s=0.0)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def __enter__(self):
        self.thread.start()
        await_ready(self.app.state.service)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    @property
    def open(self):
        """How many connections are open."""
        return len(self.server.server_state.connections)

    def connect(self):
        """A socket to the server."""
        return socket.create_connection(self.address, timeout=10)


@pytest.fixture
def run_server(predictor):
    """Makes a server in a thread, with these settings."""
    with contextlib.ExitStack() as stack:

        def run_server(connections=64, asked=predictor, **settings):
            return stack.enter_context(Running(create_app(asked, Settings(**settings)), connections))

        yield run_server
