"""Latency of one call of each base network; `python -m benchmarks.networks` runs this and tabulates it.

The variants of a case run in turns (published, torch, ..., and again), so that a drift of the machine's
speed meets all of them. A variant is made when it is first asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import dgm4
from benchmarks.published import Published
from engine.backends import usable_cores
from engine.backends.ort import load_session
from engine.network.model import InferenceModel
from export.graph.rewrite import rewrite
from export.graph.trace import example_inputs, export_onnx, flatten
from export.quantization.calibrate import calibrate
from export.quantization.dynamic_int8 import quantize_dynamic
from export.quantization.qdq import int8_layers, to_int8

# int8 is dynamic, qdq calibrated; plain is ONNX Runtime with the options that it has by itself.
VARIANTS = (
    "published",
    "torch",
    "compile",
    "plain-fp32",
    "ort-fp32",
    "openvino-fp32",
    "ort-int8",
    "ort-qdq",
    "openvino-qdq",
)
TURNS = {1: 3, 8: 2}  # by batch
CALLS = {1: 5, 8: 1}  # calls a turn, by batch
SHAPES = ((1, 24), (1, 50), (8, 50))
CASES = [(batch, tokens, turn) for batch, tokens in SHAPES for turn in range(TURNS[batch])]

Call = Callable[[dict[str, torch.Tensor]], Any]


class Variants:
    """The variants of one network, all on the same drawn weights; files lie in `folder`."""

    def __init__(self, name: str, folder: Path, size: str = "base"):
        self.model = dgm4.seeded_model(name, size)
        self.inference = rewrite(self.model)
        self.folder = folder

    @functools.cache  # noqa: B019 (lives as long as the module's fixture)
    def call(self, variant: str) -> Call:
        """Make the variant: a function of the inputs of one batch."""
        if variant == "published":
            return _torch_call(Published(self.model))
        if variant in ("torch", "compile"):
            return _torch_call(torch.compile(self.inference) if variant == "compile" else self.inference)
        library, precision = variant.split("-")
        graph = self.graph(precision)
        if library != "openvino":
            plain = partial(onnxruntime.InferenceSession, providers=["CPUExecutionProvider"])
            session = plain(graph) if library == "plain" else load_session(graph, usable_cores())
            return lambda inputs: session.run(None, _arrays(inputs))
        from engine.backends import openvino  # where it is not installed, its variants fail alone

        flatten(graph, flat := graph.with_name(f"flat.{graph.name}"))
        request = openvino.load_model(flat, usable_cores()).create_infer_request()
        return lambda inputs: request.infer(_arrays(inputs), share_inputs=True)

    @functools.cache  # noqa: B019
    def graph(self, precision: str) -> Path:
        """Write the graph in fp32, int8 (dynamic) or qdq (calibrated)."""
        path = self.folder / f"{precision}.onnx"
        if precision == "fp32":
            export_onnx(self.inference, path)
        elif precision == "int8":
            quantize_dynamic(self.graph("fp32"), path)
        else:
            export_onnx(self._calibrated(), path)
        return path

    def _calibrated(self) -> InferenceModel:
        """The network in static int8; drawn pairs do: a product takes as long at one scale as at another."""
        model = rewrite(self.model)
        batches = [example_inputs(model.config, 8, 50, seed) for seed in range(2)]
        return to_int8(model, calibrate(model, int8_layers(model), batches, torch.int8))


def _torch_call(model: Callable[..., Any]) -> Call:
    def call(inputs: dict[str, torch.Tensor]) -> Any:
        with torch.inference_mode():
            return model(**inputs)

    return call


def _arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in inputs.items()}


@pytest.fixture(scope="module", params=dgm4.MODEL_NAMES)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Variants]:
    """One network at a time; its size is what `python -m benchmarks.networks` was given."""
    torch.set_num_threads(usable_cores())
    torch.compiler.reset()
    size = request.config.getoption("network_size", "base")
    yield Variants(request.param, tmp_path_factory.mktemp(request.param), size)
    Variants.call.cache_clear()
    Variants.graph.cache_clear()


# The innermost parameter varies fastest: the variants alternate within each turn of a case.
@pytest.mark.timeout(900)  # a base network's export or compilation takes minutes
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch", "tokens", "turn"), CASES)
def test_latency(
    benchmark: BenchmarkFixture, network: Variants, batch: int, tokens: int, turn: int, variant: str
) -> None:
    """Time a few calls of one variant, after one that is not counted."""
    name, config = network.model.config.name, network.model.config
    inputs = example_inputs(config, batch, tokens)
    inputs["attention_mask"].fill_(1)
    benchmark.group = f"{name} batch {batch} tokens {tokens}"
    case = {"network": name, "batch": batch, "tokens": tokens, "turn": turn, "variant": variant}
    benchmark.extra_info.update(case)
    benchmark.pedantic(network.call(variant), args=(inputs,), rounds=CALLS[batch], warmup_rounds=1)
