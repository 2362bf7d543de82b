"""Whether an engine of TensorRT-RTX runs on this GPU, whatever its documentation says of the GPU's kind.

`Predictor` refuses an engine for other compute capabilities before it reads it; here it is tried.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine import Bundle
from engine.backends import create
from engine.backends.cuda import open_gpu
from engine.backends.tensorrt import TensorRtBackend
from engine.errors import Dgm4Error
from export.options import ExportOptions
from export.pipeline import export_bundle

LIBRARY = "tensorrt_rtx"

Row = dict[str, Any]


def check() -> Iterator[Row]:
    """A row: whether a tiny network's engine ran, its distance from ONNX Runtime, or the library's words."""
    if importlib.util.find_spec(LIBRARY) is None:
        yield {"missing": f"{LIBRARY} is not installed"}
        return
    gpu = open_gpu(0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        options = ExportOptions(out=out, model="asap", size="tiny", precision="fp16")
        export_bundle(options, lambda stage: None)
        bundle = Bundle.open(out)
        engines = [entry for entry in bundle.manifest.engines if entry.library == LIBRARY]
        if not engines:
            yield {"missing": f"no engine: {LIBRARY} is not what builds here"}
            return
        facts = {"capability": gpu.capability, "engine": engines[0].file, "version": engines[0].version}
        backend = TensorRtBackend(bundle, engines[0], gpu)
        try:
            yield {**facts, "ran": True, "errors": _errors(bundle, backend)}
        except Dgm4Error as error:
            yield {**facts, "ran": False, "why": str(error)}
        finally:
            backend.close()


def _errors(bundle: Bundle, backend: TensorRtBackend) -> dict[str, float]:
    """Largest distance of each output from that of the same graph in ONNX Runtime on the CPU."""
    batch, tokens = 2, 9
    random = np.random.default_rng(0)
    side = bundle.manifest.preprocess.image_size
    feeds: dict[str, np.ndarray] = {
        "image": random.standard_normal((batch, 3, side, side), dtype=np.float32),
        "input_ids": random.integers(0, bundle.manifest.model.config.vocabulary, (batch, tokens)),
        "attention_mask": np.ones((batch, tokens), np.int64),
    }
    other = create("ort", bundle, "cpu", None)
    try:
        expected = other.run(feeds)
    finally:
        other.close()
    outputs = backend.run(feeds)
    return {name: float(np.abs(outputs[name] - expected[name]).max()) for name in expected}
