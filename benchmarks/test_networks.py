"""Latency of one call of each base network; `python -m benchmarks.networks` runs this and tabulates it.

The variants of a case run in turns (published, torch, onnxruntime fp32, int8, and again), so that a drift
of the machine's speed meets all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import dgm4
from benchmarks.published import Published
from engine.backends import usable_cores
from engine.backends.ort import load_session
from export.inference import rewrite
from export.onnx import example_inputs, export_onnx
from export.quantize import quantize_dynamic

VARIANTS = ("published", "torch", "ort-fp32", "ort-int8")
TURNS = {1: 3, 8: 2}  # by batch
CALLS = {1: 5, 8: 1}  # calls a turn, by batch
CASES = [(batch, tokens, turn) for batch in (1, 8) for tokens in (24, 50) for turn in range(TURNS[batch])]

Call = Callable[[dict[str, torch.Tensor]], Any]


def _torch_call(model: torch.nn.Module) -> Call:
    def call(inputs: dict[str, torch.Tensor]) -> Any:
        with torch.inference_mode():
            return model(**inputs)

    return call


def _ort_call(path: Path) -> Call:
    session = load_session(path, usable_cores())
    return lambda inputs: session.run(None, {name: value.numpy() for name, value in inputs.items()})


@pytest.fixture(scope="module", params=dgm4.MODEL_NAMES)
def network(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """The four variants of one network on the same weights, and its config."""
    torch.set_num_threads(usable_cores())
    folder = tmp_path_factory.mktemp(request.param)
    model = dgm4.seeded_model(request.param, "base")
    inference = rewrite(model)
    export_onnx(inference, folder / "model.onnx")
    quantize_dynamic(folder / "model.onnx", folder / "int8.onnx")
    calls = {
        "torch": _torch_call(inference),
        "ort-fp32": _ort_call(folder / "model.onnx"),
        "ort-int8": _ort_call(folder / "int8.onnx"),
        "published": _torch_call(Published(model)),
    }
    yield {"name": request.param, "config": model.config, "calls": calls}


# The innermost parameter varies fastest: the variants alternate within each turn of a case.
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch", "tokens", "turn"), CASES)
def test_latency(
    benchmark: BenchmarkFixture, network: dict[str, Any], batch: int, tokens: int, turn: int, variant: str
) -> None:
    """Time a few calls of one variant, after one that is not counted."""
    inputs = example_inputs(network["config"], batch, tokens)
    inputs["attention_mask"].fill_(1)
    benchmark.group = f"{network['name']} batch {batch} tokens {tokens}"
    case = {"network": network["name"], "batch": batch, "tokens": tokens, "turn": turn, "variant": variant}
    benchmark.extra_info.update(case)
    benchmark.pedantic(network["calls"][variant], args=(inputs,), rounds=CALLS[batch], warmup_rounds=1)
