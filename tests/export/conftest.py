"""Tiny networks exported once a session, and their inputs."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def exported(tiny, tmp_path_factory):
    """Export a tiny network by name: .model (inference, torch), .path and .proto of the graph."""

    @functools.cache
    def export(name):
        from export.inference import rewrite
        from export.onnx import export_onnx

        model = rewrite(tiny(name))
        path = tmp_path_factory.mktemp(f"graph-{name}") / "model.onnx"
        return SimpleNamespace(name=name, model=model, path=path, proto=export_onnx(model, path))

    return export


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """Export a tiny bundle by name and precision, without an engine: .path, .manifest and .stages."""

    @functools.cache
    def export(name, precision):
        from export.pipeline import ExportOptions, export_bundle

        out = tmp_path_factory.mktemp("bundles") / f"{name}-{precision}"
        stages = []
        options = ExportOptions(out=out, model=name, size="tiny", precision=precision, engine=False)
        return SimpleNamespace(path=out, manifest=export_bundle(options, stages.append), stages=stages)

    return export


@pytest.fixture(scope="session")
def session_of():
    """Open a graph in ONNX Runtime on the CPU."""

    def load(path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    return load
