"""Bundles with engines, pictures, and pairs as a client sends them."""

from __future__ import annotations

import hashlib
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from engine import Bundle
from engine.manifest import manifest_digest


@pytest.fixture
def asap(bundle):
    return Bundle.open(bundle("asap", "fp32").path)


@pytest.fixture(scope="session")
def with_engine(bundle, tmp_path_factory):
    """A copy of a bundle that holds an engine of `library`."""

    def make(library, **own):
        copy = tmp_path_factory.mktemp("with-engine") / f"bundle-{library}"
        shutil.copytree(bundle("asap", "fp32").path, copy)
        (copy / "model.engine").write_bytes(b"engine")
        fields = json.loads((copy / "manifest.json").read_text())
        record = {"file": "model.engine", "library": library, "version": "1", "compute_capabilities": ["9.0"]}
        fields["engines"] = [{**record, "onnx_sha256": "0" * 64, "profiles": [{}], **own}]
        digest = hashlib.sha256(b"engine").hexdigest()
        fields["files"]["model.engine"] = {"sha256": digest, "bytes": 6}
        fields["sha256"] = manifest_digest(fields)
        (copy / "manifest.json").write_text(json.dumps(fields))
        return Bundle.open(copy)

    return make


@pytest.fixture(scope="session")
def jpeg():
    """The bytes of a JPEG of drawn blocks, by seed."""

    def make(seed, size=(160, 120)):
        blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
        return file.getvalue()

    return make


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Show the log of a server beside the failure of a test that it served."""
    report = (yield).get_result()
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and server is not None:
        report.sections.append(("log of the Triton server", server.log[-20_000:]))
