"""Tiny networks exported once a session, and their inputs."""

from __future__ import annotations

import functools
import shutil
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def exported(tiny, bundle, tmp_path_factory):
    """A tiny float32 graph by name: .model (in torch), .path of a copy to write beside, and .proto."""

    @functools.cache
    def export(name):
        import onnx

        from export.inference import rewrite
        from export.onnx import data_of

        path = tmp_path_factory.mktemp(f"graph-{name}") / "model.onnx"
        written = bundle(name, "fp32").path / path.name
        for source, copy in ((written, path), (data_of(written), data_of(path))):
            shutil.copyfile(source, copy)
        proto = onnx.load_model(path, load_external_data=False)
        return SimpleNamespace(name=name, model=rewrite(tiny(name)), path=path, proto=proto)

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
