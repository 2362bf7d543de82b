"""The rewritten and the exported base networks against the published numbers."""

from __future__ import annotations

import gc

import pytest
import torch

from export.graph.rewrite import rewrite
from export.graph.trace import export_onnx, outputs_of

OUTPUTS = 2e-5

pytestmark = pytest.mark.base


def test_rewritten_outputs_are_the_published_ones(base, outputs_apart):
    inputs = {k: torch.from_numpy(v) for k, v in base.golden.inputs.items()}
    with torch.inference_mode():
        answers = rewrite(base.model)(**inputs)
    worst = outputs_apart(answers._asdict(), base.golden)
    assert max(worst.values()) <= OUTPUTS, worst


def test_exported_outputs_are_the_published_ones(base, outputs_apart, session_of, tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(rewrite(base.model), path)
    gc.collect()
    session = session_of(path)
    names = outputs_of(base.model.config)
    answers = dict(zip(names, session.run(list(names), base.golden.inputs), strict=True))
    worst = outputs_apart(answers, base.golden)
    for file in tmp_path.iterdir():
        file.unlink()  # a gigabyte
    assert max(worst.values()) <= OUTPUTS, worst
